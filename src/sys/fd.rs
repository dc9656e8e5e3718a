//! Descriptors by number, owners and locks of open file descriptions.

use crate::model::event::Owner;
use crate::model::frozen::{FileLock, FileOwner, LockKind};
use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// What a system call returned that makes a descriptor.
///
/// # Errors
/// It made none; `errno` is as it left it.
pub(super) fn owned(result: i32) -> Result<OwnedFd, Errno> {
    Errno::result(result)?;
    // SAFETY: the kernel has just handed out this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

/// Makes room in this process's table for so many descriptors more than it was made for before. One
/// that grows when it is full has a process with several threads wait until all CPUs have passed a
/// quiet moment (`expand_fdtable()` of fs/file.c), which takes longer than to open hundreds of files.
///
/// Where there cannot be as much room (`RLIMIT_NOFILE`) there is as much as before.
pub fn make_room(descriptors: usize) {
    /// What a process has open besides.
    const OTHERS: usize = 64;
    static MADE: Mutex<usize> = Mutex::new(OTHERS);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    let more = made.saturating_add(descriptors);
    let last = i32::try_from(more).unwrap_or(i32::MAX);
    // Any descriptor will do. The table does not get smaller when it is closed.
    if duplicate_above(std::io::stderr().as_fd(), last).is_ok() {
        *made = more;
    }
}

/// A duplicate at the lowest free number from `least` on, with `FD_CLOEXEC`.
///
/// # Errors
/// `EMFILE`, `EINVAL`: beyond `RLIMIT_NOFILE`.
pub fn duplicate_above(fd: BorrowedFd<'_>, least: i32) -> Result<OwnedFd, Errno> {
    // SAFETY: takes integers and returns a new descriptor.
    owned(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) })
}

/// dup3(2): makes `number` refer to the same description. Whatever was there is closed, so
/// the number must belong to the table being built, not to an owned descriptor.
///
/// # Errors
/// As the system call.
pub fn duplicate_to(fd: BorrowedFd<'_>, number: i32, cloexec: bool) -> Result<(), Errno> {
    let flags = if cloexec { libc::O_CLOEXEC } else { 0 };
    // SAFETY: takes integers; who owns `number` is the caller's promise above.
    Errno::result(unsafe { libc::dup3(fd.as_raw_fd(), number, flags) }).map(drop)
}

/// Closes the numbers from `first` to `last`, both included (close_range(2)). Nobody may own one
/// of them who uses it or drops it afterwards.
///
/// # Errors
/// As the system call; none for an empty range.
pub fn close_range(first: i32, last: i32) -> Result<(), Errno> {
    if first > last {
        return Ok(());
    }
    let (first, last) = (first.cast_unsigned(), last.cast_unsigned());
    // SAFETY: takes integers; that nobody uses the numbers any more is the caller's promise above.
    Errno::result(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
}

#[repr(C)]
struct OwnerEx {
    kind: i32,
    id: i32,
}

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

/// `F_GETOWN_EX` and `F_GETSIG`; nobody once he has ended.
///
/// # Errors
/// `EBADF`: it was opened with `O_PATH`.
pub fn signal_owner(fd: BorrowedFd<'_>) -> Result<Owner, Errno> {
    let mut owner = OwnerEx { kind: 0, id: 0 };
    // SAFETY: the kernel writes a struct f_owner_ex.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), F_GETOWN_EX, &raw mut owner) };
    Errno::result(result)?;
    // SAFETY: takes integers.
    let signal = Errno::result(unsafe { libc::fcntl(fd.as_raw_fd(), F_GETSIG) })?;
    Ok(Owner {
        pid: owner.id,
        kind: owner.kind.cast_unsigned(),
        signal,
    })
}

/// `F_SETFL`.
///
/// # Errors
/// As the system call.
pub fn set_status(number: i32, flags: i32) -> Result<(), Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETFL, flags) }).map(drop)
}

/// `F_SETOWN_EX` and `F_SETSIG`.
///
/// # Errors
/// `ESRCH`: no such process.
pub fn set_owner(number: i32, owner: &FileOwner) -> Result<(), Errno> {
    let value = OwnerEx {
        kind: owner.kind,
        id: owner.id,
    };
    // SAFETY: reads one f_owner_ex.
    Errno::result(unsafe { libc::fcntl(number, F_SETOWN_EX, &raw const value) })?;
    // SAFETY: takes an integer.
    Errno::result(unsafe { libc::fcntl(number, F_SETSIG, owner.signal) }).map(drop)
}

/// Takes a lock without waiting.
///
/// # Errors
/// `EAGAIN`, `EACCES`: somebody else holds it.
pub fn lock(number: i32, lock: &FileLock) -> Result<(), Errno> {
    if lock.kind == LockKind::Flock {
        let how = if lock.exclusive {
            libc::LOCK_EX
        } else {
            libc::LOCK_SH
        };
        // SAFETY: takes integers.
        return Errno::result(unsafe { libc::flock(number, how | libc::LOCK_NB) }).map(drop);
    }
    // SAFETY: plain data for which zero is valid.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    let kind = if lock.exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    range.l_type = i16::try_from(kind).unwrap_or(0);
    range.l_start = lock.start.cast_signed();
    range.l_len = lock.len.cast_signed();
    let command = if lock.kind == LockKind::Ofd {
        libc::F_OFD_SETLK
    } else {
        libc::F_SETLK
    };
    // SAFETY: reads one struct flock.
    Errno::result(unsafe { libc::fcntl(number, command, &raw const range) }).map(drop)
}

/// `F_SET_RW_HINT`, of the file itself: `RWH_WRITE_LIFE_*`.
///
/// # Errors
/// `EINVAL`: no such hint.
pub fn set_write_life(fd: BorrowedFd<'_>, life: u8) -> Result<(), Errno> {
    // Of include/uapi/linux/fcntl.h.
    const F_SET_RW_HINT: i32 = 1036;
    let life = u64::from(life);
    // SAFETY: reads one u64.
    let set = unsafe { libc::fcntl(fd.as_raw_fd(), F_SET_RW_HINT, &raw const life) };
    Errno::result(set).map(drop)
}

/// `F_SETLEASE`.
///
/// # Errors
/// `EAGAIN`: somebody else has the file open in a way that conflicts.
pub fn lease(number: i32, exclusive: bool) -> Result<(), Errno> {
    let kind = if exclusive {
        libc::F_WRLCK
    } else {
        libc::F_RDLCK
    };
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::fcntl(number, libc::F_SETLEASE, kind) }).map(drop)
}

/// Takes ownership of a descriptor that recvmsg(2) has just delivered by `SCM_RIGHTS`.
#[must_use]
pub fn received(number: i32) -> OwnedFd {
    // SAFETY: the kernel installed it for this message; the caller has it from the control data.
    unsafe { OwnedFd::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many descriptors there is room for (proc_pid_status(5)).
    fn room() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let mut lines = status.lines();
        let size = lines.find_map(|line| line.strip_prefix("FDSize:")).unwrap();
        size.trim().parse().unwrap()
    }

    #[test]
    fn room_is_made_on_top_of_what_was_made() {
        let before = room();
        make_room(300);
        make_room(300);
        assert!(room() >= 600 && room() > before);
        let made = room();
        make_room(usize::MAX);
        assert_eq!(room(), made);
    }
}
