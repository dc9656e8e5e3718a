//! Files and directories that a restore finds by their names: each must lead to what has it.
//!
//! A name does not when the file was unlinked and has another link, when something was mounted
//! over it, or when a package was upgraded and the process runs the program of before. The name of
//! a Unix socket leads elsewhere when it is a relative one.

use super::files::is_pseudo;
use super::view::View;
use crate::bpf::events::{FileKind as Kind, VmaRec};
use crate::bpf::iter::{Detail, Files, Tasks, user_dev};
use crate::model::frozen::Blocker;
use crate::model::ids::{Fd, Pid};
use nix::libc;
use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Whether the path leads to the file that `found` is the status of.
#[must_use]
pub fn leads_to(path: &Path, found: &Metadata) -> bool {
    fs::metadata(path).is_ok_and(|named| (named.dev(), named.ino()) == (found.dev(), found.ino()))
}

/// Where a link of procfs says that it leads, if that does not lead there; `None` also for what
/// has ended or was closed meanwhile.
fn astray(link: &Path, view: &View) -> Option<(PathBuf, Metadata)> {
    let path = fs::read_link(link).ok()?;
    let found = fs::metadata(link).ok()?;
    let place = view.find(link, &path);
    let leads = place.is_some_and(|place| leads_to(&place.path, &found));
    (!leads).then_some((path, found))
}

const REASON: &str = "that name leads elsewhere or nowhere, and a restore finds it by its name";

/// What of an application has a name that does not lead to it. A program that has none left is
/// carried as long as it is mapped.
#[must_use]
pub fn blockers(tasks: &Tasks, vmas: &[VmaRec], open: &Files, view: &View) -> Vec<Blocker> {
    let mut found = processes(tasks, vmas, view);
    found.extend(files(open, view));
    found.extend(unix_sockets(open, view));
    found
}

/// A zombie has none of these links.
fn processes(tasks: &Tasks, vmas: &[VmaRec], view: &View) -> Vec<Blocker> {
    let mut found = Vec::new();
    let nameless: HashSet<_> = vmas
        .iter()
        .filter(|vma| vma.file != 0 && vma.nlink == 0)
        .map(|vma| (vma.tgid, user_dev(vma.dev), vma.ino))
        .collect();
    for process in &tasks.processes {
        for (name, what) in [
            ("exe", "program"),
            ("cwd", "working directory"),
            ("root", "root directory"),
        ] {
            let link = PathBuf::from(format!("/proc/{}/{name}", process.pid));
            let Some((path, stat)) = astray(&link, view) else {
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
    found
}

fn files(open: &Files, view: &View) -> Vec<Blocker> {
    let mut found = Vec::new();
    let mut seen = HashSet::new();
    for file in &open.files {
        let named = match file.rec.kind {
            Kind::REGULAR | Kind::DIRECTORY => file.rec.nlink > 0 && !is_pseudo(file.rec.magic),
            Kind::FIFO => true,
            _ => false,
        };
        if !named || !seen.insert(file.rec.file) {
            continue;
        }
        let link = PathBuf::from(format!("/proc/{}/fd/{}", file.rec.tgid, file.rec.fd));
        if let Some((path, _)) = astray(&link, view) {
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

/// Unix sockets with names that a restore would bind somewhere else: relative ones, and those
/// below another root directory.
fn unix_sockets(open: &Files, view: &View) -> Vec<Blocker> {
    let sockets: Vec<_> = open
        .files
        .iter()
        .filter_map(|file| match &file.detail {
            Detail::Socket(sock) if i32::from(sock.family) == libc::AF_UNIX => Some((file, sock)),
            _ => None,
        })
        .collect();
    if sockets.is_empty() {
        return Vec::new();
    }
    let table = fs::read("/proc/net/unix").unwrap_or_default();
    let names = bound(&table);
    let mut roots: HashMap<u32, PathBuf> = HashMap::new();
    let mut found = Vec::new();
    for (file, sock) in sockets {
        let Some(name) = names.get(&sock.ino) else {
            continue;
        };
        let pid = file.rec.tgid;
        let root = roots
            .entry(pid)
            .or_insert_with(|| fs::read_link(format!("/proc/{pid}/root")).unwrap_or_default());
        let reason = match name.strip_prefix("/") {
            Err(_) => "a relative name, which is not carried yet",
            // It may have got its name before it changed its root directory.
            Ok(below) if *root != Path::new("/") && view.here(&root.join(below)).exists() => {
                "a name below another root directory, which is not carried yet"
            }
            Ok(_) => continue,
        };
        found.push(Blocker {
            pid: Pid(pid.cast_signed()),
            fd: Some(Fd(file.rec.fd.cast_signed())),
            object: format!("Unix socket {}", name.display()),
            reason: reason.to_owned(),
        });
    }
    found
}

/// The paths in /proc/net/unix by the inode numbers of their sockets; `@` begins no path.
fn bound(table: &[u8]) -> HashMap<u64, PathBuf> {
    fn cut(text: &[u8]) -> Option<(&[u8], &[u8])> {
        let at = text.iter().position(|byte| *byte == b' ')?;
        Some((&text[..at], &text[at + 1..]))
    }
    /// Before the inode number, which blanks stand in front of.
    const COLUMNS: usize = 6;
    let line = |line| {
        let mut rest = line;
        for _ in 0..COLUMNS {
            (_, rest) = cut(rest)?;
        }
        let (inode, name) = cut(rest.trim_ascii_start())?;
        let inode = std::str::from_utf8(inode).ok()?.parse().ok()?;
        (!name.starts_with(b"@")).then(|| (inode, PathBuf::from(OsStr::from_bytes(name))))
    };
    let lines = table.split(|byte| *byte == b'\n');
    lines.skip(1).filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;

    #[test]
    fn bound_sockets_are_listed_with_their_names() {
        let table = b"Num       RefCount Protocol Flags    Type St Inode Path\n\
            ffff8d0c: 00000002 00000000 00010000 0001 01   812 /run/a b.sock\n\
            ffff8d0d: 00000003 00000000 00000000 0001 03 12345\n\
            ffff8d0e: 00000002 00000000 00010000 0001 01 13 private/x\n\
            ffff8d0f: 00000002 00000000 00010000 0001 01 14 @abstract\n";
        let wanted = [(812, "/run/a b.sock"), (13, "private/x")];
        assert_eq!(
            bound(table),
            HashMap::from(wanted.map(|(inode, name)| (inode, PathBuf::from(name))))
        );
    }

    #[test]
    fn a_link_that_is_gone_is_missed() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let file = File::create(&first).unwrap();
        let link = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert!(astray(&link, &View::default()).is_none());
        fs::hard_link(&first, &second).unwrap();
        fs::remove_file(&first).unwrap();
        assert!(astray(&link, &View::default()).is_some());
        fs::write(&first, "another").unwrap();
        assert!(astray(&link, &View::default()).is_some());
        assert!(leads_to(&second, &file.metadata().unwrap()));
    }
}
