//! The way of a record from a ring into the model, whatever it holds.

#[path = "model_laws/kernel.rs"]
mod kernel;

use kernel::{history, op};
use proptest::prelude::*;
use tracker::bpf::wire::{decode, encode};
use tracker::model::apply::{Anomaly, apply};
use tracker::model::check::check;
use tracker::model::event::{Body, Event, Object, Owner};
use tracker::model::snapshot::absorb;
use tracker::model::state::State;
use tracker::track::order::Order;

/// What the agent's model thread does with records, without a kernel behind it.
#[derive(Debug, Default)]
struct Intake {
    state: State,
    order: Order,
    anomalies: Vec<Anomaly>,
    malformed: usize,
}

impl Intake {
    fn take(&mut self, record: &[u8], last: u64) {
        let event = decode(record).ok();
        if !event.is_some_and(|event| self.order.push(event, last)) {
            self.malformed += 1;
        }
        self.drain();
    }

    fn drain(&mut self) {
        while let Some(event) = self.order.pop() {
            for anomaly in apply(&mut self.state, &event) {
                self.malformed += usize::from(anomaly == Anomaly::Malformed);
                self.anomalies.push(anomaly);
            }
        }
    }
}

/// What can be wrong with a record.
#[derive(Clone, Debug)]
enum Harm {
    /// Too short for a number.
    Torn(Vec<u8>),
    /// It ends early.
    Cut(prop::sample::Index),
    /// It says another size than its kind has.
    Grown(u32),
    /// A kind that does not exist.
    Kind(u32),
    /// A number that no event has.
    Number(u64),
    /// The number of another event.
    Again,
}

fn harm() -> impl Strategy<Value = Harm> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..16).prop_map(Harm::Torn),
        any::<prop::sample::Index>().prop_map(Harm::Cut),
        (1..64_u32).prop_map(Harm::Grown),
        prop_oneof![0..64_u32, 200..u32::MAX].prop_map(Harm::Kind),
        (1 << 32..u64::MAX).prop_map(Harm::Number),
        Just(Harm::Again),
    ]
}

/// The record, harmed; and whether it takes up a number of its own.
fn harmed(harm: &Harm, seq: u64) -> (Vec<u8>, bool) {
    let event = Event {
        seq,
        // It would do harm if it were believed.
        body: Body::TaskExit {
            task: tracker::model::ids::TaskId(64),
        },
    };
    let mut record = encode(&event);
    match harm {
        Harm::Torn(bytes) => return (bytes.clone(), false),
        Harm::Cut(at) => record.truncate(16 + at.index(record.len() - 16)),
        Harm::Grown(by) => {
            let size = u32::try_from(record.len()).expect("small") + by;
            record.resize(size as usize, 0);
            record[4..8].copy_from_slice(&size.to_ne_bytes());
        }
        Harm::Kind(kind) => record[..4].copy_from_slice(&kind.to_ne_bytes()),
        Harm::Number(number) => {
            record[8..16].copy_from_slice(&number.to_ne_bytes());
            return (record, false);
        }
        Harm::Again => {
            record[8..16].copy_from_slice(&(seq + 1).to_ne_bytes());
            return (record, false);
        }
    }
    (record, true)
}

proptest! {
    /// The wire loses nothing of what the hooks say.
    #[test]
    fn a_history_survives_the_wire(ops in prop::collection::vec(op(), 0..100)) {
        for mut event in history(&ops).events {
            if let Body::FdInstall { ofd, .. } = &mut event.body {
                // Said by itself, see `Body::Ofd`.
                ofd.owner = Owner::default();
            }
            prop_assert_eq!(decode(&encode(&event)).expect("long enough"), event);
        }
    }

    /// A malformed record is counted, and nothing else comes of it.
    #[test]
    fn malformed_records_change_nothing(
        ops in prop::collection::vec(op(), 0..100),
        harms in prop::collection::vec(prop::option::weighted(0.2, harm()), 1000),
    ) {
        let (mut with, mut without) = (Intake::default(), State::default());
        let last = 1 << 32;
        let (mut number, mut expected) = (0, 0);
        let kernel = history(&ops);
        for (mut event, harm) in kernel.events.iter().cloned().zip(&harms) {
            if let Some(harm) = harm {
                expected += 1;
                let (record, numbered) = harmed(harm, number + 1);
                number += u64::from(numbered);
                if let Harm::Again = harm {
                    // Both wait for the event before them; the second is not believed.
                    event.seq = number + 2;
                    with.take(&encode(&event), last);
                    with.take(&record, last);
                    let before = Event { seq: number + 1, body: Body::Malformed };
                    with.take(&encode(&before), last);
                    expected += 1;
                    number += 2;
                    apply(&mut without, &event);
                    continue;
                }
                with.take(&record, last);
            }
            number += 1;
            event.seq = number;
            apply(&mut without, &event);
            with.take(&encode(&event), last);
        }
        prop_assert_eq!(with.malformed, expected);
        let of_the_malformed = |anomaly: &Anomaly| {
            // Changes of mappings are said as marks.
            matches!(anomaly, Anomaly::Malformed | Anomaly::Stale(Object::Mm(_)))
        };
        prop_assert!(with.anomalies.iter().all(of_the_malformed));
        prop_assert_eq!(with.order.waiting(), 0);
        if kernel.events.len() <= harms.len() {
            kernel.assert_model(&with.state);
        }
        without.seq = with.state.seq;
        prop_assert_eq!(with.state, without);
    }

    /// Flipped bits may make a record say something else, which only reading again can tell.
    /// The model never contradicts itself, and a reading heals it.
    #[test]
    fn flipped_bits_leave_a_sound_model(
        ops in prop::collection::vec(op(), 0..100),
        flips in prop::collection::vec((any::<usize>(), any::<usize>()), 0..40),
    ) {
        let kernel = history(&ops);
        let mut records: Vec<Vec<u8>> = kernel.events.iter().map(encode).collect();
        for (which, bit) in flips {
            let which = which % records.len();
            let bit = bit % (records[which].len() * 8);
            records[which][bit / 8] ^= 1 << (bit % 8);
        }
        let mut intake = Intake::default();
        for record in &records {
            intake.take(record, kernel.seq);
        }
        while intake.order.skip_gap() > 0 {
            intake.drain();
        }
        prop_assert_eq!(intake.order.waiting(), 0);
        prop_assert_eq!(check(&intake.state), vec![]);
        absorb(&mut intake.state, &kernel.snapshot(true));
        kernel.assert_model(&intake.state);
    }
}
