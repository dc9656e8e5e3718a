//! What the kernel says, for the audit: nothing here comes from our own BPF programs.

mod diag;
pub(super) mod fds;
pub(super) mod maps;
pub(super) mod sockets;

use crate::model::event::Ids;
use crate::model::ids::{Pid, Tid};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use procfs::ProcError;
use procfs::process::Process;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// A thread as /proc shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ProcAttrs {
    pub parent: Pid,
    /// Without securebits.
    pub ids: Ids,
    /// `None` once it gave its directories up.
    pub umask: Option<u32>,
}

/// An inode on a mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Place {
    pub mount: u64,
    pub ino: u64,
}

/// Whether an error says that what was read went away.
pub(super) fn is_gone(error: &io::Error) -> bool {
    const ESRCH: i32 = Errno::ESRCH as i32;
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH)
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
        let Some(tid) = number(&entry) else { continue };
        let comm = match fs::read(entry.path().join("comm")) {
            Err(error) if is_gone(&error) => continue,
            comm => comm?,
        };
        let comm = String::from_utf8_lossy(&comm);
        let comm = comm.strip_suffix('\n').unwrap_or(&comm).to_owned();
        found.insert(Tid(tid), comm);
    }
    Ok(found)
}

/// The number that an entry of /proc has for a name.
fn number(entry: &fs::DirEntry) -> Option<i32> {
    entry.file_name().to_str()?.parse().ok()
}

/// Credentials, session and parent of a thread.
pub(super) fn attrs(pid: Pid, tid: Tid) -> io::Result<ProcAttrs> {
    let failed = |error| match error {
        ProcError::NotFound(_) => io::Error::from(io::ErrorKind::NotFound),
        ProcError::Io(error, _) => error,
        error => io::Error::other(error),
    };
    let task = Process::new(pid.0).and_then(|process| process.task_from_tid(tid.0));
    let task = task.map_err(failed)?;
    let (stat, status) = (task.stat().map_err(failed)?, task.status().map_err(failed)?);
    let ids = Ids {
        session: Pid(stat.session),
        group: Pid(stat.pgrp),
        uids: [status.ruid, status.euid, status.suid, status.fuid],
        gids: [status.rgid, status.egid, status.sgid, status.fgid],
        caps: [
            status.capinh,
            status.capprm,
            status.capeff,
            status.capbnd.unwrap_or_default(),
            status.capamb.unwrap_or_default(),
        ],
        securebits: 0,
    };
    Ok(ProcAttrs {
        parent: Pid(status.ppid),
        ids,
        umask: status.umask,
    })
}

/// A directory of a thread: `cwd` or `root`.
pub(super) fn place(pid: Pid, tid: Tid, name: &str) -> io::Result<Place> {
    place_at(Path::new(&format!("/proc/{pid}/task/{tid}/{name}")))
}

/// What a path leads to. What stat(2) says would be the filesystem's own view, not the inode
/// that the kernel holds.
pub(super) fn place_at(path: &Path) -> io::Result<Place> {
    let fd = open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
    let info = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd()))?;
    Ok(place_of(&info))
}

/// The value of a line of fdinfo.
fn value<'a>(info: &'a str, key: &str) -> &'a str {
    let line = info.lines().find_map(|line| line.strip_prefix(key));
    line.map_or("", str::trim)
}

fn place_of(info: &str) -> Place {
    Place {
        mount: value(info, "mnt_id:").parse().unwrap_or_default(),
        ino: value(info, "ino:").parse().unwrap_or_default(),
    }
}

/// Mounts that a process can see with the devices of their filesystems.
pub(super) fn mounts(process: &str) -> BTreeMap<u64, u32> {
    let text = fs::read_to_string(format!("/proc/{process}/mountinfo")).unwrap_or_default();
    text.lines().filter_map(mount).collect()
}

/// `36 35 98:0 /root /mount options - type source options`
fn mount(line: &str) -> Option<(u64, u32)> {
    let mut words = line.split(' ');
    let id = words.next()?.parse().ok()?;
    let (major, minor) = words.nth(1)?.split_once(':')?;
    let (major, minor): (u32, u32) = (major.parse().ok()?, minor.parse().ok()?);
    Some((id, major << 20 | minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_name_their_devices() {
        let line = "36 35 98:3 / /mnt rw,noatime shared:1 - ext4 /dev/root rw";
        assert_eq!(mount(line), Some((36, 98 << 20 | 3)));
    }

    #[test]
    fn our_own_attributes_are_read() {
        let pid = Pid(std::process::id().cast_signed());
        let attrs = attrs(pid, pid.leader()).expect("we live");
        assert_eq!(attrs.ids.uids[1], nix::unistd::geteuid().as_raw());
        assert_eq!(attrs.parent, Pid(nix::unistd::getppid().as_raw()));
        let here = place(pid, pid.leader(), "cwd").expect("we live");
        assert_ne!(here, Place::default());
    }
}
