//! What a reading of the kernel in miniature says, and whether the model says the same.

use super::{Items, Kernel};
use std::collections::{BTreeMap, BTreeSet};
use tracker::model::check::check;
use tracker::model::event::OfdInfo;
use tracker::model::ids::{Fd, FilesId, OfdId};
use tracker::model::snapshot::Snapshot;
use tracker::model::state::{State, Trust};

impl Kernel {
    pub fn snapshot(&self, all_tasks: bool) -> Snapshot {
        let table = |(id, fds): (&FilesId, &BTreeMap<Fd, (OfdId, bool)>)| {
            (
                *id,
                fds.iter()
                    .map(|(fd, (ofd, c))| (*fd, self.read(*ofd), *c))
                    .collect(),
            )
        };
        let epoll = |(id, items): (&OfdId, &Items)| {
            let item = |((target, fd), events): (&(OfdId, Fd), &u32)| {
                (*target, *fd, *events, u64::from(*events))
            };
            (*id, items.iter().map(item).collect())
        };
        Snapshot {
            seq: self.seq,
            all_tasks,
            tasks: self
                .threads
                .iter()
                .map(|t| (Self::info(t), false))
                .collect(),
            tables: self.tables.iter().map(table).collect(),
            attrs: (0..self.threads.len()).map(|n| self.attrs(n)).collect(),
            epolls: self.epolls.iter().map(epoll).collect(),
            sockets: self.sockets.clone(),
            inotifies: self.inotifies.clone(),
            mms: self
                .mms
                .iter()
                .map(|(id, vmas)| (*id, vmas.values().copied().collect()))
                .collect(),
        }
    }

    /// The model must say exactly this.
    pub fn assert_model(&self, state: &State) {
        assert_eq!(check(state), [], "contradictions");
        let model: BTreeMap<_, BTreeMap<_, _>> = state
            .tables
            .iter()
            .filter(|(_, t)| !t.users.is_empty())
            .map(|(id, t)| {
                (
                    *id,
                    t.fds
                        .iter()
                        .map(|(fd, s)| (*fd, (s.ofd, s.cloexec)))
                        .collect(),
                )
            })
            .collect();
        assert_eq!(model, self.tables, "descriptor tables");
        let used = state
            .tables
            .values()
            .filter(|table| !table.users.is_empty());
        let held: BTreeSet<OfdId> = used
            .flat_map(|table| table.fds.values())
            .map(|slot| slot.ofd)
            .collect();
        let model: BTreeMap<_, _> = state
            .ofds
            .iter()
            .filter(|(id, _)| held.contains(id))
            .map(|(id, ofd)| {
                (
                    *id,
                    OfdInfo {
                        id: *id,
                        kind: ofd.kind,
                        inode: ofd.inode,
                        mode: ofd.mode,
                        flags: ofd.flags,
                        owner: ofd.owner,
                        sock: ofd.sock,
                        group: ofd.group,
                        empty: false,
                    },
                )
            })
            .collect();
        assert_eq!(model, self.files, "open file descriptions");
        let model: BTreeMap<_, Items> = state
            .epolls
            .iter()
            .filter(|(id, _)| held.contains(id))
            .map(|(id, e)| {
                (
                    *id,
                    e.items
                        .iter()
                        .map(|(key, item)| (*key, item.events))
                        .collect(),
                )
            })
            .collect();
        assert_eq!(model, self.epolls, "epoll items");
        let mut model: Vec<_> = state.tasks.iter().map(|(id, t)| (*id, t.files)).collect();
        model.sort_unstable();
        let mut threads: Vec<_> = self
            .threads
            .iter()
            .map(|t| (t.task, Some(t.files)))
            .collect();
        threads.sort_unstable();
        assert_eq!(model, threads, "threads");
        self.assert_details(state);
    }

    fn assert_details(&self, state: &State) {
        let groups: BTreeSet<_> = self.files.values().filter_map(|file| file.group).collect();
        let model = state.inotifies.iter().filter(|(id, _)| groups.contains(id));
        let model: BTreeMap<_, _> = model.map(|(id, i)| (*id, i.watches.clone())).collect();
        assert_eq!(model, self.inotifies, "inotify watches");
        let model = state
            .sockets
            .iter()
            .filter(|(id, _)| self.sockets.contains_key(id));
        let model: BTreeMap<_, _> = model.map(|(id, s)| (*id, s.info.clone())).collect();
        assert_eq!(model, self.sockets, "sockets");
        let model: BTreeMap<_, _> = state.fss.iter().map(|(id, fs)| (*id, fs.info)).collect();
        assert_eq!(model, self.fss, "directories");
        let model = state.tasks.iter();
        let mut model: Vec<_> = model
            .map(|(id, t)| (*id, t.fs, t.ids.as_deref().copied()))
            .collect();
        model.sort_unstable_by_key(|(id, _, _)| *id);
        let threads = self.threads.iter();
        let mut threads: Vec<_> = threads.map(|t| (t.task, Some(t.fs), Some(t.ids))).collect();
        threads.sort_unstable_by_key(|(id, _, _)| *id);
        assert_eq!(model, threads, "identities");
        let known = state
            .mms
            .iter()
            .filter(|(_, mm)| mm.trust == Trust::Verified);
        for (id, mm) in known {
            let vmas = self
                .mms
                .get(id)
                .map(|vmas| vmas.values().copied().collect());
            assert_eq!(mm.vmas, vmas, "mappings of {id} are verified");
        }
        let mms: BTreeSet<_> = state.mms.keys().collect();
        assert!(mms.into_iter().eq(self.mms.keys()), "address spaces");
    }
}
