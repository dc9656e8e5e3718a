//! Files that have a name: regular files, directories, devices without state.

use super::error::{FilesError, call};
use crate::model::frozen::{FileHints, FileIdentity, PathRef, PressureTrigger, Through};
use crate::model::ids::Pid;
use crate::restore::namespaces::place;
use crate::sys::fd::set_write_life;
use nix::fcntl::{OFlag, PosixFadviseAdvice, open, posix_fadvise};
use nix::sys::stat::{FileStat, Mode, fstat, stat};
use nix::unistd::{Whence, getppid, lseek, write};
use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The name as a path.
pub(super) fn path_of(at: &PathRef) -> &Path {
    Path::new(OsStr::from_bytes(&at.path))
}

/// What it is called in the mount namespace of the application, where files are opened.
pub(super) fn here(at: &PathRef) -> PathBuf {
    // Who made this process is in the machine's.
    place(at, Pid(getppid().as_raw()))
}

/// Flags that open(2) acts on once and that `F_GETFL` does not show again.
fn flags_of(flags: u32) -> OFlag {
    let once = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_TRUNC | OFlag::O_NOCTTY;
    OFlag::from_bits_retain(flags.cast_signed()).difference(once) | OFlag::O_CLOEXEC
}

fn open_path(at: &PathRef, flags: OFlag) -> Result<(OwnedFd, FileStat), FilesError> {
    let name = path_of(at).display().to_string();
    let fd =
        open(&here(at), flags | OFlag::O_NOCTTY, Mode::empty()).map_err(call(&name, "open"))?;
    let found = fstat(fd.as_fd()).map_err(call(&name, "fstat"))?;
    Ok((fd, found))
}

fn check_inode(at: &PathRef, found: &FileStat) -> Result<(), FilesError> {
    // The device number may differ on another kernel; the inode number does not, except on
    // pseudo filesystems, where it is not carried.
    if at.inode.ino == 0 || at.through == Through::Remade || found.st_ino == at.inode.ino {
        return Ok(());
    }
    Err(FilesError::Changed {
        path: path_of(at).display().to_string(),
        reason: format!("inode {} was {}", found.st_ino, at.inode.ino),
    })
}

/// What a file that is watched is called here, which must be the one that was; it is not opened.
///
/// # Errors
/// It is gone or another one.
pub(super) fn watched(at: &PathRef, object: &str) -> Result<CString, FilesError> {
    let path = here(at);
    check_inode(at, &stat(&path).map_err(call(object, "stat"))?)?;
    CString::new(path.into_os_string().into_vec())
        .map_err(|_| FilesError::Unsupported(object.to_owned()))
}

fn seek(fd: &OwnedFd, at: &PathRef, pos: u64) -> Result<(), FilesError> {
    let pos = i64::try_from(pos).unwrap_or(i64::MAX);
    lseek(fd.as_fd(), pos, Whence::SeekSet)
        .map_err(call(path_of(at).display().to_string(), "lseek"))?;
    Ok(())
}

/// Opens a regular file, which must be the same inode and not have become shorter.
///
/// # Errors
/// It is gone, another file, or shorter.
pub fn open_regular(identity: &FileIdentity, flags: u32, pos: u64) -> Result<OwnedFd, FilesError> {
    let (fd, found) = open_path(&identity.at, flags_of(flags))?;
    check_inode(&identity.at, &found)?;
    if u64::try_from(found.st_size).unwrap_or(0) < identity.size {
        return Err(FilesError::Changed {
            path: path_of(&identity.at).display().to_string(),
            reason: format!("{} bytes long, was {}", found.st_size, identity.size),
        });
    }
    if !flags_of(flags).contains(OFlag::O_PATH) {
        seek(&fd, &identity.at, pos)?;
    }
    Ok(fd)
}

/// Says how a file will be used.
///
/// # Errors
/// The kernel refuses.
pub fn hint(fd: BorrowedFd<'_>, hints: &FileHints) -> Result<(), FilesError> {
    let object = "Open file";
    // In this order: the first undoes the second.
    let advices = [
        (hints.sequential, PosixFadviseAdvice::POSIX_FADV_SEQUENTIAL),
        (hints.random, PosixFadviseAdvice::POSIX_FADV_RANDOM),
        (hints.noreuse, PosixFadviseAdvice::POSIX_FADV_NOREUSE),
    ];
    for (_, advice) in advices.into_iter().filter(|(given, _)| *given) {
        posix_fadvise(fd, 0, 0, advice).map_err(call(object, "posix_fadvise"))?;
    }
    if hints.write_life != 0 {
        set_write_life(fd, hints.write_life).map_err(call(object, "fcntl(F_SET_RW_HINT)"))?;
    }
    Ok(())
}

/// Opens a file of pressure stall information and sets its trigger.
///
/// # Errors
/// It is gone, or the kernel refuses the trigger.
pub fn open_pressure(
    at: &PathRef,
    trigger: &PressureTrigger,
    flags: u32,
    pos: u64,
) -> Result<OwnedFd, FilesError> {
    let (fd, _) = open_path(at, flags_of(flags))?;
    let which = if trigger.full { "full" } else { "some" };
    // procfs puts a NUL in place of the last byte (psi_write()).
    let text = format!("{which} {} {}\0", trigger.threshold, trigger.window);
    let name = path_of(at).display().to_string();
    write(&fd, text.as_bytes()).map_err(call(name, "write of its trigger"))?;
    seek(&fd, at, pos)?;
    Ok(fd)
}

/// Opens a directory, at the position readdir(3) had reached.
///
/// # Errors
/// It is gone or another one.
pub fn open_directory(at: &PathRef, flags: u32, pos: u64) -> Result<OwnedFd, FilesError> {
    let (fd, found) = open_path(at, flags_of(flags))?;
    check_inode(at, &found)?;
    if !flags_of(flags).contains(OFlag::O_PATH) {
        seek(&fd, at, pos)?;
    }
    Ok(fd)
}

/// Opens a character device, which must be the same device.
///
/// # Errors
/// It is gone or another device.
pub fn open_device(at: &PathRef, rdev: u32, flags: u32) -> Result<OwnedFd, FilesError> {
    let (fd, found) = open_path(at, flags_of(flags))?;
    let (major, minor) = (
        nix::sys::stat::major(found.st_rdev),
        nix::sys::stat::minor(found.st_rdev),
    );
    if (major << 20 | minor) != u64::from(rdev) {
        return Err(FilesError::Changed {
            path: path_of(at).display().to_string(),
            reason: format!(
                "device {major}:{minor}, was {}:{}",
                rdev >> 20,
                rdev & 0xf_ffff
            ),
        });
    }
    Ok(fd)
}
