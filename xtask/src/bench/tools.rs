//! The tools that are compared, and what is asked of them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::ValueEnum;
use serde::Serialize;
use vmtests::apps;
use vmtests::vm::{Exec, Vm};

/// Time for one step on a loaded machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

/// Where the images go, one after another.
pub(super) const IMAGES: &str = "/root/bench";

/// Who takes a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Tool {
    /// This program.
    Tracker,
    /// The peer.
    Criu,
}

/// What a tool says of a checkpoint, in milliseconds.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// How long the application stood still.
    pub frozen: f64,
    /// What tracker says each of its steps took.
    pub steps: Vec<(String, f64)>,
}

impl Tool {
    /// Both.
    pub(super) const ALL: [Tool; 2] = [Tool::Tracker, Tool::Criu];

    /// Makes an image of application `name`, whose first process is `pid`, which runs on.
    pub(super) fn checkpoint(self, vm: &Vm, name: &str, pid: &str) -> Result<Said> {
        match self {
            Tool::Tracker => tracker(vm, name),
            Tool::Criu => criu(vm, pid),
        }
    }

    /// Restores from that image, the application being gone. Returns milliseconds.
    pub(super) fn restore(self, vm: &Vm) -> Result<f64> {
        let image = format!("{IMAGES}/tracker");
        let last = format!("{IMAGES}/3");
        let command = match self {
            Tool::Tracker => Exec::new(["tracker", "restore", "--image", &image, "--detach"]),
            Tool::Criu => Exec::new([
                "criu",
                "restore",
                "--images-dir",
                &last,
                "--restore-detached",
                "--tcp-established",
            ]),
        };
        let begun = Instant::now();
        vm.exec(command.timeout(PATIENCE))?.check()?;
        Ok(milliseconds(begun.elapsed()))
    }
}

/// For tables.
pub(super) fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// `tracker checkpoint` with its pre-copy.
fn tracker(vm: &Vm, name: &str) -> Result<Said> {
    let image = format!("{IMAGES}/tracker");
    let command = apps::checkpoint(name, &image, &["--leave-running", "--json"]);
    let output = vm.exec(command.timeout(PATIENCE))?.check()?;
    said(&output.stdout)
}

/// What `tracker checkpoint --json` says.
pub(super) fn said(output: &[u8]) -> Result<Said> {
    let text = || String::from_utf8_lossy(output).into_owned();
    let json: serde_json::Value = serde_json::from_slice(output).with_context(text)?;
    let frozen = find(&json, "frozen_us").and_then(serde_json::Value::as_f64);
    let frozen = frozen.with_context(|| format!("No frozen_us in {}", text()))?;
    let steps = find(&json, "steps").cloned().unwrap_or_default();
    let steps: Vec<(String, f64)> = serde_json::from_value(steps).with_context(text)?;
    let number = |name| find(&json, name).and_then(serde_json::Value::as_f64);
    let steps = steps.into_iter().map(|(name, us)| (name, us / 1000.0));
    let more = [
        (
            "frozen before",
            number("frozen_before_us").map(|us| us / 1000.0),
        ),
        ("pages copied while frozen", number("copied_frozen")),
    ];
    let more = more
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Ok(Said {
        frozen: frozen / 1000.0,
        steps: steps.chain(more).collect(),
    })
}

/// The first value of that name, however deep.
fn find<'a>(json: &'a serde_json::Value, name: &str) -> Option<&'a serde_json::Value> {
    match json {
        serde_json::Value::Object(members) => members
            .get(name)
            .or_else(|| members.values().find_map(|value| find(value, name))),
        serde_json::Value::Array(values) => values.iter().find_map(|value| find(value, name)),
        _ => None,
    }
}

/// CRIU, as its documentation has it: two pre-dumps, then the dump.
fn criu(vm: &Vm, pid: &str) -> Result<Said> {
    let call = |action: &str, directory: &str, more: &[&str]| {
        let images = format!("{IMAGES}/{directory}");
        vm.exec(Exec::new(["mkdir", "-p", &images]))?.check()?;
        let words = [
            "criu",
            action,
            "--tree",
            pid,
            "--images-dir",
            &images,
            "--track-mem",
        ];
        let command = Exec::new([&words[..], more].concat()).timeout(PATIENCE);
        vm.exec(command)?.check()
    };
    call("pre-dump", "1", &[])?;
    call("pre-dump", "2", &["--prev-images-dir", "../1"])?;
    let output = call(
        "dump",
        "3",
        &[
            "--prev-images-dir",
            "../2",
            "--leave-running",
            "--tcp-established",
            "--network-lock",
            "nftables",
            "--display-stats",
        ],
    )?;
    let text = output.text() + &output.error_text();
    let frozen = text.lines().find_map(|line| {
        let digits = line.trim().strip_prefix("Frozen time:")?.trim();
        digits.trim_end_matches("us").trim().parse::<f64>().ok()
    });
    let frozen = frozen.with_context(|| format!("CRIU reports no frozen time:\n{text}"))?;
    Ok(Said {
        frozen: frozen / 1000.0,
        steps: Vec::new(),
    })
}
