//! From what the iterators found to what the model compares and absorbs.

use super::events::SockFlag;
use super::iter::{Detail, Files, Tasks};
use super::wire;
use crate::model::event::FileKind;
use crate::model::ids::{Fd, FilesId, OfdId, Pid, SockId};
use crate::model::snapshot::Snapshot;
use std::collections::BTreeMap;

/// Adds threads and the tables they use.
pub fn add_tasks(snapshot: &mut Snapshot, tasks: &Tasks) {
    let processes: BTreeMap<u32, _> = tasks
        .processes
        .iter()
        .map(|process| (process.pid, process))
        .collect();
    for thread in &tasks.threads {
        let process = processes.get(&thread.tgid).copied();
        let parent = process.map_or(0, |process| process.ppid);
        let info = wire::task_info(thread, Pid(parent.cast_signed()));
        // A table without descriptors is listed by nothing else.
        if let Some(files) = info.files {
            snapshot.tables.entry(files).or_default();
        }
        snapshot.tasks.push((info, thread.is_zombie()));
        if let Some(process) = process {
            snapshot.attrs.push(wire::task_attrs(thread, process));
        }
    }
}

/// The sockets made outside what [`Iterators::tell_foreign`](super::iter::Iterators) was told of.
pub fn foreign(files: &Files) -> impl Iterator<Item = SockId> {
    files.files.iter().filter_map(|file| match &file.detail {
        Detail::Socket(rec) if rec.flags & SockFlag::FOREIGN != 0 => Some(SockId(rec.sock)),
        _ => None,
    })
}

/// Adds descriptors with their sockets and epoll sets.
pub fn add_files(snapshot: &mut Snapshot, files: &Files) {
    let mut tables = BTreeMap::<FilesId, BTreeMap<Fd, _>>::new();
    let mut groups = BTreeMap::new();
    for file in &files.files {
        let sock = match &file.detail {
            Detail::Socket(rec) => {
                let sock = SockId(rec.sock);
                snapshot.sockets.insert(sock, wire::sock_info(rec));
                Some(sock)
            }
            _ => None,
        };
        let info = wire::ofd_info(&file.rec, sock);
        if info.kind == FileKind::Epoll {
            snapshot.epolls.entry(info.id).or_default();
        }
        if let Some(group) = info.group {
            groups.insert(info.id, group);
            snapshot.inotifies.entry(group).or_default();
        }
        let fd = Fd(file.rec.fd.cast_signed());
        // A table shared by processes is listed once for each.
        let table = tables.entry(FilesId(file.rec.files)).or_default();
        table.insert(fd, (fd, info, file.rec.cloexec != 0));
    }
    for (id, fds) in tables {
        snapshot.tables.insert(id, fds.into_values().collect());
    }
    for rec in &files.watches {
        let group = groups.get(&OfdId(rec.group));
        if let Some(watches) = group.and_then(|group| snapshot.inotifies.get_mut(group)) {
            let (wd, watch) = wire::watch(rec);
            watches.insert(wd, watch);
        }
    }
    for item in &files.epoll_items {
        let items = snapshot.epolls.entry(OfdId(item.epoll)).or_default();
        items.push((
            OfdId(item.target),
            Fd(item.fd.cast_signed()),
            item.events,
            item.data,
        ));
    }
}
