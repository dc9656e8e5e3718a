//! The model against what stands still: one pass over a frozen application.
//!
//! A reading taken while nothing moves is the truth. Where the model says otherwise of an object
//! it calls verified, tracking is wrong; the checkpoint is not, since it takes what was read.

use super::ids::{Fd, FilesId, OfdId, TaskId};
use super::snapshot::Snapshot;
use super::state::{State, Trust};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// How the model fared. The unit is a thread, a descriptor or an epoll item.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verification {
    /// Objects found in the kernel.
    pub objects: u64,
    /// Of those, or in the model alone: known otherwise than found.
    pub differing: u64,
    /// Of an object that the model calls suspect itself: not compared.
    pub suspect: u64,
    /// The first few that differ, in words.
    pub examples: Vec<String>,
}

/// More examples help nobody.
const EXAMPLES: usize = 10;

/// `EPOLLONESHOT`: the kernel disarms such an item by itself.
const ONESHOT: u32 = 1 << 30;

impl Verification {
    fn differs(&mut self, what: impl FnOnce() -> String) {
        self.differing += 1;
        if self.examples.len() < EXAMPLES {
            self.examples.push(what());
        }
    }

    /// Both together.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.objects += other.objects;
        self.differing += other.differing;
        self.suspect += other.suspect;
        self.examples.extend(other.examples);
        self.examples.truncate(EXAMPLES);
        self
    }
}

/// Compares the model with all that a reading of a frozen application found.
#[must_use]
pub fn verify(state: &State, found: &Snapshot) -> Verification {
    let mut result = Verification::default();
    for (info, zombie) in &found.tasks {
        result.objects += 1;
        let same = state.tasks.get(&info.task).is_some_and(|task| {
            let at = (task.tid, task.tgid, task.files, task.mm);
            at == (info.tid, info.tgid, info.files, info.mm) && task.zombie == *zombie
        });
        if !same {
            let TaskId(address) = info.task;
            result.differs(|| format!("thread {} at {address:#x}", info.tid));
        }
    }
    for (id, fds) in &found.tables {
        let fds = fds
            .iter()
            .map(|(fd, info, cloexec)| (*fd, (info.id, *cloexec)));
        table(state, *id, &fds.collect(), &mut result);
    }
    for (id, items) in &found.epolls {
        let items = items
            .iter()
            .map(|(target, fd, events, data)| ((*target, *fd), (*events, *data)));
        epoll(state, *id, &items.collect(), &mut result);
    }
    result
}

fn table(
    state: &State,
    id: FilesId,
    found: &BTreeMap<Fd, (OfdId, bool)>,
    result: &mut Verification,
) {
    result.objects += found.len() as u64;
    let known = state.tables.get(&id);
    if known.is_some_and(|table| table.trust == Trust::Suspect) {
        result.suspect += found.len() as u64;
        return;
    }
    let name = |fd: &Fd| format!("descriptor {fd} of table {:#x}", id.0);
    for (fd, (ofd, cloexec)) in found {
        let slot = known.and_then(|table| table.fds.get(fd));
        if slot.map(|slot| (slot.ofd, slot.cloexec)) != Some((*ofd, *cloexec)) {
            result.differs(|| name(fd));
        }
    }
    let gone = known.iter().flat_map(|table| table.fds.keys());
    for fd in gone.filter(|fd| !found.contains_key(fd)) {
        result.differs(|| format!("{}, which is closed", name(fd)));
    }
}

fn epoll(
    state: &State,
    id: OfdId,
    found: &BTreeMap<(OfdId, Fd), (u32, u64)>,
    result: &mut Verification,
) {
    result.objects += found.len() as u64;
    let known = state.epolls.get(&id);
    if known.is_some_and(|epoll| epoll.trust == Trust::Suspect) {
        result.suspect += found.len() as u64;
        return;
    }
    let name = |fd: &Fd| format!("item {fd} of epoll {:#x}", id.0);
    for ((target, fd), (events, data)) in found {
        let item = known.and_then(|epoll| epoll.items.get(&(*target, *fd)));
        let same = item.is_some_and(|item| {
            item.data == *data && (item.events == *events || item.events & ONESHOT != 0)
        });
        if !same {
            result.differs(|| name(fd));
        }
    }
    let gone = known.iter().flat_map(|epoll| epoll.items.keys());
    for (_, fd) in gone.filter(|key| !found.contains_key(key)) {
        result.differs(|| format!("{}, which is gone", name(fd)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::event::OfdInfo;
    use crate::model::state::{Epoll, EpollItem, Slot, Table};

    fn slot(ofd: u64, cloexec: bool) -> Slot {
        Slot {
            seq: 1,
            ofd: OfdId(ofd),
            cloexec,
        }
    }

    fn state(trust: Trust) -> State {
        let mut state = State::default();
        let fds = BTreeMap::from([(Fd(0), slot(8, false)), (Fd(3), slot(16, true))]);
        let table = Table {
            trust,
            fds,
            ..Table::default()
        };
        state.tables.insert(FilesId(64), table);
        let item = EpollItem {
            seq: 1,
            events: 1 | ONESHOT,
            data: 7,
        };
        let items = [((OfdId(8), Fd(0)), item)].into_iter().collect();
        let epoll = Epoll {
            seq: 1,
            trust,
            items,
        };
        state.epolls.insert(OfdId(16), epoll);
        state
    }

    fn found(fds: &[(i32, u64, bool)], data: u64) -> Snapshot {
        let mut found = Snapshot::default();
        let entry = |&(fd, ofd, cloexec): &(i32, u64, bool)| {
            let info = OfdInfo {
                id: OfdId(ofd),
                ..OfdInfo::default()
            };
            (Fd(fd), info, cloexec)
        };
        found
            .tables
            .insert(FilesId(64), fds.iter().map(entry).collect());
        found
            .epolls
            .insert(OfdId(16), vec![(OfdId(8), Fd(0), 0, data)]);
        found
    }

    fn check(fds: &[(i32, u64, bool)], data: u64, objects: u64, differing: u64) {
        let result = verify(&state(Trust::Verified), &found(fds, data));
        assert_eq!(
            (result.objects, result.differing),
            (objects, differing),
            "{result:?}"
        );
    }

    #[test]
    fn what_is_known_is_compared() {
        check(&[(0, 8, false), (3, 16, true)], 7, 3, 0);
        // Another description, another flag, one closed, one new.
        check(&[(0, 24, false), (3, 16, true)], 7, 3, 1);
        check(&[(0, 8, false), (3, 16, false)], 7, 3, 1);
        check(&[(0, 8, false)], 7, 2, 1);
        check(&[(0, 8, false), (3, 16, true), (4, 8, false)], 7, 4, 1);
        // Other user data of an item; its events are disarmed, which is no difference.
        check(&[(0, 8, false), (3, 16, true)], 8, 3, 1);
    }

    #[test]
    fn what_is_suspect_is_not() {
        let result = verify(&state(Trust::Suspect), &found(&[(0, 24, true)], 9));
        assert_eq!((result.differing, result.suspect), (0, 2));
    }

    #[test]
    fn what_is_unknown_differs() {
        let result = verify(&State::default(), &found(&[(0, 8, false)], 7));
        assert_eq!((result.objects, result.differing), (2, 2));
    }
}
