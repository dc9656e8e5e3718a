//! What the BPF side reads and blocks, on every kernel.

use std::time::Duration;

use anyhow::Result;

use super::Scenario;
use crate::image::Kernel;
use crate::payload::TESTS_DIR;
use crate::vm::{Exec, Vm};

/// The scenarios of this file.
pub const SCENARIOS: &[Scenario] = &[Scenario {
    name: "kernel_interfaces",
    kernels: &Kernel::ALL,
    configure: |vm| vm,
    run: interfaces,
}];

/// Iterators and network lock tell the truth about objects of known state.
fn interfaces(vm: &Vm) -> Result<()> {
    let program = format!("{TESTS_DIR}/iter_check");
    let check = Exec::new([program.as_str(), "--all"]).timeout(Duration::from_secs(300));
    vm.exec(check)?.check()?;
    Ok(())
}
