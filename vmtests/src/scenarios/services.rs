//! Redis and memcached with connected clients.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

use super::{Kernels, Scenario};
use crate::apps;
use crate::image::Kernel;
use crate::load::{Connection, Load, Protocol};
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "services_clients_notice",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: apps::forwarded,
        run: clients_notice,
    },
    Scenario {
        name: "services_leave_running",
        kernels: Kernels::Either,
        configure: |vm| apps::forwarded(vm).agent(),
        run: leave_running,
    },
    Scenario {
        name: "services_accepting",
        kernels: Kernels::Only(Kernel::V6_12),
        configure: apps::forwarded,
        run: accepting,
    },
    Scenario {
        name: "services_checkpoint_restore",
        kernels: Kernels::Either,
        configure: apps::forwarded,
        run: checkpoint_restore,
    },
];

/// Time for anything on a loaded machine.
pub(super) const PATIENCE: Duration = Duration::from_secs(300);

/// Megabytes of data in redis.
const DATA: usize = 20;

/// How long a server is gone between its checkpoint and its restore.
const ABSENCE: Duration = Duration::from_secs(5);

/// How often each server is ended and restored in turn.
const ROUNDS: usize = 2;

/// Checkpoints until the agent answers one in time.
const ATTEMPTS: u32 = 5;

/// Both servers, with clients at work.
pub(super) fn start(vm: &Vm) -> Result<Load> {
    apps::start_redis(vm, DATA)?;
    apps::start_memcached(vm)?;
    let load = Load::start(&apps::targets(vm, 20, 10))?;
    load.progress(10, PATIENCE).context("Before")?;
    Ok(load)
}

/// Clients go on, and then confirm that nothing is lost.
pub(super) fn all_well(vm: &Vm, load: Load) -> Result<()> {
    load.progress(20, PATIENCE).context("Afterwards")?;
    let summary = load.finish();
    ensure!(summary.clean(), "{summary:#?}");
    apps::check_redis_data(vm, DATA)
}

/// The clients themselves tell a server that serves from one that dies, and
/// one that has lost its data from one that has not.
fn clients_notice(vm: &Vm) -> Result<()> {
    all_well(vm, start(vm)?)?;
    let load = Load::start(&apps::targets(vm, 5, 5))?;
    load.progress(10, PATIENCE)?;
    vm.sh("redis-cli flushall")?.check()?;
    load.progress(10, PATIENCE)?;
    for name in ["redis", "memcached"] {
        for pid in apps::pids(vm, name)? {
            vm.kill(i32::try_from(pid)?, libc::SIGKILL)?;
        }
    }
    load.progress(1000, PATIENCE)?;
    let summary = load.finish();
    ensure!(summary.lost.len() == 10, "Killed servers: {summary:#?}");
    ensure!(!summary.wrong.is_empty(), "A flushed redis: {summary:#?}");
    Ok(())
}

/// How what a checkpoint finds compares with what the agent knew; `None` if it was not told.
fn known_of(vm: &Vm, name: &str, attempt: u32) -> Result<Option<Value>> {
    let image = format!("/root/image.{name}.{attempt}");
    let checkpoint = apps::checkpoint(name, &image, &["--leave-running", "--json"]);
    let output = vm.exec(checkpoint.timeout(PATIENCE))?.check()?.text();
    let mut outcome: Value = serde_json::from_str(&output).context(output)?;
    Ok(Some(outcome["verification"].take()).filter(|known| !known.is_null()))
}

/// A checkpoint that leaves the program running is a pause to its clients, and finds what the
/// agent knew.
fn leave_running(vm: &Vm) -> Result<()> {
    let load = start(vm)?;
    for name in ["redis", "memcached"] {
        let pids = apps::pids(vm, name)?;
        // A checkpoint does not wait for an agent that has no CPU.
        let known = (1..=ATTEMPTS).find_map(|attempt| known_of(vm, name, attempt).transpose());
        let known = known.with_context(|| format!("{name} was never compared"))??;
        let connections = if name == "redis" { 20 } else { 10 };
        ensure!(
            known["objects"].as_u64() > Some(connections) && known["differing"] == 0,
            "The agent's model of {name}: {known}"
        );
        ensure!(apps::pids(vm, name)? == pids, "The PIDs have changed");
        load.progress(10, PATIENCE)?;
    }
    all_well(vm, load)
}

/// Checkpoint, end, restore, and all of it again: late answers, and nothing else.
fn checkpoint_restore(vm: &Vm) -> Result<()> {
    let load = start(vm)?;
    let rounds = (1..=ROUNDS).flat_map(|round| [(round, "redis"), (round, "memcached")]);
    for (round, name) in rounds {
        let pids = apps::pids(vm, name)?;
        let image = format!("/root/image.{name}.{round}");
        let checkpoint = apps::checkpoint(name, &image, &[]);
        vm.exec(checkpoint.timeout(PATIENCE))?.check()?;
        ensure!(
            apps::pids(vm, name).is_err(),
            "{name} still runs after the checkpoint"
        );
        // Long enough for every client's request to be sent again, to nobody.
        std::thread::sleep(ABSENCE);
        let restore = ["tracker", "restore", "--image", &image, "--detach"];
        vm.exec(Exec::new(restore).timeout(PATIENCE))?.check()?;
        let now = apps::pids(vm, name)?;
        ensure!(now == pids, "{name} had PIDs {pids:?}, has {now:?}");
        load.progress(10, PATIENCE)
            .with_context(|| format!("After restore {round} of {name}"))?;
        let lost = load.lost();
        ensure!(lost.is_empty(), "Restore {round} of {name} lost {lost:?}");
    }
    all_well(vm, load)
}

/// Clients that come and go all the time: a checkpoint finds a moment in which all of them are
/// accepted, and none is turned away.
fn accepting(vm: &Vm) -> Result<()> {
    apps::start_redis(vm, 1)?;
    let port = vm.port(apps::REDIS);
    let stop = AtomicBool::new(false);
    let came = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let client = || -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                let mut connection = Connection::open(Protocol::Redis, port)?;
                let answer = connection.call(&[b"PING"])?;
                ensure!(answer == "+PONG", "Redis says {answer:?}");
                came.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        };
        let clients: Vec<_> = (0..8).map(|_| scope.spawn(client)).collect();
        let checkpoints = || -> Result<()> {
            for number in 1..=10 {
                let before = came.load(Ordering::Relaxed);
                let image = format!("/root/image.{number}");
                let checkpoint = apps::checkpoint("redis", &image, &["--leave-running"]);
                vm.exec(checkpoint.timeout(PATIENCE))?
                    .check()
                    .with_context(|| format!("Checkpoint {number}"))?;
                let begun = Instant::now();
                while came.load(Ordering::Relaxed) < before + 20 {
                    ensure!(begun.elapsed() < PATIENCE, "Nobody comes any more");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Ok(())
        };
        let result = checkpoints();
        stop.store(true, Ordering::Relaxed);
        for client in clients {
            let ended = client.join().map_err(|_| anyhow!("A client panicked"))?;
            ended.context("A client")?;
        }
        result
    })
}
