//! System V message queues that cannot have their ids or keys back, and what a restore that
//! fails leaves of them.

use anyhow::{Context, Result, ensure};

use super::Scenario;
use super::services::PATIENCE;
use crate::apps;
use crate::image::Kernel;
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Output, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "sysv_msg_taken",
    kernels: &[Kernel::V6_1],
    configure: |builder| builder,
    run: taken,
}];

const DIR: &str = "/root/taken";

const IMAGE: &str = "/root/image";

/// The case `sysv_msg` has two queues; this is the key of one.
const KEY: &str = "0x7472616d";

const REMOVE_ALL: &str = "ipcrm --all=msg";

fn restore() -> Exec {
    Exec::new(["tracker", "restore", "--image", IMAGE, "--detach"]).timeout(PATIENCE)
}

fn taken(vm: &Vm) -> Result<()> {
    let program = format!("{TESTS_DIR}/cases");
    let run = ["tracker", "run", "--name", "queues", "--"];
    let case = [program.as_str(), "sysv_msg", DIR];
    vm.spawn(Exec::new([&run[..], &case].concat()), Some("/root/run.log"))?;
    let ready = vm.await_file(&format!("{DIR}/ready"), PATIENCE)?;
    ensure!(ready, "The case does not get ready");
    let id = "awk '$1 == 1953653101 {print $2}' /proc/sysvipc/msg";
    let id = vm.sh(id)?.check()?.text().trim().to_owned();
    let checkpoint = apps::checkpoint("queues", IMAGE, &[]).timeout(PATIENCE);
    vm.exec(checkpoint)?.check()?;

    let make = |key: &str| {
        format!("python3 -c 'import ctypes; assert ctypes.CDLL(None).msgget({key}, 0o1600) >= 0'")
    };
    let other_key = format!("ipcrm -Q {KEY} && {}", make(KEY));
    vm.sh(&other_key)?.check()?;
    refused(vm, restore(), "its id or its key is in use")?;
    ensure!(count(vm)? == 2, "One that was there is gone");

    let next = format!("echo {id} >/proc/sys/kernel/msg_next_id");
    let other_id = format!("{REMOVE_ALL} && {next} && {}", make("0"));
    vm.sh(&other_id)?.check()?;
    refused(vm, restore(), &format!("message queue {id}, key {KEY}"))?;
    ensure!(count(vm)? == 1, "Not the other one alone");

    vm.sh(REMOVE_ALL)?.check()?;
    let fails = restore().env("TRACKER_FAULT", "restore-memory");
    refused(vm, fails, "RestoreMemory was hit")?;
    ensure!(count(vm)? == 0, "A failed restore leaves queues behind");

    vm.exec(restore())?.check()?;
    vm.write_file(&format!("{DIR}/go"), b"")?;
    let result = format!("{DIR}/result");
    ensure!(vm.await_file(&result, PATIENCE)?, "The case does not end");
    let result = String::from_utf8(vm.read_file(&result)?)?;
    ensure!(result == "PASS", "{result}");
    Ok(())
}

fn refused(vm: &Vm, restore: Exec, text: &str) -> Result<()> {
    let output: Output = vm.exec(restore)?;
    let said = output.error_text();
    ensure!(
        !output.success() && said.contains(text),
        "Not refused with {text:?}: {} {said}",
        output.status
    );
    Ok(())
}

/// Queues of the machine.
fn count(vm: &Vm) -> Result<usize> {
    let table = vm.read_file("/proc/sysvipc/msg")?;
    let table = String::from_utf8(table).context("/proc/sysvipc/msg")?;
    Ok(table.lines().count().saturating_sub(1))
}
