//! The thread that owns the model.

mod adoption;
mod names;
mod resync;
mod suspects;

use super::order::Order;
use super::reader::{self, Reading};
use super::roots::Root;
use super::{Counters, Request, Settle, View};
use crate::bpf::iter::Iterators;
use crate::bpf::rings::Kick;
use crate::bpf::track::{HookSet, Hooks};
use crate::model::apply::apply;
use crate::model::event::Event;
use crate::model::state::State;
use adoption::Adoption;
use crossbeam_channel::{Receiver, Sender, select};
use names::Naming;
use resync::{FILES_PAUSE, MMS_PAUSE};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(50);
/// A record that is reserved already may be submitted only after its ring was read.
const KICK_PATIENCE: Duration = Duration::from_millis(2);
/// Between two looks at what each hook says of itself.
const MISSES_PAUSE: Duration = Duration::from_secs(1);
/// How long an event may be missing: a BPF program that holds room in a ring ends
/// in microseconds, but its virtual CPU may not run meanwhile.
const GAP_PATIENCE: Duration = Duration::from_secs(5);
/// How many may wait for it: some hundred megabytes.
const GAP_EVENTS: usize = 1 << 20;
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
    naming: Naming,
    adoption: Adoption,
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
        let naming = Naming::start()?;
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
            naming,
            adoption: Adoption::new(now),
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
        self.naming.stop();
    }

    /// Waits for something to do, at most so long, and does it.
    fn step(&mut self, patience: Duration) {
        let (batches, readings) = (self.inbox.batches.clone(), self.readings.clone());
        let named = self.naming.answers.clone();
        let requests = self.requests.clone();
        select! {
            recv(batches) -> batch => match batch {
                Ok(batch) => self.take_in(batch),
                Err(_) => self.stopped = true,
            },
            recv(readings) -> reading => if let Ok(reading) = reading {
                self.absorb(reading);
            },
            recv(named) -> named => if let Ok(named) = named {
                self.hold_names(named);
            },
            recv(requests) -> request => match request {
                Ok(Request::Look { settle, look }) => {
                    match settle {
                        Settle::No => {}
                        Settle::Events => self.catch_up(),
                        Settle::Reading => {
                            self.finish_reading();
                            self.catch_up();
                        }
                        Settle::Suspects => self.settle(),
                        Settle::Names => {
                            self.settle();
                            self.name_all();
                        }
                    }
                    look(self.view());
                }
                Ok(Request::Stop) | Err(_) => self.stopped = true,
            },
            default(patience) => {}
        }
        self.tick();
    }

    /// As `step`, without taking requests.
    fn wait(&mut self, patience: Duration) {
        let (batches, readings) = (self.inbox.batches.clone(), self.readings.clone());
        let named = self.naming.answers.clone();
        select! {
            recv(batches) -> batch => if let Ok(batch) = batch {
                self.take_in(batch);
            },
            recv(readings) -> reading => if let Ok(reading) = reading {
                self.absorb(reading);
            },
            recv(named) -> named => if let Ok(named) = named {
                self.hold_names(named);
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
        self.enact(event);
    }

    /// Applies what happened, whoever says so.
    fn enact(&mut self, event: Event) {
        let anomalies = apply(&mut self.state, &event);
        self.judge(&anomalies);
        if let Some(log) = &mut self.log {
            log.push(event);
        }
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
        self.maybe_name();
        self.maybe_sweep();
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
            // One that is under way may have read them before what is not told of.
            self.finish_reading();
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
}
