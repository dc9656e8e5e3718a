//! The agent's model is what the kernel has, after everything we can throw at it.

use anyhow::{Result, ensure};

use super::tracked::{
    PATIENCE, agent_log, audit, audited_at_rest, end, lost, start, start_agent, status, stop,
};
use super::{Kernels, Scenario};
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tracking_fentry",
        kernels: Kernels::Both,
        configure: |vm| vm,
        run: |vm| tracking(vm, "fentry"),
    },
    Scenario {
        name: "tracking_fallback",
        kernels: Kernels::Both,
        configure: |vm| vm,
        run: |vm| tracking(vm, "fallback"),
    },
];

fn tracking(vm: &Vm, hooks: &str) -> Result<()> {
    let agent = start_agent(vm, hooks, &["--ring-bytes", "16777216"])?;

    let redis = ["redis-server", "--save", "", "--maxclients", "1000"];
    let redis = start(vm, "redis", &redis, "Ready to accept")?;
    // With connections that stay, and with one for each request: the network then changes the
    // state of one while it interrupts who changes that of another.
    let load = "redis-benchmark -q -c 200 -n 10000 -t set,get && \
                redis-benchmark -q -c 200 -n 2000 -t set -k 0";
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
            "Nothing was lost, and events did not tell all: {counters:#}\n{}",
            agent_log(vm)
        );
    }
    let report = audited_at_rest(vm, "storm", 50)?;
    for kind in ["names", "watched_paths"] {
        let compared = report["compared"][kind].as_u64();
        ensure!(compared > Some(0), "No {kind} are known: {report:#}");
    }
    end(vm, "storm", storm)?;
    end(vm, "redis", redis)?;
    stop(vm, agent)
}
