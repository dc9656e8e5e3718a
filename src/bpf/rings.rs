//! Reading the event rings.
//!
//! The kernel side wakes the reader only when it waits for that (`submit` in
//! `bpf/track_ring.bpf.h`). While events come, the reader looks by itself, a few milliseconds
//! apart, so that they cost no wake-up each; it is kicked by whoever must know sooner.

use super::fill::Fills;
use super::shared::SharedPage;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// Events read at once from one ring: few enough to hand them on while more arrive.
const BATCH: usize = 4096;
/// Milliseconds between two looks while there are events.
const PAUSE: u8 = 10;

/// All rings with their callbacks.
pub struct Rings {
    buffers: Vec<libbpf_rs::RingBuffer<'static>>,
    fills: Fills,
    /// What the kernel side looks at, see `asleep` there.
    asleep: SharedPage,
    kick: Kick,
    next: Next,
}

/// What to do before the next look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Nothing: there may be more.
    Look,
    /// Let some gather.
    Pause,
    /// Wait to be woken: there was nothing.
    Sleep,
}

/// Makes the reader of the rings look now.
#[derive(Clone, Debug)]
pub struct Kick(Arc<EventFd>);

impl Kick {
    fn new() -> io::Result<Self> {
        let fd = EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(Arc::new(fd)))
    }

    /// Makes it look.
    pub fn now(&self) {
        // Full means that it was kicked and did not look yet.
        let _ = self.0.write(1);
    }
}

impl Rings {
    pub(super) fn new(
        buffers: Vec<libbpf_rs::RingBuffer<'static>>,
        fills: Fills,
        asleep: BorrowedFd<'_>,
    ) -> io::Result<Self> {
        Ok(Self {
            buffers,
            fills,
            asleep: SharedPage::map_writable(asleep)?,
            kick: Kick::new()?,
            next: Next::Look,
        })
    }

    /// What makes this reader look.
    #[must_use]
    pub fn kick(&self) -> Kick {
        self.kick.clone()
    }

    /// Waits until it is time to look, and has the callbacks take some events.
    pub fn read(&mut self) {
        match self.next {
            Next::Look => {}
            Next::Pause => self.wait(&[], PAUSE.into()),
            Next::Sleep => self.sleep(),
        }
        // Empty if nobody kicked.
        let _ = self.kick.0.read();
        let counts = self.buffers.iter().map(|ring| ring.consume_raw_n(BATCH));
        let most = counts
            .max()
            .map_or(0, |count| usize::try_from(count).unwrap_or(0));
        self.next = match most {
            0 => Next::Sleep,
            BATCH.. => Next::Look,
            _ => Next::Pause,
        };
    }

    /// Until an event is submitted or somebody kicks.
    fn sleep(&self) {
        let asleep: &AtomicU32 = self.asleep.word();
        asleep.store(1, Ordering::SeqCst);
        if self.fills.now().iter().all(|ring| ring.bytes == 0) {
            // SAFETY: the ring buffers own the descriptors and live as long as `self`.
            let wakes = |ring: &libbpf_rs::RingBuffer<'_>| unsafe {
                BorrowedFd::borrow_raw(ring.epoll_fd())
            };
            let wakes: Vec<_> = self.buffers.iter().map(wakes).collect();
            self.wait(&wakes, PollTimeout::NONE);
        } else {
            // Room is taken, but what is in it may take a moment.
            self.wait(&[], 1_u8.into());
        }
        asleep.store(0, Ordering::SeqCst);
    }

    fn wait(&self, others: &[BorrowedFd<'_>], pause: PollTimeout) {
        let fds = others.iter().copied().chain([self.kick.0.as_fd()]);
        let mut fds: Vec<_> = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
        // The error is EINTR, after which looking does no harm.
        let _ = poll(&mut fds, pause);
    }
}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rings").finish_non_exhaustive()
    }
}
