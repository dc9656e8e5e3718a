//! What became of an update: `/run/tracker/update.json`.

use crate::applications::STATE_DIR;
use crate::model::frozen::{Milestone, Origin};
use crate::model::verify::Verification;
use crate::sys::clock;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::Path;

/// Where the report of the last update lies.
pub const FILE: &str = "update.json";

/// How an update ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Everything was restored.
    Done,
    /// At least one application was not restored.
    Partial,
    /// No image was found, or it could not be read.
    #[default]
    Failed,
}

/// The report. Times are `CLOCK_REALTIME` in nanoseconds by the old kernel's clock, which
/// the CPU's time stamp counter continues; durations are nanoseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UpdateReport {
    /// How it ended.
    pub status: Status,
    /// `uname -r` before.
    pub kernel_before: String,
    /// `uname -r` after.
    pub kernel_after: String,
    /// Each application.
    pub applications: Vec<ApplicationReport>,
    /// Steps on both kernels, in order.
    pub timeline: Vec<Milestone>,
    /// From the freeze to the old kernel's last instruction of ours.
    pub frozen_until_kexec: u64,
    /// From there to the first instruction of ours on the new kernel.
    pub boot: u64,
    /// From there until the applications ran.
    pub restore: u64,
    /// All of it: how long the applications stood still.
    pub total: u64,
    /// How the agent's model compared with the frozen applications; `None` without an agent.
    pub verification: Option<Verification>,
    /// What went wrong without ending the update.
    pub warnings: Vec<String>,
}

/// One application's part of the report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApplicationReport {
    /// Its name.
    pub name: String,
    /// What became of it.
    pub status: ApplicationStatus,
    /// PIDs of its processes.
    pub pids: Vec<i32>,
    /// TCP connections it had.
    pub connections: usize,
    /// Why it was not restored.
    pub error: Option<String>,
}

/// What became of one application.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ApplicationStatus {
    /// It goes on where it was.
    Restored,
    /// It could not be restored and was started by its own command.
    Restarted,
    /// It could neither be restored nor started.
    #[default]
    Failed,
}

/// Names of the milestones that durations are computed from.
pub mod step {
    /// The applications are asked to stop: from here on they stand still.
    pub const FROZEN: &str = "freeze";
    /// The old kernel is about to be left.
    pub const KEXEC: &str = "kexec";
    /// The first instruction of ours on the new kernel.
    pub const EARLY: &str = "early boot";
    /// The applications run.
    pub const RUNNING: &str = "running";
}

impl UpdateReport {
    /// Fills the durations in from the timeline. Steps that never came count as nothing.
    pub fn measure(&mut self) {
        let at = |step: &str| {
            let mut found = self.timeline.iter().filter(|m| m.step == step);
            found.next().map(|m| m.at)
        };
        let between = |from: &str, to: &str| match (at(from), at(to)) {
            (Some(from), Some(to)) => to.saturating_sub(from),
            _ => 0,
        };
        let durations = [
            between(step::FROZEN, step::KEXEC),
            between(step::KEXEC, step::EARLY),
            between(step::EARLY, step::RUNNING),
            between(step::FROZEN, step::RUNNING),
        ];
        [self.frozen_until_kexec, self.boot, self.restore, self.total] = durations;
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// /run/tracker cannot be written.
    pub fn write(&self) -> io::Result<()> {
        let dir = Path::new(STATE_DIR);
        fs::create_dir_all(dir)?;
        let part = dir.join("update.part");
        fs::write(&part, serde_json::to_vec_pretty(self)?)?;
        fs::rename(part, dir.join(FILE))
    }

    /// The report of the last update; `None` where this kernel was not started by one.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read() -> io::Result<Option<Self>> {
        match fs::read(Path::new(STATE_DIR).join(FILE)) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// `CLOCK_REALTIME` of the old kernel, continued: time stamp counter `tsc` in nanoseconds.
#[must_use]
pub fn continued(origin: &Origin, tsc: u64) -> u64 {
    let counts = u128::from(tsc.saturating_sub(origin.tsc));
    let passed = counts * 1_000_000_000 / u128::from(origin.tsc_hz.max(1));
    origin
        .realtime
        .saturating_add(u64::try_from(passed).unwrap_or(u64::MAX))
}

/// Finds out how fast the time stamp counter runs, from one reading to another.
#[derive(Clone, Copy, Debug)]
pub struct TscRate {
    tsc: u64,
    nanoseconds: u64,
}

impl TscRate {
    /// The first reading.
    #[must_use]
    pub fn begin() -> Self {
        Self {
            tsc: clock::tsc(),
            nanoseconds: clock::monotonic_raw(),
        }
    }

    /// Counts per second since the first reading.
    #[must_use]
    pub fn hertz(self) -> u64 {
        let counts = u128::from(clock::tsc().saturating_sub(self.tsc));
        let passed = u128::from(clock::monotonic_raw().saturating_sub(self.nanoseconds));
        u64::try_from(counts * 1_000_000_000 / passed.max(1)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_come_from_the_timeline() {
        let milestone = |step: &str, at| Milestone {
            step: step.into(),
            at,
        };
        let mut report = UpdateReport {
            timeline: vec![
                milestone(step::FROZEN, 100),
                milestone(step::KEXEC, 130),
                milestone(step::EARLY, 1130),
                milestone(step::RUNNING, 1180),
            ],
            ..UpdateReport::default()
        };
        report.measure();
        assert_eq!(
            (report.frozen_until_kexec, report.boot, report.restore),
            (30, 1000, 50)
        );
        assert_eq!(report.total, 1080);
    }

    #[test]
    fn the_old_clock_goes_on() {
        let origin = Origin {
            realtime: 5_000_000_000,
            tsc: 1000,
            tsc_hz: 2_000_000_000,
            ..Origin::default()
        };
        assert_eq!(continued(&origin, 4_000_001_000), 7_000_000_000);
    }
}
