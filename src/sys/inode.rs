//! Names of inodes that are known by a file handle.

use super::mount::mounts;
use crate::model::ids::{Fd, InodeId, Pid};
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

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

/// The watches of an inotify instance, as the fdinfo of a descriptor of it shows them (proc(5)).
#[derive(Debug)]
pub struct Watches {
    watches: BTreeMap<i32, Watch>,
    names: Names,
}

/// A line of fdinfo.
#[derive(Debug)]
struct Watch {
    mask: u32,
    watched: Handle,
}

/// An inode as fdinfo shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handle {
    /// Which one it is.
    pub inode: InodeId,
    kind: i32,
    bytes: Vec<u8>,
}

/// The fields of a line of fdinfo, which are hexadecimal numbers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a>(pub &'a str);

impl<'a> Fields<'a> {
    fn text(self, name: &str) -> Option<&'a str> {
        let mut parts = self.0.split(' ');
        parts.find_map(|part| part.strip_prefix(name)?.strip_prefix(':'))
    }

    pub(super) fn long(self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.text(name)?, 16).ok()
    }

    pub(super) fn number(self, name: &str) -> Option<u32> {
        u32::try_from(self.long(name)?).ok()
    }

    /// `None` also of a filesystem without handles.
    pub(super) fn handle(self) -> Option<Handle> {
        Some(Handle {
            inode: InodeId {
                dev: self.number("sdev")?,
                ino: self.long("ino")?,
            },
            kind: i32::try_from(self.number("fhandle-type")?).ok()?,
            bytes: hex(self.text("f_handle")?)?,
        })
    }
}

/// Finds the names of inodes by their handles.
#[derive(Debug)]
pub struct Names {
    pid: Pid,
    /// Where handles of a device can be opened.
    mounts: BTreeMap<u32, OwnedFd>,
}

impl Names {
    /// As this process sees them.
    #[must_use]
    pub fn of(pid: Pid) -> Self {
        Self {
            pid,
            mounts: BTreeMap::new(),
        }
    }

    /// The handle is opened and the name asked for.
    ///
    /// # Errors
    /// The file has none, or its filesystem is not mounted.
    pub fn find(&mut self, handle: &Handle) -> io::Result<Vec<u8>> {
        let mount = match self.mounts.entry(handle.inode.dev) {
            Entry::Occupied(mount) => mount.into_mut(),
            Entry::Vacant(place) => place.insert(mount_of(self.pid, handle.inode.dev)?),
        };
        let opened = open_handle(mount, handle)?;
        let path = std::fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))?;
        let path = path.into_os_string().into_vec();
        if path.ends_with(b" (deleted)") {
            return Err(io::ErrorKind::NotFound.into());
        }
        Ok(path)
    }
}

impl Watches {
    /// Those of a descriptor of this process.
    ///
    /// # Errors
    /// It is gone.
    pub fn read(pid: Pid, fd: Fd) -> io::Result<Self> {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?;
        Ok(Self::parse(pid, &info))
    }

    /// Those in the fdinfo of a descriptor of this process; what has no handle is left out.
    #[must_use]
    pub fn parse(pid: Pid, info: &str) -> Self {
        let lines = info
            .lines()
            .filter_map(|line| line.strip_prefix("inotify "));
        Self {
            watches: lines.filter_map(Watch::parse).collect(),
            names: Names::of(pid),
        }
    }

    /// Their watch descriptors, and what each watches.
    pub fn inodes(&self) -> impl Iterator<Item = (i32, InodeId)> {
        let watches = self.watches.iter();
        watches.map(|(wd, watch)| (*wd, watch.watched.inode))
    }

    /// What this one watches.
    ///
    /// # Errors
    /// No such watch, a filesystem without handles, or a file without a name.
    pub fn watched(&mut self, wd: i32) -> io::Result<Watched> {
        let watch = self.watches.get(&wd).ok_or(io::ErrorKind::NotFound)?;
        Ok(Watched {
            path: self.names.find(&watch.watched)?,
            mask: watch.mask,
        })
    }
}

impl Watch {
    /// The rest of a line of fs/notify/fdinfo.c: `wd:X ino:X sdev:X mask:X …`.
    fn parse(line: &str) -> Option<(i32, Self)> {
        let fields = Fields(line);
        let watch = Self {
            mask: fields.number("mask")?,
            watched: fields.handle()?,
        };
        Some((i32::try_from(fields.number("wd")?).ok()?, watch))
    }
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
    let mounts = mounts(File::open(format!("/proc/{pid}/mountinfo"))?)?;
    let shown = mounts.values().filter(|mount| mount.majmin == wanted);
    // Through a mount of a part, what is elsewhere has no name.
    let widest = shown.min_by_key(|mount| mount.root.len());
    let mount = widest.ok_or(io::ErrorKind::NotFound)?;
    // As the process sees it, whose mount namespace or root directory may be its own.
    let root = PathBuf::from(format!("/proc/{pid}/root"));
    let point = mount.mount_point.strip_prefix("/");
    Ok(open(
        &root.join(point.unwrap_or(&mount.mount_point)),
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?)
}

/// `struct file_handle`.
#[repr(C)]
struct FileHandle {
    bytes: u32,
    kind: i32,
    handle: [u8; MAX_HANDLE],
}

fn open_handle(mount: &OwnedFd, wanted: &Handle) -> io::Result<OwnedFd> {
    let mut handle = FileHandle {
        bytes: u32::try_from(wanted.bytes.len()).map_err(io::Error::other)?,
        kind: wanted.kind,
        handle: [0; MAX_HANDLE],
    };
    handle
        .handle
        .get_mut(..wanted.bytes.len())
        .ok_or(io::ErrorKind::InvalidData)?
        .copy_from_slice(&wanted.bytes);
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: `FileHandle` begins as struct file_handle and holds the bytes it announces.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watches_are_read_from_fdinfo() {
        let info = "pos:\t0\nflags:\t00\nmnt_id:\t15\nino:\t7\n\
                    inotify wd:a ino:1f sdev:fe00001 mask:3ce ignored_mask:0 fhandle-bytes:8 \
                    fhandle-type:1 f_handle:1f0000a1\n\
                    inotify wd:b ino:20 sdev:fe00001 mask:2 ignored_mask:0 \n";
        let watches = Watches::parse(Pid(1), info);
        let (dev, ino) = (0xfe << 20 | 1, 0x1f);
        let inodes: Vec<_> = watches.inodes().collect();
        assert_eq!(inodes, [(10, InodeId { dev, ino })]);
        let watch = &watches.watches[&10];
        assert_eq!((watch.mask, watch.watched.kind), (0x3ce, 1));
        assert_eq!(watch.watched.bytes, [0x1f, 0, 0, 0xa1]);
    }
}
