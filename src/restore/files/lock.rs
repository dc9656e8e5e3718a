//! Locks and leases on files: flock(2), fcntl(2) POSIX and open file description locks.

use super::error::{FilesError, call};
use crate::model::frozen::{FileLock, FileOwner, LockKind, OpenFile};
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

/// Takes the lease that process `pid` had taken through this descriptor. To be called by that
/// process, when it is known whom to tell of the lease's end: the kernel would tell the caller.
///
/// # Errors
/// Somebody else has the file open by now.
pub fn take_lease(number: Fd, file: &OpenFile, pid: Pid) -> Result<(), FilesError> {
    let own = file
        .lease
        .filter(|lease| (lease.pid, lease.fd) == (pid, number));
    let Some(lease) = own else {
        return Ok(());
    };
    let object = format!("Lease on descriptor {number}");
    fd::lease(number.0, lease.exclusive).map_err(call(&object, "fcntl(F_SETLEASE)"))?;
    let owner = file.owner.unwrap_or(FileOwner {
        kind: 1,
        id: 0,
        signal: 0,
    });
    if owner.id != 0 {
        return Ok(());
    }
    // It was given to nobody afterwards.
    fd::set_owner(number.0, &owner).map_err(call(object, "fcntl(F_SETOWN_EX)"))
}

fn take(number: i32, lock: &FileLock) -> Result<(), FilesError> {
    let object = format!("{:?} lock on descriptor {number}", lock.kind);
    fd::lock(number, lock).map_err(call(object, "lock"))
}
