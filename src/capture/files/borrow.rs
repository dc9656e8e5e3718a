//! Descriptors of frozen processes, borrowed for as long as they are read.

use super::CollectError;
use crate::bpf::iter::File;
use crate::model::frozen::Blocker;
use crate::model::ids::{Fd, Pid};
use crate::sys::pidfds::Pidfds;
use crate::sys::socket::{int_option, set_int_option};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Opens what the iterators have found.
#[derive(Debug, Default)]
pub struct Lender(Pidfds);

/// A descriptor of another process, and whose it is.
#[derive(Debug)]
pub struct Borrowed {
    /// Owner.
    pub pid: Pid,
    /// Number in the owner's table.
    pub number: Fd,
    /// Our duplicate.
    pub fd: OwnedFd,
}

/// Owner and number of a descriptor record.
pub fn place(file: &File) -> (Pid, Fd) {
    (
        Pid(file.rec.tgid.cast_signed()),
        Fd(file.rec.fd.cast_signed()),
    )
}

impl Lender {
    /// Borrows the description behind `file`.
    ///
    /// # Errors
    /// pidfd_open(2) or pidfd_getfd(2) fails.
    pub fn borrow(&mut self, file: &File) -> Result<Borrowed, CollectError> {
        let (pid, number) = place(file);
        let fd = self.0.duplicate(pid, number)?;
        Ok(Borrowed { pid, number, fd })
    }
}

impl Borrowed {
    /// The descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// A path that opens another description of the same file.
    pub fn reopen_path(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// Runs `look` while `MSG_PEEK` goes on from message to message, beginning with the first.
    /// `SO_PEEK_OFF` belongs to the socket, not to us, and is as before afterwards.
    ///
    /// # Errors
    /// A socket call fails, or `look` does.
    pub fn peeking<T>(
        &self,
        look: impl FnOnce() -> Result<T, CollectError>,
    ) -> Result<T, CollectError> {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_PEEK_OFF);
        let set = |offset| {
            set_int_option(self.as_fd(), level, name, offset).map_err(self.socket_failed())
        };
        let own = int_option(self.as_fd(), level, name).map_err(self.socket_failed())?;
        set(0)?;
        let result = look();
        set(own)?;
        result
    }

    /// Whether the next call on the socket would be told of an error, once, or its error queue
    /// holds something. Looking takes nothing away (`POLLERR`).
    ///
    /// # Errors
    /// poll(2) fails.
    pub fn has_error(&self) -> Result<bool, CollectError> {
        let mut socket = [PollFd::new(self.as_fd(), PollFlags::empty())];
        poll(&mut socket, PollTimeout::ZERO).map_err(self.failed("poll"))?;
        let told = socket[0].revents().unwrap_or(PollFlags::empty());
        Ok(told.contains(PollFlags::POLLERR))
    }

    /// That it is not carried: what it is, and why.
    pub fn blocked(&self, object: &str, reason: impl Into<String>) -> CollectError {
        CollectError::Blocked(Blocker {
            pid: self.pid,
            fd: Some(self.number),
            object: object.to_owned(),
            reason: reason.into(),
        })
    }

    /// Names the descriptor in an error of `call`.
    pub fn failed<E: Into<io::Error>>(
        &self,
        call: &'static str,
    ) -> impl FnOnce(E) -> CollectError + use<E> {
        let (pid, fd) = (self.pid, self.number);
        move |source| CollectError::File {
            pid,
            fd,
            call,
            source: source.into(),
        }
    }

    /// Names the descriptor in an error of a socket call.
    pub fn socket_failed(
        &self,
    ) -> impl FnOnce(crate::sys::socket::SocketError) -> CollectError + use<> {
        let (pid, fd) = (self.pid, self.number);
        move |source| CollectError::Socket { pid, fd, source }
    }
}
