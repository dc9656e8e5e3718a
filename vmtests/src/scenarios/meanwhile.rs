//! What goes on around an application while it is frozen: what reaches its sockets after the pass
//! over its descriptors, who thaws it, who has the CPUs.

use anyhow::{Context, Result, ensure};

use super::services::PATIENCE;
use super::single_case::ensure_failed;
use super::{Kernels, Scenario, single_case};
use crate::apps;
use crate::image::Kernel;
use crate::protocol::Status;
use crate::vm::{Exec, Output, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "tcp_ended_frozen",
        kernels: Kernels::Only(Kernel::V6_12),
        configure: |builder| builder,
        run: ended_frozen,
    },
    Scenario {
        name: "icmp_error_frozen",
        kernels: Kernels::Either,
        configure: |builder| builder,
        run: error_frozen,
    },
    Scenario {
        name: "talks_frozen",
        kernels: Kernels::Both,
        configure: |builder| builder,
        run: talks_frozen,
    },
    Scenario {
        name: "thawed_frozen",
        kernels: Kernels::Either,
        configure: |builder| builder,
        run: thawed_frozen,
    },
    Scenario {
        name: "first_frozen",
        kernels: Kernels::Either,
        configure: |builder| builder,
        run: first_frozen,
    },
    Scenario {
        name: "vforks_frozen",
        kernels: Kernels::Both,
        configure: |builder| builder,
        run: vforks_frozen,
    },
];

const PROGRAM: &str = "/root/meanwhile.py";
const NAME: &str = "meanwhile";
const DIR: &str = "/root/meanwhile";
const IMAGE: &str = "/root/meanwhile.image";

/// Exit codes of `tracker` for "not eligible" and "rolled back".
const NOT_ELIGIBLE: i32 = 3;
const ABORTED: i32 = 6;

/// Starts the program that will be frozen.
fn start(vm: &Vm, role: &str) -> Result<()> {
    vm.write_file(PROGRAM, include_bytes!("meanwhile.py"))?;
    vm.sh(&format!("mkdir {DIR}"))?.check()?;
    let run = [
        "tracker", "run", "--name", NAME, "--", "python3", PROGRAM, role, DIR,
    ];
    vm.spawn(Exec::new(run), Some("/root/program.log"))?;
    Ok(())
}

/// Starts who waits until it is.
fn start_other(vm: &Vm, role: &str) -> Result<i32> {
    let cgroup = format!("/sys/fs/cgroup/tracker/{NAME}");
    let other = ["python3", PROGRAM, role, DIR, &cgroup];
    vm.spawn(Exec::new(other), Some("/root/other.log"))
}

fn await_ready(vm: &Vm) -> Result<()> {
    await_said(vm, "ready")
}

fn await_said(vm: &Vm, what: &str) -> Result<()> {
    let said = vm.await_file(&format!("{DIR}/{what}"), PATIENCE)?;
    ensure!(said, "The program does not say {what}");
    Ok(())
}

/// A checkpoint that takes its time between the pass and what comes next.
fn checkpoint(vm: &Vm) -> Result<Output> {
    let checkpoint = apps::checkpoint(NAME, IMAGE, &[]).timeout(PATIENCE);
    vm.exec(checkpoint.env("TRACKER_FAULT", "memory:slow"))
}

/// What the program says once it may go on.
fn result(vm: &Vm) -> Result<String> {
    vm.write_file(&format!("{DIR}/go"), b"")?;
    let result = format!("{DIR}/result");
    ensure!(
        vm.await_file(&result, PATIENCE)?,
        "The program does not end"
    );
    Ok(String::from_utf8(vm.read_file(&result)?)?)
}

fn await_end(vm: &Vm, other: i32) -> Result<()> {
    ensure!(
        vm.wait(other, PATIENCE)?.is_some(),
        "The other does not end"
    );
    Ok(())
}

/// Connections end.
fn ended_frozen(vm: &Vm) -> Result<()> {
    /// Reset; closed and then reset, of which reading shows the end and the socket keeps the
    /// reset; closed after the restore.
    const RESULT: &str = "unread [104, b''] 0; unread [b'', b''] 32; unread [b'', b''] 0";
    start(vm, "server")?;
    let listens =
        "for i in $(seq 600); do ss -tln | grep -q :7001 && exit 0; sleep 0.1; done; exit 1";
    vm.exec(Exec::new(["sh", "-c", listens]).timeout(PATIENCE))?
        .check()?;
    let peer = start_other(vm, "peer")?;
    await_ready(vm)?;

    checkpoint(vm)?.check()?;
    let restore = Exec::new(["tracker", "restore", "--image", IMAGE, "--detach"]);
    vm.exec(restore.timeout(PATIENCE))?.check()?;

    let result = result(vm)?;
    ensure!(result == RESULT, "{result}");
    await_end(vm, peer)
}

/// An ICMP message arrives: to look into the socket's queue would take the error away from the
/// application.
fn error_frozen(vm: &Vm) -> Result<()> {
    start(vm, "asks")?;
    await_ready(vm)?;
    let forger = start_other(vm, "forges")?;

    let why = "an error that it was not told yet";
    ensure_failed(&checkpoint(vm)?, NOT_ELIGIBLE, why)?;
    await_end(vm, forger)?;

    let result = result(vm)?;
    ensure!(result == "111, then b'answer'", "{result}");
    Ok(())
}

/// Segments that this kernel has sent again (proc_net_snmp(5)): names in one line, numbers in the
/// next.
fn sent_again(vm: &Vm) -> Result<u64> {
    let text = String::from_utf8(vm.read_file("/proc/net/snmp")?)?;
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, numbers) = (lines.next(), lines.next());
    let mut pairs = std::iter::zip(
        names.unwrap_or_default().split(' '),
        numbers.unwrap_or_default().split(' '),
    );
    let (_, number) = pairs
        .find(|(name, _)| *name == "RetransSegs")
        .context("No RetransSegs in /proc/net/snmp")?;
    Ok(number.parse()?)
}

/// Peers ask and ask again. An application that is left running misses nothing of it: no packet is
/// dropped that its sender would have to send again.
fn talks_frozen(vm: &Vm) -> Result<()> {
    const CHECKPOINTS: usize = 15;
    start(vm, "echoes")?;
    await_said(vm, "listens")?;
    let callers = start_other(vm, "calls")?;
    await_ready(vm)?;

    let before = sent_again(vm)?;
    for _ in 0..CHECKPOINTS {
        let checkpoint = apps::checkpoint(NAME, IMAGE, &["--leave-running", "--json"]);
        let output = vm.exec(checkpoint.timeout(PATIENCE))?.check()?;
        let said: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        ensure!(said["silenced"] == false, "It was silenced: {said}");
        vm.sh(&format!("rm -r {IMAGE}"))?.check()?;
    }
    let after = sent_again(vm)?;
    ensure!(
        before == after,
        "Sent again: {before} before, {after} after"
    );

    let result = result(vm)?;
    ensure!(result == "True", "No call was answered");
    let status = vm.wait(callers, PATIENCE)?;
    ensure!(
        status == Some(Status::Exited(0)),
        "The callers ended with {status:?}"
    );
    Ok(())
}

/// Somebody lets the application run in the middle of a checkpoint, which is void then.
fn thawed_frozen(vm: &Vm) -> Result<()> {
    start(vm, "waits")?;
    await_ready(vm)?;
    let other = start_other(vm, "thaws")?;

    ensure_failed(&checkpoint(vm)?, ABORTED, "Somebody else has thawed")?;
    await_end(vm, other)?;

    let result = result(vm)?;
    ensure!(result == "went on", "{result}");
    Ok(())
}

/// Whoever has an application stand still goes before all that is ordinary, and the guard, which
/// the checkpoint has forked, does not.
fn first_frozen(vm: &Vm) -> Result<()> {
    let first = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    start(vm, "waits")?;
    await_ready(vm)?;
    let other = start_other(vm, "observes")?;

    let checkpoint = apps::checkpoint(NAME, IMAGE, &["--leave-running"]).timeout(PATIENCE);
    vm.exec(checkpoint.env("TRACKER_FAULT", "memory:slow"))?
        .check()?;
    await_end(vm, other)?;

    let observed = String::from_utf8(vm.read_file(&format!("{DIR}/observed"))?)?;
    let expected = format!("[{}, {first}]", libc::SCHED_OTHER);
    ensure!(observed == expected, "{observed} instead of {expected}");
    let result = result(vm)?;
    ensure!(result == "went on", "{result}");
    Ok(())
}

/// A parent in vfork(2) counts as frozen, and still does when its child is gone and it waits for
/// a CPU to go on with: its call has not ended then. It shares its CPU with one that goes first.
fn vforks_frozen(vm: &Vm) -> Result<()> {
    const ROUNDS: usize = 5;
    single_case::start_by(vm, &["taskset", "-c", "1"], "process_vforks")?;
    vm.write_file(PROGRAM, include_bytes!("meanwhile.py"))?;
    let first = [
        "chrt", "-f", "1", "taskset", "-c", "1", "python3", PROGRAM, "occupies", DIR,
    ];
    let first = vm.spawn(Exec::new(first), None)?;
    for _ in 0..ROUNDS {
        single_case::checkpoint(vm)?;
        vm.exec(single_case::restore())?.check()?;
        single_case::forget(vm)?;
    }
    vm.kill(first, libc::SIGKILL)?;
    single_case::passes(vm)
}
