//! Why a descriptor could not be put back.

use crate::bpf::accept::HandshakeError;
use crate::image::StoreError;
use crate::model::ids::{Fd, OfdId};
use crate::sys::socket::SocketError;
use nix::errno::Errno;
use std::fmt::Display;
use std::io;

/// Why the descriptors of an application could not be put back.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// A system call on the way to a description.
    #[error("{object}: {call}: {errno}; see what holds or changed it, then restore again")]
    Call {
        /// The description in the kernel's terms.
        object: String,
        /// The system call.
        call: &'static str,
        /// What the kernel answered.
        errno: Errno,
    },
    /// A socket call.
    #[error("{object}: {source}; see what holds the address, then restore again")]
    Socket {
        /// The socket.
        object: String,
        /// The call.
        source: SocketError,
    },
    /// A file is not what it was.
    #[error("{path}: {reason}; put the file back as it was, then restore again")]
    Changed {
        /// The file.
        path: String,
        /// In what it differs.
        reason: String,
    },
    /// Another message queue has the name.
    #[error(
        "POSIX message queue {name}: {reason}; remove that one (rm /dev/mqueue{name}) and restore \
         again"
    )]
    Queue {
        /// The name.
        name: String,
        /// Why it is not the one that was left.
        reason: String,
    },
    /// The image names something it does not hold.
    #[error("{0} is referred to and not in the image; make a new checkpoint")]
    Missing(String),
    /// The image cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A connection that was not accepted cannot be made.
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    /// What a peer had sent did not arrive again.
    #[error(
        "{object}: its {what} is not what it was: packets over the loopback interface are not taken \
         in; see whether a packet filter drops them, then restore again"
    )]
    NotReceived {
        /// The connection.
        object: String,
        /// What is missing.
        what: String,
    },
    /// Something that this version does not restore.
    #[error("{0} cannot be restored by this version")]
    Unsupported(String),
}

/// Maps an errno of `call` on `object`, which is written out only then: there may be very many.
pub(super) fn call(object: impl Display, call: &'static str) -> impl FnOnce(Errno) -> FilesError {
    move |errno| FilesError::Call {
        object: object.to_string(),
        call,
        errno,
    }
}

/// Maps an I/O error of `call` on `object`.
pub(super) fn io_call(
    object: impl Display,
    call: &'static str,
) -> impl FnOnce(io::Error) -> FilesError {
    move |error| FilesError::Call {
        object: object.to_string(),
        call,
        errno: Errno::from_raw(error.raw_os_error().unwrap_or(0)),
    }
}

/// Maps a socket error on `object`.
pub(super) fn socket(object: impl Display) -> impl FnOnce(SocketError) -> FilesError {
    move |source| FilesError::Socket {
        object: object.to_string(),
        source,
    }
}

/// A description that descriptor `fd` refers to is not in the image.
pub(super) fn missing(fd: Fd, ofd: OfdId) -> FilesError {
    FilesError::Missing(format!("{ofd} behind descriptor {fd}"))
}

/// Part of an object is not in the image.
pub(super) fn missing_part(object: &str, part: &str) -> FilesError {
    FilesError::Missing(format!("{part} of the {object}"))
}
