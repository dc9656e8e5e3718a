//! POSIX message queues whose names are other queues' by now, and what a restore that fails leaves
//! of them.

use anyhow::{Result, ensure};

use super::Scenario;
use super::services::PATIENCE;
use crate::apps;
use crate::image::Kernel;
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Output, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "mqueue_taken",
    kernels: &[Kernel::V6_1],
    configure: |builder| builder,
    run: taken,
}];

const DIR: &str = "/root/taken";

const IMAGE: &str = "/root/image";

/// The queue of the case `mqueue`.
const QUEUE: &str = "/dev/mqueue/tracker-case";

fn restore() -> Exec {
    Exec::new(["tracker", "restore", "--image", IMAGE, "--detach"]).timeout(PATIENCE)
}

fn taken(vm: &Vm) -> Result<()> {
    let program = format!("{TESTS_DIR}/cases");
    let run = ["tracker", "run", "--name", "queues", "--"];
    let case = [program.as_str(), "mqueue", DIR];
    vm.spawn(Exec::new([&run[..], &case].concat()), Some("/root/run.log"))?;
    let ready = vm.await_file(&format!("{DIR}/ready"), PATIENCE)?;
    ensure!(ready, "The case does not get ready");
    let checkpoint = apps::checkpoint("queues", IMAGE, &[]).timeout(PATIENCE);
    vm.exec(checkpoint)?.check()?;
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
    vm.write_file(&format!("{DIR}/go"), b"")?;
    let result = format!("{DIR}/result");
    ensure!(vm.await_file(&result, PATIENCE)?, "The case does not end");
    let result = String::from_utf8(vm.read_file(&result)?)?;
    ensure!(result == "PASS", "{result}");
    Ok(())
}

fn refused(vm: &Vm, restore: Exec, text: &str) -> Result<()> {
    const RESTORE_FAILED: i32 = 7;
    let output: Output = vm.exec(restore)?;
    let said = output.error_text();
    ensure!(
        output.code() == Some(RESTORE_FAILED) && said.contains(text),
        "Not refused with {text:?}: {} {said}",
        output.status
    );
    Ok(())
}

/// Names of all queues.
fn queues(vm: &Vm) -> Result<String> {
    Ok(vm.sh("ls /dev/mqueue")?.check()?.text().trim().to_owned())
}
