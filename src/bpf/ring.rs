//! Reading one event ring.
//!
//! The kernel side wakes readers for few events only (`submit` in `bpf/track_ring.bpf.h`), so
//! a reader looks by itself after a pause, and at once when it is kicked.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Events read at once: few enough to hand them on while more arrive.
const BATCH: usize = 4096;

/// A ring with its callback.
pub struct Ring {
    buffer: libbpf_rs::RingBuffer<'static>,
    kick: Kick,
}

/// Makes the reader of a ring look now.
#[derive(Clone, Debug)]
pub struct Kick(Arc<EventFd>);

impl Kick {
    pub(super) fn new() -> io::Result<Self> {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(fd)))
    }

    /// Makes it look.
    pub fn now(&self) {
        // Full means that it was kicked and did not look yet.
        let _ = self.0.write(1);
    }
}

impl Ring {
    pub(super) fn new(buffer: libbpf_rs::RingBuffer<'static>, kick: Kick) -> Self {
        Self { buffer, kick }
    }

    /// Waits to be woken or kicked, at most `pause`, and has the callback take some events.
    /// Says whether there may be more at once.
    pub fn read(&self, pause: PollTimeout) -> bool {
        // SAFETY: the ring buffer owns the descriptor and lives as long as `self`.
        let wakes = unsafe { BorrowedFd::borrow_raw(self.buffer.epoll_fd()) };
        let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
        // The error is EINTR, after which looking does no harm.
        let _ = poll(&mut [wait(wakes), wait(self.kick.0.as_fd())], pause);
        // Empty if nobody kicked.
        let _ = self.kick.0.read();
        usize::try_from(self.buffer.consume_raw_n(BATCH)).is_ok_and(|read| read >= BATCH)
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring").finish_non_exhaustive()
    }
}
