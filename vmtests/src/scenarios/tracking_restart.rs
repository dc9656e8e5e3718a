//! An agent that is killed leaves nothing behind, and the next one knows everything.

use std::collections::BTreeSet;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::tracked::{
    PATIENCE, PAUSE, SOCKET, audit, await_status, calm, end, start_agent, status, stop, storm,
};
use super::{Kernels, Scenario};
use crate::vm::Vm;

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tracking_restart_fentry",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| restart(vm, "fentry"),
    },
    Scenario {
        name: "tracking_restart_fallback",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: |vm| restart(vm, "fallback"),
    },
];

/// What the kernel holds of BPF: `prog 7`, `link 3`, `map 9`.
fn held(vm: &Vm) -> Result<BTreeSet<String>> {
    let mut held = BTreeSet::new();
    for kind in ["prog", "link", "map"] {
        let list = vm.sh(&format!("bpftool --json {kind} show"))?.check()?;
        let list: Value = serde_json::from_str(&list.text())
            .with_context(|| format!("bpftool {kind}: {}", list.text()))?;
        let list = list
            .as_array()
            .with_context(|| format!("bpftool {kind}: {list}"))?;
        held.extend(list.iter().map(|object| format!("{kind} {}", object["id"])));
    }
    Ok(held)
}

/// Waits until the kernel holds no more of BPF than before, and nothing is pinned: programs and
/// maps go a grace period after the last reference.
fn await_nothing_left(vm: &Vm, before: &BTreeSet<String>) -> Result<()> {
    let begun = Instant::now();
    loop {
        let now = held(vm)?;
        let left: Vec<_> = now.difference(before).collect();
        if left.is_empty() {
            break;
        }
        ensure!(begun.elapsed() < PATIENCE, "Left behind: {left:?}");
        std::thread::sleep(PAUSE);
    }
    let pinned = vm.sh("mountpoint -q /sys/fs/bpf && find /sys/fs/bpf -mindepth 1")?;
    let pinned = pinned.check()?.text();
    ensure!(pinned.is_empty(), "Pinned: {pinned}");
    Ok(())
}

/// Killed in the middle of a storm and started again, still in the middle of it.
fn restart(vm: &Vm, hooks: &str) -> Result<()> {
    let before = held(vm)?;
    let agent = start_agent(vm, hooks, &[])?;
    let storm = storm(vm, 2)?;
    let events = |now: &Value| now["counters"]["events"].as_u64();
    await_status(vm, "events come", |now| events(now) > Some(300))?;
    for kind in ["prog", "link", "map"] {
        let mine = |name: &&String| name.starts_with(kind) && !before.contains(*name);
        let held = held(vm)?;
        ensure!(held.iter().any(|name| mine(&name)), "No {kind} of tracker");
    }

    vm.kill(agent, libc::SIGKILL)?;
    ensure!(vm.wait(agent, PATIENCE)?.is_some(), "The agent lives on");
    await_nothing_left(vm, &before)?;
    vm.sh(&format!("[ -S {SOCKET} ]"))?
        .check()
        .context("The dead agent's socket is gone, which proves nothing of the next one's start")?;

    let agent = start_agent(vm, hooks, &[])?;
    let first = events(&status(vm)?);
    await_status(vm, "events come again", |now| events(now) > first)?;
    calm(vm, "storm")?;
    audit(vm, "at rest after the restart", 50)?;
    println!("counters {}", status(vm)?["counters"]);
    end(vm, "storm", storm)?;

    // Ended in an orderly way, it leaves nothing either.
    stop(vm, agent)?;
    await_nothing_left(vm, &before)?;
    ensure!(
        vm.await_gone(SOCKET, PATIENCE)?,
        "An agent that was stopped left its socket"
    );
    Ok(())
}
