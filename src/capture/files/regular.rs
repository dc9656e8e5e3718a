//! Files that have a name.

use super::CollectError;
use super::borrow::place;
use super::pseudo::is_pseudo;
use super::refuse::O_PATH;
use crate::bpf::events::{FileHint, FileRec};
use crate::bpf::iter::File;
use crate::capture::names::leads_to;
use crate::capture::view::{Place, View};
use crate::model::frozen::{Blocker, FileHints, FileIdentity, PathRef};
use crate::model::ids::InodeId;
use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

fn link(file: &File) -> PathBuf {
    let (pid, fd) = place(file);
    PathBuf::from(format!("/proc/{pid}/fd/{fd}"))
}

fn failed(file: &File, call: &'static str) -> impl FnOnce(std::io::Error) -> CollectError {
    let (pid, fd) = place(file);
    move |source| CollectError::File {
        pid,
        fd,
        call,
        source,
    }
}

/// The file's name as its owner sees it.
///
/// # Errors
/// The link cannot be read.
pub fn name(file: &File) -> Result<Vec<u8>, CollectError> {
    let target = std::fs::read_link(link(file)).map_err(failed(file, "readlink"))?;
    let mut path = target.into_os_string().into_vec();
    if file.rec.nlink == 0
        && let Some(bare) = path.strip_suffix(b" (deleted)")
    {
        path = bare.to_vec();
    }
    Ok(path)
}

/// The file by its name; with inode number 0 where that says all.
///
/// # Errors
/// The link cannot be read, or leads through a mount of a namespace that is not carried.
pub fn path(file: &File, view: &View) -> Result<PathRef, CollectError> {
    Ok(located(file, view)?.0)
}

/// The file by its name, and where that leads.
fn located(file: &File, view: &View) -> Result<(PathRef, Place), CollectError> {
    let path = name(file)?;
    let place = place_of(file, &path, view)?;
    let ino = match is_pseudo(file.rec.magic) {
        true => 0,
        false => file.rec.ino,
    };
    let at = PathRef {
        path,
        inode: InodeId {
            dev: file.rec.dev,
            ino,
        },
        through: place.through,
    };
    Ok((at, place))
}

fn place_of(file: &File, path: &[u8], view: &View) -> Result<Place, CollectError> {
    let path = Path::new(OsStr::from_bytes(path));
    view.find(&link(file), path).ok_or_else(|| {
        let (pid, fd) = place(file);
        CollectError::Blocked(Blocker {
            pid,
            fd: Some(fd),
            object: format!("file {}", path.display()),
            reason: "it was opened through a mount that neither the application nor the machine \
                     has; close it before the update"
                .into(),
        })
    })
}

/// The file's name, size and time of change.
///
/// # Errors
/// It cannot be read.
pub fn identity(file: &File, view: &View) -> Result<FileIdentity, CollectError> {
    let (at, led) = located(file, view)?;
    if is_pseudo(file.rec.magic) {
        return Ok(FileIdentity {
            at,
            ..FileIdentity::default()
        });
    }
    let found = std::fs::metadata(link(file)).map_err(failed(file, "stat"))?;
    if !leads_to(&led.path, &found) {
        let name = Path::new(OsStr::from_bytes(&at.path));
        let (pid, fd) = place(file);
        return Err(CollectError::Blocked(Blocker {
            pid,
            fd: Some(fd),
            object: format!("file {}", name.display()),
            reason: "that name does not lead to it any more; try again".into(),
        }));
    }
    Ok(FileIdentity {
        at,
        size: found.size(),
        mtime: found.mtime() * 1_000_000_000 + found.mtime_nsec(),
    })
}

/// How an open file will be used.
pub(super) fn hints(rec: &FileRec) -> FileHints {
    // What is of the file itself is said through one that can be used.
    if rec.flags & O_PATH != 0 {
        return FileHints::default();
    }
    let has = |hint: u32| rec.hints & hint != 0;
    FileHints {
        sequential: has(FileHint::SEQUENTIAL),
        random: has(FileHint::RANDOM),
        noreuse: has(FileHint::NOREUSE),
        write_life: u8::try_from(rec.write_hint).unwrap_or(0),
    }
}
