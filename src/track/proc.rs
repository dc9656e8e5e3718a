//! What /proc says, for the audit: nothing here comes from our own BPF programs.

use crate::model::ids::{Fd, Pid, Tid};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::Path;

/// A descriptor as /proc shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProcFd {
    pub cloexec: bool,
    /// `socket`, `pipe`, `eventpoll`, …, or `file` for what has a path.
    pub kind: String,
    pub ino: u64,
    /// `tfd` lines of an epoll instance.
    pub items: Vec<ProcItem>,
}

/// An epoll item as fdinfo shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ProcItem {
    pub fd: Fd,
    pub events: u32,
    pub data: u64,
    pub ino: u64,
}

/// A socket as /proc/net shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum ProcSocket {
    Inet {
        local: (Vec<u8>, u16),
        remote: (Vec<u8>, u16),
        state: u8,
    },
    Unix {
        listening: bool,
        name: Vec<u8>,
    },
}

/// The processes in these cgroups; those whose threads are all dead are not listed.
pub(super) fn processes<'a>(cgroups: impl Iterator<Item = &'a Path>) -> BTreeSet<Pid> {
    let mut found = BTreeSet::new();
    for cgroup in cgroups {
        // A cgroup that went away meanwhile holds nobody.
        let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        found.extend(text.lines().filter_map(|line| line.parse().ok()).map(Pid));
    }
    found
}

/// Threads of a process with their names; zombies included.
pub(super) fn threads(pid: Pid) -> io::Result<BTreeMap<Tid, String>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let entry = entry?;
        let Some(tid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let comm = fs::read(entry.path().join("comm"))?;
        let comm = String::from_utf8_lossy(&comm);
        found.insert(
            Tid(tid),
            comm.strip_suffix('\n').unwrap_or(&comm).to_owned(),
        );
    }
    Ok(found)
}

/// Descriptors of a thread's table.
pub(super) fn descriptors(pid: Pid, tid: Tid) -> io::Result<BTreeMap<Fd, ProcFd>> {
    let base = format!("/proc/{pid}/task/{tid}");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(format!("{base}/fd"))? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(fd) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        let link = match fs::read_link(entry.path()) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            link => link?,
        };
        let info = match fs::read_to_string(format!("{base}/fdinfo/{fd}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            info => info?,
        };
        found.insert(Fd(fd), descriptor(&link.to_string_lossy(), &info));
    }
    Ok(found)
}

const O_CLOEXEC: u32 = 0o2_000_000;

fn descriptor(link: &str, info: &str) -> ProcFd {
    let value = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key));
        line.map_or("", str::trim)
    };
    let flags = u32::from_str_radix(value("flags:"), 8).unwrap_or(0);
    let items = info
        .lines()
        .filter_map(|line| item(line.strip_prefix("tfd:")?))
        .collect();
    ProcFd {
        cloexec: flags & O_CLOEXEC != 0,
        kind: link_kind(link),
        ino: value("ino:").parse().unwrap_or(0),
        items,
    }
}

fn link_kind(link: &str) -> String {
    if let Some(anon) = link.strip_prefix("anon_inode:") {
        return anon.trim_matches(['[', ']']).to_owned();
    }
    match link.split_once(":[") {
        Some((kind, _)) if !kind.starts_with('/') => kind.to_owned(),
        _ if link.starts_with("/memfd:") => "memfd".to_owned(),
        _ => "file".to_owned(),
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

/// Sockets of a process's network namespace by inode.
pub(super) fn sockets(pid: Pid) -> BTreeMap<u64, ProcSocket> {
    let mut found = BTreeMap::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        // IPv6 may be absent.
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        found.extend(text.lines().skip(1).filter_map(inet));
    }
    let text = fs::read(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    found.extend(text.split(|byte| *byte == b'\n').skip(1).filter_map(unix));
    found
}

fn inet(line: &str) -> Option<(u64, ProcSocket)> {
    let mut words = line.split_whitespace().skip(1);
    let local = endpoint(words.next()?)?;
    let remote = endpoint(words.next()?)?;
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    let inode: u64 = words.nth(5)?.parse().ok()?;
    (inode != 0).then_some((
        inode,
        ProcSocket::Inet {
            local,
            remote,
            state,
        },
    ))
}

/// `0100007F:1F90`: each group of eight digits is a word of the address in memory order.
fn endpoint(text: &str) -> Option<(Vec<u8>, u16)> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = Vec::new();
    for group in address.as_bytes().chunks(8) {
        let group = std::str::from_utf8(group).ok()?;
        bytes.extend(u32::from_str_radix(group, 16).ok()?.to_ne_bytes());
    }
    Some((bytes, u16::from_str_radix(port, 16).ok()?))
}

/// `Num RefCount Protocol Flags Type St Inode Path` of net/unix/af_unix.c.
fn unix(line: &[u8]) -> Option<(u64, ProcSocket)> {
    const ACCEPTING: u32 = 1 << 16;
    let text = String::from_utf8_lossy(line);
    let mut words = text.split_whitespace();
    let flags = u32::from_str_radix(words.nth(3)?, 16).ok()?;
    let inode = words.nth(2)?.parse().ok()?;
    let name = words.next().unwrap_or_default().as_bytes().to_vec();
    Some((
        inode,
        ProcSocket::Unix {
            listening: flags & ACCEPTING != 0,
            name,
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoll_descriptor_is_read_with_its_items() {
        let info = "pos:\t0\nflags:\t02000002\nmnt_id:\t15\nino:\t1057\n\
                    tfd:       12 events:       19 data:        deadbeef  pos:0 ino:1f sdev:8\n";
        let fd = descriptor("anon_inode:[eventpoll]", info);
        let item = ProcItem {
            fd: Fd(12),
            events: 0x19,
            data: 0xdead_beef,
            ino: 0x1f,
        };
        let expected = ProcFd {
            cloexec: true,
            kind: "eventpoll".into(),
            ino: 1057,
            items: vec![item],
        };
        assert_eq!(fd, expected);
    }

    #[test]
    fn links_tell_kinds() {
        let kinds = [
            "socket:[7]",
            "pipe:[8]",
            "/memfd:x (deleted)",
            "/a:[b",
            "anon_inode:inotify",
        ];
        assert_eq!(
            kinds.map(link_kind),
            ["socket", "pipe", "memfd", "file", "inotify"]
        );
    }

    #[test]
    fn a_tcp_line_is_read() {
        let line = "   0: 0100007F:18EB 00000000:0000 0A 00000000:00000000 00:00000000 \
                    00000000     0        0 21 1 00000000 100 0 0 10 0";
        let local = (vec![127, 0, 0, 1], 6379);
        let remote = (vec![0; 4], 0);
        assert_eq!(
            inet(line),
            Some((
                21,
                ProcSocket::Inet {
                    local,
                    remote,
                    state: 10
                }
            ))
        );
    }

    #[test]
    fn an_abstract_listener_is_read() {
        let line = b"0000000000000000: 00000002 00000000 00010000 0001 01 1234 @name";
        let socket = ProcSocket::Unix {
            listening: true,
            name: b"@name".to_vec(),
        };
        assert_eq!(unix(line), Some((1234, socket)));
    }
}
