//! Terminals: the ioctls of tty_ioctl(4) and of pseudo-terminals.

use crate::model::frozen::Termios;
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// `TCSETS2` of asm-generic/ioctls.h, with 44 bytes.
const TCSETS2: u64 = 0x402c_542b;
const TIOCGPTN: u64 = 0x8004_5430;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGPTPEER: u64 = 0x5441;

fn with_value(fd: impl AsFd, request: u64, value: u64) -> Result<i32, Errno> {
    // SAFETY: for requests whose argument is an integer.
    Errno::result(unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, value) })
}

fn with_bytes<const N: usize>(
    fd: impl AsFd,
    request: u64,
    bytes: &mut [u8; N],
) -> Result<(), Errno> {
    // SAFETY: for requests that read or write N bytes.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, bytes.as_mut_ptr()) };
    Errno::result(result).map(drop)
}

fn with_int(fd: impl AsFd, request: u64, value: i32) -> Result<(), Errno> {
    with_bytes(fd, request, &mut value.to_ne_bytes())
}

/// `TIOCGPTN`: N of the slave's `/dev/pts/N`.
///
/// # Errors
/// `ENOTTY`: not a master.
pub fn number(master: impl AsFd) -> Result<u32, Errno> {
    let mut number = [0; 4];
    with_bytes(master, TIOCGPTN, &mut number)?;
    Ok(u32::from_ne_bytes(number))
}

/// `TIOCSPTLCK`: whether the slave can be opened.
///
/// # Errors
/// `ENOTTY`: not a master.
pub fn set_lock(master: impl AsFd, locked: bool) -> Result<(), Errno> {
    with_int(master, TIOCSPTLCK, locked.into())
}

/// `TIOCGPTPEER`: opens the slave with these `O_*` flags.
///
/// # Errors
/// `EIO`: it is locked.
pub fn open_slave(master: impl AsFd, flags: i32) -> Result<OwnedFd, Errno> {
    let fd = with_value(master, TIOCGPTPEER, u64::from(flags.cast_unsigned()))?;
    // SAFETY: the kernel has just handed out this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `TIOCPKT` on.
///
/// # Errors
/// `ENOTTY`: not a master.
pub fn set_packet(master: impl AsFd) -> Result<(), Errno> {
    with_int(master, libc::TIOCPKT, 1)
}

/// `TCSETS2`: settings, at once. Through the master they are those of the slave.
///
/// # Errors
/// As the system call.
pub fn set_termios(fd: impl AsFd, termios: &Termios) -> Result<(), Errno> {
    with_bytes(fd, TCSETS2, &mut termios.encode())
}

/// `TIOCSWINSZ`: rows, columns, width and height in pixels.
///
/// # Errors
/// As the system call.
pub fn set_winsize(fd: impl AsFd, size: [u16; 4]) -> Result<(), Errno> {
    let mut bytes = [0; 8];
    for (place, value) in bytes.chunks_exact_mut(2).zip(size) {
        place.copy_from_slice(&value.to_ne_bytes());
    }
    with_bytes(fd, libc::TIOCSWINSZ, &mut bytes)
}

/// `TIOCEXCL`: nobody but root may open it.
///
/// # Errors
/// As the system call.
pub fn set_exclusive(fd: impl AsFd) -> Result<(), Errno> {
    with_value(fd, libc::TIOCEXCL, 0).map(drop)
}

/// `TIOCSTI`: passes a byte to the line discipline as if it had been typed, before returning.
///
/// # Errors
/// `EPERM`, `EIO`: needs `CAP_SYS_ADMIN`.
pub fn type_byte(fd: impl AsFd, byte: u8) -> Result<(), Errno> {
    with_bytes(fd, libc::TIOCSTI, &mut [byte])
}

/// `TCXONC` with `TCOOFF`: output stops.
///
/// # Errors
/// As the system call.
pub fn output_off(fd: impl AsFd) -> Result<(), Errno> {
    const TCOOFF: u64 = 0;
    with_value(fd, libc::TCXONC, TCOOFF).map(drop)
}

/// `TCFLSH` with `TCIFLUSH`: throws away what could be read, with what is on its way there.
///
/// # Errors
/// As the system call.
pub fn flush_input(fd: impl AsFd) -> Result<(), Errno> {
    const TCIFLUSH: u64 = 0;
    with_value(fd, libc::TCFLSH, TCIFLUSH).map(drop)
}

/// `FIONREAD`: bytes that read(2) would give, in canonical mode those of complete lines.
///
/// # Errors
/// As the system call.
pub fn unread(fd: impl AsFd) -> Result<u32, Errno> {
    let mut count = [0; 4];
    with_bytes(fd, libc::FIONREAD, &mut count)?;
    Ok(u32::from_ne_bytes(count))
}

/// `TIOCSCTTY`: makes it the controlling terminal of the calling session leader.
///
/// # Errors
/// `EPERM`: the caller leads no session or has a terminal, or another session has this one.
pub fn set_controlling(fd: impl AsFd) -> Result<(), Errno> {
    with_value(fd, libc::TIOCSCTTY, 0).map(drop)
}
