//! What changed between two states, small when little did.
//!
//! Law: `patch(a, diff(a, b)) == b`.

use super::event::SockInfo;
use super::ids::{Fd, FilesId, FsId, GroupId, MmId, OfdId, SockId, TaskId};
use super::map::{Keyed, Map};
use super::state::{
    Epoll, EpollItem, Fs, Inotify, Mm, Ofd, Slot, Socket, State, Table, Task, Trust,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Changes of a map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MapDiff<K: Ord, V> {
    /// Keys that are new or have another value, which this is.
    pub set: BTreeMap<K, V>,
    /// Keys that are gone.
    pub removed: BTreeSet<K>,
}

impl<K: Ord, V> Default for MapDiff<K, V> {
    fn default() -> Self {
        Self {
            set: BTreeMap::new(),
            removed: BTreeSet::new(),
        }
    }
}

impl<K: Ord, V> MapDiff<K, V> {
    /// Whether nothing changed.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.removed.is_empty()
    }
}

/// Changes of a descriptor table: everything but the descriptors, and those that differ.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TableDiff {
    /// The table with no descriptors.
    pub rest: Table,
    /// Descriptors.
    pub fds: MapDiff<Fd, Slot>,
}

/// Changes of an epoll instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollDiff {
    /// Generation.
    pub seq: u64,
    /// Whether all items are right.
    pub trust: Trust,
    /// Items.
    pub items: MapDiff<(OfdId, Fd), EpollItem>,
}

/// Changes of a state.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Diff {
    /// Number of the last event of the later state.
    pub seq: u64,
    pub tasks: MapDiff<TaskId, Task>,
    pub tables: MapDiff<FilesId, TableDiff>,
    pub ofds: MapDiff<OfdId, Ofd>,
    pub names: MapDiff<OfdId, Box<[u8]>>,
    pub sockets: MapDiff<SockId, Socket>,
    pub epolls: MapDiff<OfdId, EpollDiff>,
    pub inotifies: MapDiff<GroupId, Inotify>,
    pub mms: MapDiff<MmId, Mm>,
    pub fss: MapDiff<FsId, Fs>,
}

impl Diff {
    /// Whether no object differs, generations included.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tasks.is_empty()
            && self.tables.is_empty()
            && self.ofds.is_empty()
            && self.names.is_empty()
            && self.sockets.is_empty()
            && self.epolls.is_empty()
            && self.inotifies.is_empty()
            && self.mms.is_empty()
            && self.fss.is_empty()
    }
}

/// What turns `a` into `b`.
#[must_use]
pub fn diff(a: &State, b: &State) -> Diff {
    Diff {
        seq: b.seq,
        tasks: map_diff(&a.tasks, &b.tasks, |_, new| new.clone()),
        tables: map_diff(&a.tables, &b.tables, |old, new| {
            let none = BTreeMap::new();
            let fds = map_diff(old.map_or(&none, |old| &old.fds), &new.fds, |_, slot| *slot);
            let rest = Table {
                fds: BTreeMap::new(),
                users: new.users.clone(),
                ..*new
            };
            TableDiff { rest, fds }
        }),
        ofds: map_diff(&a.ofds, &b.ofds, |_, new| **new),
        names: map_diff(&a.names, &b.names, |_, new| new.clone()),
        sockets: map_diff(&a.sockets, &b.sockets, |_, new| Socket::clone(new)),
        epolls: map_diff(&a.epolls, &b.epolls, |old, new| {
            let none = Map::default();
            let items = map_diff(
                old.map_or(&none, |old| &old.items),
                &new.items,
                |_, item| *item,
            );
            EpollDiff {
                seq: new.seq,
                trust: new.trust,
                items,
            }
        }),
        inotifies: map_diff(&a.inotifies, &b.inotifies, |_, new| new.clone()),
        mms: map_diff(&a.mms, &b.mms, |_, new| new.clone()),
        fss: map_diff(&a.fss, &b.fss, |_, new| new.clone()),
    }
}

/// Applies what [`diff`] found.
#[must_use]
pub fn patch(mut state: State, diff: Diff) -> State {
    state.seq = diff.seq;
    map_patch(&mut state.tasks, diff.tasks, |_, new| new);
    map_patch(&mut state.tables, diff.tables, |old, new| {
        let mut fds = old.map(|old| old.fds).unwrap_or_default();
        map_patch(&mut fds, new.fds, |_, slot| slot);
        Table { fds, ..new.rest }
    });
    map_patch(&mut state.ofds, diff.ofds, |_, new| Box::new(new));
    map_patch(&mut state.names, diff.names, |_, new| new);
    map_patch(&mut state.sockets, diff.sockets, |_, new| Box::new(new));
    map_patch(&mut state.epolls, diff.epolls, |old, new| {
        let mut items = old.map(|old| old.items).unwrap_or_default();
        map_patch(&mut items, new.items, |_, item| item);
        Epoll {
            seq: new.seq,
            trust: new.trust,
            items,
        }
    });
    map_patch(&mut state.inotifies, diff.inotifies, |_, new| new);
    map_patch(&mut state.mms, diff.mms, |_, new| new);
    map_patch(&mut state.fss, diff.fss, |_, new| new);
    state.reindex();
    state
}

/// The socket without what tells one moment from another: what two readings compare.
#[must_use]
pub fn socket_identity(info: &SockInfo) -> (u64, u16, u16, u16) {
    (info.ino, info.family, info.kind, info.protocol)
}

fn map_diff<K: Ord + Copy, V: PartialEq, D, M: Keyed<K, V>>(
    a: &M,
    b: &M,
    change: impl Fn(Option<&V>, &V) -> D,
) -> MapDiff<K, D> {
    let changed = b.entries().filter_map(|(key, new)| {
        let old = a.at(key);
        (old != Some(new)).then(|| (*key, change(old, new)))
    });
    let known = a.entries().map(|(key, _)| *key);
    MapDiff {
        set: changed.collect(),
        removed: known.filter(|key| b.at(key).is_none()).collect(),
    }
}

fn map_patch<K: Ord, V, D>(
    map: &mut impl Keyed<K, V>,
    diff: MapDiff<K, D>,
    change: impl Fn(Option<V>, D) -> V,
) {
    for key in &diff.removed {
        map.take(key);
    }
    for (key, value) in diff.set {
        let new = change(map.take(&key), value);
        map.put(key, new);
    }
}
