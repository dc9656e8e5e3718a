//! A page of a BPF map that the kernel and we read and write at the same time.

use nix::errno::Errno;
use nix::libc;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64};

/// Its size.
pub(super) const PAGE: usize = 4096;

/// Our own mapping of it, whatever becomes of libbpf's.
#[derive(Debug)]
pub(super) struct SharedPage(NonNull<u8>);

// SAFETY: the mapping belongs to the process, and it is only accessed atomically.
unsafe impl Send for SharedPage {}
// SAFETY: as above.
unsafe impl Sync for SharedPage {}

impl SharedPage {
    /// One page of a map, to be read.
    ///
    /// # Errors
    ///
    /// mmap(2).
    pub(super) fn map(map: BorrowedFd<'_>, page: i64) -> io::Result<Self> {
        Self::map_with(map, page, libc::PROT_READ)
    }

    /// The first page of a map, to be written too.
    ///
    /// # Errors
    ///
    /// mmap(2).
    pub(super) fn map_writable(map: BorrowedFd<'_>) -> io::Result<Self> {
        Self::map_with(map, 0, libc::PROT_READ | libc::PROT_WRITE)
    }

    fn map_with(map: BorrowedFd<'_>, page: i64, protection: i32) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice, which replaces none.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PAGE,
                protection,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                page * 4096,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(Errno::last().into());
        }
        let address = NonNull::new(address.cast()).ok_or(io::ErrorKind::AddrInUse)?;
        Ok(Self(address))
    }

    /// Its first four bytes. Only a writable page may be written.
    pub(super) fn word(&self) -> &AtomicU32 {
        // SAFETY: mapped as long as `self`, aligned, and accessed atomically by everybody.
        unsafe { self.0.cast().as_ref() }
    }

    /// Its first eight bytes, likewise.
    pub(super) fn long(&self) -> &AtomicU64 {
        // SAFETY: as above.
        unsafe { self.0.cast().as_ref() }
    }
}

impl Drop for SharedPage {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.0.as_ptr().cast(), PAGE) };
    }
}
