//! All cases at the same time: alone, or through one `tracker update`.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::life::Life;
use super::{Mode, Report};
use crate::guest::case::Entry;
use crate::image::Kernel;
use crate::vm::{Exec, Outcome, Vm};

/// Time for the update, the next kernel's boot and the restore.
const UPDATE: Duration = Duration::from_secs(900);

/// What happens between "ready" and "go".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// Nothing: shows that the cases themselves are right.
    Nothing,
    /// An update to this kernel.
    Update(Kernel),
}

/// Starts the cases, lets their fate happen once, and takes every verdict.
/// Waiting together, cases that hang or sleep cost the time of one.
pub(crate) fn run(
    vm: &Vm,
    fate: Fate,
    entries: &[&'static Entry],
    report: &Report,
    name: &dyn Fn(&Entry) -> String,
) -> Result<()> {
    let mode = if fate == Fate::Nothing {
        Mode::Plain
    } else {
        Mode::Kexec
    };
    let mut started = Vec::new();
    for entry in entries {
        started.push((name(entry), Life::start(vm, mode, entry)?));
    }
    let mut batch = Vec::new();
    for (name, mut life) in started {
        match life.await_ready(vm) {
            Ok(()) => batch.push((name, life)),
            // It must not hold up the others.
            Err(error) => {
                let result = life.finish(vm, Err(error));
                report.verdict(&name, &result, Duration::ZERO);
            }
        }
    }
    if let Fate::Update(to) = fate {
        update(vm, to)?;
    }
    let gone_on: Vec<_> = batch
        .iter()
        .map(|(_, life)| match fate {
            Fate::Nothing => life.go(vm),
            Fate::Update(_) => life.go_after_kexec(vm),
        })
        .collect();
    for ((name, life), gone_on) in batch.iter().zip(gone_on) {
        let begun = Instant::now();
        let result = life.finish(vm, gone_on.and_then(|()| life.verdict(vm)));
        report.verdict(name, &result, begun.elapsed());
    }
    Ok(())
}

fn update(vm: &Vm, to: Kernel) -> Result<()> {
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
        "vm: updated to {to} in {:.1} s",
        begun.elapsed().as_secs_f32()
    );
    Ok(())
}
