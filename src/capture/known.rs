//! What the agent knows, at the moment in which everything stands still.
//!
//! The application waits while it is asked, so a thread of its own asks and compares while the
//! rest is read.

use super::Capture;
use crate::agent::client::{ClientError, Follower, SOCKET};
use crate::bpf::reading::{add_files, add_tasks};
use crate::model::snapshot::Snapshot;
use crate::model::verify::{Verification, verify};
use crate::sys::precedence::Precedence;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

/// How long the agent may take beyond all that is read while applications stand still.
const PATIENCE: Duration = Duration::from_millis(100);

/// When whoever waits for an answer has long gone away.
const LIMIT: Duration = Duration::from_secs(60);

struct Asking {
    found: Sender<Vec<Snapshot>>,
    outcome: Receiver<Result<Verification, ClientError>>,
}

/// The agent's model, if there is an agent. One that fails costs a checkpoint nothing.
pub struct Known(Option<Asking>);

/// The model is being compared.
pub struct Comparison(Option<Receiver<Result<Verification, ClientError>>>);

impl Known {
    /// Fetches the model while the applications run.
    #[must_use]
    pub fn fetch() -> Self {
        match Follower::start(Path::new(SOCKET)) {
            Ok(follower) => Self(follower.and_then(Asking::start)),
            Err(error) => {
                tracing::warn!("The model is not verified: {error}");
                Self(None)
            }
        }
    }

    /// Has what was found standing still ([`Capture::found`]) compared with the model and what
    /// has happened since it was fetched. To be called once all is frozen.
    #[must_use]
    pub fn compare(self, found: impl FnOnce() -> Vec<Snapshot>) -> Comparison {
        Comparison(self.0.and_then(|asking| {
            let sent = asking.found.send(found());
            sent.is_ok().then_some(asking.outcome)
        }))
    }
}

impl Asking {
    /// The thread is made early: its stack takes its time, all the more with locked memory.
    fn start(follower: Follower) -> Option<Self> {
        let (found, work) = channel::<Vec<Snapshot>>();
        let (answer, outcome) = channel();
        let thread = move || {
            let Ok(found) = work.recv() else { return };
            let _precedence = Precedence::take();
            let result = follower.catch_up(LIMIT).map(|state| {
                let each = found.iter().map(|found| verify(&state, found));
                each.fold(Verification::default(), Verification::and)
            });
            // Nobody there: it took too long.
            let _ = answer.send(result);
        };
        let name = "verify".to_owned();
        let started = std::thread::Builder::new().name(name).spawn(thread);
        started
            .map_err(|error| tracing::warn!("The model is not verified: {error}"))
            .ok()?;
        Some(Self { found, outcome })
    }
}

impl Comparison {
    /// What came of it. To be called before anything moves again.
    #[must_use]
    pub fn result(self) -> Option<Verification> {
        match self.0?.recv_timeout(PATIENCE) {
            Ok(Ok(verification)) => {
                if verification.differing > 0 {
                    tracing::warn!("The agent's model differs: {:?}", verification.examples);
                }
                Some(verification)
            }
            Ok(Err(error)) => {
                tracing::warn!("The model is not verified: {error}");
                None
            }
            Err(_) => {
                tracing::warn!("The model is not verified: the agent takes too long");
                None
            }
        }
    }
}

impl Capture {
    /// Threads, descriptors and epoll items as found standing still, which is what is carried,
    /// whatever a comparison says; nothing when the application is not frozen.
    #[must_use]
    pub fn found(&self) -> Snapshot {
        let mut found = Snapshot::default();
        if let Some(frozen) = &self.frozen {
            add_tasks(&mut found, &frozen.tasks);
            add_files(&mut found, &frozen.open);
        }
        found
    }
}
