//! POSIX message queues: mq_overview(7).

use super::fd::owned;
use nix::errno::Errno;
use nix::libc;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

/// What a queue has room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// Messages, `mq_maxmsg`.
    pub maxmsg: i64,
    /// Bytes that each may have, `mq_msgsize`.
    pub msgsize: i64,
}

/// Makes a queue, for nobody but the superuser yet, and opens it for reading and writing without
/// waiting. The name begins with a slash.
///
/// # Errors
/// `EEXIST`: the name is in use; `EMFILE`: `RLIMIT_MSGQUEUE` of the caller's real user.
pub fn create(name: &CStr, room: Room) -> Result<OwnedFd, Errno> {
    let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR | libc::O_NONBLOCK;
    // SAFETY: plain data for which zero is valid.
    let mut attr: libc::mq_attr = unsafe { std::mem::zeroed() };
    (attr.mq_maxmsg, attr.mq_msgsize) = (room.maxmsg, room.msgsize);
    let mode: libc::mode_t = 0;
    // SAFETY: reads the name and the attributes.
    owned(unsafe { libc::mq_open(name.as_ptr(), flags, mode, &raw const attr) })
}

/// Opens a queue with these flags, which `F_GETFL` then shows.
///
/// # Errors
/// `ENOENT`: there is none of this name.
pub fn open(name: &CStr, flags: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: reads the name; without O_CREAT there are no more arguments.
    owned(unsafe { libc::mq_open(name.as_ptr(), flags & !libc::O_CREAT) })
}

/// Removes the name of a queue.
///
/// # Errors
/// `ENOENT`: there is none.
pub fn unlink(name: &CStr) -> Result<(), Errno> {
    // SAFETY: reads the name.
    Errno::result(unsafe { libc::mq_unlink(name.as_ptr()) }).map(drop)
}

/// What a queue has room for.
///
/// # Errors
/// `EBADF`: it is none.
pub fn room(queue: BorrowedFd<'_>) -> Result<Room, Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut attr: libc::mq_attr = unsafe { std::mem::zeroed() };
    // SAFETY: writes one mq_attr.
    Errno::result(unsafe { libc::mq_getattr(queue.as_raw_fd(), &raw mut attr) })?;
    Ok(Room {
        maxmsg: attr.mq_maxmsg,
        msgsize: attr.mq_msgsize,
    })
}

/// Sends a message.
///
/// # Errors
/// `EAGAIN`: there is no room for it, and the descriptor does not wait.
pub fn send(queue: BorrowedFd<'_>, text: &[u8], priority: u32) -> Result<(), Errno> {
    let (at, len) = (text.as_ptr().cast(), text.len());
    // SAFETY: reads so many bytes.
    Errno::result(unsafe { libc::mq_send(queue.as_raw_fd(), at, len, priority) }).map(drop)
}

/// Receives a message of at most `msgsize` bytes and throws it away.
///
/// # Errors
/// `EAGAIN`: there is none, and the descriptor does not wait.
pub fn discard(queue: BorrowedFd<'_>, msgsize: usize) -> Result<(), Errno> {
    let mut text = vec![0_u8; msgsize];
    let (at, null) = (text.as_mut_ptr().cast(), std::ptr::null_mut());
    // SAFETY: writes at most so many bytes.
    let got = unsafe { libc::mq_receive(queue.as_raw_fd(), at, msgsize, null) };
    Errno::result(got).map(drop)
}

/// Whether somebody has the file open besides this description, which is for reading and
/// writing: a lease for writing is not given then (check_conflicting_open()).
///
/// # Errors
/// As fcntl(2) `F_SETLEASE`.
pub fn is_open_elsewhere(queue: BorrowedFd<'_>) -> Result<bool, Errno> {
    match super::fd::lease(queue.as_raw_fd(), true) {
        Err(Errno::EAGAIN) => return Ok(true),
        taken => taken?,
    }
    // SAFETY: takes integers.
    let given = unsafe { libc::fcntl(queue.as_raw_fd(), libc::F_SETLEASE, libc::F_UNLCK) };
    Errno::result(given).map(|_| false)
}
