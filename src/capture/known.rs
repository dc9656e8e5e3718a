//! What the agent knows, at the moment in which everything stands still.

use super::Capture;
use crate::agent::client::{Follower, SOCKET};
use crate::bpf::reading::{add_files, add_tasks};
use crate::model::snapshot::Snapshot;
use crate::model::state::State;
use crate::model::verify::{Verification, verify};
use std::path::Path;
use std::time::Duration;

/// How long the agent may take to send its last changes: applications stand still meanwhile.
const PATIENCE: Duration = Duration::from_millis(100);

/// The agent's model, if there is an agent. One that fails costs a checkpoint nothing.
#[derive(Debug)]
pub struct Known(Option<Follower>);

impl Known {
    /// Fetches the model while the applications run.
    #[must_use]
    pub fn fetch() -> Self {
        Self(Follower::start(Path::new(SOCKET)).unwrap_or_else(|error| {
            tracing::warn!("The model is not verified: {error}");
            None
        }))
    }

    /// The model with what has happened since. To be called once all is frozen.
    #[must_use]
    pub fn catch_up(self) -> Option<State> {
        let result = self.0?.catch_up(PATIENCE);
        result
            .map_err(|error| tracing::warn!("The model is not verified: {error}"))
            .ok()
    }
}

impl Capture {
    /// Compares the model with what was found standing still, which is what is carried,
    /// whatever comes of it; `None` when the application is not frozen.
    #[must_use]
    pub fn verify(&self, state: &State) -> Option<Verification> {
        let frozen = self.frozen.as_ref()?;
        let mut found = Snapshot::default();
        add_tasks(&mut found, &frozen.tasks);
        add_files(&mut found, &frozen.open);
        let verification = verify(state, &found);
        if verification.differing > 0 {
            tracing::warn!("The agent's model differs: {:?}", verification.examples);
        }
        Some(verification)
    }
}
