//! Laws of the live model, over random histories that a kernel could produce.

mod kernel;

use kernel::{Kernel, history, op};
use proptest::prelude::*;
use std::collections::BTreeMap;
use tracker::model::apply::{Anomaly, apply};
use tracker::model::diff::{diff, patch};
use tracker::model::event::{Event, Object};
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
            held.map(|(id, ofd)| (*id, ofd.kind, ofd.inode)).collect::<Vec<_>>()
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
        }
        // What was copied from a table not yet known is suspect, and is read once more.
        absorb(&mut state, &kernel.snapshot(true));
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
