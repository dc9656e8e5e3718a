//! Files and directories that a restore finds by their names: each must lead to what has it.
//!
//! A name does not when the file was unlinked and has another link, when something was mounted
//! over it, or when a package was upgraded and the process runs the program of before.

use crate::bpf::events::{FileKind as Kind, VmaRec};
use crate::bpf::iter::{Files, Tasks, user_dev};
use crate::model::frozen::Blocker;
use crate::model::ids::{Fd, Pid};
use std::collections::HashSet;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Whether the path leads to the file that `found` is the status of.
#[must_use]
pub fn leads_to(path: &Path, found: &Metadata) -> bool {
    fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (found.dev(), found.ino()))
}

/// Where a link of procfs says that it leads, if that does not lead there; `None` also for what
/// has ended or was closed meanwhile.
fn astray(link: &Path) -> Option<(PathBuf, Metadata)> {
    let path = fs::read_link(link).ok()?;
    let found = fs::metadata(link).ok()?;
    (!leads_to(&path, &found)).then_some((path, found))
}

const REASON: &str = "that name leads elsewhere or nowhere, and a restore finds it by its name";

/// What of an application has a name that does not lead to it. A program that has none left is
/// carried as long as it is mapped.
#[must_use]
pub fn blockers(tasks: &Tasks, vmas: &[VmaRec], open: &Files) -> Vec<Blocker> {
    let mut found = Vec::new();
    let nameless: HashSet<_> = vmas
        .iter()
        .filter(|vma| vma.file != 0 && vma.nlink == 0)
        .map(|vma| (vma.tgid, user_dev(vma.dev), vma.ino))
        .collect();
    let alive = |pid: u32| tasks.threads.iter().any(|t| t.tid == pid && !t.is_zombie());
    for process in tasks.processes.iter().filter(|p| alive(p.pid)) {
        for (name, what) in [
            ("exe", "program"),
            ("cwd", "working directory"),
            ("root", "root directory"),
        ] {
            let link = PathBuf::from(format!("/proc/{}/{name}", process.pid));
            let Some((path, stat)) = astray(&link) else {
                continue;
            };
            if name == "exe" && nameless.contains(&(process.pid, stat.dev(), stat.ino())) {
                continue;
            }
            found.push(Blocker {
                pid: Pid(process.pid.cast_signed()),
                fd: None,
                object: format!("{what} {}", path.display()),
                reason: REASON.to_owned(),
            });
        }
    }
    let mut seen = HashSet::new();
    for file in &open.files {
        let named = match file.rec.kind {
            Kind::REGULAR => file.rec.nlink > 0 && !super::files::is_pseudo(file.rec.magic),
            Kind::DIRECTORY => file.rec.nlink > 0 && !super::files::is_pseudo(file.rec.magic),
            Kind::FIFO => true,
            _ => false,
        };
        if !named || !seen.insert(file.rec.file) {
            continue;
        }
        let link = PathBuf::from(format!("/proc/{}/fd/{}", file.rec.tgid, file.rec.fd));
        if let Some((path, _)) = astray(&link) {
            found.push(Blocker {
                pid: Pid(file.rec.tgid.cast_signed()),
                fd: Some(Fd(file.rec.fd.cast_signed())),
                object: format!("file {}", path.display()),
                reason: REASON.to_owned(),
            });
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn a_link_that_is_gone_is_missed() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let file = File::create(&first).unwrap();
        let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert!(astray(&link).is_none());
        fs::hard_link(&first, &second).unwrap();
        fs::remove_file(&first).unwrap();
        assert!(astray(&link).is_some());
        fs::write(&first, "another").unwrap();
        assert!(astray(&link).is_some());
        assert!(leads_to(&second, &file.metadata().unwrap()));
    }
}
