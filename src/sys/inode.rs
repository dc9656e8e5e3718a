//! Names of inodes that are known by a file handle.

use crate::model::ids::{Fd, Pid};
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;

/// Largest handle any filesystem makes (`MAX_HANDLE_SZ`).
const MAX_HANDLE: usize = 128;

/// What an inotify watch watches, and for what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watched {
    /// Name of the inode.
    pub path: Vec<u8>,
    /// `IN_*` bits as inotify_add_watch(2) took them; the kernel keeps more in its own mask.
    pub mask: u32,
}

/// What inotify watch `wd` of a process's descriptor watches: the handle in its fdinfo
/// (proc(5)) is opened and the name asked for.
///
/// # Errors
/// No such watch, a filesystem without handles, or a file without a name.
pub fn watched(pid: Pid, fd: Fd, wd: i32) -> io::Result<Watched> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?;
    let line = text
        .lines()
        .find(|line| line.starts_with(&format!("inotify wd:{wd:x} ")))
        .ok_or(io::ErrorKind::NotFound)?;
    let field = |name: &str| {
        line.split(' ')
            .find_map(|part| part.strip_prefix(name))
            .ok_or(io::ErrorKind::InvalidData)
    };
    let kind = i32::from_str_radix(field("fhandle-type:")?, 16).map_err(io::Error::other)?;
    let device = u32::from_str_radix(field("sdev:")?, 16).map_err(io::Error::other)?;
    let mask = u32::from_str_radix(field("mask:")?, 16).map_err(io::Error::other)?;
    let bytes = hex(field("f_handle:")?).ok_or(io::ErrorKind::InvalidData)?;
    let mount = mount_of(pid, device)?;
    let opened = open_handle(&mount, kind, &bytes)?;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))?;
    let path = path.into_os_string().into_vec();
    if path.ends_with(b" (deleted)") {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(Watched { path, mask })
}

fn hex(text: &str) -> Option<Vec<u8>> {
    (0..text.len())
        .step_by(2)
        .map(|at| {
            text.get(at..at + 2)
                .and_then(|byte| u8::from_str_radix(byte, 16).ok())
        })
        .collect()
}

/// A directory on the filesystem with this device (`MKDEV`).
fn mount_of(pid: Pid, device: u32) -> io::Result<OwnedFd> {
    let wanted = format!("{}:{}", device >> 20, device & 0xf_ffff);
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let point = mounts
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find(|fields| fields.get(2).is_some_and(|number| *number == wanted))
        .and_then(|fields| fields.get(4).map(|point| (*point).to_owned()))
        .ok_or(io::ErrorKind::NotFound)?;
    Ok(open(
        point.as_str(),
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?)
}

#[repr(C)]
struct Handle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE],
}

fn open_handle(mount: &OwnedFd, kind: i32, bytes: &[u8]) -> io::Result<OwnedFd> {
    let mut handle = Handle {
        bytes: u32::try_from(bytes.len()).map_err(io::Error::other)?,
        kind,
        handle: [0; MAX_HANDLE],
    };
    handle
        .handle
        .get_mut(..bytes.len())
        .ok_or(io::ErrorKind::InvalidData)?
        .copy_from_slice(bytes);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: `Handle` begins as struct file_handle and holds the bytes it announces.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_fd().as_raw_fd(),
            &raw const handle,
            flags,
        )
    };
    match i32::try_from(fd) {
        // SAFETY: the kernel has just handed out this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
