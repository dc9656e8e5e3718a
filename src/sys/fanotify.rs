//! fanotify groups: what the fdinfo of one shows, and the calls that make one.

use super::fd::owned;
use super::identity::without_capability;
use super::inode::{Fields, Handle};
use crate::model::ids::{Fd, Pid};
use nix::errno::Errno;
use nix::libc;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// `CAP_SYS_ADMIN`: who has it is told of what others do, and by whom.
const CAP_SYS_ADMIN: u32 = 21;

/// Events that the kernel waits for an answer to: `FAN_OPEN_PERM`, `FAN_ACCESS_PERM`,
/// `FAN_OPEN_EXEC_PERM` and, since Linux 6.14, `FAN_PRE_ACCESS`.
pub const PERMISSION: u32 = 0x0017_0000;

/// What a mark is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum On {
    /// A file or directory.
    Inode(Handle),
    /// A mount, by its id.
    Mount(u64),
    /// All of the filesystem with this device (`MKDEV`).
    Filesystem(u32),
}

/// One mark of a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// What it is on.
    pub on: On,
    /// `FAN_*` events.
    pub mask: u32,
    /// Those that are left out.
    pub ignored: u32,
    /// `FAN_MARK_IGNORED_SURV_MODIFY`, `FAN_MARK_EVICTABLE`, `FAN_MARK_IGNORE`.
    pub flags: u32,
}

/// A fanotify group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// As fanotify_init(2) was given them.
    pub flags: u32,
    /// `O_*` of the files that its events open.
    pub event_flags: u32,
    /// Its marks.
    pub marks: Vec<Mark>,
}

impl Group {
    /// That of a descriptor of this process, from its fdinfo (fs/notify/fdinfo.c).
    ///
    /// # Errors
    /// It is gone, or shows something that is not understood: a mark of a kind that is not known,
    /// or on a filesystem without file handles.
    pub fn read(pid: Pid, fd: Fd) -> io::Result<Self> {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"))?;
        Self::parse(&info).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn parse(info: &str) -> Option<Self> {
        let mut lines = info
            .lines()
            .filter_map(|line| line.strip_prefix("fanotify "))
            .map(Fields);
        let first = lines.next()?;
        Some(Self {
            flags: first.number("flags")?,
            event_flags: first.number("event-flags")?,
            marks: lines.map(Mark::parse).collect::<Option<_>>()?,
        })
    }
}

impl Mark {
    fn parse(fields: Fields<'_>) -> Option<Self> {
        let on = match (fields.long("ino"), fields.long("mnt_id")) {
            (Some(_), _) => On::Inode(fields.handle()?),
            (None, Some(id)) => On::Mount(id),
            (None, None) => On::Filesystem(fields.number("sdev")?),
        };
        Some(Self {
            on,
            mask: fields.number("mask")?,
            ignored: fields.number("ignored_mask")?,
            flags: fields.number("mflags")?,
        })
    }
}

/// fanotify_init(2), as if without `CAP_SYS_ADMIN` if `unprivileged`.
///
/// # Errors
/// As the system call: `EINVAL` for a flag that the kernel does not know.
pub fn init(flags: u32, event_flags: u32, unprivileged: bool) -> Result<OwnedFd, Errno> {
    // SAFETY: takes two integers and returns a new descriptor.
    let call = || owned(unsafe { libc::fanotify_init(flags, event_flags) });
    if unprivileged {
        without_capability(CAP_SYS_ADMIN, call)?
    } else {
        call()
    }
}

/// fanotify_mark(2) of `path`, by `FAN_MARK_*` flags.
///
/// # Errors
/// As the system call.
pub fn mark(group: &OwnedFd, flags: u32, mask: u32, path: &CStr) -> Result<(), Errno> {
    // SAFETY: `path` ends with a NUL; the rest are integers.
    Errno::result(unsafe {
        libc::fanotify_mark(
            group.as_raw_fd(),
            flags,
            mask.into(),
            libc::AT_FDCWD,
            path.as_ptr(),
        )
    })
    .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INFO: &str = "pos:\t0\nflags:\t02\nmnt_id:\t16\nino:\t18\n\
        fanotify flags:a12 event-flags:8000\n\
        fanotify ino:c sdev:800001 mflags:40 mask:8000020 ignored_mask:8 fhandle-bytes:8 \
        fhandle-type:1 f_handle:0c00000012d2a4f5\n\
        fanotify mnt_id:1f mflags:0 mask:1000 ignored_mask:0\n\
        fanotify sdev:19 mflags:0 mask:800 ignored_mask:0\n";

    #[test]
    fn groups_are_read_from_fdinfo() {
        let group = Group::parse(INFO).unwrap();
        assert_eq!((group.flags, group.event_flags), (0xa12, 0x8000));
        let [inode, mount, filesystem] = &group.marks[..] else {
            panic!("{:?}", group.marks);
        };
        assert!(matches!(&inode.on, On::Inode(handle) if handle.inode.ino == 12));
        let numbers = (inode.mask, inode.ignored, inode.flags);
        assert_eq!(numbers, (0x800_0020, 8, 0x40));
        assert_eq!((&mount.on, mount.mask), (&On::Mount(31), 0x1000));
        assert_eq!(filesystem.on, On::Filesystem(0x19));
    }

    #[test]
    fn no_mark_is_left_out() {
        for damaged in [
            INFO.replace("f_handle", "handle"),
            INFO.replace("mnt_id:1f", "id:1f"),
            INFO.replace("mflags:0", ""),
            INFO.replace("fanotify flags", "flags"),
        ] {
            assert_eq!(Group::parse(&damaged), None, "{damaged}");
        }
    }
}
