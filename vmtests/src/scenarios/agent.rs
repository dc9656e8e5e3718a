//! The daemon as an operator sees it: starting, stopping, being supervised, turning away.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::tracked::{
    PATIENCE, PAUSE, SOCKET, audit, await_agent, await_status, end, log, start, start_beside,
    status,
};
use super::{Kernels, Scenario};
use crate::image::Kernel;
use crate::protocol::Status;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "agent_lifecycle",
        kernels: Kernels::Either,
        configure: |vm| vm,
        run: lifecycle,
    },
    Scenario {
        name: "agent_service",
        // Its systemd is the same on both, and takes minutes to emulate.
        kernels: Kernels::Only(Kernel::V6_12),
        // Systemd in place of the guest's own init, which it starts as a service.
        configure: |vm| {
            vm.append("init=/lib/systemd/systemd")
                .append("systemd.unit=guest.target")
        },
        run: service,
    },
];

const UNIT: &[u8] = include_bytes!("../../../packaging/tracker-agent.service");

/// Prints what a service manager would be told.
const LISTENER: &str = "exec python3 -c '
import socket
manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
manager.bind(\"/run/notify\")
print(\"listening\", flush=True)
while True:
    print(manager.recv(1000).decode(), end=\"\", flush=True)
'";

/// Somebody who is not root and in no group but this.
fn as_nobody(group: &str, command: &[&str]) -> Exec {
    let group = format!("--regid={group}");
    let words = ["setpriv", "--reuid=nobody", &group, "--clear-groups"];
    Exec::new(words.iter().chain(command).copied())
}

fn lifecycle(vm: &Vm) -> Result<()> {
    start_beside(vm, "manager", &["sh", "-c", LISTENER], "listening")?;
    let told = |line: &str| {
        let text = log(vm, "/root/manager.log");
        text.lines().filter(|said| *said == line).count()
    };
    let await_told = |line: &str, times: usize| -> Result<()> {
        let begun = Instant::now();
        while told(line) < times {
            let said = || log(vm, "/root/manager.log");
            ensure!(begun.elapsed() < PATIENCE, "No {line}, but\n{}", said());
            std::thread::sleep(PAUSE);
        }
        Ok(())
    };
    let command = Exec::new(["tracker", "-v", "agent"])
        .env("NOTIFY_SOCKET", "/run/notify")
        .env("WATCHDOG_USEC", "4000000");
    let agent = vm.spawn(command, Some("/root/agent.log"))?;
    await_agent(vm, agent)?;
    await_told("READY=1", 1)?;
    await_told("WATCHDOG=1", 3)?;

    let second = vm.exec(Exec::new(["tracker", "agent"]))?;
    let error = second.error_text();
    ensure!(
        second.code() == Some(1) && error.contains("Another agent runs in /run/tracker"),
        "A second agent: {:?} {error}",
        second.status
    );
    ensure!(
        status(vm)?["agent"]["pid"] == agent,
        "The first one is gone"
    );

    // Even where the way to the socket is open.
    vm.sh("chmod 0755 /run/tracker")?.check()?;
    for command in ["status", "audit"] {
        let refused = vm.exec(as_nobody("nogroup", &["tracker", command]))?;
        let error = refused.error_text();
        ensure!(
            refused.code() == Some(1) && error.contains("--socket-group"),
            "Nobody's {command}: {:?} {error}",
            refused.status
        );
    }

    stops(vm, agent)?;
    ensure!(told("STOPPING=1") == 1, "{}", log(vm, "/root/manager.log"));
    let gone = vm.exec(Exec::new(["tracker", "status"]))?;
    ensure!(
        gone.code() == Some(1) && gone.error_text().contains("start one with"),
        "Without an agent: {:?} {}",
        gone.status,
        gone.error_text()
    );
    group(vm)
}

/// A group may ask if the agent was told so, and no other.
fn group(vm: &Vm) -> Result<()> {
    let command = ["tracker", "-v", "agent", "--socket-group", "games"];
    let agent = vm.spawn(Exec::new(command), Some("/root/agent.log"))?;
    await_agent(vm, agent)?;
    vm.exec(as_nobody("games", &["tracker", "status"]))?
        .check()
        .context("A member of the group")?;
    let other = vm.exec(as_nobody("nogroup", &["tracker", "status"]))?;
    ensure!(!other.success(), "Another group: {}", other.text());
    stops(vm, agent)
}

/// SIGTERM ends the agent in good order.
fn stops(vm: &Vm, agent: i32) -> Result<()> {
    vm.kill(agent, libc::SIGTERM)?;
    let how = vm.wait(agent, PATIENCE)?;
    ensure!(how == Some(Status::Exited(0)), "SIGTERM: {how:?}");
    vm.sh(&format!("[ ! -e {SOCKET} ]"))?
        .check()
        .context("The socket is left")?;
    Ok(())
}

/// Waits until the unit's main process is another one and answers.
fn await_successor(vm: &Vm, before: i32) -> Result<i32> {
    let begun = Instant::now();
    loop {
        let now = main_pid(vm)?;
        if now != 0 && now != before && status(vm).is_ok_and(|s| s["agent"]["pid"] == now) {
            return Ok(now);
        }
        ensure!(begun.elapsed() < PATIENCE, "{}", journal(vm));
        std::thread::sleep(PAUSE);
    }
}

fn main_pid(vm: &Vm) -> Result<i32> {
    Ok(property(vm, "MainPID")?.parse()?)
}

fn property(vm: &Vm, name: &str) -> Result<String> {
    let show = format!("systemctl show --value --property={name} tracker-agent");
    Ok(vm.sh(&show)?.check()?.text().trim().to_owned())
}

fn journal(vm: &Vm) -> String {
    let show = "systemctl status --lines=0 tracker-agent; journalctl --unit=tracker-agent";
    vm.sh(show).map(|output| output.text()).unwrap_or_default()
}

/// The unit under a real systemd, with all its hardening.
fn service(vm: &Vm) -> Result<()> {
    let unit = "/etc/systemd/system/tracker-agent.service";
    vm.write_file(unit, UNIT)?;
    let verify = vm.sh(&format!("systemd-analyze verify {unit}"))?.check()?;
    let complaints = verify.text() + &verify.error_text();
    ensure!(!complaints.contains("tracker-agent"), "{complaints}");
    // A minute is long to wait for, and so is half of one for a stopped process to end by SIGABRT.
    vm.sh("mkdir -p /run/systemd/system/tracker-agent.service.d && \
         printf '[Service]\\nWatchdogSec=8\\nTimeoutAbortSec=2\\n' \
         >/run/systemd/system/tracker-agent.service.d/short.conf && systemctl daemon-reload")?
        .check()?;
    let start_unit = Exec::new(["systemctl", "start", "tracker-agent"]).timeout(PATIENCE);
    let started = vm.exec(start_unit)?;
    ensure!(started.success(), "{}", journal(vm));
    let first = main_pid(vm)?;

    // It tracks and audits as root with everything does.
    let redis = [
        "setpriv",
        "--reuid=redis",
        "--regid=redis",
        "--clear-groups",
    ];
    let redis = [&redis[..], &["redis-server", "--save", "", "--dir", "/tmp"]].concat();
    let redis = start(vm, "redis", &redis, "Ready to accept")?;
    audit(vm, "under the unit's hardening", 6)?;
    let now = status(vm)?;
    ensure!(now["hooks"] == "fentry", "The better hooks: {now:#}");
    await_status(vm, "Spare iterators", |now| {
        now["spare_iterators"]["state"] == "ready"
    })?;
    ensure!(
        now["programs"] != serde_json::json!([]),
        "Programs: {now:#}"
    );

    vm.kill(first, libc::SIGKILL)?;
    let second = await_successor(vm, first).context("Killed")?;
    // It hangs as a whole, and so does not tell the watchdog.
    vm.kill(second, libc::SIGSTOP)?;
    let third = await_successor(vm, second).context("Hanging")?;
    audit(vm, "after two restarts", 6)?;
    // Nobody ends what works.
    std::thread::sleep(Duration::from_secs(12));
    ensure!(
        main_pid(vm)? == third,
        "Restarted for nothing: {}",
        journal(vm)
    );

    vm.exec(Exec::new(["systemctl", "stop", "tracker-agent"]).timeout(PATIENCE))?
        .check()?;
    let (state, result) = (property(vm, "ActiveState")?, property(vm, "Result")?);
    ensure!(
        state == "inactive" && result == "success",
        "{state}, {result}: {}",
        journal(vm)
    );
    vm.sh(&format!(
        "[ ! -e {SOCKET} ] && [ -e /run/tracker/redis.json ]"
    ))?
    .check()
    .context("The socket is left, or the record of how redis was started is not")?;
    vm.exec(Exec::new(["systemctl", "start", "tracker-agent"]).timeout(PATIENCE))?
        .check()?;
    end(vm, "redis", redis)
}
