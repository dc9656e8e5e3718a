//! Files that have a name.

use super::CollectError;
use super::borrow::place;
use super::pseudo::is_pseudo;
use crate::bpf::iter::File;
use crate::capture::names::leads_to;
use crate::model::frozen::{Blocker, FileIdentity, PathRef};
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

/// The file's name as its owner sees it; with inode number 0 where the name says all.
///
/// # Errors
/// The link cannot be read.
pub fn path(file: &File) -> Result<PathRef, CollectError> {
    let target = std::fs::read_link(link(file)).map_err(failed(file, "readlink"))?;
    let mut path = target.into_os_string().into_vec();
    if file.rec.nlink == 0
        && let Some(bare) = path.strip_suffix(b" (deleted)")
    {
        path = bare.to_vec();
    }
    let ino = match is_pseudo(file.rec.magic) {
        true => 0,
        false => file.rec.ino,
    };
    Ok(PathRef {
        path,
        inode: InodeId {
            dev: file.rec.dev,
            ino,
        },
    })
}

/// The file's name, size and time of change.
///
/// # Errors
/// It cannot be read.
pub fn identity(file: &File) -> Result<FileIdentity, CollectError> {
    let at = path(file)?;
    if is_pseudo(file.rec.magic) {
        return Ok(FileIdentity {
            at,
            ..FileIdentity::default()
        });
    }
    let found = std::fs::metadata(link(file)).map_err(failed(file, "stat"))?;
    let name = Path::new(OsStr::from_bytes(&at.path));
    if !leads_to(name, &found) {
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
