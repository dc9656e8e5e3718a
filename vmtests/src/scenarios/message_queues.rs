//! System V message queues that cannot have their ids or keys back, and what a restore that
//! fails leaves of them.

use anyhow::{Context, Result, ensure};

use super::single_case::{checkpoint, passes, refused, restore, start};
use super::{Kernels, Scenario};
use crate::image::Kernel;
use crate::vm::Vm;

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "sysv_msg_taken",
    kernels: Kernels::Only(Kernel::V6_1),
    configure: |builder| builder,
    run: taken,
}];

/// The case `sysv_msg` has two queues; this is the key of one.
const KEY: &str = "0x7472616d";

const REMOVE_ALL: &str = "ipcrm --all=msg";

fn taken(vm: &Vm) -> Result<()> {
    start(vm, "sysv_msg")?;
    let id = "awk '$1 == 1953653101 {print $2}' /proc/sysvipc/msg";
    let id = vm.sh(id)?.check()?.text().trim().to_owned();
    checkpoint(vm)?;

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
    passes(vm)
}

/// Queues of the machine.
fn count(vm: &Vm) -> Result<usize> {
    let table = vm.read_file("/proc/sysvipc/msg")?;
    let table = String::from_utf8(table).context("/proc/sysvipc/msg")?;
    Ok(table.lines().count().saturating_sub(1))
}
