//! The thread that owns the model.

use super::order::Order;
use super::reader::{self, Reading};
use super::roots::Root;
use super::{Counters, Request, Settle, View};
use crate::bpf::iter::{Iterators, Scope};
use crate::bpf::rings::Kick;
use crate::bpf::track::{HookSet, Hooks};
use crate::bpf::wire;
use crate::model::apply::{Anomaly, apply};
use crate::model::event::{Body, Event, Object};
use crate::model::ids::{FilesId, Pid};
use crate::model::snapshot::{absorb, replay};
use crate::model::state::State;
use crossbeam_channel::{Receiver, Sender, select};
use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(50);
/// A record that is reserved already may be submitted only after its ring was read.
const KICK_PATIENCE: Duration = Duration::from_millis(2);
/// Between two readings of descriptors, and of mappings.
const FILES_PAUSE: Duration = Duration::from_millis(200);
const MMS_PAUSE: Duration = Duration::from_secs(1);
/// Between two looks at what each hook says of itself.
const MISSES_PAUSE: Duration = Duration::from_secs(1);
/// How long an event may be missing: a BPF program that holds room in a ring ends
/// in microseconds, but its virtual CPU may not run meanwhile.
const GAP_PATIENCE: Duration = Duration::from_secs(5);
/// How many may wait for it: some hundred megabytes.
const GAP_EVENTS: usize = 1 << 20;
/// More processes than this are read by one pass over all.
const FEW_PROCESSES: usize = 4;
const SETTLE_ROUNDS: usize = 5;

/// Events of one ring on their way; `None` stands for a record without a number.
#[derive(Clone, Debug, Default)]
pub(super) struct Batch(Arc<Mutex<Vec<Option<Event>>>>);

impl Batch {
    pub(super) fn push(&self, event: Option<Event>) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(event);
    }

    pub(super) fn take(&self) -> Vec<Option<Event>> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Where the events of all rings come in.
pub(super) struct Inbox {
    pub batches: Receiver<Vec<Option<Event>>>,
    /// Makes the rings be read now.
    pub kick: Kick,
}

pub(super) struct Engine {
    hooks: Hooks,
    roots: Vec<Root>,
    state: State,
    order: Order,
    counters: Counters,
    inbox: Inbox,
    requests: Receiver<Request>,
    orders: Option<Sender<reader::Order>>,
    readings: Receiver<Reading>,
    reader: Option<JoinHandle<()>>,
    /// Events applied since the reading under way was asked for.
    log: Option<Vec<Event>>,
    /// Threads may be missing: everything is to be read.
    read_all: bool,
    /// All details are suspect, and to be marked so once no reading is under way: that one
    /// began before, and what it says of them may be old.
    spread: bool,
    /// Everything was marked while a reading was under way, which is no news of it.
    repeat: bool,
    files_read: Instant,
    mms_read: Instant,
    ticked: Instant,
    progressed: Instant,
    lost: u64,
    /// Runs of hooks that were left out.
    misses: u64,
    misses_read: Instant,
    stopped: bool,
}

impl Engine {
    pub(super) fn new(
        hooks: Hooks,
        iterators: Iterators,
        roots: Vec<Root>,
        inbox: Inbox,
        requests: Receiver<Request>,
    ) -> io::Result<Self> {
        let (orders, readings, reader) = reader::start(iterators)?;
        let now = Instant::now();
        Ok(Self {
            hooks,
            roots,
            state: State::default(),
            order: Order::default(),
            counters: Counters::default(),
            inbox,
            requests,
            orders: Some(orders),
            readings,
            reader: Some(reader),
            log: None,
            read_all: true,
            spread: false,
            repeat: false,
            files_read: now.checked_sub(FILES_PAUSE).unwrap_or(now),
            mms_read: now.checked_sub(MMS_PAUSE).unwrap_or(now),
            ticked: now,
            progressed: now,
            lost: 0,
            misses: 0,
            misses_read: now,
            stopped: false,
        })
    }

    pub(super) fn run(mut self) {
        self.maybe_read();
        while !self.stopped {
            self.step(TICK);
        }
        // The reader ends when nobody can order from it.
        self.orders = None;
        while self.readings.recv().is_ok() {}
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }

    /// Waits for something to do, at most so long, and does it.
    fn step(&mut self, patience: Duration) {
        let (batches, readings) = (self.inbox.batches.clone(), self.readings.clone());
        let requests = self.requests.clone();
        select! {
            recv(batches) -> batch => match batch {
                Ok(batch) => self.take_in(batch),
                Err(_) => self.stopped = true,
            },
            recv(readings) -> reading => if let Ok(reading) = reading {
                self.absorb(reading);
            },
            recv(requests) -> request => match request {
                Ok(Request::Look { settle, look }) => {
                    match settle {
                        Settle::No => {}
                        Settle::Events => self.catch_up(),
                        Settle::Suspects => self.settle(),
                    }
                    look(self.view());
                }
                Ok(Request::Alive { reply }) => drop(reply.send(())),
                Ok(Request::Stop) | Err(_) => self.stopped = true,
            },
            default(patience) => {}
        }
        self.tick();
    }

    /// As `step`, without taking requests.
    fn wait(&mut self, patience: Duration) {
        let (batches, readings) = (self.inbox.batches.clone(), self.readings.clone());
        select! {
            recv(batches) -> batch => if let Ok(batch) = batch {
                self.take_in(batch);
            },
            recv(readings) -> reading => if let Ok(reading) = reading {
                self.absorb(reading);
            },
            default(patience) => {}
        }
        self.mind_gaps();
    }

    fn take_in(&mut self, batch: Vec<Option<Event>>) {
        // Read after the batch was: no event in it can have a higher number.
        let last = self.hooks.last_seq();
        let mut malformed = 0;
        for event in batch {
            if !event.is_some_and(|event| self.order.push(event, last)) {
                malformed += 1;
            }
        }
        if malformed > 0 {
            self.counters.malformed += malformed;
            self.suspect_everything();
        }
        let before = self.order.done();
        while let Some(event) = self.order.pop() {
            self.apply(event);
        }
        if self.order.done() > before {
            self.progressed = Instant::now();
        }
    }

    fn apply(&mut self, event: Event) {
        self.counters.events += 1;
        let anomalies = apply(&mut self.state, &event);
        self.judge(&anomalies);
        if let Some(log) = &mut self.log {
            log.push(event);
        }
    }

    fn judge(&mut self, anomalies: &[Anomaly]) {
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
    fn spread(&mut self, object: Object) {
        match object {
            Object::Tasks => self.read_all = true,
            Object::Files(_) if self.hooks.set == HookSet::Fallback => self.spread = true,
            _ => {}
        }
    }

    fn suspect_everything(&mut self) {
        self.read_all = true;
        self.state.suspect_everything();
        self.repeat = self.log.is_some();
    }

    fn tick(&mut self) {
        if self.ticked.elapsed() < TICK {
            return;
        }
        self.ticked = Instant::now();
        self.note_losses();
        if self.misses_read.elapsed() >= MISSES_PAUSE {
            self.note_misses();
        }
        self.mind_gaps();
        self.maybe_read();
    }

    fn mind_gaps(&mut self) {
        if self.order.waiting() == 0 {
            self.progressed = Instant::now();
        } else if self.progressed.elapsed() > GAP_PATIENCE || self.order.waiting() > GAP_EVENTS {
            let missing = self.order.skip_gap();
            tracing::error!(missing, "events are missing; reading everything again");
            self.counters.gaps += missing;
            self.suspect_everything();
            self.take_in(Vec::new());
        }
    }

    /// Makes suspect what the kernel side could not report.
    fn note_losses(&mut self) {
        let counts = match self.hooks.lost() {
            Ok(counts) => counts,
            Err(error) => {
                tracing::error!(%error, "losses are not known; reading everything again");
                self.suspect_everything();
                return;
            }
        };
        let total = counts.iter().sum();
        let names = wire::CLASSES.iter().map(ToString::to_string);
        self.counters.lost = names.zip(counts).collect();
        if total == self.lost {
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
            let event = Event {
                seq,
                body: Body::Stale(object),
            };
            let anomalies = apply(&mut self.state, &event);
            self.judge(&anomalies);
            if let Some(log) = &mut self.log {
                log.push(event);
            }
            if !matches!(object, Object::Mm(_) | Object::Socket(_)) {
                // The descriptor of a lost socket or the table of a lost fork are not
                // in the state for being marked.
                self.read_all |= self.is_unknown(object);
            }
        }
    }

    /// Makes everything suspect if a hook did not run where it should have: the kernel leaves
    /// out a program that is running on the CPU already, and nobody knows for what.
    fn note_misses(&mut self) {
        self.misses_read = Instant::now();
        let misses = self.hooks.recursion_misses();
        if misses > self.misses {
            let missed = misses - self.misses;
            tracing::warn!(missed, "hooks were left out; reading everything again");
            *self
                .counters
                .anomalies
                .entry("missed-run".to_owned())
                .or_default() += missed;
            self.misses = misses;
            self.suspect_everything();
        }
    }

    fn is_unknown(&self, object: Object) -> bool {
        match object {
            Object::Files(id) => !self.state.tables.contains_key(&id),
            Object::Epoll(_) => {
                // Also the loss of a watched file's death, which is in no set's name.
                true
            }
            _ => true,
        }
    }

    fn view(&self) -> View<'_> {
        View {
            state: &self.state,
            counters: &self.counters,
            hooks: self.hooks.set,
            refused: self.hooks.refused.as_deref(),
            last_seq: self.hooks.last_seq(),
        }
    }

    /// Applies everything up to now and reads what is suspect.
    fn settle(&mut self) {
        self.note_misses();
        if self.hooks.set == HookSet::Fallback {
            self.suspect_unseen();
        }
        for _ in 0..SETTLE_ROUNDS {
            self.finish_reading();
            self.catch_up();
            self.note_losses();
            let (files, mms) = self.wanted();
            if !files && !mms {
                return;
            }
            self.order_reading(files, mms);
            self.finish_reading();
            self.catch_up();
        }
    }

    /// No tracepoint tells that a watch went with what it watched, or after its one event,
    /// nor that a socket was bound because it sent.
    fn suspect_unseen(&mut self) {
        let inotifies = self.state.inotifies.iter();
        let watching = inotifies.filter(|(_, inotify)| !inotify.watches.is_empty());
        let watching = watching.map(|(id, _)| Object::Inotify(*id));
        let sockets = self.state.sockets.iter();
        let unbound = sockets
            .filter(|(_, socket)| socket.info.local_port == 0 && socket.info.name.is_empty());
        let unbound = unbound.map(|(id, _)| Object::Socket(*id));
        for object in watching.chain(unbound).collect::<Vec<_>>() {
            self.state.suspect(object);
        }
    }

    fn catch_up(&mut self) {
        let target = self.hooks.last_seq();
        while self.order.done() < target && !self.stopped {
            self.inbox.kick.now();
            self.wait(KICK_PATIENCE);
        }
    }

    fn finish_reading(&mut self) {
        while self.log.is_some() {
            self.wait(TICK);
        }
    }

    /// Whether there is something suspect of which descriptors tell, and mappings.
    fn wanted(&mut self) -> (bool, bool) {
        if self.spread && self.log.is_none() {
            self.spread = false;
            self.state.suspect_details();
        }
        let suspects = self.state.suspects();
        let is_mm = |object: &Object| matches!(object, Object::Mm(_));
        let files = self.read_all || !suspects.iter().all(is_mm);
        (files, suspects.iter().any(is_mm))
    }

    fn maybe_read(&mut self) {
        let (files, mms) = self.wanted();
        let files = files && self.files_read.elapsed() >= FILES_PAUSE;
        let mms = mms && self.mms_read.elapsed() >= MMS_PAUSE;
        if files || mms {
            self.order_reading(files, mms);
        }
    }

    /// Has what is suspect read, unless a reading is under way.
    fn order_reading(&mut self, files: bool, mms: bool) {
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
        let all = self.read_all || processes.len() > FEW_PROCESSES;
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
        // Before the number is taken: a change from here on is said again.
        for address in self.hooks.dirty() {
            let is_mm = self
                .state
                .mms
                .contains_key(&crate::model::ids::MmId(address));
            let is_table = self.state.tables.contains_key(&FilesId(address));
            if if is_mm { mms } else { files || !is_table } {
                self.hooks.clear_dirty(address);
            }
        }
        let order = reader::Order {
            seq: self.hooks.last_seq(),
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

    fn count_resyncs(&mut self, files: bool, mms: bool, all: bool) {
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

    fn suspect_processes(&self, files: bool, mms: bool) -> BTreeSet<Pid> {
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

    fn absorb(&mut self, reading: Reading) {
        let Some(log) = self.log.take() else { return };
        match reading.result {
            Ok(snapshot) => {
                absorb(&mut self.state, &snapshot);
                // Equal: a loss that was noted since, which has no number of its own.
                let since = log.iter().filter(|event| event.seq >= snapshot.seq);
                let since: Vec<Event> = since.cloned().collect();
                // Judged when they were applied first.
                replay(&mut self.state, &since);
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
