//! Keeps a model of the tracked applications: ring threads hand events to one
//! thread that owns the state, a reader reads what is suspect.

pub mod audit;
mod engine;
mod names;
pub mod order;
mod reader;
pub mod roots;

use crate::bpf::fill::Fills;
use crate::bpf::iter::Iterators;
use crate::bpf::programs::Programs;
use crate::bpf::rings::Kick;
use crate::bpf::track::{HookSet, Hooks, Options};
use crate::model::ids::Tid;
use crate::model::state::State;
use crate::sys::precedence::Precedence;
use crossbeam_channel::{RecvTimeoutError, SendTimeoutError, Sender, bounded};
use nix::unistd::gettid;
use roots::Root;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Tracking cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The hooks.
    #[error(transparent)]
    Hooks(#[from] crate::bpf::track::LoadError),
    /// The iterators.
    #[error(transparent)]
    Iterators(#[from] crate::bpf::iter::LoadError),
    /// A thread.
    #[error("Starting a thread failed; is the limit of processes reached?")]
    Thread(#[from] io::Error),
}

/// The thread that owns the model is gone: a bug of ours.
#[derive(Debug, thiserror::Error)]
#[error("The model's thread ended; restart the agent")]
pub struct Gone;

/// Counts since the start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Events applied.
    pub events: u64,
    /// Events lost for want of room, by class.
    pub lost: BTreeMap<String, u64>,
    /// Records that could not be decoded.
    pub malformed: u64,
    /// Numbers that were never seen: a bug of ours.
    pub gaps: u64,
    /// Things events said that the model could not explain, by kind.
    pub anomalies: BTreeMap<String, u64>,
    /// Readings of suspect objects, the first one included.
    pub readings: u64,
    /// Objects read again because they were suspect, by kind. Address spaces are the rule
    /// (their changes are said as marks); with nothing lost and the fentry set the others
    /// are not.
    pub resyncs: BTreeMap<String, u64>,
    /// Readings that failed.
    pub failed_readings: u64,
    /// Sockets of tracked processes that were made outside and are followed now.
    pub adopted: u64,
}

/// The model at one instant, in the hands of its thread.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The state.
    pub state: &'a State,
    /// The counters.
    pub counters: &'a Counters,
    /// The hook set in use.
    pub hooks: HookSet,
    /// Why the better one is not.
    pub refused: Option<&'a str>,
    /// Number of the last event that happened; `state.seq` is the last applied.
    pub last_seq: u64,
}

/// How far the model is to come before it is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Settle {
    /// As it is.
    No,
    /// Everything that happened before is applied; nothing is read.
    Events,
    /// And what is being read, if anything is, was.
    Reading,
    /// And what is suspect was read again.
    Suspects,
    /// And the names of all files, which change without an event.
    Names,
}

/// What somebody wants to know of the model.
type Look = Box<dyn FnOnce(View<'_>) + Send>;

enum Request {
    Look { settle: Settle, look: Look },
    Stop,
}

/// Running tracking. Dropping it stops the threads and detaches the hooks.
#[derive(Debug)]
pub struct Tracking {
    requests: Sender<Request>,
    stop: Arc<AtomicBool>,
    kick: Kick,
    threads: Vec<JoinHandle<()>>,
    /// The thread that owns the model.
    model: Tid,
    /// What is tracked.
    pub roots: Vec<Root>,
    /// The hooks' programs, for what the kernel counts of them.
    pub programs: Programs,
    /// How full the rings are.
    pub fills: Fills,
}

impl Tracking {
    /// Attaches the hooks and reads what is there already.
    ///
    /// # Errors
    ///
    /// The kernel refuses the programs, or a thread cannot be started.
    pub fn start(options: &Options, roots: Vec<Root>) -> Result<Self, StartError> {
        let mut iterators = Iterators::load()?;
        let roots_of: Vec<_> = roots.iter().map(|root| (root.id.0, root.level)).collect();
        iterators.tell_foreign(&roots_of);
        let mut hooks = Hooks::load(options, &roots_of)?;
        let (batches, inbox) = bounded(1024);
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let batch = engine::Batch::default();
        let sink = {
            let batch = batch.clone();
            move |event| batch.push(event)
        };
        let mut rings = hooks.rings(sink)?;
        let kick = rings.kick();
        let reader = {
            let stop = Arc::clone(&stop);
            move || {
                while !stop.load(Ordering::Relaxed) {
                    rings.read();
                    let events = batch.take();
                    if !events.is_empty() && batches.send(events).is_err() {
                        return;
                    }
                }
            }
        };
        threads.push(thread::Builder::new().name("rings".into()).spawn(reader)?);
        hooks.start();
        let (programs, fills) = (hooks.programs().clone(), hooks.fills()?);
        let (requests, requested) = bounded(16);
        let inbox = engine::Inbox {
            batches: inbox,
            kick: kick.clone(),
        };
        let engine = engine::Engine::new(hooks, iterators, roots.clone(), inbox, requested)?;
        let (model, who) = bounded(1);
        let run = move || {
            let _ = model.send(Tid(gettid().as_raw()));
            engine.run();
        };
        threads.push(thread::Builder::new().name("model".into()).spawn(run)?);
        let model = who.recv().map_err(io::Error::other)?;
        Ok(Self {
            requests,
            stop,
            kick,
            threads,
            model,
            roots,
            programs,
            fills,
        })
    }

    /// Has the model's thread look at it, with regard to what happened before the call. No
    /// event is applied meanwhile, so a look must be short and wait for nothing.
    ///
    /// # Errors
    ///
    /// The model's thread is gone.
    pub fn look<T: Send + 'static>(
        &self,
        settle: Settle,
        look: impl FnOnce(View<'_>) -> T + Send + 'static,
    ) -> Result<T, Gone> {
        let (reply, answer) = bounded(1);
        let look = Box::new(move |view: View<'_>| {
            // Whoever asked may have gone.
            let _ = reply.send(look(view));
        });
        self.requests
            .send(Request::Look { settle, look })
            .map_err(|_| Gone)?;
        answer.recv().map_err(|_| Gone)
    }

    /// Has the model's thread go first for as long as the result lives: applications stand still
    /// until it has answered.
    #[must_use]
    pub fn urge(&self) -> Precedence {
        Precedence::lend(self.model)
    }

    /// A copy of the state.
    ///
    /// # Errors
    ///
    /// The model's thread is gone.
    pub fn state(&self, settle: Settle) -> Result<State, Gone> {
        self.look(settle, |view| view.state.clone())
    }

    /// Whether the model's thread does its work, as far as can be told in this time.
    ///
    /// # Errors
    ///
    /// It is gone.
    pub fn is_alive(&self, patience: Duration) -> Result<bool, Gone> {
        let deadline = Instant::now() + patience;
        let (reply, answer) = bounded(1);
        let settle = Settle::No;
        // Whoever asked may have gone.
        let look = Box::new(move |_: View<'_>| {
            let _ = reply.send(());
        });
        let request = Request::Look { settle, look };
        match self.requests.send_deadline(request, deadline) {
            Ok(()) => {}
            Err(SendTimeoutError::Timeout(_)) => return Ok(false),
            Err(SendTimeoutError::Disconnected(_)) => return Err(Gone),
        }
        match answer.recv_deadline(deadline) {
            Ok(()) => Ok(true),
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(Gone),
        }
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.kick.now();
        // The thread may be gone already; it is joined in any case.
        let _ = self.requests.send(Request::Stop);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
