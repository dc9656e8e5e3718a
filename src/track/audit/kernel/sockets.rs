//! Sockets as /proc/net and sock_diag(7) show them.

use super::diag::{self, Diag};
use crate::model::ids::Pid;
use crate::sys::process::apart;
use nix::sched::{CloneFlags, setns};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::rc::Rc;

/// A socket as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcSocket {
    pub end: End,
    /// What only sock_diag(7) says; its module may be missing.
    pub diag: Option<Diag>,
}

/// A socket as /proc/net shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
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

/// The sockets of all network namespaces that were asked for, each read once.
#[derive(Debug, Default)]
pub struct Namespaces(BTreeMap<String, Rc<BTreeMap<u64, ProcSocket>>>);

impl Namespaces {
    /// Sockets of a process's network namespace by inode.
    pub fn of(&mut self, pid: Pid) -> Rc<BTreeMap<u64, ProcSocket>> {
        let name = |process: &str| {
            let link = fs::read_link(format!("/proc/{process}/ns/net")).unwrap_or_default();
            link.to_string_lossy().into_owned()
        };
        let namespace = name(&pid.to_string());
        let known = self.0.entry(namespace).or_insert_with_key(|namespace| {
            let diag = if *namespace == name("thread-self") {
                diag::dump()
            } else {
                dump_in(pid)
            };
            let diag = diag.unwrap_or_else(|error| {
                tracing::debug!(%error, "sock_diag");
                BTreeMap::new()
            });
            Rc::new(sockets(pid, &diag))
        });
        Rc::clone(known)
    }
}

/// In the network namespace of a process.
fn dump_in(pid: Pid) -> io::Result<BTreeMap<u64, Diag>> {
    let namespace = File::open(format!("/proc/{pid}/ns/net"))?;
    let dump = || {
        setns(&namespace, CloneFlags::CLONE_NEWNET)?;
        diag::dump()
    };
    apart(dump)
}

fn sockets(pid: Pid, diag: &BTreeMap<u64, Diag>) -> BTreeMap<u64, ProcSocket> {
    let mut found = BTreeMap::new();
    for table in ["tcp", "tcp6", "udp", "udp6", "udplite", "udplite6"] {
        // IPv6 and UDP-Lite may be absent.
        let text = fs::read_to_string(format!("/proc/{pid}/net/{table}")).unwrap_or_default();
        found.extend(text.lines().skip(1).filter_map(inet));
    }
    let text = fs::read(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    found.extend(text.split(|byte| *byte == b'\n').skip(1).filter_map(unix));
    let whole = |(ino, end)| {
        let diag = diag.get(&ino).copied();
        (ino, ProcSocket { end, diag })
    };
    found.into_iter().map(whole).collect()
}

fn inet(line: &str) -> Option<(u64, End)> {
    let mut words = line.split_whitespace().skip(1);
    let local = endpoint(words.next()?)?;
    let remote = endpoint(words.next()?)?;
    let state = u8::from_str_radix(words.next()?, 16).ok()?;
    let inode: u64 = words.nth(5)?.parse().ok()?;
    (inode != 0).then_some((
        inode,
        End::Inet {
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

/// `Num RefCount Protocol Flags Type St Inode Path` of net/unix/af_unix.c; the path may hold
/// any byte, NUL shown as @.
fn unix(line: &[u8]) -> Option<(u64, End)> {
    const ACCEPTING: u32 = 1 << 16;
    let mut rest = line;
    let mut words = Vec::new();
    while words.len() < 7 {
        rest = rest.trim_ascii_start();
        let end = rest
            .iter()
            .position(|byte| *byte == b' ')
            .unwrap_or(rest.len());
        words.push(std::str::from_utf8(&rest[..end]).ok()?);
        rest = &rest[end..];
    }
    let flags = u32::from_str_radix(words[3], 16).ok()?;
    let inode = words[6].parse().ok()?;
    let name = rest.get(1..).unwrap_or_default().to_vec();
    Some((
        inode,
        End::Unix {
            listening: flags & ACCEPTING != 0,
            name,
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

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
                End::Inet {
                    local,
                    remote,
                    state: 10
                }
            ))
        );
    }

    #[test]
    fn an_abstract_listener_is_read() {
        let line = b"0000000000000000: 00000002 00000000 00010000 0001 01  1234 @na me";
        let socket = End::Unix {
            listening: true,
            name: b"@na me".to_vec(),
        };
        assert_eq!(unix(line), Some((1234, socket)));
    }
}
