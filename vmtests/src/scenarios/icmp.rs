//! An ICMP message that reaches a socket while its application is frozen, after the pass over its
//! descriptors: to look into the socket's queue would take the error away from the application.

use anyhow::{Result, ensure};

use super::services::PATIENCE;
use super::{Kernels, Scenario};
use crate::apps;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "icmp_error_frozen",
    kernels: Kernels::Either,
    configure: |builder| builder,
    run: error_frozen,
}];

const PROGRAM: &str = "/root/icmp.py";
const NAME: &str = "icmp";
const DIR: &str = "/root/icmp";

/// Exit code of `tracker` for "not eligible".
const NOT_ELIGIBLE: i32 = 3;

fn error_frozen(vm: &Vm) -> Result<()> {
    vm.write_file(PROGRAM, include_bytes!("icmp.py"))?;
    vm.sh(&format!("mkdir {DIR}"))?.check()?;
    let run = [
        "tracker", "run", "--name", NAME, "--", "python3", PROGRAM, "asks", DIR,
    ];
    vm.spawn(Exec::new(run), Some("/root/icmp.log"))?;
    let ready = vm.await_file(&format!("{DIR}/ready"), PATIENCE)?;
    ensure!(ready, "The program is not ready");
    let cgroup = format!("/sys/fs/cgroup/tracker/{NAME}");
    let forger = ["python3", PROGRAM, "forges", DIR, &cgroup];
    let forger = vm.spawn(Exec::new(forger), Some("/root/forger.log"))?;

    let image = "/root/icmp.image";
    let checkpoint = apps::checkpoint(NAME, image, &[]).timeout(PATIENCE);
    let refused = vm.exec(checkpoint.env("TRACKER_FAULT", "memory:slow"))?;
    let said = refused.error_text();
    ensure!(
        refused.code() == Some(NOT_ELIGIBLE) && said.contains("an error that it was not told yet"),
        "The checkpoint ended with {}:\n{said}",
        refused.status
    );
    let ended = vm.wait(forger, PATIENCE)?;
    ensure!(ended.is_some(), "The forger does not end");

    vm.write_file(&format!("{DIR}/go"), b"")?;
    let result = format!("{DIR}/result");
    ensure!(
        vm.await_file(&result, PATIENCE)?,
        "The program does not end"
    );
    let result = String::from_utf8(vm.read_file(&result)?)?;
    ensure!(result == "111, then b'answer'", "{result}");
    Ok(())
}
