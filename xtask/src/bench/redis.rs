//! How long redis stands still under load for a checkpoint that leaves it running.
//!
//! Three figures each time: what the tool itself reports, the longest silence
//! that a client inside the guest hears (asking every millisecond), and the
//! longest that clients on the host hear.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use vmtests::apps;
use vmtests::load::Load;
use vmtests::payload::{Profile, TESTS_DIR};
use vmtests::vm::{Exec, Vm};

use super::tools::{IMAGES, PATIENCE, Said, Tool, milliseconds};
use super::{Arguments, median};
use crate::workspace;

/// One checkpoint, in milliseconds.
#[derive(Debug, Serialize)]
struct Sample {
    tool: Tool,
    /// Frozen time as the tool reports it.
    reported: f64,
    /// Longest gap of the client in the guest.
    guest_gap: f64,
    /// Longest gap of the clients on the host.
    host_gap: f64,
    /// What tracker says each of its steps took.
    steps: Vec<(String, f64)>,
}

#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    clients: usize,
    /// Programs beside it that keep a CPU busy each.
    busy: usize,
    data_mb: usize,
    /// Gaps without any checkpoint: guest and host, in milliseconds.
    idle_guest_gap: f64,
    idle_host_gap: f64,
    samples: Vec<Sample>,
}

/// Runs it and prints what came of it.
pub fn run(arguments: &Arguments) -> Result<()> {
    let builder = Vm::builder(workspace())
        .kernel(arguments.kernel)
        .profile(Profile::Release)
        .quiet(arguments.json);
    let vm = apps::forwarded(builder).start()?;
    arguments.start_agent(&vm)?;
    apps::start_redis(&vm, arguments.data)?;
    for _ in 0..arguments.busy {
        vm.spawn(Exec::new(["sh", "-c", "while :; do :; done"]), None)?;
    }
    let load = Load::start(&apps::targets(&vm, arguments.clients, 0))?;
    load.progress(20, PATIENCE)?;
    let (_, idle) = heard(&vm, &load, || {
        std::thread::sleep(Duration::from_secs(5));
        Ok(Said::default())
    })?;
    let mut report = Report {
        kernel: vm.hello().release,
        clients: arguments.clients,
        busy: arguments.busy,
        data_mb: arguments.data,
        idle_guest_gap: idle.0,
        idle_host_gap: idle.1,
        samples: Vec::new(),
    };
    for round in 1..=arguments.rounds {
        for tool in [Tool::Tracker, Tool::Criu] {
            if !arguments.wants(tool) {
                continue;
            }
            if !arguments.json {
                eprintln!("Round {round}: {tool:?}");
            }
            let checkpoint = || {
                let pid = apps::pids(&vm, "redis")?[0].to_string();
                tool.checkpoint(&vm, "redis", &pid)
            };
            let (said, (guest_gap, host_gap)) =
                heard(&vm, &load, checkpoint).with_context(|| format!("{tool:?}"))?;
            report.samples.push(Sample {
                tool,
                reported: said.frozen,
                guest_gap,
                host_gap,
                steps: said.steps,
            });
        }
    }
    let summary = load.finish();
    ensure!(summary.clean(), "Something was lost: {summary:#?}");
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", table(&report)?);
    }
    Ok(())
}

/// Runs something while the heart beats; returns its result and the longest
/// gaps heard in the guest and on the host, in milliseconds.
fn heard(vm: &Vm, load: &Load, work: impl FnOnce() -> Result<Said>) -> Result<(Said, (f64, f64))> {
    let dir = "/run/heartbeat";
    vm.sh(&format!(
        "rm -rf {dir} {IMAGES}; mkdir -p {dir} {IMAGES}; sync"
    ))?
    .check()?;
    let program = format!("{TESTS_DIR}/heartbeat");
    let port = apps::REDIS.to_string();
    let pid = vm.spawn(
        Exec::new([program.as_str(), &port, dir]),
        Some("/root/heartbeat.log"),
    )?;
    if !vm.await_file(&format!("{dir}/beating"), PATIENCE)? {
        let log = vm.read_file("/root/heartbeat.log").unwrap_or_default();
        bail!("No heartbeat: {}", String::from_utf8_lossy(&log));
    }
    load.progress(5, PATIENCE)?;
    load.take_longest_gap();
    let result = work();
    // Gaps end with an answer.
    load.progress(2, PATIENCE)?;
    let host_gap = load.take_longest_gap();
    vm.write_file(&format!("{dir}/stop"), b"")?;
    ensure!(
        vm.await_file(&format!("{dir}/gap"), PATIENCE)?,
        "The heartbeat did not end"
    );
    vm.wait(pid, PATIENCE)?;
    let gap = String::from_utf8(vm.read_file(&format!("{dir}/gap"))?)?;
    let guest_gap = gap.trim().parse::<f64>().context("The heartbeat's gap")? / 1000.0;
    Ok((result?, (guest_gap, milliseconds(host_gap))))
}

fn table(report: &Report) -> Result<String> {
    let mut text = String::new();
    writeln!(
        text,
        "Linux {}, redis with {} MB and {} clients, {} busy programs beside it; milliseconds",
        report.kernel, report.data_mb, report.clients, report.busy
    )?;
    writeln!(
        text,
        "{:<12} {:>16} {:>16} {:>16}",
        "", "reported frozen", "gap in guest", "gap on host"
    )?;
    let mut row = |name: &str, values: [f64; 3], digits: usize| {
        let cell = |value: f64| match value.is_nan() {
            true => "-".to_owned(),
            false => format!("{value:.digits$}"),
        };
        let [a, b, c] = values.map(cell);
        writeln!(text, "{name:<12} {a:>16} {b:>16} {c:>16}")
    };
    row(
        "idle",
        [f64::NAN, report.idle_guest_gap, report.idle_host_gap],
        1,
    )?;
    for sample in &report.samples {
        let name = format!("{:?}", sample.tool).to_lowercase();
        row(
            &name,
            [sample.reported, sample.guest_gap, sample.host_gap],
            1,
        )?;
    }
    let medians = |tool: Tool| {
        let of = |value: fn(&Sample) -> f64| {
            let samples = report.samples.iter().filter(|sample| sample.tool == tool);
            median(samples.map(value).collect())
        };
        [of(|s| s.reported), of(|s| s.guest_gap), of(|s| s.host_gap)]
    };
    let (ours, theirs) = (medians(Tool::Tracker), medians(Tool::Criu));
    row("tracker, med", ours, 1)?;
    row("criu, median", theirs, 1)?;
    row("criu/tracker", [0, 1, 2].map(|i| theirs[i] / ours[i]), 2)?;
    let all = report.samples.iter().flat_map(|sample| &sample.steps);
    let mut steps: Vec<(&str, Vec<f64>)> = Vec::new();
    for (name, took) in all {
        match steps.iter_mut().find(|(known, _)| known == name) {
            Some((_, values)) => values.push(*took),
            None => steps.push((name, vec![*took])),
        }
    }
    for (name, values) in steps {
        writeln!(
            text,
            "tracker, median of {name:<26} {:>8.1}",
            median(values)
        )?;
    }
    Ok(text)
}
