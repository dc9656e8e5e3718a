//! What makes objects suspect: contradictions, losses, hooks that did not run.

use super::Engine;
use crate::bpf::track::HookSet;
use crate::bpf::wire;
use crate::model::apply::Anomaly;
use crate::model::event::{Body, Event, Object, SockInfo};
use std::collections::BTreeMap;
use std::time::Instant;

impl Engine {
    pub(super) fn judge(&mut self, anomalies: &[Anomaly]) {
        for anomaly in anomalies {
            let kind = match anomaly {
                Anomaly::UnknownTask(_) => "unknown-task",
                Anomaly::UnknownProcess(_) => "unknown-process",
                Anomaly::UnknownTable(_) => "unknown-table",
                Anomaly::UnknownEpoll(_) => "unknown-epoll",
                Anomaly::Conflict(_) => "conflict",
                Anomaly::Stale(_) => "stale",
                Anomaly::Malformed => "malformed",
            };
            match anomaly {
                Anomaly::Stale(object) => self.spread(*object),
                // Until now it changed what it shares with others while nobody followed it.
                Anomaly::UnknownProcess(_) => {
                    self.read_all = true;
                    self.spread = true;
                }
                Anomaly::Malformed => {
                    self.counters.malformed += 1;
                    self.suspect_everything();
                }
                _ => self.read_all = true,
            }
            if !matches!(anomaly, Anomaly::Stale(Object::Mm(_))) {
                tracing::debug!(?anomaly, seq = self.state.seq, "anomaly");
                *self.counters.anomalies.entry(kind.to_owned()).or_default() += 1;
            }
        }
    }

    /// What else is suspect when this object is. Without fentry, a close is the only
    /// sign that an item left an epoll instance or that a socket changed.
    pub(super) fn spread(&mut self, object: Object) {
        match object {
            Object::Tasks => self.read_all = true,
            Object::Files(_) if self.hooks.set == HookSet::Fallback => self.spread = true,
            _ => {}
        }
    }

    pub(super) fn suspect_everything(&mut self) {
        self.read_all = true;
        self.state.suspect_everything();
        self.repeat = self.log.is_some();
    }

    /// Makes suspect what the kernel side could not report.
    pub(super) fn note_losses(&mut self) {
        let counts = match self.hooks.lost() {
            Ok(counts) => counts,
            Err(error) => {
                tracing::error!(%error, "losses are not known; reading everything again");
                self.suspect_everything();
                return;
            }
        };
        let total = counts.iter().sum();
        let news = total != self.lost;
        if news || self.counters.lost.is_empty() {
            let names = wire::CLASSES.iter().map(ToString::to_string);
            self.counters.lost = names.zip(counts).collect();
        }
        if !news {
            return;
        }
        self.lost = total;
        let Some(objects) = self.hooks.take_stale() else {
            self.suspect_everything();
            return;
        };
        // As events they are applied again should a reading be under way.
        let seq = self.hooks.last_seq();
        for object in objects {
            let body = Body::Stale(object);
            self.enact(Event { seq, body });
            self.read_all |= match object {
                Object::Mm(_) | Object::Socket(_) => false,
                // The table of a lost fork is not in the state for being marked.
                Object::Files(id) => !self.state.tables.contains_key(&id),
                // The loss of a watched file's death is in no set's name.
                Object::Tasks | Object::Epoll(_) | Object::Inotify(_) => true,
            };
        }
    }

    /// Makes everything suspect if a hook did not run where it should have: the kernel leaves
    /// out a program that is running on the CPU already, and nobody knows for what.
    pub(super) fn note_misses(&mut self) {
        self.misses_read = Instant::now();
        let missed = match self.more_misses() {
            // A stand-in may have been about to take its turn.
            Ok(Some(_)) => self.more_misses(),
            none => none,
        };
        match missed {
            Ok(None) => {}
            Ok(Some(programs)) => {
                let misses = programs.values().sum();
                let missed = misses - self.misses;
                tracing::warn!(
                    missed,
                    ?programs,
                    "hooks were left out; reading everything again"
                );
                *self
                    .counters
                    .anomalies
                    .entry("missed-run".to_owned())
                    .or_default() += missed;
                self.misses = misses;
                self.suspect_everything();
            }
            Err(error) => {
                tracing::error!(%error, "what hooks missed is not known; reading everything again");
                self.suspect_everything();
            }
        }
    }

    /// What programs missed, if that is more than was known.
    fn more_misses(&self) -> std::io::Result<Option<BTreeMap<String, u64>>> {
        let programs = self.hooks.programs().missed()?;
        Ok((programs.values().sum::<u64>() > self.misses).then_some(programs))
    }

    /// No tracepoint tells that a watch went with what it watched, or after its one event,
    /// nor that a socket was bound because it sent, nor that who is not tracked shut or closed
    /// the other end of a Unix connection. Whether that end is tracked its address does not tell
    /// for sure: it may be one's that was tracked before.
    pub(super) fn suspect_unseen(&mut self) {
        let inotifies = self.state.inotifies.iter();
        let watching = inotifies.filter(|(_, inotify)| !inotify.watches.is_empty());
        let watching = watching.map(|(id, _)| Object::Inotify(*id));
        let unseen =
            |info: &SockInfo| info.peer.is_some() || (info.local_port == 0 && info.name.is_empty());
        let sockets = self.state.sockets.iter();
        let sockets = sockets.filter(|(_, socket)| unseen(&socket.info));
        let sockets = sockets.map(|(id, _)| Object::Socket(*id));
        for object in watching.chain(sockets).collect::<Vec<_>>() {
            self.state.suspect(object);
        }
    }
}
