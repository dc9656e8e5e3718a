//! All cases through one `tracker update` to the next kernel.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::Report;
use super::life::Started;
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
        match Started::in_batch(vm, entry) {
            Ok(started) => batch.push((entry, started)),
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
    for (entry, started) in batch {
        let begun = Instant::now();
        let result = started.after_kexec(vm);
        report.verdict(&name(entry), &result, begun.elapsed());
    }
    Ok(())
}
