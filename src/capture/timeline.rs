//! When each step of a checkpoint ended.

use super::error::CheckpointError;
use serde::Serialize;
use std::time::{Duration, Instant};

/// Steps with the moment they ended, from one start.
#[derive(Clone, Debug)]
pub struct Timeline {
    start: Instant,
    steps: Vec<(&'static str, Instant)>,
    frozen: Option<(Instant, Option<Instant>)>,
    /// Of the times before that.
    earlier: Duration,
}

/// How long things took, in microseconds.
#[derive(Clone, Debug, Serialize)]
pub struct Durations {
    /// Each step's own time.
    pub steps: Vec<(&'static str, u64)>,
    /// From the request to freeze to the thaw or the kill.
    pub frozen_us: u64,
    /// It stood still before for so long, in all: looks at what it wrote, attempts repeated.
    pub frozen_before_us: u64,
    /// All of it.
    pub total_us: u64,
}

impl Timeline {
    pub(super) fn new() -> Self {
        Self {
            start: Instant::now(),
            steps: Vec::new(),
            frozen: None,
            earlier: Duration::ZERO,
        }
    }

    pub(super) fn done(&mut self, step: &'static str) {
        self.steps.push((step, Instant::now()));
    }

    pub(super) fn freeze(&mut self) {
        // A repeated attempt begins anew: the application ran in between.
        if let Some((from, Some(to))) = self.frozen {
            self.earlier += to - from;
        }
        self.frozen = Some((Instant::now(), None));
    }

    pub(super) fn release(&mut self) {
        if let Some((_, end @ None)) = &mut self.frozen {
            *end = Some(Instant::now());
        }
    }

    /// Fails if the application stands still for longer than `limit` by now.
    pub(super) fn within(&self, limit: Option<Duration>) -> Result<(), CheckpointError> {
        match (self.frozen, limit) {
            (Some((from, None)), Some(limit)) if from.elapsed() > limit => {
                Err(CheckpointError::TooSlow(from.elapsed()))
            }
            _ => Ok(()),
        }
    }

    /// What it amounts to.
    #[must_use]
    pub fn durations(&self) -> Durations {
        let mut last = self.start;
        let steps = self.steps.iter().map(|&(name, at)| {
            let took = at - last;
            last = at;
            (name, micros(took))
        });
        let steps = steps.collect();
        let frozen = self.frozen.map_or(Duration::ZERO, |(from, to)| {
            to.unwrap_or_else(Instant::now) - from
        });
        Durations {
            steps,
            frozen_us: micros(frozen),
            frozen_before_us: micros(self.earlier),
            total_us: micros(last - self.start),
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
