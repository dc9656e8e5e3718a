//! Merging what was read from the kernel into a state that events kept changing.
//!
//! A reading names the last event number before it began. Everything it says is
//! as true as an event of that number: what events said later stands. Replaying
//! the events since then afterwards gives the state as if it had always been known.

use super::apply::{Anomaly, Step, apply};
use super::event::{Event, FileKind, Object, OfdInfo, SockInfo, TaskAttrs, TaskInfo, Vma, Watch};
use super::ids::{Fd, FilesId, GroupId, MmId, OfdId, SockId, TaskId};
use super::state::{EpollItem, State, Table, Trust};
use std::collections::{BTreeMap, BTreeSet};

/// Objects as they were read, each complete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Every event up to this number had taken effect when reading began.
    pub seq: u64,
    /// Whether `tasks` are all that are tracked, rather than some.
    pub all_tasks: bool,
    /// Threads; `true` for zombies.
    pub tasks: Vec<(TaskInfo, bool)>,
    /// The rest of these threads.
    pub attrs: Vec<TaskAttrs>,
    /// Tables with all their descriptors.
    pub tables: BTreeMap<FilesId, Vec<(Fd, OfdInfo, bool)>>,
    /// Sockets that `tables` refer to.
    pub sockets: BTreeMap<SockId, SockInfo>,
    /// Epoll instances that `tables` refer to, with all items: target, number, events, data.
    pub epolls: BTreeMap<OfdId, Vec<(OfdId, Fd, u32, u64)>>,
    /// Inotify instances that `tables` refer to, with all watches.
    pub inotifies: BTreeMap<GroupId, BTreeMap<i32, Watch>>,
    /// Address spaces with their mappings.
    pub mms: BTreeMap<MmId, Vec<Vma>>,
}

/// Merges a reading. The events numbered above `snapshot.seq` that were applied
/// already must be applied once more afterwards.
///
/// Reading takes time, so what it says of later objects may contradict what is known of
/// earlier ones: it is right, and the events in between are still to come.
pub fn absorb(state: &mut State, snapshot: &Snapshot) {
    let mut step = Step {
        state,
        seq: snapshot.seq,
        anomalies: Vec::new(),
    };
    let seq = snapshot.seq;
    if snapshot.all_tasks {
        let read: BTreeSet<TaskId> = snapshot.tasks.iter().map(|(info, _)| info.task).collect();
        let old = step
            .state
            .tasks
            .iter()
            .filter(|(id, t)| t.seq <= seq && !read.contains(id));
        let gone: Vec<TaskId> = old.map(|(id, _)| *id).collect();
        for id in gone {
            step.forget_task(id);
        }
    }
    // Threads first: a table goes with the last thread that leaves it.
    for (info, zombie) in &snapshot.tasks {
        step.absorb_task(info, *zombie);
    }
    for attrs in &snapshot.attrs {
        if let Some(task) = step.state.tasks.get_mut(&attrs.task)
            && task.seq <= seq
        {
            task.seq = seq;
            step.set_attrs(attrs);
        }
    }
    for (files, fds) in &snapshot.tables {
        step.absorb_table(*files, fds);
    }
    for (id, info) in &snapshot.sockets {
        if let Some(socket) = step.state.sockets.get_mut(id)
            && (socket.seq <= seq || socket.trust == Trust::Suspect)
        {
            socket.seq = seq;
            socket.info.clone_from(info);
            step.state.set_trust(Object::Socket(*id), Trust::Verified);
        }
    }
    for (id, items) in &snapshot.epolls {
        // One that is verified and has news was made, or seen empty, since.
        if let Some(epoll) = step.state.epolls.get_mut(id)
            && (epoll.seq <= seq || epoll.trust == Trust::Suspect)
        {
            let item = |(target, fd, events, data): &(OfdId, Fd, u32, u64)| {
                (
                    (*target, *fd),
                    EpollItem {
                        seq,
                        events: *events,
                        data: *data,
                    },
                )
            };
            epoll.seq = seq;
            epoll.items = items.iter().map(item).collect();
            step.state.set_trust(Object::Epoll(*id), Trust::Verified);
        }
    }
    for (id, watches) in &snapshot.inotifies {
        if let Some(inotify) = step.state.inotifies.get_mut(id)
            && (inotify.seq <= seq || inotify.trust == Trust::Suspect)
        {
            inotify.seq = seq;
            let old = std::mem::replace(&mut inotify.watches, watches.clone());
            let inode = |watch: &Watch| watch.inode;
            inotify
                .paths
                .retain(|wd, _| watches.get(wd).map(inode) == old.get(wd).map(inode));
            step.state.set_trust(Object::Inotify(*id), Trust::Verified);
        }
    }
    for (id, vmas) in &snapshot.mms {
        if let Some(mm) = step.state.mms.get_mut(id) {
            mm.vmas = Some(vmas.clone());
            step.state.set_trust(Object::Mm(*id), Trust::Verified);
        }
    }
    if snapshot.all_tasks {
        step.forget_unused();
    }
    step.state.seq = step.state.seq.max(seq);
}

/// Applies events again that were applied before, such as those since a reading.
///
/// A repeated copy of a table that is gone by now makes it once more, and the
/// thread that used it, being further on, does not take it: it goes again here.
pub fn replay(state: &mut State, events: &[Event]) -> Vec<Anomaly> {
    let unused = |state: &State| -> BTreeSet<FilesId> {
        let unused = state
            .tables
            .iter()
            .filter(|(_, table)| table.users.is_empty());
        unused.map(|(id, _)| *id).collect()
    };
    let before = unused(state);
    let anomalies = events
        .iter()
        .flat_map(|event| apply(state, event))
        .collect();
    let made = unused(state)
        .difference(&before)
        .copied()
        .collect::<Vec<_>>();
    let mut step = Step {
        state,
        seq: 0,
        anomalies,
    };
    for files in made {
        step.forget_table(files);
    }
    step.anomalies
}

impl Step<'_> {
    fn absorb_task(&mut self, info: &TaskInfo, zombie: bool) {
        if self
            .state
            .tasks
            .get(&info.task)
            .is_some_and(|task| task.seq > self.seq)
        {
            return;
        }
        if let Some(task) = self.state.tasks.get_mut(&info.task) {
            // Equal numbers are no news to `task_new`.
            task.seq = 0;
        }
        self.task_new(info, zombie);
    }

    /// The table as it was read, except for what events said since.
    fn absorb_table(&mut self, files: FilesId, fds: &[(Fd, OfdInfo, bool)]) {
        let seq = self.seq;
        let table = self.state.tables.entry(files);
        let table = table.or_insert_with(|| Table {
            seq,
            ..Table::default()
        });
        if table.born > seq {
            return; // another table, made at the same address since
        }
        table.seq = seq;
        let read: BTreeSet<Fd> = fds.iter().map(|(fd, _, _)| *fd).collect();
        let gone = table
            .fds
            .extract_if(.., |fd, slot| slot.seq <= seq && !read.contains(fd));
        let gone: Vec<OfdId> = gone.map(|(_, slot)| slot.ofd).collect();
        self.state.set_trust(Object::Files(files), Trust::Verified);
        for (fd, info, cloexec) in fds {
            self.describe(info);
            self.set_slot(files, *fd, info, *cloexec, None);
        }
        for ofd in gone {
            self.unref(ofd);
        }
    }

    /// Forgets the tables that no thread used at two readings in a row. A fork that failed after
    /// it copied the table leaves such a one; one under way does so too, for a while. Should it
    /// take longer than that, its end is of a table that is not known, and all is read again.
    fn forget_unused(&mut self) {
        let mut forgotten = Vec::new();
        for (id, table) in &mut self.state.tables {
            let unused = table.users.is_empty() && table.seq <= self.seq;
            if unused && table.unused {
                forgotten.push(*id);
            }
            table.unused = unused;
        }
        for id in forgotten {
            self.forget_table(id);
        }
    }

    /// Completes a description of which only the address was known.
    fn describe(&mut self, info: &OfdInfo) {
        let seq = self.seq;
        let Some(ofd) = self.state.ofds.get_mut(&info.id) else {
            return;
        };
        if ofd.kind != FileKind::Unknown && ofd.seq > seq {
            return;
        }
        ofd.flags = info.flags;
        ofd.owner = info.owner;
        ofd.mode = info.mode;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::apply::apply;
    use crate::model::event::{Body, Owner};
    use crate::model::ids::InodeId;

    #[test]
    fn a_table_without_threads_is_forgotten_at_the_second_reading() {
        let (mut state, files) = (State::default(), FilesId(64));
        let body = Body::FilesNew { files };
        assert_eq!(apply(&mut state, &Event { seq: 1, body }), []);
        let reading = |seq| Snapshot {
            seq,
            all_tasks: true,
            ..Snapshot::default()
        };
        absorb(&mut state, &reading(0));
        assert!(!state.tables[&files].unused, "made since");
        absorb(&mut state, &reading(1));
        assert!(state.tables.contains_key(&files), "a fork may be under way");
        absorb(&mut state, &reading(2));
        assert!(state.tables.is_empty());
    }

    /// An address was one file for a table made since the reading began, then another for one
    /// that was there before, which a fork copied by its address.
    #[test]
    fn a_description_is_what_was_said_last() {
        let (old, new, copy) = (FilesId(64), FilesId(128), FilesId(192));
        let info = |kind, ino| OfdInfo {
            id: OfdId(64),
            kind,
            inode: InodeId { dev: 1, ino },
            empty: true,
            ..OfdInfo::default()
        };
        let install = |files, ofd| Body::FdInstall {
            files,
            fd: Fd(3),
            cloexec: false,
            ofd,
            socket: None,
        };
        let ofd = OfdId(64);
        let task = |task, files| TaskInfo {
            task: TaskId(task),
            ..TaskInfo::sample(files)
        };
        let bodies = [
            Body::FilesNew { files: new },
            Body::TaskNew(task(1, new)),
            install(new, info(FileKind::Regular, 7)),
            Body::FdClose {
                files: new,
                fd: Fd(3),
            },
            install(old, info(FileKind::Pipe, 8)),
            Body::FilesNew { files: copy },
            Body::FilesWord {
                files: copy,
                fds: vec![(Fd(3), ofd, false)],
            },
            Body::TaskNew(task(2, copy)),
            Body::Ofd {
                ofd,
                flags: 0o4000,
                owner: Owner::default(),
            },
        ];
        let events = (11..).zip(bodies).map(|(seq, body)| Event { seq, body });
        let events: Vec<_> = events.collect();
        let mut state = State::default();
        for event in &events {
            apply(&mut state, event);
        }
        let read = OfdInfo {
            flags: 0o4000,
            empty: false,
            ..info(FileKind::Pipe, 8)
        };
        let fds = vec![(Fd(3), read, false)];
        let snapshot = Snapshot {
            seq: 10,
            all_tasks: true,
            tasks: vec![(task(3, old), false), (task(2, copy), false)],
            tables: [(old, fds.clone()), (copy, fds)].into(),
            ..Snapshot::default()
        };
        absorb(&mut state, &snapshot);
        replay(&mut state, &events);
        let ofd = state
            .ofds
            .get(&ofd)
            .map(|ofd| (ofd.kind, ofd.inode.ino, ofd.flags));
        assert_eq!(ofd, Some((FileKind::Pipe, 8, 0o4000)));
    }
}
