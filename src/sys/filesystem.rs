//! Freezing filesystems: `FIFREEZE`, `FITHAW` (include/uapi/linux/fs.h).

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd};

mod ioctl {
    nix::ioctl_readwrite!(fifreeze, b'X', 119, super::libc::c_int);
    nix::ioctl_readwrite!(fithaw, b'X', 120, super::libc::c_int);
}

/// Writes everything of the filesystem that `fd` is on to its device and stops all writes.
/// Freezes nest: each wants its [`thaw`].
///
/// # Errors
/// `EOPNOTSUPP`: the filesystem cannot; `EBUSY`: frozen already (before Linux 6.8).
pub fn freeze(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: the argument is not used; it is a live int all the same.
    unsafe { ioctl::fifreeze(fd.as_raw_fd(), &raw mut unused) }.map(drop)
}

/// Lets writes go on.
///
/// # Errors
/// `EINVAL`: it is not frozen.
pub fn thaw(fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut unused = 0;
    // SAFETY: as above.
    unsafe { ioctl::fithaw(fd.as_raw_fd(), &raw mut unused) }.map(drop)
}
