//! Why the open files of a frozen application could not be read.

use crate::bpf::iter::ReadError;
use crate::image::StoreError;
use crate::model::frozen::Blocker;
use crate::model::ids::{Fd, Pid};
use crate::sys::process::CallError;
use crate::sys::socket::SocketError;
use std::io;

/// Why the open files of a frozen application could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    /// Something that is not carried appeared after the eligibility check.
    #[error("{0}")]
    Blocked(Blocker),
    /// A file operation on a borrowed descriptor.
    #[error("PID {pid} fd {fd}: {call}: {source}; try again, and report it if it persists")]
    File {
        /// Owner of the descriptor.
        pid: Pid,
        /// The descriptor.
        fd: Fd,
        /// What was tried.
        call: &'static str,
        /// What the kernel answered.
        source: io::Error,
    },
    /// A socket call on a borrowed descriptor.
    #[error("PID {pid} fd {fd}: {source}; try again, and report it if it persists")]
    Socket {
        /// Owner of the descriptor.
        pid: Pid,
        /// The descriptor.
        fd: Fd,
        /// The call.
        source: SocketError,
    },
    /// A descriptor could not be borrowed.
    #[error(transparent)]
    Borrow(#[from] CallError),
    /// The iterators failed.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Pages could not be written.
    #[error(transparent)]
    Store(#[from] StoreError),
}
