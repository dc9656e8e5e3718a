//! Laws of the live model, over random histories that a kernel could produce.

mod kernel;

use kernel::{Kernel, history, op};
use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use tracker::model::apply::{Anomaly, apply};
use tracker::model::check::check;
use tracker::model::diff::{diff, patch};
use tracker::model::event::{Body, Event, Object};
use tracker::model::ids::OfdId;
use tracker::model::snapshot::{Snapshot, absorb, replay as repeat};
use tracker::model::state::{State, Trust};

fn replay(state: &mut State, events: &[Event]) -> Vec<Anomaly> {
    events
        .iter()
        .flat_map(|event| apply(state, event))
        // Changes of mappings are said as marks.
        .filter(|anomaly| !matches!(anomaly, Anomaly::Stale(Object::Mm(_))))
        .collect()
}

/// An object that may be there.
fn any_object(state: &State, kind: u8, which: prop::sample::Index) -> Object {
    fn pick<K: Copy + Ord + Default>(
        keys: impl Iterator<Item = K>,
        which: prop::sample::Index,
    ) -> K {
        let mut keys: Vec<K> = keys.chain([K::default()]).collect();
        keys.sort_unstable();
        *which.get(&keys)
    }
    match kind % 3 {
        0 => Object::Files(pick(state.tables.keys().copied(), which)),
        1 => Object::Epoll(pick(state.epolls.keys().copied(), which)),
        _ => Object::Mm(pick(state.mms.keys().copied(), which)),
    }
}

/// What is suspect and used, by looking at everything.
fn scan(state: &State) -> BTreeSet<Object> {
    let suspect = |trust| trust == Trust::Suspect;
    let held = |id: &OfdId| state.ofds.get(id).is_some_and(|ofd| ofd.refs > 0);
    let tables = state.tables.iter();
    let tables = tables.filter(|(_, table)| suspect(table.trust) && !table.users.is_empty());
    let epolls = state.epolls.iter();
    let epolls = epolls.filter(|(id, epoll)| suspect(epoll.trust) && held(id));
    let mms = state.mms.iter().filter(|(_, mm)| suspect(mm.trust));
    let tables = tables.map(|(id, _)| Object::Files(*id));
    let epolls = epolls.map(|(id, _)| Object::Epoll(*id));
    let mms = mms.map(|(id, _)| Object::Mm(*id));
    let sockets = state.sockets.iter();
    let sockets = sockets.filter(|(_, socket)| suspect(socket.trust) && held(&socket.holder));
    let sockets = sockets.map(|(id, _)| Object::Socket(*id));
    let inotifies = state.inotifies.iter();
    let inotifies = inotifies.filter(|(_, i)| suspect(i.trust) && held(&i.holder));
    let inotifies = inotifies.map(|(id, _)| Object::Inotify(*id));
    let details = epolls.chain(sockets).chain(inotifies);
    tables.chain(details).chain(mms).collect()
}

proptest! {
    /// Events alone, nothing lost: the model is the truth and needs no second look.
    #[test]
    fn events_rebuild_the_truth(ops in prop::collection::vec(op(), 0..200)) {
        let kernel = history(&ops);
        let mut state = State::default();
        let anomalies = replay(&mut state, &kernel.events);
        kernel.assert_model(&state);
        prop_assert_eq!(anomalies, vec![]);
        prop_assert!(state.tables.values().all(|table| table.trust == Trust::Verified));
        prop_assert!(state.epolls.values().all(|epoll| epoll.trust == Trust::Verified));
    }

    /// Applying any end of a history again changes nothing.
    #[test]
    fn late_repetition_converges(
        ops in prop::collection::vec(op(), 0..150),
        from in any::<prop::sample::Index>(),
    ) {
        let kernel = history(&ops);
        let mut state = State::default();
        replay(&mut state, &kernel.events);
        let once = state.clone();
        repeat(&mut state, &kernel.events[from.index(kernel.events.len())..]);
        kernel.assert_model(&state);
        prop_assert_eq!(&once.tables, &state.tables);
        let held = |state: &State| {
            let held = state.ofds.iter().filter(|(_, ofd)| ofd.refs > 0);
            held.map(|(id, ofd)| (*id, (ofd.kind, ofd.inode))).collect::<BTreeMap<_, _>>()
        };
        prop_assert_eq!(held(&once), held(&state));
        prop_assert_eq!(&once.tasks, &state.tasks);
    }

    /// Starting in the middle: events from `attach` on are seen, the kernel is
    /// read at `read`, and the reading is merged only at `merge`.
    #[test]
    fn bootstrap_meets_the_events(
        ops in prop::collection::vec(op(), 3..150),
        mut cuts in prop::array::uniform3(any::<prop::sample::Index>()),
    ) {
        cuts.sort_by_key(|cut| cut.index(ops.len()));
        let [attach, read, merge] = cuts.map(|cut| cut.index(ops.len()));
        let mut kernel = Kernel::boot();
        let (mut first, mut snapshot, mut merged) = (0, Snapshot::default(), 0);
        for (n, op) in ops.iter().enumerate() {
            if n == attach {
                first = kernel.events.len();
            }
            if n == read {
                snapshot = kernel.snapshot(true);
            }
            if n == merge {
                merged = kernel.events.len();
            }
            kernel.run(*op);
        }
        let mut state = State::default();
        replay(&mut state, &kernel.events[first..merged]);
        absorb(&mut state, &snapshot);
        let applied = &kernel.events[first..merged];
        repeat(&mut state, &applied[applied.partition_point(|event| event.seq <= snapshot.seq)..]);
        replay(&mut state, &kernel.events[merged..]);
        let used = state.tables.iter().filter(|(_, table)| !table.users.is_empty());
        for (id, table) in used.filter(|(_, table)| table.trust == Trust::Verified) {
            let fds: BTreeMap<_, _> =
                table.fds.iter().map(|(fd, slot)| (*fd, (slot.ofd, slot.cloexec))).collect();
            prop_assert_eq!(Some(&fds), kernel.tables.get(id), "verified and wrong");
            for slot in table.fds.values() {
                let ofd = state.ofds.get(&slot.ofd).map(|ofd| (ofd.kind, ofd.inode, ofd.flags));
                let file = kernel.files.get(&slot.ofd);
                let file = file.map(|file| (file.kind, file.inode, file.flags));
                prop_assert_eq!(ofd, file, "{} is another", slot.ofd);
            }
        }
        // What was copied from a table not yet known is suspect, and is read once more.
        absorb(&mut state, &kernel.snapshot(true));
        kernel.assert_model(&state);
    }

    /// A reading alone tells everything, also one from before the first event.
    #[test]
    fn first_reading_is_complete(ops in prop::collection::vec(op(), 0..150)) {
        let kernel = history(&ops);
        let snapshot = Snapshot { seq: 0, ..kernel.snapshot(true) };
        let mut state = State::default();
        absorb(&mut state, &snapshot);
        kernel.assert_model(&state);
    }

    /// Reading a state that was right leaves it right.
    #[test]
    fn resync_is_harmless(ops in prop::collection::vec(op(), 0..150)) {
        let kernel = history(&ops);
        let mut state = State::default();
        replay(&mut state, &kernel.events);
        absorb(&mut state, &kernel.snapshot(false));
        kernel.assert_model(&state);
    }

    /// Whatever is lost, a full reading heals it.
    #[test]
    fn losses_heal(
        ops in prop::collection::vec(op(), 0..150),
        lost in prop::collection::vec(prop::bool::weighted(0.2), 2000),
    ) {
        let kernel = history(&ops);
        let mut state = State::default();
        for (event, _) in kernel.events.iter().zip(&lost).filter(|(_, lost)| !**lost) {
            apply(&mut state, event);
        }
        absorb(&mut state, &kernel.snapshot(true));
        kernel.assert_model(&state);
    }

    /// What is suspect is known without looking for it.
    #[test]
    fn suspects_are_what_a_scan_finds(
        ops in prop::collection::vec(op(), 0..150),
        lost in prop::collection::vec(prop::bool::weighted(0.1), 2000),
        marks in prop::collection::vec((any::<u8>(), any::<prop::sample::Index>()), 0..60),
        read in any::<bool>(),
    ) {
        let kernel = history(&ops);
        let mut state = State::default();
        let mut marks = marks.iter();
        for (event, lost) in kernel.events.iter().zip(&lost) {
            if !lost {
                apply(&mut state, event);
            } else if let Some((kind, which)) = marks.next() {
                let object = any_object(&state, *kind, *which);
                apply(&mut state, &Event { seq: event.seq, body: Body::Stale(object) });
            }
            prop_assert_eq!(state.suspects(), scan(&state));
        }
        if read {
            absorb(&mut state, &kernel.snapshot(true));
        } else {
            state.suspect_everything();
        }
        prop_assert_eq!(state.suspects(), scan(&state));
        prop_assert_eq!(check(&state), vec![]);
    }

    #[test]
    fn patch_undoes_diff(
        a in prop::collection::vec(op(), 0..80),
        b in prop::collection::vec(op(), 0..80),
    ) {
        let mut first = State::default();
        replay(&mut first, &history(&a).events);
        let mut second = State::default();
        replay(&mut second, &history(&b).events);
        let change = diff(&first, &second);
        prop_assert_eq!(patch(first, change), second.clone());
        prop_assert!(diff(&second, &second).is_empty());
    }
}
