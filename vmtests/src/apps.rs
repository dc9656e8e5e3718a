//! Redis and memcached under `tracker run` in a VM.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::load::{Connection, Protocol, Target};
use crate::vm::{Exec, Vm, VmBuilder};

/// Redis's port in the guest.
pub const REDIS: u16 = 6379;

/// Memcached's port in the guest.
pub const MEMCACHED: u16 = 11211;

/// Bytes of each value that [`start_redis`] fills redis with.
const VALUE: usize = 1000;

/// Time for the start of a program.
const START: Duration = Duration::from_secs(120);

/// Forwards both servers' ports.
#[must_use]
pub fn forwarded(vm: VmBuilder) -> VmBuilder {
    vm.forward(REDIS).forward(MEMCACHED)
}

/// Starts the daemon and waits until `tracker status` finds it.
///
/// # Errors
/// If it does not come up.
pub fn start_agent(vm: &Vm) -> Result<()> {
    let pid = vm.spawn(Exec::new(["tracker", "agent"]), Some("/root/agent.log"))?;
    let begun = Instant::now();
    while !vm.exec(Exec::new(["tracker", "status"]))?.success() {
        let status = vm.wait(pid, Duration::from_millis(200))?;
        if status.is_some() || begun.elapsed() > START {
            let log = vm.read_file("/root/agent.log").unwrap_or_default();
            let how = status.map_or("still starting".to_owned(), |status| status.to_string());
            bail!("tracker agent: {how}\n{}", String::from_utf8_lossy(&log));
        }
    }
    Ok(())
}

/// Waits until the agent has iterators to lend, as it has most of the time.
///
/// # Errors
/// If it never has, or there is no agent.
pub fn await_spare(vm: &Vm) -> Result<()> {
    let begun = Instant::now();
    loop {
        let status = Exec::new(["tracker", "status", "--json"]);
        let status = vm.exec(status)?.check()?.text();
        let status: Value = serde_json::from_str(&status)?;
        let spare = &status["spare_iterators"];
        if spare["state"] == "ready" {
            return Ok(());
        }
        ensure!(begun.elapsed() < START, "Spare iterators: {spare}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// Starts redis as application `redis`, with about that many megabytes of data
/// in it.
///
/// # Errors
/// If it does not start or cannot be filled.
pub fn start_redis(vm: &Vm, megabytes: usize) -> Result<()> {
    start_redis_by(vm, &[], megabytes)
}

/// [`start_redis`], by a command that is given its own as arguments.
///
/// # Errors
/// As there.
pub fn start_redis_by(vm: &Vm, starter: &[&str], megabytes: usize) -> Result<()> {
    let port = REDIS.to_string();
    let server = [
        "redis-server",
        "--port",
        &port,
        "--bind",
        "0.0.0.0",
        "--protected-mode",
        "no",
        "--save",
        "",
        "--appendonly",
        "no",
        "--enable-debug-command",
        "yes",
        "--dir",
        "/var/lib/redis",
    ];
    start(vm, "redis", &[starter, &server].concat())?;
    let mut connection =
        Connection::open(Protocol::Redis, vm.port(REDIS)).context(said(vm, "redis"))?;
    let (keys, size) = (keys(megabytes).to_string(), VALUE.to_string());
    let words = ["DEBUG", "POPULATE", &keys, "key", &size].map(str::as_bytes);
    let answer = connection.call(&words)?;
    ensure!(answer == "+OK", "DEBUG POPULATE answered {answer:?}");
    check_redis_data(vm, megabytes)
}

/// Starts memcached as application `memcached`.
///
/// # Errors
/// If it does not start.
pub fn start_memcached(vm: &Vm) -> Result<()> {
    start_memcached_by(vm, &[])
}

/// [`start_memcached`], by a command that is given its own as arguments.
///
/// # Errors
/// As there.
pub fn start_memcached_by(vm: &Vm, starter: &[&str]) -> Result<()> {
    let port = MEMCACHED.to_string();
    let server = [
        "memcached",
        "-u",
        "memcache",
        "-l",
        "0.0.0.0",
        "-p",
        &port,
        "-m",
        "64",
        "-t",
        "4",
    ];
    start(vm, "memcached", &[starter, &server].concat())?;
    Connection::open(Protocol::Memcached, vm.port(MEMCACHED))
        .context(said(vm, "memcached"))
        .map(|_| ())
}

fn start(vm: &Vm, name: &str, command: &[&str]) -> Result<()> {
    let run = ["tracker", "run", "--name", name, "--"];
    let log = log_file(name);
    vm.spawn(Exec::new([&run[..], command].concat()), Some(&log))?;
    Ok(())
}

fn log_file(name: &str) -> String {
    format!("/root/{name}.log")
}

/// The end of an application's log, for messages.
pub fn said(vm: &Vm, name: &str) -> String {
    let log = vm.read_file(&log_file(name)).unwrap_or_default();
    let log = String::from_utf8_lossy(&log);
    let lines: Vec<&str> = log.lines().collect();
    format!(
        "{name}'s log ends with\n{}",
        lines[lines.len().saturating_sub(10)..].join("\n")
    )
}

fn keys(megabytes: usize) -> usize {
    megabytes * 1_000_000 / VALUE
}

/// Compares a sample of the data that redis was filled with, and its size.
///
/// # Errors
/// If a value is missing or another one.
pub fn check_redis_data(vm: &Vm, megabytes: usize) -> Result<()> {
    let mut connection = Connection::open(Protocol::Redis, vm.port(REDIS))?;
    let keys = keys(megabytes);
    let answer = connection.call(&[b"DBSIZE"])?;
    let count: usize = answer
        .strip_prefix(':')
        .and_then(|digits| digits.parse().ok())
        .with_context(|| format!("DBSIZE answered {answer:?}"))?;
    ensure!(count >= keys, "Redis has {count} keys of {keys}");
    for number in (0..keys).step_by((keys / 1000).max(1)) {
        let mut wanted = format!("value:{number}").into_bytes();
        wanted.resize(VALUE, 0);
        let found = connection.get(&format!("key:{number}"))?;
        ensure!(
            found == Some(wanted),
            "Redis has another value at key:{number}"
        );
    }
    Ok(())
}

/// `tracker checkpoint` of an application, with more options.
#[must_use]
pub fn checkpoint(name: &str, image: &str, more: &[&str]) -> Exec {
    let words = ["tracker", "checkpoint", "--name", name, "--image", image];
    Exec::new([&words[..], more].concat())
}

/// The targets for this many clients of each server.
pub fn targets(vm: &Vm, redis: usize, memcached: usize) -> Vec<Target> {
    let target = |protocol, port, clients| Target {
        protocol,
        port: vm.port(port),
        clients,
    };
    let mut targets = Vec::new();
    if redis > 0 {
        targets.push(target(Protocol::Redis, REDIS, redis));
    }
    if memcached > 0 {
        targets.push(target(Protocol::Memcached, MEMCACHED, memcached));
    }
    targets
}

/// The PIDs in an application's cgroup, sorted.
///
/// # Errors
/// If there is no such application.
pub fn pids(vm: &Vm, name: &str) -> Result<Vec<u32>> {
    let script = "find /sys/fs/cgroup/tracker/\"$1\" -name cgroup.procs -exec cat {} +";
    let output = vm
        .exec(Exec::new(["sh", "-c", script, "sh", name]))?
        .check()?;
    let mut pids = output
        .text()
        .lines()
        .map(|line| line.parse().with_context(|| format!("PID {line:?}")))
        .collect::<Result<Vec<u32>>>()?;
    pids.sort_unstable();
    ensure!(!pids.is_empty(), "Nothing runs in {name}'s cgroup");
    Ok(pids)
}
