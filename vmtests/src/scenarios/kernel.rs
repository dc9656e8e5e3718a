//! What the BPF side reads and blocks, on every kernel.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::Value;

use super::{Kernels, Scenario};
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "kernel_interfaces",
    kernels: Kernels::Both,
    configure: |vm| vm,
    run: interfaces,
}];

/// Iterators and network lock tell the truth about objects of known state.
fn interfaces(vm: &Vm) -> Result<()> {
    let program = format!("{TESTS_DIR}/iter_check");
    let check = Exec::new([program.as_str(), "--all"]).timeout(Duration::from_secs(300));
    vm.exec(check)?.check()?;
    programs(vm)
}

/// The kernel takes every BPF program, those of the hook set included that it does not use; but
/// for those that need a newer one.
fn programs(vm: &Vm) -> Result<()> {
    let release = vm.exec(Exec::new(["uname", "-r"]))?.check()?.text();
    let is_old = release.starts_with("6.1.");
    let check = Exec::new(["tracker", "check", "--programs", "--json"]);
    let output = vm.exec(check.timeout(Duration::from_secs(300)))?.check()?;
    let objects: Vec<Value> = serde_json::from_str(&output.text())?;
    ensure!(objects.len() == 5, "Not every object: {objects:#?}");
    for object in objects {
        if is_old && object["name"] == "accept" {
            let why = object["refused"].as_str().unwrap_or_default();
            ensure!(why.contains("it needs Linux 6.9"), "{object:#}");
            continue;
        }
        let programs = object["programs"].as_array().map_or(&[][..], Vec::as_slice);
        ensure!(
            object["refused"].is_null() && !programs.is_empty(),
            "{object:#}"
        );
        for program in programs {
            let positive = |field: &str| program[field].as_u64().is_some_and(|n| n > 0);
            ensure!(
                program["not_attached"].is_null()
                    && positive("verified_insns")
                    && positive("xlated_bytes")
                    && positive("jited_bytes"),
                "{program:#}"
            );
        }
    }
    Ok(())
}
