//! One case, ended and restored step by step.

use anyhow::{Result, ensure};

use super::services::PATIENCE;
use crate::apps;
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Output, Vm};

const NAME: &str = "single";
const DIR: &str = "/root/single";
const IMAGE: &str = "/root/single.image";

/// Starts a case and waits until it is ready.
pub fn start(vm: &Vm, case: &str) -> Result<()> {
    start_by(vm, &[], case)
}

/// The same with a command before it, as taskset(1) is.
pub fn start_by(vm: &Vm, before: &[&str], case: &str) -> Result<()> {
    let program = format!("{TESTS_DIR}/cases");
    let run = ["tracker", "run", "--name", NAME, "--"];
    let run = [&run, before, &[&program, case, DIR]].concat();
    vm.spawn(Exec::new(run), Some("/root/single.log"))?;
    let ready = vm.await_file(&format!("{DIR}/ready"), PATIENCE)?;
    ensure!(ready, "The case does not get ready");
    Ok(())
}

/// Ends it by a checkpoint.
pub fn checkpoint(vm: &Vm) -> Result<()> {
    let checkpoint = apps::checkpoint(NAME, IMAGE, &[]).timeout(PATIENCE);
    vm.exec(checkpoint)?.check().map(drop)
}

/// What restores it.
pub fn restore() -> Exec {
    Exec::new(["tracker", "restore", "--image", IMAGE, "--detach"]).timeout(PATIENCE)
}

/// Removes the image, to make room for the next.
pub fn forget(vm: &Vm) -> Result<()> {
    vm.sh(&format!("rm -r {IMAGE}"))?.check().map(drop)
}

/// A restore that fails, with this text on stderr.
pub fn refused(vm: &Vm, restore: Exec, text: &str) -> Result<()> {
    const RESTORE_FAILED: i32 = 7;
    ensure_failed(&vm.exec(restore)?, RESTORE_FAILED, text)
}

/// That a command has failed with this code, and has said why on stderr.
pub fn ensure_failed(output: &Output, code: i32, why: &str) -> Result<()> {
    let said = output.error_text();
    ensure!(
        output.code() == Some(code) && said.contains(why),
        "Not {code} with {why:?}: {}\n{said}",
        output.status
    );
    Ok(())
}

/// Tells it to go on, and takes its verdict.
pub fn passes(vm: &Vm) -> Result<()> {
    vm.write_file(&format!("{DIR}/go"), b"")?;
    let result = format!("{DIR}/result");
    ensure!(vm.await_file(&result, PATIENCE)?, "The case does not end");
    let result = String::from_utf8(vm.read_file(&result)?)?;
    ensure!(result == "PASS", "{result}");
    Ok(())
}
