//! Giving names to files that stay open.

use super::Engine;
use crate::model::names::Unnamed;
use crate::track::names::{self, Named};
use crossbeam_channel::{Receiver, Sender};
use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Between two looks for files without a name; what stays open for less is never asked for.
const PAUSE: Duration = Duration::from_secs(2);

/// Who is asked for names, and how far that has come.
#[derive(Debug)]
pub(super) struct Naming {
    namer: Option<Sender<Vec<Unnamed>>>,
    pub(super) answers: Receiver<Named>,
    thread: Option<JoinHandle<()>>,
    /// Number of the last event at the last look.
    seen: u64,
    looked: Instant,
    /// A question is under way.
    asking: bool,
    /// Answers that wait until everything is applied that happened before they were there.
    ready: Option<(u64, Named)>,
}

impl Naming {
    pub(super) fn start() -> io::Result<Self> {
        let (namer, answers, thread) = names::start()?;
        Ok(Self {
            namer: Some(namer),
            answers,
            thread: Some(thread),
            seen: 0,
            looked: Instant::now(),
            asking: false,
            ready: None,
        })
    }

    /// The thread ends when nobody can ask it.
    pub(super) fn stop(&mut self) {
        self.namer = None;
        while self.answers.recv().is_ok() {}
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Engine {
    /// Has the names read of files that were there at the last look and have none yet.
    pub(super) fn maybe_name(&mut self) {
        self.take_names();
        let news = self.order.done() != self.naming.seen;
        if news && self.naming.looked.elapsed() >= PAUSE {
            let since = self.naming.seen;
            self.naming.looked = Instant::now();
            self.naming.seen = self.order.done();
            self.ask_names(since, false);
        }
    }

    /// Has the names of all files read, and takes them.
    pub(super) fn name_all(&mut self) {
        self.finish_naming();
        self.ask_names(u64::MAX, true);
        self.finish_naming();
    }

    fn ask_names(&mut self, since: u64, again: bool) {
        if self.naming.asking || self.naming.ready.is_some() {
            return;
        }
        let wanted = self.state.unnamed(since, again);
        let namer = self.naming.namer.as_ref();
        if !wanted.is_empty() && namer.is_some_and(|namer| namer.send(wanted).is_ok()) {
            self.naming.asking = true;
        }
    }

    pub(super) fn hold_names(&mut self, named: Named) {
        self.naming.asking = false;
        self.naming.ready = Some((self.hooks.last_seq(), named));
        self.take_names();
    }

    fn take_names(&mut self) {
        let done = self.order.done();
        let due = self.naming.ready.take_if(|(seq, _)| *seq <= done);
        for names in due.into_iter().flat_map(|(_, named)| named) {
            self.state.set_names(&names);
        }
    }

    fn finish_naming(&mut self) {
        while self.naming.asking && !self.stopped {
            self.wait(super::TICK);
        }
        if self.naming.ready.is_some() {
            self.catch_up();
            self.take_names();
        }
    }
}
