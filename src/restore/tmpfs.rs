//! What was in a tmpfs of an application's own.

use crate::model::frozen::{TmpfsEntry, TmpfsNode};
use nix::sys::stat::{Mode, SFlag, UtimensatFlags, mknod, utimensat};
use nix::sys::time::TimeSpec;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

/// Makes all entries in a new tmpfs, whose root `tree` is.
///
/// # Errors
/// It has not as much room, or the kernel refuses a call.
pub fn fill(tree: &OwnedFd, entries: &[TmpfsEntry]) -> io::Result<()> {
    let top = PathBuf::from(format!("/proc/self/fd/{}/", tree.as_raw_fd()));
    let at = |path: &[u8]| top.join(OsStr::from_bytes(path));
    for entry in entries {
        let path = at(&entry.path);
        match &entry.node {
            TmpfsNode::Directory if entry.path.is_empty() => {}
            TmpfsNode::Directory => fs::create_dir(&path)?,
            TmpfsNode::File(content) => fs::write(&path, content)?,
            TmpfsNode::Link(first) => fs::hard_link(at(first), &path)?,
            TmpfsNode::Symlink(to) => symlink(OsStr::from_bytes(to), &path)?,
            TmpfsNode::Special(kind, device) => {
                mknod(
                    &path,
                    SFlag::from_bits_truncate(*kind),
                    Mode::empty(),
                    *device,
                )?;
            }
        }
        if !matches!(entry.node, TmpfsNode::Link(_)) {
            lchown(&path, Some(entry.uid), Some(entry.gid))?;
        }
        if !matches!(entry.node, TmpfsNode::Link(_) | TmpfsNode::Symlink(_)) {
            // After the owner, a change of whom takes some bits away.
            fs::set_permissions(&path, fs::Permissions::from_mode(entry.mode))?;
        }
    }
    // Making what is in a directory changes its time.
    for entry in entries.iter().rev() {
        set_time(&at(&entry.path), entry)?;
    }
    Ok(())
}

fn set_time(path: &Path, entry: &TmpfsEntry) -> io::Result<()> {
    const SECOND: i64 = 1_000_000_000;
    let time = TimeSpec::new(
        entry.mtime.div_euclid(SECOND),
        entry.mtime.rem_euclid(SECOND),
    );
    // The root is reached by a link of procfs.
    let flags = match entry.path.is_empty() {
        true => UtimensatFlags::FollowSymlink,
        false => UtimensatFlags::NoFollowSymlink,
    };
    let unchanged = TimeSpec::UTIME_OMIT;
    utimensat(nix::fcntl::AT_FDCWD, path, &unchanged, &time, flags)?;
    Ok(())
}
