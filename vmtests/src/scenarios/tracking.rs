//! The agent's model is what the kernel has, after everything we can throw at it.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Scenario;
use crate::image::Kernel;
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tracking_fentry",
        kernels: &[Kernel::V6_1, Kernel::V6_12],
        configure: |vm| vm,
        run: |vm| tracking(vm, "fentry"),
    },
    Scenario {
        name: "tracking_fallback",
        kernels: &[Kernel::V6_1, Kernel::V6_12],
        configure: |vm| vm,
        run: |vm| tracking(vm, "fallback"),
    },
    Scenario {
        name: "tracking_tiny_rings",
        kernels: &[Kernel::V6_1, Kernel::V6_12],
        configure: |vm| vm,
        run: tiny_rings,
    },
];

const PATIENCE: Duration = Duration::from_secs(300);

/// Starts the agent and waits until it answers.
fn start_agent(vm: &Vm, hooks: &str, options: &[&str]) -> Result<i32> {
    let command = ["tracker", "-v", "agent"].iter().chain(options).copied();
    let agent = Exec::new(command).env("TRACKER_HOOKS", hooks);
    let pid = vm.spawn(agent, Some("/root/agent.log"))?;
    if !vm.await_file("/run/tracker/agent.sock", Duration::from_secs(60))? {
        bail!("The agent did not start: {}", log(vm, "/root/agent.log"));
    }
    Ok(pid)
}

fn stop(vm: &Vm, pid: i32) -> Result<()> {
    vm.kill(pid, libc::SIGTERM)?;
    ensure!(
        vm.wait(pid, Duration::from_secs(60))?.is_some(),
        "Process {pid} did not end"
    );
    Ok(())
}

fn log(vm: &Vm, path: &str) -> String {
    let bytes = vm.read_file(path).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn status(vm: &Vm) -> Result<Value> {
    let output = vm
        .exec(Exec::new(["tracker", "status", "--json"]))?
        .check()?;
    Ok(serde_json::from_str(&output.text())?)
}

/// The audit finds no difference, and enough was compared to mean something.
fn audit(vm: &Vm, when: &str, descriptors: u64) -> Result<()> {
    let output = vm.exec(Exec::new(["tracker", "audit", "--json"]).timeout(PATIENCE))?;
    let report: Value = serde_json::from_str(&output.text())
        .with_context(|| format!("{when}: {}", output.error_text()))?;
    ensure!(output.success(), "{when}: {report:#}\n{:#}", status(vm)?);
    let compared = report["compared"]["descriptors"].as_u64();
    ensure!(
        compared.is_some_and(|compared| compared >= descriptors),
        "{when}: only {compared:?} descriptors were compared"
    );
    println!("{when}: {}", report["compared"]);
    Ok(())
}

/// Starts an application and waits until its log shows a line.
fn start(vm: &Vm, name: &str, command: &[&str], line: &str) -> Result<i32> {
    let path = format!("/root/{name}.log");
    let run = ["tracker", "run", "--name", name, "--"];
    let pid = vm.spawn(Exec::new(run.iter().chain(command).copied()), Some(&path))?;
    let wait = format!("until grep -q '{line}' {path}; do sleep 0.2; done");
    let waited = vm.exec(Exec::new(["sh", "-c", &wait]).timeout(PATIENCE))?;
    ensure!(waited.success(), "{name} hangs: {}", log(vm, &path));
    Ok(pid)
}

/// Ends an application and sees that the model forgets it.
fn end(vm: &Vm, name: &str, pid: i32) -> Result<()> {
    vm.sh(&format!(
        "echo 1 > /sys/fs/cgroup/tracker/{name}/cgroup.kill"
    ))?
    .check()?;
    vm.wait(pid, Duration::from_secs(60))?;
    let gone = format!(
        "for i in $(seq 50); do tracker status {name} >/dev/null 2>&1 || exit 0; sleep 0.2; done; exit 1"
    );
    vm.sh(&gone)?
        .check()
        .with_context(|| format!("{name} is still in the model"))?;
    Ok(())
}

/// Events lost, of all classes.
fn lost(status: &Value) -> Result<u64> {
    let by_class = status["counters"]["lost"]
        .as_object()
        .context("No loss counters")?;
    ensure!(
        by_class.contains_key("files"),
        "Losses are not counted by class: {by_class:?}"
    );
    Ok(by_class.values().filter_map(Value::as_u64).sum())
}

fn tracking(vm: &Vm, hooks: &str) -> Result<()> {
    let agent = start_agent(vm, hooks, &["--ring-bytes", "16777216"])?;
    ensure!(status(vm)?["hooks"] == hooks, "{:#}", status(vm)?);

    let redis = ["redis-server", "--save", "", "--maxclients", "1000"];
    let redis = start(vm, "redis", &redis, "Ready to accept")?;
    let load = "redis-benchmark -q -c 200 -n 10000 -t set,get";
    vm.exec(Exec::new(["sh", "-c", load]).timeout(PATIENCE))?
        .check()?;
    audit(vm, "redis after 200 connections", 6)?;
    // And while connections are there: 200 that stay.
    let hold = "exec python3 -c 'import socket,time\n\
                s=[socket.create_connection((\"127.0.0.1\",6379)) for i in range(200)]\n\
                print(\"held\",flush=True); time.sleep(1000)'";
    let clients = vm.spawn(Exec::new(["sh", "-c", hold]), Some("/root/clients.log"))?;
    vm.sh("until grep -q held /root/clients.log; do sleep 0.2; done")?
        .check()?;
    audit(vm, "redis with 200 connections", 200)?;
    vm.kill(clients, libc::SIGKILL)?;
    let now = status(vm)?;
    println!("lost {}, counters {}", lost(&now)?, now["counters"]);
    // The audit reads again what is suspect first, so it would hide a hook that says too little.
    let anomalies = &now["counters"]["anomalies"];
    ensure!(
        hooks != "fentry" || lost(&now)? > 0 || *anomalies == serde_json::json!({}),
        "Nothing was lost, and events contradict the model: {anomalies}"
    );

    let seed = std::process::id().to_string();
    println!("storm seed {seed}");
    let storm = format!("{TESTS_DIR}/storm");
    // Of two threads in each process.
    let storm = start(vm, "storm", &[&storm, "5500", "2", &seed], "storm: still")?;
    let before = status(vm)?;
    println!("lost {}, counters {}", lost(&before)?, before["counters"]);
    if hooks == "fentry" {
        ensure!(lost(&before)? == 0, "The rings are too small for the storm");
        let counters = &before["counters"];
        let mut resyncs = counters["resyncs"].as_object().cloned().unwrap_or_default();
        // Changes of mappings are said as marks.
        resyncs.remove("address-spaces");
        ensure!(
            counters["anomalies"] == serde_json::json!({}) && resyncs.is_empty(),
            "Nothing was lost, and events did not tell all: {counters:#}"
        );
    }
    audit(vm, "storm", 50)?;
    end(vm, "storm", storm)?;
    end(vm, "redis", redis)?;
    stop(vm, agent)
}

/// With rings of one page events are lost, counted, and healed.
fn tiny_rings(vm: &Vm) -> Result<()> {
    let agent = start_agent(vm, "fentry", &["--ring-bytes", "4096"])?;
    let storm = format!("{TESTS_DIR}/storm");
    let storm = start(vm, "storm", &[&storm, "3000", "3"], "storm: still")?;
    let lost = lost(&status(vm)?)?;
    ensure!(lost > 0, "Nothing was lost in rings of one page");
    audit(vm, &format!("after {lost} losses"), 50)?;
    end(vm, "storm", storm)?;
    stop(vm, agent)
}
