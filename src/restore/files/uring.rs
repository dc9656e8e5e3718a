//! io_uring instances. A new one begins at position 0 of both rings, and nothing sets the kernel's
//! own positions: requests that do nothing are made until they are where they were. Then the rings
//! show what they showed.

use super::error::{FilesError, call};
use crate::model::frozen::IoUring;
use crate::sys::uring::{MappedRing, Params, make as make_ring, submit};
use nix::errno::Errno;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

const OBJECT: &str = "io_uring";

/// Of `struct io_uring_sqe`: where the flags are; the operation is its first byte, 0 does nothing.
const SQE_FLAGS: usize = 1;
/// `IOSQE_CQE_SKIP_SUCCESS`: no completion unless it fails.
const CQE_SKIP_SUCCESS: u8 = 1 << 6;

/// Makes an instance as it was.
///
/// # Errors
/// The kernel refuses a step, or keeps rings in another form.
pub fn make(ring: &IoUring) -> Result<OwnedFd, FilesError> {
    let made = make_ring(ring.sq_entries, ring.cq_entries, ring.flags);
    let (fd, params) = made.map_err(call(OBJECT, "io_uring_setup"))?;
    let same = params.sq_entries == ring.sq_entries
        && params.cq_entries == ring.cq_entries
        && params.sq_off.array == ring.sq_array
        && params.cq_off.cqes == ring.cqes;
    if !same {
        // User space was told once where everything is.
        let what = format!("{OBJECT} on a kernel that keeps rings in another form");
        return Err(FilesError::Unsupported(what));
    }
    let mut mapped = MappedRing::new(&fd, ring.lengths()).map_err(call(OBJECT, "mmap"))?;
    let (silent, both, extra) = ring.winding();
    let winder = Winder::new(&fd, &params);
    winder.wind(&mut mapped, silent, CQE_SKIP_SUCCESS)?;
    winder.wind(&mut mapped, both, 0)?;
    if extra > 0 {
        winder.complete(&mapped, extra)?;
    }
    let reached = (
        mapped.ring.load(params.sq_off.head),
        mapped.ring.load(params.cq_off.tail),
    );
    if reached != (ring.sq_head, ring.cq_tail) {
        let what = format!(
            "{OBJECT} at {} and {}, brought to {} and {},",
            ring.sq_head, ring.cq_tail, reached.0, reached.1
        );
        return Err(FilesError::Unsupported(what));
    }
    mapped.ring.write(0, &ring.ring);
    mapped.sqes.write(0, &ring.sqes);
    Ok(fd)
}

/// Moves the positions of an instance.
struct Winder<'a> {
    fd: &'a OwnedFd,
    params: &'a Params,
    /// Bytes of one request.
    sqe: usize,
}

impl<'a> Winder<'a> {
    fn new(fd: &'a OwnedFd, params: &'a Params) -> Self {
        let sqe = IoUring::sqe_bytes(params.flags);
        Self { fd, params, sqe }
    }

    /// Has the kernel take so many requests that do nothing, and drops their completions.
    fn wind(&self, mapped: &mut MappedRing, count: u32, flags: u8) -> Result<(), FilesError> {
        let entries = self.params.sq_entries;
        for index in 0..entries {
            let mut request = [0; 64];
            request[SQE_FLAGS] = flags;
            self.put(mapped, index, &request);
        }
        let mut left = count;
        while left > 0 {
            let most = left.min(entries);
            self.take(mapped, most)?;
            self.drop_completions(mapped);
            left -= most;
        }
        Ok(())
    }

    fn put(&self, mapped: &mut MappedRing, index: u32, request: &[u8]) {
        mapped.sqes.write(index as usize * self.sqe, request);
        if self.params.flags & IoUring::NO_SQARRAY == 0 {
            mapped
                .ring
                .store(self.params.sq_off.array + 4 * index, index);
        }
    }

    /// Submits so many of the requests that stand in their slots.
    fn take(&self, mapped: &MappedRing, count: u32) -> Result<(), FilesError> {
        let tail = self.params.sq_off.tail;
        mapped
            .ring
            .store(tail, mapped.ring.load(tail).wrapping_add(count));
        match submit(self.fd.as_fd(), count) {
            Ok(taken) if taken == count => Ok(()),
            Ok(_) => Err(call(OBJECT, "io_uring_enter")(Errno::EAGAIN)),
            Err(errno) => Err(call(OBJECT, "io_uring_enter")(errno)),
        }
    }

    fn drop_completions(&self, mapped: &MappedRing) {
        let cq = &self.params.cq_off;
        mapped.ring.store(cq.head, mapped.ring.load(cq.tail));
    }

    /// Puts in so many completions that no request of its own leads to: messages from another
    /// instance.
    fn complete(&self, mapped: &MappedRing, count: u32) -> Result<(), FilesError> {
        const ENTRIES: u32 = 64;
        let (fd, params) =
            make_ring(ENTRIES, ENTRIES, 0).map_err(call(OBJECT, "io_uring_setup"))?;
        let form = IoUring {
            sq_entries: params.sq_entries,
            cq_entries: params.cq_entries,
            sq_array: params.sq_off.array,
            cqes: params.cq_off.cqes,
            ..IoUring::default()
        };
        let mut sender = MappedRing::new(&fd, form.lengths()).map_err(call(OBJECT, "mmap"))?;
        let messages = Winder::new(&fd, &params);
        let message = message_to(self.fd.as_raw_fd());
        for index in 0..params.sq_entries {
            messages.put(&mut sender, index, &message);
        }
        let most = params.sq_entries.min(self.params.cq_entries);
        let mut left = count;
        while left > 0 {
            let some = left.min(most);
            messages.take(&sender, some)?;
            messages.drop_completions(&sender);
            self.drop_completions(mapped);
            left -= some;
        }
        Ok(())
    }
}

/// `struct io_uring_sqe`: `IORING_OP_MSG_RING` with `IORING_MSG_DATA`, to an instance.
fn message_to(fd: i32) -> [u8; 64] {
    const MSG_RING: u8 = 40;
    const SQE_FD: usize = 4;
    let mut request = [0; 64];
    request[0] = MSG_RING;
    request[SQE_FD..SQE_FD + 4].copy_from_slice(&fd.to_ne_bytes());
    request
}
