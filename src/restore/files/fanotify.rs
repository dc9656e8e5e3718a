//! fanotify groups.

use super::error::{FilesError, call};
use super::regular::watched;
use crate::model::frozen::{Fanotify, FanotifyMark, MarkOn};
use crate::sys::fanotify;
use nix::libc;
use std::os::fd::OwnedFd;

/// Makes a group without marks, see [`mark`].
///
/// # Errors
/// The kernel refuses.
pub fn make(group: &Fanotify) -> Result<OwnedFd, FilesError> {
    let fd = fanotify::init(group.flags, group.event_flags, group.unprivileged);
    fd.map_err(call("fanotify", "fanotify_init"))
}

/// Gives a group its marks.
///
/// # Errors
/// What was marked is gone or something else, or the kernel refuses.
pub fn mark(group: &OwnedFd, marks: &[FanotifyMark]) -> Result<(), FilesError> {
    for mark in marks {
        let object = format!(
            "fanotify mark of {}",
            String::from_utf8_lossy(&mark.at.path)
        );
        let path = watched(&mark.at, &object)?;
        for (flags, mask) in steps(mark) {
            fanotify::mark(group, flags, mask, &path).map_err(call(&object, "fanotify_mark"))?;
        }
    }
    Ok(())
}

/// The flags and masks of the calls that make a mark.
fn steps(mark: &FanotifyMark) -> impl Iterator<Item = (u32, u32)> {
    let on = match mark.on {
        MarkOn::Inode => libc::FAN_MARK_INODE,
        MarkOn::Mount => libc::FAN_MARK_MOUNT,
        MarkOn::Filesystem => libc::FAN_MARK_FILESYSTEM,
    };
    let all = libc::FAN_MARK_ADD | on | mark.flags & libc::FAN_MARK_EVICTABLE;
    // In place of the former, by which flags among the events mean nothing.
    let kind = match mark.flags & libc::FAN_MARK_IGNORE {
        0 => libc::FAN_MARK_IGNORED_MASK,
        newer => newer,
    };
    let ignore = all | kind | mark.flags & libc::FAN_MARK_IGNORED_SURV_MODIFY;
    let steps = [(all, mark.mask), (ignore, mark.ignored)];
    steps.into_iter().filter(|(_, mask)| *mask != 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::PathRef;

    #[test]
    fn what_is_ignored_is_said_as_it_was() {
        let mut mark = FanotifyMark {
            on: MarkOn::Mount,
            at: PathRef::default(),
            mask: 0,
            ignored: 8,
            flags: libc::FAN_MARK_IGNORED_SURV_MODIFY,
        };
        let made = |mark: &FanotifyMark| steps(mark).collect::<Vec<_>>();
        assert_eq!(made(&mark), [(0x01 | 0x10 | 0x20 | 0x40, 8)]);
        mark.flags |= libc::FAN_MARK_IGNORE;
        mark.mask = 0x20;
        assert_eq!(made(&mark), [(0x11, 0x20), (0x11 | 0x400 | 0x40, 8)]);
        mark.flags = libc::FAN_MARK_EVICTABLE;
        mark.on = MarkOn::Inode;
        assert_eq!(made(&mark), [(0x201, 0x20), (0x221, 8)]);
    }
}
