//! Puts the events of all rings back into their one order.

use crate::model::event::Event;
use std::collections::{BTreeMap, VecDeque};

/// Numbers ahead of the next one that have a place of their own; what is further ahead is
/// kept in a tree. A reader takes the rings one after another, so events of one batch are
/// about this far from their order.
const WINDOW: u64 = 1 << 16;

/// Holds events back until all before them are there. Numbers have no gaps: each
/// was taken for a record that had its room in a ring already. A number that no event
/// can have would open a gap that never closes, so it is not let in.
#[derive(Debug, Default)]
pub struct Order {
    /// Number of the last event handed out.
    done: u64,
    /// Those with the numbers from `done + 1` on.
    window: VecDeque<Option<Event>>,
    /// How many of them are there.
    near: usize,
    far: BTreeMap<u64, Event>,
}

impl Order {
    /// Takes an event in, while `last` is the number of the last one that happened. One that
    /// was given up on is late and ignored. Says whether the number can be its own: it is not
    /// if none was that high yet, or if another event waits under it.
    #[must_use]
    pub fn push(&mut self, event: Event, last: u64) -> bool {
        if event.seq > last {
            return false;
        }
        let Some(ahead) = event
            .seq
            .checked_sub(self.done)
            .and_then(|n| n.checked_sub(1))
        else {
            return true;
        };
        if self.far.contains_key(&event.seq) {
            return false;
        }
        match usize::try_from(ahead) {
            Ok(ahead) if ahead < self.window.len() => {
                if self.window[ahead].is_some() {
                    return false;
                }
                self.window[ahead] = Some(event);
                self.near += 1;
            }
            Ok(at) if ahead < WINDOW => {
                self.window.resize(at, None);
                self.window.push_back(Some(event));
                self.near += 1;
            }
            _ => {
                self.far.insert(event.seq, event);
            }
        }
        true
    }

    /// The next event, if it is there.
    pub fn pop(&mut self) -> Option<Event> {
        let event = if let Some(Some(_)) = self.window.front() {
            self.near -= 1;
            self.window.pop_front().flatten()
        } else {
            let event = self.far.remove(&self.done.checked_add(1)?)?;
            self.window.pop_front();
            Some(event)
        };
        self.done += 1;
        event
    }

    /// Number of the last event handed out.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.done
    }

    /// Events waiting for one before them.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.near + self.far.len()
    }

    /// Gives up on the missing ones: returns how many there were.
    pub fn skip_gap(&mut self) -> u64 {
        let near = self.window.iter().position(Option::is_some);
        let near = near.map(|ahead| self.done + 1 + ahead as u64);
        let far = self.far.keys().next().copied();
        let Some(first) = near.into_iter().chain(far).min() else {
            return 0;
        };
        let missing = first - self.done - 1;
        let skipped = usize::try_from(missing).unwrap_or(usize::MAX);
        self.window.drain(..skipped.min(self.window.len()));
        self.done = first - 1;
        missing
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::event::Body;

    fn event(seq: u64) -> Event {
        Event {
            seq,
            body: Body::Malformed,
        }
    }

    fn drain(order: &mut Order) -> Vec<u64> {
        std::iter::from_fn(|| order.pop())
            .map(|event| event.seq)
            .collect()
    }

    #[test]
    fn shards_interleave_to_one_order() {
        let mut order = Order::default();
        for seq in [2, 4, 1] {
            assert!(order.push(event(seq), 4));
        }
        assert_eq!(drain(&mut order), [1, 2]);
        assert!(order.push(event(3), 4));
        assert_eq!(drain(&mut order), [3, 4]);
        assert_eq!(order.done(), 4);
    }

    #[test]
    fn an_old_number_is_not_handed_out_again() {
        let mut order = Order::default();
        assert!(order.push(event(1), 1));
        assert_eq!(drain(&mut order), [1]);
        assert!(order.push(event(1), 1));
        assert_eq!(drain(&mut order), Vec::<u64>::new());
        assert_eq!(order.waiting(), 0);
    }

    #[test]
    fn a_gap_is_counted_when_it_is_skipped() {
        let mut order = Order::default();
        assert!(order.push(event(4), 4));
        assert_eq!(drain(&mut order), Vec::<u64>::new());
        assert_eq!(order.skip_gap(), 3);
        assert_eq!(drain(&mut order), [4]);
        assert_eq!(order.skip_gap(), 0);
    }

    #[test]
    fn a_number_that_cannot_be_is_not_let_in() {
        let mut order = Order::default();
        assert!(!order.push(event(u64::MAX), 2), "never given");
        assert!(order.push(event(2), 2));
        assert!(!order.push(event(2), 2), "given to another");
        assert_eq!((order.waiting(), order.skip_gap()), (1, 1));
        assert_eq!(drain(&mut order), [2]);
    }

    #[test]
    fn numbers_end_without_a_panic() {
        let mut order = Order::default();
        assert!(order.push(event(u64::MAX), u64::MAX));
        assert_eq!(order.skip_gap(), u64::MAX - 1);
        assert_eq!(drain(&mut order), [u64::MAX]);
        assert_eq!(drain(&mut order), Vec::<u64>::new());
    }

    #[test]
    fn a_far_number_waits_for_those_before_it() {
        let mut order = Order::default();
        let far = WINDOW + 5;
        for seq in [far, far + 1, u64::MAX] {
            assert!(order.push(event(seq), u64::MAX));
        }
        for seq in (1..far).rev() {
            assert!(order.push(event(seq), u64::MAX));
        }
        assert_eq!(drain(&mut order).len() as u64, far + 1);
        assert_eq!(order.waiting(), 1);
        assert!(order.window.capacity() as u64 <= 2 * WINDOW);
        assert_eq!(order.skip_gap(), u64::MAX - far - 2);
        assert_eq!(drain(&mut order), [u64::MAX]);
    }
}
