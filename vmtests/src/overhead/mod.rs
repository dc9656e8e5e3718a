//! What operations cost, in CPU time of the thread that performs them (and of
//! its children). In a VM that counts instructions (`VmBuilder::icount`) a
//! nanosecond is an instruction, so times are repeatable counts.
//!
//! The guest program `ops` measures; `cargo xtask overhead` compares.

mod bpf;
mod meter;
mod operations;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use self::bpf::Programs;
use self::meter::Meter;
pub use self::operations::NAMES;
use self::operations::{OPERATIONS, Operation};

/// What one operation costs, in nanoseconds: instructions, where they are counted.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cost {
    /// The operation.
    pub name: String,
    /// Median of the batches.
    pub median: f64,
    /// The cheapest batch.
    pub low: f64,
    /// The dearest batch.
    pub high: f64,
    /// CPU time of the agent for each operation, its preparation included and
    /// what it needs when idle left out; none without an agent.
    pub agent: Option<f64>,
    /// BPF programs that ran while it was measured, if asked for. Their own
    /// statistics make everything dearer, so the other figures are then too high.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub programs: BTreeMap<String, Runs>,
}

/// How often a BPF program runs and how long, for each operation.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Runs {
    /// Times it runs.
    pub count: f64,
    /// Nanoseconds of all of these.
    pub time: f64,
}

/// How to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// Batches of each operation.
    pub batches: usize,
    /// The agent's `cpu.stat`, if there is one.
    pub agent: Option<PathBuf>,
    /// Ask for the BPF programs' statistics.
    pub programs: bool,
    /// Only these operations; all if empty.
    pub only: Vec<String>,
}

/// Batches that do not count: caches fill, code is patched, tables grow.
const WARM_UP: usize = 3;

/// Until the agent has no work left: it reads address spaces again once a second.
const SETTLE: Duration = Duration::from_millis(2500);

/// Measures the operations, one after another.
///
/// # Errors
/// If an operation fails or is unknown.
pub fn measure(options: &Options) -> Result<Vec<Cost>> {
    if let Some(unknown) = options
        .only
        .iter()
        .find(|name| !NAMES.contains(&name.as_str()))
    {
        bail!("No operation {unknown}; there are {}", NAMES.join(", "));
    }
    let chosen =
        |name: &str| options.only.is_empty() || options.only.iter().any(|only| only == name);
    let idle = match &options.agent {
        Some(_) => {
            sleep(SETTLE);
            Some(Agent::busy(options, || {
                sleep(SETTLE);
                Ok(())
            })?)
        }
        None => None,
    };
    OPERATIONS
        .iter()
        .filter(|operation| chosen(operation.name))
        .map(|operation| measure_one(operation, options, idle.as_ref()).context(operation.name))
        .collect()
}

fn measure_one(operation: &Operation, options: &Options, idle: Option<&Agent>) -> Result<Cost> {
    let programs = options.programs.then(Programs::open).transpose()?;
    let mut meter = Meter::new(operation.children, programs);
    let mut times = Vec::new();
    let mut all = || -> Result<()> {
        let mut batch = (operation.prepare)(operation.per_batch)?;
        for _ in 0..WARM_UP {
            batch(&mut meter)?;
        }
        meter.forget();
        for _ in 0..options.batches {
            batch(&mut meter)?;
            times.push(meter.take());
        }
        Ok(())
    };
    let busy = match idle {
        Some(_) => Some(Agent::busy(options, || {
            all()?;
            sleep(SETTLE);
            Ok(())
        })?),
        None => {
            all()?;
            None
        }
    };
    let per_batch = as_float(operation.per_batch);
    let mut times: Vec<f64> = times.into_iter().map(|time| time / per_batch).collect();
    times.sort_by(f64::total_cmp);
    let agent = busy.zip(idle).map(|(busy, idle)| {
        let rate = idle.used / idle.elapsed;
        let operations = per_batch * as_float(options.batches + WARM_UP);
        (busy.used - rate * busy.elapsed) / operations
    });
    let operations = per_batch * as_float(options.batches);
    Ok(Cost {
        name: operation.name.to_owned(),
        median: times.get(times.len() / 2).copied().unwrap_or(f64::NAN),
        low: times.first().copied().unwrap_or(f64::NAN),
        high: times.last().copied().unwrap_or(f64::NAN),
        agent,
        programs: meter.programs(operations),
    })
}

/// CPU time that the agent used within some time, in nanoseconds.
struct Agent {
    used: f64,
    elapsed: f64,
}

impl Agent {
    /// What it uses while something is done.
    fn busy(options: &Options, work: impl FnOnce() -> Result<()>) -> Result<Agent> {
        let path = options.agent.as_ref().context("No agent to look at")?;
        let usage = || -> Result<f64> {
            let stat = std::fs::read_to_string(path)
                .with_context(|| format!("Read {}", path.display()))?;
            cgroup_usage(&stat).with_context(|| format!("No usage_usec in {}", path.display()))
        };
        let (begun, before) = (Instant::now(), usage()?);
        work()?;
        Ok(Agent {
            used: usage()? - before,
            elapsed: begun.elapsed().as_secs_f64() * 1e9,
        })
    }
}

/// The CPU time in a cgroup's `cpu.stat`, in nanoseconds.
pub fn cgroup_usage(stat: &str) -> Option<f64> {
    let line = stat
        .lines()
        .find_map(|line| line.strip_prefix("usage_usec "))?;
    line.trim().parse::<f64>().ok().map(|usec| usec * 1000.0)
}

#[allow(
    clippy::cast_precision_loss,
    reason = "counts of operations and nanoseconds of a run are below 2^53"
)]
fn as_float(number: usize) -> f64 {
    number as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usage_is_in_nanoseconds() {
        let stat = "usage_usec 1234\nuser_usec 1000\nsystem_usec 234\n";
        assert_eq!(cgroup_usage(stat), Some(1_234_000.0));
        assert_eq!(cgroup_usage("user_usec 7\n"), None);
    }

    /// All of them work, also where nothing counts instructions.
    #[test]
    fn every_operation_can_be_measured() {
        let options = Options {
            batches: 1,
            agent: None,
            programs: false,
            only: Vec::new(),
        };
        let costs = measure(&options).unwrap();
        let names: Vec<&str> = costs.iter().map(|cost| cost.name.as_str()).collect();
        assert_eq!(names, NAMES);
    }
}
