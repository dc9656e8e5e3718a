//! Signals to tracker itself while a checkpoint is under way, as descriptors to poll.

use super::error::CheckpointError;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// `SIGINT` and `SIGTERM` ask for an abort, `SIGCHLD` tells that a tracee stopped. They are
/// blocked for the calling thread while this lives.
#[derive(Debug)]
pub struct Wakeups {
    stop: SignalFd,
    child: SignalFd,
    before: SigSet,
}

impl Wakeups {
    /// Blocks the signals and opens the descriptors.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn new() -> Result<Self, CheckpointError> {
        let failed = |errno: Errno| CheckpointError::io("signalfd", "SIGTERM")(errno.into());
        let stop = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
        let child = SigSet::from_iter([Signal::SIGCHLD]);
        let both = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGCHLD]);
        let before = SigSet::thread_get_mask().map_err(failed)?;
        both.thread_block().map_err(failed)?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let open = |set| SignalFd::with_flags(set, flags).map_err(failed);
        Ok(Self {
            stop: open(&stop)?,
            child: open(&child)?,
            before,
        })
    }

    /// Readable once an abort was asked for.
    #[must_use]
    pub fn stop_fd(&self) -> BorrowedFd<'_> {
        self.stop.as_fd()
    }

    /// Fails once an abort was asked for. The signal stays pending, so every later check
    /// fails too.
    ///
    /// # Errors
    /// [`CheckpointError::Interrupted`].
    pub fn check(&self) -> Result<(), CheckpointError> {
        if ready(&[self.stop.as_fd()], Duration::ZERO)? {
            return Err(CheckpointError::Interrupted);
        }
        Ok(())
    }

    /// Waits until a tracee reports, at most this long.
    ///
    /// # Errors
    /// poll(2) fails.
    pub fn wait_for_child(&self, limit: Duration) -> Result<(), CheckpointError> {
        ready(&[self.child.as_fd()], limit)?;
        while matches!(self.child.read_signal(), Ok(Some(_))) {}
        Ok(())
    }
}

impl Drop for Wakeups {
    fn drop(&mut self) {
        // An abort was honoured: it shall not end tracker before it has told so.
        while matches!(self.stop.read_signal(), Ok(Some(_))) {}
        let _ = self.before.thread_set_mask();
    }
}

fn ready(fds: &[BorrowedFd<'_>], limit: Duration) -> Result<bool, CheckpointError> {
    let mut fds: Vec<PollFd<'_>> = fds
        .iter()
        .map(|fd| PollFd::new(*fd, PollFlags::POLLIN))
        .collect();
    let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
    match poll(
        &mut fds,
        PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX),
    ) {
        Ok(count) => Ok(count > 0),
        Err(Errno::EINTR) => Ok(false),
        Err(errno) => Err(CheckpointError::io("poll", "signalfd")(errno.into())),
    }
}
