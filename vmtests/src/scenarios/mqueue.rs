//! POSIX message queues whose names are other queues' by now, and what a restore that fails leaves
//! of them.

use anyhow::{Result, ensure};

use super::single_case::{checkpoint, passes, refused, restore, start};
use super::{Kernels, Scenario};
use crate::image::Kernel;
use crate::vm::Vm;

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "mqueue_taken",
    kernels: Kernels::Only(Kernel::V6_1),
    configure: |builder| builder,
    run: taken,
}];

/// The queue of the case `mqueue`.
const QUEUE: &str = "/dev/mqueue/tracker-case";

fn taken(vm: &Vm) -> Result<()> {
    start(vm, "mqueue")?;
    checkpoint(vm)?;
    ensure!(queues(vm)? == "tracker-case", "The checkpoint removes it");

    // A user without a name for it: what keeps a file open is not to be seen by others.
    let hold = format!("sleep 1000 <{QUEUE} >/dev/null 2>&1 & echo $!");
    let holder = vm.sh(&hold)?.check()?.text().trim().to_owned();
    refused(vm, restore(), "there is one that somebody has open")?;
    vm.sh(&format!("kill {holder}"))?.check()?;

    vm.sh(&format!("rm {QUEUE} && touch {QUEUE}"))?.check()?;
    refused(vm, restore(), "with another owner, mode or room")?;
    ensure!(queues(vm)? == "tracker-case", "Another one is gone");

    vm.sh(&format!("rm {QUEUE}"))?.check()?;
    let fails = restore().env("TRACKER_FAULT", "restore-memory");
    refused(vm, fails, "RestoreMemory was hit")?;
    ensure!(queues(vm)?.is_empty(), "A failed restore leaves a queue");

    let limits = "cd /proc/sys/fs/mqueue && echo 1 >msg_max && echo 128 >msgsize_max && \
                  echo 0 >queues_max";
    vm.sh(limits)?.check()?;
    vm.exec(restore())?.check()?;
    passes(vm)
}

/// Names of all queues.
fn queues(vm: &Vm) -> Result<String> {
    Ok(vm.sh("ls /dev/mqueue")?.check()?.text().trim().to_owned())
}
