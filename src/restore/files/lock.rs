//! Locks on files: flock(2), fcntl(2) POSIX and open file description locks.

use super::error::{FilesError, call};
use crate::model::frozen::{FileLock, LockKind, OpenFile};
use crate::model::ids::{Fd, Pid};
use crate::sys::fd;
use std::os::fd::{AsRawFd, OwnedFd};

/// Takes the locks that belong to the description itself.
///
/// # Errors
/// Somebody else holds one by now.
pub fn take_shared(owned: &OwnedFd, file: &OpenFile) -> Result<(), FilesError> {
    for lock in file
        .locks
        .iter()
        .filter(|lock| lock.kind != LockKind::Posix)
    {
        take(owned.as_raw_fd(), lock)?;
    }
    Ok(())
}

/// Takes the POSIX locks of process `pid`. To be called by that process.
///
/// # Errors
/// Somebody else holds one by now.
pub fn take_posix(number: Fd, file: &OpenFile, pid: Pid) -> Result<(), FilesError> {
    let own = |lock: &&FileLock| lock.kind == LockKind::Posix && lock.pid == pid;
    for lock in file.locks.iter().filter(own) {
        take(number.0, lock)?;
    }
    Ok(())
}

fn take(number: i32, lock: &FileLock) -> Result<(), FilesError> {
    let object = format!("{:?} lock on descriptor {number}", lock.kind);
    fd::lock(number, lock).map_err(call(object, "lock"))
}
