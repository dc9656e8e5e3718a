//! The clock: CPU time of this thread and, where asked for, of its children.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use nix::time::{ClockId, clock_gettime};

use super::bpf::{Programs, Sums};
use super::{Runs, as_float};

/// Adds up the CPU time of the stretches that are to be measured.
pub(super) struct Meter {
    children: bool,
    /// Nanoseconds so far.
    sum: i64,
    /// What measuring nothing costs.
    own: i64,
    programs: Option<Programs>,
    runs: Sums,
}

impl Meter {
    /// A meter at zero; with `children`, of those that were waited for too.
    pub fn new(children: bool, programs: Option<Programs>) -> Meter {
        let mut meter = Meter {
            children,
            sum: 0,
            own: 0,
            programs: None,
            runs: Sums::new(),
        };
        let mut empty: Vec<i64> = (0..31)
            .filter_map(|_| {
                meter.measure(|| Ok(())).ok()?;
                Some(std::mem::take(&mut meter.sum))
            })
            .collect();
        empty.sort_unstable();
        meter.own = empty.get(empty.len() / 2).copied().unwrap_or(0);
        meter.programs = programs;
        meter
    }

    /// Measures what `work` does, beside what this thread does elsewhere.
    pub fn measure(&mut self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let before = self.programs.as_ref().map(Programs::sums).transpose()?;
        let begun = self.now()?;
        let result = work();
        self.sum += self.now()? - begun - self.own;
        if let (Some(programs), Some(before)) = (&self.programs, before) {
            for (name, (count, time)) in programs.sums()? {
                let (old_count, old_time) = before.get(&name).copied().unwrap_or_default();
                let sum = self.runs.entry(name).or_default();
                sum.0 += count - old_count;
                sum.1 += time - old_time;
            }
        }
        result
    }

    /// The time since it was last taken, in nanoseconds.
    pub fn take(&mut self) -> f64 {
        let sum = std::mem::take(&mut self.sum);
        let size = as_float(usize::try_from(sum.unsigned_abs()).unwrap_or(usize::MAX));
        if sum < 0 { -size } else { size }
    }

    /// Starts at zero again.
    pub fn forget(&mut self) {
        self.sum = 0;
        self.runs.clear();
    }

    /// The programs that ran, for each of that many operations.
    pub fn programs(&self, operations: f64) -> BTreeMap<String, Runs> {
        let float = |number: u64| as_float(usize::try_from(number).unwrap_or(usize::MAX));
        self.runs
            .iter()
            .filter(|(_, (count, _))| *count > 0)
            .map(|(name, &(count, time))| {
                let runs = Runs {
                    count: float(count) / operations,
                    time: float(time) / operations,
                };
                (name.clone(), runs)
            })
            .collect()
    }

    fn now(&self) -> Result<i64> {
        let mut time = 0;
        if self.children {
            let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("getrusage")?;
            time += (usage.user_time() + usage.system_time()).num_nanoseconds();
        }
        let own = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("clock_gettime")?;
        Ok(time + own.num_nanoseconds())
    }
}
