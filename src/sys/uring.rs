//! io_uring_setup(2) and io_uring_enter(2), and where a ring's parts are.

use super::fd::owned;
use super::mapped::MappedFile;
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// `IORING_SETUP_*` of include/uapi/linux/io_uring.h; those that say how long entries are, and
/// where, are [`IoUring`](crate::model::frozen::IoUring)'s.
#[allow(missing_docs)]
pub mod setup {
    pub const CQSIZE: u32 = 1 << 3;
    pub const CLAMP: u32 = 1 << 4;
    pub const ATTACH_WQ: u32 = 1 << 5;
    pub const SUBMIT_ALL: u32 = 1 << 7;
    pub const COOP_TASKRUN: u32 = 1 << 8;
    pub const TASKRUN_FLAG: u32 = 1 << 9;
}

/// `IORING_OFF_SQ_RING`: both rings in one mapping (`IORING_FEAT_SINGLE_MMAP`).
pub const OFF_SQ_RING: u64 = 0;
/// `IORING_OFF_CQ_RING`: the same.
pub const OFF_CQ_RING: u64 = 0x800_0000;
/// `IORING_OFF_SQES`.
pub const OFF_SQES: u64 = 0x1000_0000;

/// `struct io_sqring_offsets`, bytes from the start of the rings.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct SqOffsets {
    pub head: u32,
    pub tail: u32,
    pub ring_mask: u32,
    pub ring_entries: u32,
    pub flags: u32,
    pub dropped: u32,
    pub array: u32,
    reserved: u32,
    user_addr: u64,
}

/// `struct io_cqring_offsets`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CqOffsets {
    pub head: u32,
    pub tail: u32,
    pub ring_mask: u32,
    pub ring_entries: u32,
    pub overflow: u32,
    pub cqes: u32,
    pub flags: u32,
    reserved: u32,
    user_addr: u64,
}

/// `struct io_uring_params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Params {
    pub sq_entries: u32,
    pub cq_entries: u32,
    pub flags: u32,
    sq_thread_cpu: u32,
    sq_thread_idle: u32,
    pub features: u32,
    wq_fd: u32,
    reserved: [u32; 3],
    pub sq_off: SqOffsets,
    pub cq_off: CqOffsets,
}

/// Makes an instance with so many slots; says what became of it.
///
/// # Errors
/// As io_uring_setup(2): `EPERM` where `kernel.io_uring_disabled` says so, `ENOSYS` where there
/// is none, `EINVAL` for flags that the kernel does not know.
pub fn make(sq_entries: u32, cq_entries: u32, flags: u32) -> Result<(OwnedFd, Params), Errno> {
    let mut params = Params {
        cq_entries,
        flags: flags | setup::CQSIZE,
        ..Params::default()
    };
    // SAFETY: the kernel reads and fills one io_uring_params.
    let made = unsafe {
        libc::syscall(
            libc::SYS_io_uring_setup,
            sq_entries,
            std::ptr::from_mut(&mut params),
        )
    };
    let fd = i32::try_from(made).map_err(|_| Errno::EBADF)?;
    Ok((owned(fd)?, params))
}

/// Whether the positions of both rings lie side by side, as since Linux 6.6; `None` where there
/// are no rings.
#[must_use]
pub fn is_compact() -> Option<bool> {
    let (_, params) = make(1, 2, 0).ok()?;
    // Heads and tails are four words.
    Some(params.sq_off.tail == 4)
}

/// Has the kernel take so many requests; returns how many it took.
///
/// # Errors
/// As io_uring_enter(2).
pub fn submit(fd: BorrowedFd<'_>, count: u32) -> Result<u32, Errno> {
    // SAFETY: without flags and a signal mask nothing but the mapped rings is read.
    let taken = unsafe {
        libc::syscall(
            libc::SYS_io_uring_enter,
            fd.as_raw_fd(),
            count,
            0_u32,
            0_u32,
            std::ptr::null::<libc::sigset_t>(),
            0_usize,
        )
    };
    Ok(u32::try_from(Errno::result(taken)?).unwrap_or(0))
}

/// An instance whose parts are mapped.
#[derive(Debug)]
pub struct MappedRing {
    /// Both rings.
    pub ring: MappedFile,
    /// Requests.
    pub sqes: MappedFile,
}

impl MappedRing {
    /// Maps so many bytes of the rings and of the requests.
    ///
    /// # Errors
    /// As mmap(2).
    pub fn new(fd: &impl AsFd, (ring, sqes): (usize, usize)) -> Result<Self, Errno> {
        let at = |offset: u64, len| MappedFile::at(fd.as_fd(), offset.cast_signed(), len);
        Ok(Self {
            ring: at(OFF_SQ_RING, ring)?,
            sqes: at(OFF_SQES, sqes)?,
        })
    }
}
