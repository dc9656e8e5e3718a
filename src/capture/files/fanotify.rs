//! fanotify groups, and the names of what they and inotify instances watch.

use super::CollectError;
use super::borrow::place;
use super::pseudo::is_pseudo;
use crate::bpf::events::FileHint;
use crate::bpf::iter::File;
use crate::capture::view::View;
use crate::model::frozen::{Blocker, Fanotify, FanotifyMark, MarkOn, PathRef};
use crate::model::ids::InodeId;
use crate::sys::fanotify::{Group, Mark, On, PERMISSION};
use crate::sys::inode::Names;
use nix::sys::statfs::statfs;
use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Why a group is not carried; `None` when it is.
pub fn refusal(file: &File) -> Option<String> {
    if file.rec.hints & FileHint::EVENTS != 0 {
        return Some(
            "events that it has not read, or not answered, are not carried; try again".to_owned(),
        );
    }
    let (pid, fd) = place(file);
    match Group::read(pid, fd) {
        // Whoever opens such a file waits for it, and this process would while it stands still.
        Ok(group) if group.marks.iter().any(|mark| mark.mask & PERMISSION != 0) => Some(
            "marks for events that it decides on (FAN_OPEN_PERM and the like) are not carried; \
             remove them before the update"
                .to_owned(),
        ),
        Ok(_) => None,
        // One that cannot be read any more has been closed.
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => Some(format!(
            "its marks cannot be read ({error}), which may be on a filesystem without file \
             handles; close it before the update"
        )),
    }
}

/// Reads a group, which must not have anything to tell.
///
/// # Errors
/// Something marked has no name, or a name that leads elsewhere.
pub fn read(file: &File, view: &View) -> Result<Fanotify, CollectError> {
    let (pid, fd) = place(file);
    let group = Group::read(pid, fd).map_err(|source| CollectError::File {
        pid,
        fd,
        call: "fdinfo",
        source,
    })?;
    let mut names = Names::of(pid);
    let marks = group.marks.iter().map(|mark| {
        let (on, at) = marked(file, mark, &mut names, view)?;
        Ok(FanotifyMark {
            on,
            at,
            mask: mark.mask,
            ignored: mark.ignored,
            flags: mark.flags,
        })
    });
    Ok(Fanotify {
        marks: marks.collect::<Result<_, CollectError>>()?,
        flags: group.flags,
        event_flags: group.event_flags,
        unprivileged: file.rec.hints & FileHint::UNPRIVILEGED != 0,
    })
}

fn marked(
    file: &File,
    mark: &Mark,
    names: &mut Names,
    view: &View,
) -> Result<(MarkOn, PathRef), CollectError> {
    let object = "fanotify mark of";
    match &mark.on {
        On::Inode(handle) => {
            let path = names.find(handle);
            let path = path.map_err(|error| astray(file, "fanotify mark", &error))?;
            let at = watched(file, path, handle.inode, view, object)?;
            Ok((MarkOn::Inode, at))
        }
        On::Mount(id) => {
            let at = root_of(view, |one, _| one == *id);
            let at = at.map_err(|error| astray(file, &format!("{object} mount {id}"), &error))?;
            Ok((MarkOn::Mount, at))
        }
        On::Filesystem(device) => {
            let device = format!("{}:{}", device >> 20, device & 0xf_ffff);
            let at = root_of(view, |_, majmin| majmin == device);
            let object = format!("{object} filesystem {device}");
            let at = at.map_err(|error| astray(file, &object, &error))?;
            Ok((MarkOn::Filesystem, at))
        }
    }
}

fn astray(file: &File, object: &str, error: &io::Error) -> CollectError {
    let (pid, fd) = place(file);
    CollectError::Blocked(Blocker {
        pid,
        fd: Some(fd),
        object: object.to_owned(),
        reason: format!(
            "what it is on has no name in the mount namespace of the application ({error}); \
             remove it before the update"
        ),
    })
}

/// The mount point of a mount that is to be seen; of several that are wanted, of the one that shows
/// most of its filesystem.
fn root_of(view: &View, wanted: impl Fn(u64, &str) -> bool) -> io::Result<PathRef> {
    let point = view.mount_point(wanted)?.ok_or(ErrorKind::NotFound)?;
    let found = fs::metadata(view.here(&point))?;
    let inode = InodeId {
        dev: 0,
        ino: found.ino(),
    };
    reference(point.into_os_string().into_vec(), inode, view)
}

/// What a watched inode is called, which must be what the name leads to; `object` says who watches.
///
/// # Errors
/// The name leads elsewhere in the mount namespace of the application.
pub fn watched(
    file: &File,
    path: Vec<u8>,
    inode: InodeId,
    view: &View,
    object: &str,
) -> Result<PathRef, CollectError> {
    let (pid, fd) = place(file);
    let name = String::from_utf8_lossy(&path).into_owned();
    let astray = || {
        CollectError::Blocked(Blocker {
            pid,
            fd: Some(fd),
            object: format!("{object} {name}"),
            reason: "that name leads elsewhere in its mount namespace".into(),
        })
    };
    if !view.leads_to(&path, inode) {
        return Err(astray());
    }
    reference(path, inode, view).map_err(|_| astray())
}

/// A file by its name, with inode number 0 where that says all.
fn reference(path: Vec<u8>, mut inode: InodeId, view: &View) -> io::Result<PathRef> {
    let name = Path::new(OsStr::from_bytes(&path));
    let here = view.here(name);
    let magic = statfs(&here)?.filesystem_type().0;
    if is_pseudo(u64::try_from(magic).unwrap_or(0)) {
        inode.ino = 0;
    }
    let through = view.find(&here, name).map(|place| place.through);
    Ok(PathRef {
        inode,
        through: through.unwrap_or_default(),
        path,
    })
}
