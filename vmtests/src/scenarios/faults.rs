//! Checkpoints and updates made to fail at every step: clients must see a
//! late answer at worst.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::handover::update as update_to;
use super::services::{PATIENCE, all_well, start};
use super::{Kernels, Scenario};
use crate::apps;
use crate::image::Kernel;
use crate::vm::{Exec, Outcome, Output, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "faults_checkpoint",
        kernels: Kernels::Either,
        configure: |vm| apps::forwarded(vm).agent(),
        run: checkpoint,
    },
    Scenario {
        name: "faults_update",
        kernels: Kernels::Only(Kernel::V6_1),
        configure: apps::forwarded,
        run: update,
    },
];

/// Exit code for "aborted and rolled back".
pub(super) const ROLLED_BACK: i32 = 6;

/// Fault points that a checkpoint and an update both pass, in their order
/// (`tracker::capture::fault`).
pub(super) const BOTH: &[&str] = &[
    "prepare",
    "precopy",
    "lock",
    "freeze",
    "threads",
    "tasks",
    "memory",
    "page-write",
    "silence",
    "files",
    "encode",
    "commit",
];

/// Those of a checkpoint alone.
pub(super) const CHECKPOINT: &[&str] = &["kill"];

/// Those of an update alone.
const UPDATE: &[&str] = &["kexec-load", "before-kexec"];

fn checkpoint(vm: &Vm) -> Result<()> {
    every_fault(vm, &[BOTH, CHECKPOINT].concat(), |fault| {
        let image = format!("/root/image.{fault}");
        let command = apps::checkpoint("redis", &image, &[]).env("TRACKER_FAULT", fault);
        let output = vm.exec(command.timeout(PATIENCE))?;
        if output.code() == Some(ROLLED_BACK) {
            let inspect = vm.exec(Exec::new(["tracker", "inspect", &image]))?;
            ensure!(!inspect.success(), "A failed checkpoint left a valid image");
        }
        Ok(output)
    })
}

fn update(vm: &Vm) -> Result<()> {
    let next = Kernel::V6_12;
    let (kernel, initrd) = (next.guest_vmlinuz()?, next.guest_initrd()?);
    let words = update_to(&kernel, &initrd);
    every_fault(vm, &[BOTH, UPDATE].concat(), |fault| {
        let command = Exec::new(words).env("TRACKER_FAULT", fault);
        match vm.exec_or_reboot(command.timeout(PATIENCE))? {
            Outcome::Exited(output) => Ok(output),
            Outcome::Rebooted(hello) => {
                bail!("The update went through to {}", hello.release)
            }
        }
    })
}

/// Runs the command once per fault point, with clients at work all the time.
fn every_fault(vm: &Vm, faults: &[&str], command: impl Fn(&str) -> Result<Output>) -> Result<()> {
    let load = start(vm)?;
    let names = ["redis", "memcached"];
    let pids = names.map(|name| apps::pids(vm, name).unwrap_or_default());
    let mut failures = Vec::new();
    for fault in faults {
        let attempt = || -> Result<()> {
            let output = command(fault)?;
            ensure!(
                output.code() == Some(ROLLED_BACK),
                "{}, not exit code {ROLLED_BACK}\n{}",
                output.status,
                output.error_text()
            );
            for (name, before) in names.iter().zip(&pids) {
                ensure!(apps::pids(vm, name)? == *before, "{name} has other PIDs");
                let frozen = format!("/sys/fs/cgroup/tracker/{name}/cgroup.freeze");
                let frozen = vm.read_file(&frozen)?;
                ensure!(frozen.trim_ascii() == b"0", "{name} is still frozen");
            }
            load.progress(5, Duration::from_secs(60))?;
            let lost = load.lost();
            ensure!(lost.is_empty(), "Connections are lost: {lost:?}");
            Ok(())
        };
        if let Err(error) = attempt().with_context(|| format!("Fault {fault}")) {
            // A VM that is gone has nothing more to tell.
            if !vm.alive() {
                return Err(error);
            }
            failures.push(format!("{error:#}"));
        }
    }
    let end = all_well(vm, load);
    ensure!(failures.is_empty(), "{}", failures.join("\n"));
    end
}
