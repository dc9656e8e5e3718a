//! Reading again what is suspect, as little and as seldom as will do.

use super::Engine;
use crate::bpf::iter::Scope;
use crate::model::event::{Event, Object};
use crate::model::ids::{FilesId, MmId, Pid};
use crate::model::snapshot::{absorb, replay};
use crate::track::reader::{Found, Order, Reading};
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Between two readings of descriptors, and of mappings.
pub(super) const FILES_PAUSE: Duration = Duration::from_millis(200);
pub(super) const MMS_PAUSE: Duration = Duration::from_secs(1);
/// More processes than this are read by one pass over all.
const FEW_PROCESSES: usize = 4;

impl Engine {
    /// Whether there is something suspect of which descriptors tell, and mappings.
    pub(super) fn wanted(&mut self) -> (bool, bool) {
        if self.spread && self.log.is_none() {
            self.spread = false;
            self.state.suspect_details();
        }
        self.suspect_adopted();
        let suspects = self.state.suspects();
        let is_mm = |object: &Object| matches!(object, Object::Mm(_));
        let files = self.read_all || !suspects.iter().all(is_mm);
        (files, suspects.iter().any(is_mm))
    }

    pub(super) fn maybe_read(&mut self) {
        let (files, mms) = self.wanted();
        let files = files && self.files_read.elapsed() >= FILES_PAUSE;
        let mms = mms && self.mms_read.elapsed() >= MMS_PAUSE;
        if files || mms {
            self.order_reading(files, mms);
        }
    }

    /// Has what is suspect read, unless a reading is under way.
    pub(super) fn order_reading(&mut self, files: bool, mms: bool) {
        if self.log.is_some() {
            return;
        }
        let now = Instant::now();
        if files {
            self.files_read = now;
        }
        if mms {
            self.mms_read = now;
        }
        let processes = self.suspect_processes(files, mms);
        // What no thread seems to have goes away when all are read.
        let found = (1..=FEW_PROCESSES).contains(&processes.len());
        let all = self.read_all || !found;
        let scopes = if all {
            self.roots
                .iter()
                .map(|root| Scope::Cgroup(root.id.0))
                .collect()
        } else {
            processes
                .iter()
                .map(|pid| Scope::Process(pid.0.cast_unsigned()))
                .collect()
        };
        // First, so that what is marked from here on is suspect again after the reading: of a
        // mark that is not cleared below nothing more would be said.
        let seq = self.hooks.last_seq();
        for address in self.hooks.dirty() {
            let is_mm = self.state.mms.contains_key(&MmId(address));
            let is_table = self.state.tables.contains_key(&FilesId(address));
            if if is_mm { mms } else { files || !is_table } {
                self.hooks.clear_dirty(address);
            }
        }
        let order = Order {
            seq,
            scopes,
            all,
            files,
            mms,
        };
        if all && files {
            self.read_all = false;
        }
        if self
            .orders
            .as_ref()
            .is_some_and(|orders| orders.send(order).is_ok())
        {
            self.log = Some(Vec::new());
            if self.counters.readings > 0 {
                self.count_resyncs(files, mms, all);
            }
            self.counters.readings += 1;
        }
    }

    pub(super) fn count_resyncs(&mut self, files: bool, mms: bool, all: bool) {
        let mut count =
            |kind: &str| *self.counters.resyncs.entry(kind.to_owned()).or_default() += 1;
        if files && all {
            count("everything");
        }
        for object in self.state.suspects() {
            if if matches!(object, Object::Mm(_)) {
                mms
            } else {
                files
            } {
                count(object.kind());
            }
        }
    }

    pub(super) fn suspect_processes(&self, files: bool, mms: bool) -> BTreeSet<Pid> {
        let mut tables = BTreeSet::new();
        let mut users = BTreeSet::new();
        let mut ofds = BTreeSet::new();
        for object in self.state.suspects() {
            match object {
                Object::Files(id) if files => {
                    tables.insert(id);
                }
                Object::Epoll(id) if files => {
                    ofds.insert(id);
                }
                Object::Socket(sock) if files => {
                    ofds.extend(self.state.sockets.get(&sock).map(|socket| socket.holder));
                }
                Object::Inotify(group) if files => {
                    ofds.extend(
                        self.state
                            .inotifies
                            .get(&group)
                            .map(|inotify| inotify.holder),
                    );
                }
                Object::Mm(id) if mms => {
                    users.extend(self.state.mms[&id].users.iter().copied());
                }
                _ => {}
            }
        }
        for (id, table) in &self.state.tables {
            let holds = || table.fds.values().any(|slot| ofds.contains(&slot.ofd));
            if tables.contains(id) || (!ofds.is_empty() && holds()) {
                users.extend(table.users.iter().copied());
            }
        }
        users
            .iter()
            .filter_map(|id| Some(self.state.tasks.get(id)?.tgid))
            .collect()
    }

    pub(super) fn absorb(&mut self, reading: Reading) {
        let Some(log) = self.log.take() else { return };
        match reading.result {
            Ok(Found { snapshot, foreign }) => {
                absorb(&mut self.state, &snapshot);
                // Equal: a loss that was noted since, which has no number of its own.
                let since = log.iter().filter(|event| event.seq >= snapshot.seq);
                let since: Vec<Event> = since.cloned().collect();
                // Judged when they were applied first.
                replay(&mut self.state, &since);
                self.adopt(&foreign);
                if std::mem::take(&mut self.repeat) {
                    self.state.suspect_everything();
                }
            }
            Err(error) => {
                self.counters.failed_readings += 1;
                tracing::warn!(%error, "reading the kernel's state failed; it is tried again");
                self.read_all |= reading.order.all;
            }
        }
    }
}
