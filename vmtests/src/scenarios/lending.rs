//! Checkpoints with iterators that the agent has loaded beforehand.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::tracked::{PATIENCE, PAUSE, audit, await_status, log, start, start_agent, status, stop};
use super::{Kernels, Scenario};
use crate::apps;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "lending_restores",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: restores,
    },
    Scenario {
        name: "lending_deaths",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: deaths,
    },
];

/// Redis and what clients have stored in it.
struct Redis<'a> {
    vm: &'a Vm,
    port: u16,
}

impl<'a> Redis<'a> {
    fn start(vm: &'a Vm, name: &str, port: u16) -> Result<Self> {
        let number = port.to_string();
        let server = ["redis-server", "--save", "", "--port", &number];
        start(vm, name, &server, "Ready to accept")?;
        let this = Self { vm, port };
        this.ask("set key value")?;
        Ok(this)
    }

    fn ask(&self, command: &str) -> Result<String> {
        let ask = format!("redis-cli -p {} {command}", self.port);
        Ok(self.vm.sh(&ask)?.check()?.text().trim().to_owned())
    }

    /// It has what it had, and counts on.
    fn works(&self, when: &str) -> Result<()> {
        let before = self.ask("incr counter").context(when.to_owned())?;
        let (value, after) = (self.ask("get key")?, self.ask("incr counter")?);
        let counts = before.parse::<u64>()? + 1 == after.parse::<u64>()?;
        ensure!(
            value == "value" && counts,
            "{when}: {value}, {before}, {after}"
        );
        Ok(())
    }
}

/// The file that an image goes to.
fn image(name: &str) -> String {
    format!("/root/image.{name}")
}

/// Makes a checkpoint and says whose iterators it used.
fn checkpoint(vm: &Vm, name: &str, more: &[&str]) -> Result<String> {
    vm.sh(&format!("rm -rf {}", image(name)))?.check()?;
    let more = [more, &["--json"]].concat();
    let command = apps::checkpoint(name, &image(name), &more);
    let output = vm.exec(command.timeout(PATIENCE))?.check()?.text();
    let outcome: Value = serde_json::from_str(&output).context(output)?;
    let origin = outcome["iterators"].as_str();
    Ok(origin.context("No word of iterators")?.to_owned())
}

fn restore(vm: &Vm, name: &str) -> Result<()> {
    let restore = ["tracker", "restore", "--image", &image(name), "--detach"];
    vm.exec(Exec::new(restore).timeout(PATIENCE))?.check()?;
    Ok(())
}

/// Waits until the agent's spare iterators are loaded, or given back, and were lent so often.
fn await_ready(vm: &Vm, lent: u64) -> Result<()> {
    await_state(vm, "ready", lent)
}

fn await_state(vm: &Vm, state: &str, lent: u64) -> Result<()> {
    let wanted = serde_json::json!({ "state": state, "lent": lent });
    let what = format!("Spare iterators {wanted}");
    await_status(vm, &what, |now| now["spare_iterators"] == wanted)?;
    Ok(())
}

/// Checkpoints in a row have the agent's iterators, and what they carry is right.
fn restores(vm: &Vm) -> Result<()> {
    let agent = start_agent(vm, "fentry", &[])?;
    let redis = Redis::start(vm, "redis", 6379)?;
    await_ready(vm, 0)?;
    for round in 0..2 {
        let when = format!("Round {round}");
        let origin = checkpoint(vm, "redis", &["--leave-running"])?;
        ensure!(origin == "lent", "{when}, left running: {origin}");
        redis.works(&when)?;
        await_ready(vm, 3 * round + 1)?;
        let check = ["tracker", "check", "redis"];
        vm.exec(Exec::new(check).timeout(PATIENCE))?.check()?;
        await_ready(vm, 3 * round + 2)?;
        let origin = checkpoint(vm, "redis", &[])?;
        ensure!(origin == "lent", "{when}: {origin}");
        restore(vm, "redis")?;
        redis.works(&format!("{when}, restored"))?;
        audit(vm, &when, 6)?;
        await_ready(vm, 3 * round + 3)?;
    }
    stop(vm, agent)?;
    let origin = checkpoint(vm, "redis", &[])?;
    ensure!(origin == "loaded", "Without an agent: {origin}");
    restore(vm, "redis")?;
    redis.works("Without an agent")
}

/// There is one instance, which a borrower's death gives back and the agent's takes from nobody.
fn deaths(vm: &Vm) -> Result<()> {
    let agent = start_agent(vm, "fentry", &[])?;
    let (redis, other) = (
        Redis::start(vm, "redis", 6379)?,
        Redis::start(vm, "other", 6380)?,
    );
    await_ready(vm, 0)?;
    let command = apps::checkpoint("redis", &image("dead"), &[]).env("TRACKER_FAULT", "tasks:hang");
    let hanging = vm.spawn(command, Some("/root/hanging.log"))?;
    await_frozen(vm, "redis", hanging)?;
    let origin = checkpoint(vm, "other", &["--leave-running"])?;
    ensure!(origin == "loaded", "Beside another borrower: {origin}");
    other.works("Beside another borrower")?;
    // Longer than clients of the agent may be silent.
    std::thread::sleep(Duration::from_secs(35));
    await_state(vm, "lent", 1)?;
    vm.kill(hanging, libc::SIGKILL)?;
    await_ready(vm, 1)?;
    redis.works("After a borrower's death")?;
    let origin = checkpoint(vm, "redis", &[])?;
    ensure!(origin == "lent", "After a borrower's death: {origin}");
    restore(vm, "redis")?;
    redis.works("After a borrower's death, restored")?;
    await_ready(vm, 2)?;

    outlived(vm, agent)?;
    vm.wait(agent, PATIENCE)?;
    restore(vm, "redis")?;
    redis.works("Restored after the agent's death")?;
    unloaded(vm)?;
    let origin = checkpoint(vm, "other", &[])?;
    ensure!(origin == "loaded", "After the agent's death: {origin}");
    restore(vm, "other")?;
    other.works("After the agent's death")
}

fn await_frozen(vm: &Vm, name: &str, checkpoint: i32) -> Result<()> {
    let events = format!("/sys/fs/cgroup/tracker/{name}/cgroup.events");
    let begun = Instant::now();
    while !log(vm, &events).contains("frozen 1") {
        if let Some(how) = vm.wait(checkpoint, PAUSE)? {
            bail!("{how}: {}", log(vm, "/root/hanging.log"));
        }
        ensure!(begun.elapsed() < PATIENCE, "{name} is not frozen");
    }
    Ok(())
}

/// The agent is killed while a checkpoint has its iterators.
fn outlived(vm: &Vm, agent: i32) -> Result<()> {
    let image = image("redis");
    let during = format!(
        "rm -rf {image}
        TRACKER_FAULT=prepare:slow tracker checkpoint --name redis --image {image} --json &
        checkpoint=$!
        while ! tracker status --json | tr -d ' \\n' | grep -q '\"state\":\"lent\"'; do
            kill -0 $checkpoint || exit 3
        done
        kill -KILL {agent}
        kill -0 $checkpoint || exit 4
        wait $checkpoint"
    );
    let during = Exec::new(["sh", "-c", &during]).timeout(PATIENCE);
    let output = vm.exec(during)?.check()?.text();
    let outcome: Value = serde_json::from_str(&output).context(output)?;
    ensure!(outcome["iterators"] == "lent", "{outcome:#}");
    ensure!(status(vm).is_err(), "The agent lives");
    Ok(())
}

/// Of a dead agent's programs nothing is left, once the kernel has cleaned up.
fn unloaded(vm: &Vm) -> Result<()> {
    let begun = Instant::now();
    loop {
        let list = vm.sh("bpftool prog list")?.check()?.text();
        if !list.contains("iter_") {
            return Ok(());
        }
        ensure!(begun.elapsed() < PATIENCE, "Still loaded: {list}");
        std::thread::sleep(PAUSE);
    }
}
