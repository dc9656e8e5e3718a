//! Descriptors as /proc shows them.

use super::{Place, is_gone, number, place_of, value};
use crate::model::ids::{Fd, InodeId, Pid, Tid};
use std::collections::BTreeMap;
use std::fs;
use std::io;

/// A descriptor as /proc shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcFd {
    pub cloexec: bool,
    /// `O_*`, with the bit of `FD_CLOEXEC`.
    pub flags: u32,
    /// `socket`, `pipe`, `eventpoll`, …, or `file` for what has a path or no name of its own.
    pub kind: &'static str,
    /// What the entry in `fd` links to.
    pub link: String,
    pub place: Place,
    /// `tfd` lines of an epoll instance.
    pub items: Vec<ProcItem>,
    /// `inotify` lines of an inotify instance.
    pub watches: Vec<ProcWatch>,
}

/// An epoll item as fdinfo shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcItem {
    pub fd: Fd,
    pub events: u32,
    pub data: u64,
    pub ino: u64,
}

/// An inotify watch as fdinfo shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProcWatch {
    pub wd: i32,
    pub inode: InodeId,
    pub mask: u32,
}

/// Descriptors of a thread's table.
pub fn read(pid: Pid, tid: Tid) -> io::Result<BTreeMap<Fd, ProcFd>> {
    let base = format!("/proc/{pid}/task/{tid}");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("{base}/fd"))? {
        let entry = entry?;
        let Some(fd) = number(&entry) else { continue };
        let link = match fs::read_link(entry.path()) {
            Err(error) if is_gone(&error) => continue,
            link => link?,
        };
        let info = match fs::read_to_string(format!("{base}/fdinfo/{fd}")) {
            Err(error) if is_gone(&error) => continue,
            info => info?,
        };
        found.insert(Fd(fd), descriptor(link.to_string_lossy().into(), &info));
    }
    Ok(found)
}

pub const O_CLOEXEC: u32 = 0o2_000_000;

fn descriptor(link: String, info: &str) -> ProcFd {
    let flags = u32::from_str_radix(value(info, "flags:"), 8).unwrap_or(0);
    let lines = |key: &'static str| info.lines().filter_map(move |line| line.strip_prefix(key));
    ProcFd {
        cloexec: flags & O_CLOEXEC != 0,
        flags,
        kind: link_kind(&link),
        link,
        place: place_of(info),
        items: lines("tfd:").filter_map(item).collect(),
        watches: lines("inotify ").filter_map(watch).collect(),
    }
}

fn link_kind(link: &str) -> &'static str {
    const ANON: [&str; 10] = [
        "eventfd",
        "eventpoll",
        "timerfd",
        "signalfd",
        "inotify",
        "fanotify",
        "pidfd",
        "io_uring",
        "userfaultfd",
        "perf_event",
    ];
    if let Some(anon) = link.strip_prefix("anon_inode:") {
        let name = anon.trim_matches(['[', ']']);
        let known = ANON.iter().find(|known| **known == name);
        return known.copied().unwrap_or_else(|| {
            if name.starts_with("bpf") {
                "bpf"
            } else {
                "file"
            }
        });
    }
    match link.split_once(":[") {
        Some(("socket", _)) => "socket",
        Some(("pipe", _)) => "pipe",
        Some((name, _)) if !name.starts_with('/') => "namespace",
        _ if link.starts_with("/memfd:") => "memfd",
        _ => "file",
    }
}

/// The rest of a `tfd` line of fs/eventpoll.c: ` N events: X data: X  pos:N ino:X sdev:X`.
fn item(line: &str) -> Option<ProcItem> {
    let mut words = line.split_whitespace();
    let fd = Fd(words.next()?.parse().ok()?);
    let events = u32::from_str_radix(words.nth(1)?, 16).ok()?;
    let data = u64::from_str_radix(words.nth(1)?, 16).ok()?;
    let ino = words.find_map(|word| word.strip_prefix("ino:"))?;
    Some(ProcItem {
        fd,
        events,
        data,
        ino: u64::from_str_radix(ino, 16).ok()?,
    })
}

/// The rest of an `inotify` line of fs/notify/fdinfo.c: `wd:X ino:X sdev:X mask:X …`.
fn watch(line: &str) -> Option<ProcWatch> {
    let hex = |key| {
        let word = line.split(' ').find_map(|word| word.strip_prefix(key));
        u64::from_str_radix(word?, 16).ok()
    };
    let inode = InodeId {
        dev: u32::try_from(hex("sdev:")?).ok()?,
        ino: hex("ino:")?,
    };
    Some(ProcWatch {
        wd: i32::try_from(hex("wd:")?).ok()?,
        inode,
        mask: u32::try_from(hex("mask:")?).ok()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoll_descriptor_is_read_with_its_items() {
        let info = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1057\n\
                    tfd:       12 events:       19 data:        deadbeef  pos:0 ino:1f sdev:8\n";
        let fd = descriptor("anon_inode:[eventpoll]".into(), info);
        let item = ProcItem {
            fd: Fd(12),
            events: 0x19,
            data: 0xdead_beef,
            ino: 0x1f,
        };
        let expected = ProcFd {
            cloexec: true,
            flags: 0o2_000_002,
            kind: "eventpoll",
            link: "anon_inode:[eventpoll]".into(),
            place: Place {
                mount: 15,
                ino: 1057,
            },
            items: vec![item],
            watches: vec![],
        };
        assert_eq!(fd, expected);
    }

    #[test]
    fn an_inotify_descriptor_is_read_with_its_watches() {
        let info = "flags:\t00\nmnt_id:\t15\nino:\t7\ninotify wd:a ino:1f sdev:fe00001 \
                    mask:3ce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:00\n";
        let inode = InodeId {
            dev: 0xfe << 20 | 1,
            ino: 0x1f,
        };
        let watch = ProcWatch {
            wd: 10,
            inode,
            mask: 0x3ce,
        };
        assert_eq!(
            descriptor("anon_inode:inotify".into(), info).watches,
            [watch]
        );
    }

    #[test]
    fn links_tell_kinds() {
        let kinds = [
            "socket:[7]",
            "pipe:[8]",
            "/memfd:x (deleted)",
            "/a:[b",
            "anon_inode:inotify",
            "anon_inode:[pidfd]",
            "anon_inode:[landlock-ruleset]",
            "anon_inode:bpf-map",
            "mnt:[4026531841]",
        ];
        assert_eq!(
            kinds.map(link_kind),
            [
                "socket",
                "pipe",
                "memfd",
                "file",
                "inotify",
                "pidfd",
                "file",
                "bpf",
                "namespace"
            ]
        );
    }
}
