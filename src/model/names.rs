//! Names of files, and of what is watched: no event tells them, so they are asked for when a
//! file has been open for a while.

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

/// What was found for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    /// What was asked for.
    pub asked: Unnamed,
    /// The link in /proc.
    pub name: Vec<u8>,
    /// Of an inotify instance: watch descriptors, the inodes they watch, and their paths.
    pub paths: Vec<(i32, InodeId, Vec<u8>)>,
}

impl State {
    /// One descriptor each of the descriptions without a name, or with watches whose paths were
    /// not asked for, that had no news since this number; `again`: of the others as well.
    #[must_use]
    pub fn unnamed(&self, since: u64, again: bool) -> Vec<Unnamed> {
        let ofds = self.ofds.iter().filter(|(id, ofd)| {
            let wants = match ofd.group.and_then(|group| self.inotifies.get(&group)) {
                Some(inotify) => inotify.seq <= since && (again || inotify.named < inotify.seq),
                None => ofd.kind.has_name() && (again || !self.names.contains_key(id)),
            };
            wants && ofd.refs > 0 && ofd.seq <= since
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

    /// Takes what was found, all events up to then being applied; unless the descriptor had news
    /// since it was asked for: then it may be of another file.
    pub fn set_names(&mut self, names: &Names) {
        let asked = &names.asked;
        let table = self.tables.get(&asked.files);
        let slot = table.and_then(|table| table.fds.get(&asked.fd));
        if slot.is_none_or(|slot| (slot.ofd, slot.seq) != (asked.ofd, asked.seq)) {
            return;
        }
        let ofd = self.ofds.get(&asked.ofd);
        let Some(ofd) = ofd.filter(|ofd| ofd.inode == asked.inode) else {
            return;
        };
        if ofd.kind.has_name() {
            self.names.insert(asked.ofd, names.name.as_slice().into());
        }
        let Some(inotify) = ofd.group.and_then(|group| self.inotifies.get_mut(&group)) else {
            return;
        };
        inotify.named = inotify.seq;
        let same = |wd: &i32, inode: &InodeId| {
            let watch = inotify.watches.get(wd);
            watch.is_some_and(|watch| watch.inode == *inode)
        };
        let paths = names.paths.iter().filter(|(wd, inode, _)| same(wd, inode));
        inotify.paths = paths
            .map(|(wd, _, path)| (*wd, path.as_slice().into()))
            .collect();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::apply::apply;
    use crate::model::check::check;
    use crate::model::event::{Body, Event, OfdInfo, TaskInfo, Watch};
    use crate::model::ids::GroupId;

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
        let events = [
            Body::FilesNew { files: FILES },
            Body::TaskNew(TaskInfo::sample(FILES)),
            open(0, 256, FileKind::Regular),
            open(1, 320, FileKind::Pipe),
        ];
        run(&mut state, (1..).zip(events));
        state
    }

    fn found(asked: Unnamed) -> Names {
        Names {
            asked,
            name: b"/var/log/x".to_vec(),
            paths: vec![],
        }
    }

    #[test]
    fn watches_are_named_when_they_are_new() {
        let mut state = start();
        let (group, watch) = (GroupId(512), Watch::default());
        let mut opened = open(2, 384, FileKind::Inotify);
        if let Body::FdInstall { ofd, .. } = &mut opened {
            ofd.group = Some(group);
        }
        let set = |wd| Body::WatchSet { group, wd, watch };
        run(&mut state, (5..).zip([opened, set(1), set(2)]));
        let of = |state: &State, since| {
            let mut wanted = state.unnamed(since, false);
            wanted.retain(|wanted| wanted.ofd == OfdId(384));
            wanted
        };
        assert_eq!(of(&state, 6), [], "news since");
        let mut names = found(of(&state, 7)[0]);
        let other = InodeId { dev: 1, ino: 1 };
        names.paths = vec![
            (1, watch.inode, b"/a".to_vec()),
            (2, other, b"/b".to_vec()),
            (3, watch.inode, b"/c".to_vec()),
        ];
        state.set_names(&names);
        assert_eq!(check(&state), []);
        let paths = |state: &State| state.inotifies[&group].paths.clone();
        assert_eq!(
            paths(&state),
            BTreeMap::from([(1, b"/a".as_slice().into())])
        );
        assert_eq!(of(&state, 7), [], "asked already");
        run(&mut state, [(8, Body::WatchDel { group, wd: 1 })]);
        assert_eq!(paths(&state), BTreeMap::new());
        assert_eq!(of(&state, 8).len(), 1);
    }

    #[test]
    fn a_file_is_named_once_it_has_been_open_for_a_while() {
        let mut state = start();
        assert_eq!(state.unnamed(2, false), []);
        let wanted = state.unnamed(3, false);
        assert_eq!(wanted.len(), 1);
        assert_eq!((wanted[0].tid, wanted[0].fd), (Tid(7), Fd(0)));
        state.set_names(&found(wanted[0]));
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
        state.set_names(&found(wanted[0]));
        assert!(state.names.is_empty());
    }

    #[test]
    fn a_name_goes_with_its_file() {
        let mut state = start();
        let wanted = state.unnamed(3, false);
        state.set_names(&found(wanted[0]));
        let (files, fd) = (FILES, Fd(0));
        let reused = [Body::FdClose { files, fd }, open(2, 256, FileKind::Regular)];
        run(&mut state, (5..).zip(reused));
        assert!(state.names.is_empty());
    }
}
