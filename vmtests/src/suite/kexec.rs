//! All cases through one `tracker update` to the next kernel.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::Report;
use super::life::Life;
use crate::guest::case::Entry;
use crate::image::Kernel;
use crate::vm::{Exec, Outcome, Vm};

/// Time for the update, the next kernel's boot and the restore.
const UPDATE: Duration = Duration::from_secs(240);

/// Starts the cases, updates once, and takes every case's verdict.
pub(crate) fn run(
    vm: &Vm,
    to: Kernel,
    entries: &[&'static Entry],
    report: &Report,
    name: &dyn Fn(&Entry) -> String,
) -> Result<()> {
    let mut batch = Vec::new();
    for entry in entries {
        match Life::start_in_batch(vm, entry) {
            Ok(life) => batch.push((entry, life)),
            // It must not hold up the others.
            Err(error) => report.verdict(&name(entry), &Err(error), Duration::ZERO),
        }
    }
    let begun = Instant::now();
    let (kernel, initrd) = (to.guest_vmlinuz()?, to.guest_initrd()?);
    let update = Exec::new([
        "tracker", "update", "--kernel", &kernel, "--initrd", &initrd,
    ]);
    match vm.exec_or_reboot(update.timeout(UPDATE))? {
        Outcome::Exited(output) => bail!(
            "tracker update: {}\n{}{}\n-- console\n{}",
            output.status,
            output.text(),
            output.error_text(),
            vm.console_tail(10)
        ),
        Outcome::Rebooted(hello) => {
            ensure!(
                hello.release == to.release()?,
                "The guest now runs {}",
                hello.release
            );
        }
    }
    eprintln!(
        "kexec: updated {} cases in {:.1} s",
        batch.len(),
        begun.elapsed().as_secs_f32()
    );
    // All go on together: one that hangs costs the others nothing.
    let gone_on: Vec<_> = batch
        .iter()
        .map(|(_, life)| life.go_after_kexec(vm))
        .collect();
    for ((entry, life), gone_on) in batch.iter().zip(gone_on) {
        let begun = Instant::now();
        let result = life.end_after_kexec(vm, gone_on);
        report.verdict(&name(entry), &result, begun.elapsed());
    }
    Ok(())
}
