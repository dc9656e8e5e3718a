//! Buffers of sockets that are larger for a while: what was queued must fit, however little the
//! application has set since.

use super::error::{FilesError, socket};
use crate::sys::socket::{int_option, set_int_option};
use nix::libc;
use std::os::fd::BorrowedFd;

/// A buffer of a socket: the option that tells its size, and the one that sets it.
#[derive(Clone, Copy, Debug)]
pub struct Buffer(i32, i32);

impl Buffer {
    /// What is sent and not taken yet.
    pub const SEND: Self = Self(libc::SO_SNDBUF, libc::SO_SNDBUFFORCE);
    /// What is received and not read yet.
    pub const RECEIVE: Self = Self(libc::SO_RCVBUF, libc::SO_RCVBUFFORCE);
}

/// Runs `fill` while a buffer has so many bytes of room at least, as socket(7) counts them. Those
/// that accept(2) gives meanwhile have the listener's `SO_BUF_LOCK`.
///
/// # Errors
/// A socket call fails, or `fill` does.
pub fn with_room(
    object: &str,
    fd: BorrowedFd<'_>,
    Buffer(get, force): Buffer,
    room: usize,
    fill: impl FnOnce() -> Result<(), FilesError>,
) -> Result<(), FilesError> {
    let (level, failed) = (libc::SOL_SOCKET, || socket(object));
    let size = int_option(fd, level, get).map_err(failed())?;
    // The kernel doubles what it is told.
    let room = i32::try_from(room.div_ceil(2)).unwrap_or(i32::MAX / 2);
    if room <= size / 2 {
        return fill();
    }
    let lock = int_option(fd, level, libc::SO_BUF_LOCK).map_err(failed())?;
    let set = |size| {
        set_int_option(fd, level, force, size).map_err(failed())?;
        set_int_option(fd, level, libc::SO_BUF_LOCK, lock).map_err(failed())
    };
    set(room)?;
    let filled = fill();
    set(size / 2)?;
    filled
}
