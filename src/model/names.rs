//! Names of files: no event tells them, so they are asked for when a file has been open for a
//! while.

use super::event::FileKind;
use super::ids::{Fd, FilesId, InodeId, OfdId, Tid};
use super::state::State;
use std::collections::BTreeMap;

impl FileKind {
    /// Whether a file of this kind has a name: a path, or what memfd_create(2) was given.
    #[must_use]
    pub fn has_name(self) -> bool {
        matches!(
            self,
            Self::Regular
                | Self::Directory
                | Self::CharDevice
                | Self::BlockDevice
                | Self::Symlink
                | Self::Fifo
                | Self::Memfd
                | Self::Mqueue
        )
    }
}

/// A descriptor whose file's name is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unnamed {
    /// The description.
    pub ofd: OfdId,
    /// What the kernel must say of it, or it is not the one.
    pub inode: InodeId,
    /// A thread that has the descriptor.
    pub tid: Tid,
    /// The descriptor.
    pub fd: Fd,
    /// The thread's table.
    files: FilesId,
    /// The descriptor's generation.
    seq: u64,
}

impl State {
    /// One descriptor each of the descriptions without a name that had no news since this
    /// number; `again`: of those with a name as well.
    #[must_use]
    pub fn unnamed(&self, since: u64, again: bool) -> Vec<Unnamed> {
        let ofds = self.ofds.iter().filter(|(id, ofd)| {
            let wanted = ofd.refs > 0 && ofd.kind.has_name() && ofd.seq <= since;
            wanted && (again || !self.names.contains_key(id))
        });
        let mut wanted: BTreeMap<OfdId, InodeId> = ofds.map(|(id, ofd)| (*id, ofd.inode)).collect();
        let mut found = Vec::with_capacity(wanted.len());
        for (files, table) in &self.tables {
            if wanted.is_empty() {
                break;
            }
            let user = table.users.iter().find_map(|user| self.tasks.get(user));
            let Some(tid) = user.map(|task| task.tid) else {
                continue;
            };
            for (fd, slot) in &table.fds {
                let Some(inode) = wanted.remove(&slot.ofd) else {
                    continue;
                };
                found.push(Unnamed {
                    ofd: slot.ofd,
                    inode,
                    tid,
                    fd: *fd,
                    files: *files,
                    seq: slot.seq,
                });
            }
        }
        found
    }

    /// Takes the name that was found for a descriptor, all events up to then being applied;
    /// unless the descriptor had news since it was asked for: then it may be another file's.
    pub fn set_name(&mut self, asked: &Unnamed, name: &[u8]) {
        let table = self.tables.get(&asked.files);
        let slot = table.and_then(|table| table.fds.get(&asked.fd));
        if slot.is_some_and(|slot| (slot.ofd, slot.seq) == (asked.ofd, asked.seq))
            && self
                .ofds
                .get(&asked.ofd)
                .is_some_and(|ofd| ofd.inode == asked.inode && ofd.kind.has_name())
        {
            self.names.insert(asked.ofd, name.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::apply::apply;
    use crate::model::check::check;
    use crate::model::event::{Body, Event, OfdInfo, TaskInfo};
    use crate::model::ids::{CgroupId, Pid, TaskId};

    const FILES: FilesId = FilesId(64);

    fn run(state: &mut State, events: impl IntoIterator<Item = (u64, Body)>) {
        for (seq, body) in events {
            assert_eq!(apply(state, &Event { seq, body }), []);
        }
        assert_eq!(check(state), []);
    }

    fn open(fd: i32, ofd: u64, kind: FileKind) -> Body {
        let ofd = OfdInfo {
            id: OfdId(ofd),
            kind,
            empty: true,
            ..OfdInfo::default()
        };
        Body::FdInstall {
            files: FILES,
            fd: Fd(fd),
            cloexec: false,
            ofd,
            socket: None,
        }
    }

    /// A thread with a file, which event 3 opened, and a pipe.
    fn start() -> State {
        let mut state = State::default();
        let task = TaskInfo {
            task: TaskId(64),
            tid: Tid(7),
            tgid: Pid(7),
            parent: Pid(1),
            files: Some(FILES),
            mm: None,
            cgroup: CgroupId(1),
            comm: "server".into(),
        };
        let events = [
            Body::FilesNew { files: FILES },
            Body::TaskNew(task),
            open(0, 256, FileKind::Regular),
            open(1, 320, FileKind::Pipe),
        ];
        run(&mut state, (1..).zip(events));
        state
    }

    #[test]
    fn a_file_is_named_once_it_has_been_open_for_a_while() {
        let mut state = start();
        assert_eq!(state.unnamed(2, false), []);
        let wanted = state.unnamed(3, false);
        assert_eq!(wanted.len(), 1);
        assert_eq!((wanted[0].tid, wanted[0].fd), (Tid(7), Fd(0)));
        state.set_name(&wanted[0], b"/var/log/x");
        assert_eq!(check(&state), []);
        assert_eq!(state.names[&OfdId(256)].as_ref(), b"/var/log/x");
        assert_eq!(state.unnamed(4, false), []);
        assert_eq!(state.unnamed(4, true), wanted);
    }

    #[test]
    fn a_name_is_not_given_to_another_file() {
        let mut state = start();
        let wanted = state.unnamed(3, false);
        let (files, fd) = (FILES, Fd(0));
        let reopened = [Body::FdClose { files, fd }, open(0, 256, FileKind::Regular)];
        run(&mut state, (5..).zip(reopened));
        state.set_name(&wanted[0], b"/var/log/x");
        assert!(state.names.is_empty());
    }

    #[test]
    fn a_name_goes_with_its_file() {
        let mut state = start();
        state.set_name(&state.unnamed(3, false)[0], b"/var/log/x");
        let (files, fd) = (FILES, Fd(0));
        let reused = [Body::FdClose { files, fd }, open(2, 256, FileKind::Regular)];
        run(&mut state, (5..).zip(reused));
        assert!(state.names.is_empty());
    }
}
