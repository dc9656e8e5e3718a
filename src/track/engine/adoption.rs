//! Sockets of tracked processes that were made outside the tracked cgroups.
//!
//! The kernel side follows a socket for the cgroup it was made in, and others only if they are on
//! its list (`bpf/track_socket.bpf.h`). It lists those whose descriptors it sees made; what is
//! found by reading is listed here, and what is gone is taken off again.

use super::Engine;
use crate::model::event::Object;
use crate::model::ids::SockId;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Between two looks for sockets on the list that are gone.
const SWEEP_PAUSE: Duration = Duration::from_secs(5);

/// What is still to be done about such sockets.
#[derive(Debug)]
pub(super) struct Adoption {
    /// Listed only after they were read, when this was the number of the last event: what came
    /// in between was not said, though an event of before may say what they were then.
    late: Vec<(u64, SockId)>,
    swept: Instant,
}

impl Adoption {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            late: Vec::new(),
            swept: now,
        }
    }
}

impl Engine {
    /// Has these sockets of a reading followed, and read once more if they were not so far.
    pub(super) fn adopt(&mut self, foreign: &BTreeSet<SockId>) {
        for sock in foreign {
            // What was closed meanwhile is none of ours.
            if self.state.sockets.contains_key(sock) && self.list(*sock) {
                self.state.suspect(Object::Socket(*sock));
            }
        }
    }

    /// Whether a socket must be read again because it was not on the list.
    fn list(&mut self, sock: SockId) -> bool {
        let seq = self.hooks.last_seq();
        let late = self.hooks.adopted().add(sock, seq);
        let late = late.unwrap_or_else(|error| {
            // It stays suspect, for it cannot be followed.
            tracing::warn!(%error, "a socket made outside is read instead of followed");
            true
        });
        if late {
            // Read after the socket was listed.
            self.adoption.late.push((self.hooks.last_seq(), sock));
        }
        late
    }

    /// Makes those suspect that were listed late, once no event is to come that was said before
    /// and no reading that was begun before.
    pub(super) fn suspect_adopted(&mut self) {
        if self.log.is_some() {
            return;
        }
        let done = self.order.done();
        for (_, sock) in self.adoption.late.extract_if(.., |(seq, _)| *seq <= done) {
            self.state.suspect(Object::Socket(sock));
        }
    }

    /// Takes those off the list that the model does not have any more.
    pub(super) fn maybe_sweep(&mut self) {
        self.counters.adopted = self.hooks.adopted().count();
        if self.counters.adopted == 0 || self.adoption.swept.elapsed() < SWEEP_PAUSE {
            return;
        }
        self.adoption.swept = Instant::now();
        let done = self.order.done();
        for (sock, seq) in self.hooks.adopted().all() {
            // The event that brings it may be to come.
            if seq > done || self.state.sockets.contains_key(&sock) {
                continue;
            }
            // Another socket got the address in this moment.
            if self.hooks.adopted().remove(sock) > Some(done) {
                self.list(sock);
            }
        }
    }
}
