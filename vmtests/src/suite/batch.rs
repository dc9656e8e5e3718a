//! All cases at the same time: alone, or through one `tracker update`.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::life::Life;
use super::{Mode, Report};
use crate::guest::case::Entry;
use crate::image::Kernel;
use crate::vm::{Exec, Outcome, Vm};

/// Time for the update, the next kernel's boot and the restore.
const UPDATE: Duration = Duration::from_secs(900);

/// So many cases are set up at a time. With all of them at once, one whose threads are of low
/// priority got nothing to run on for minutes.
const AT_A_TIME: usize = 16;

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
    let mut batch = Vec::new();
    for some in entries.chunks(AT_A_TIME) {
        let starting = some
            .iter()
            .map(|entry| Ok((name(entry), Life::start(vm, mode, entry)?)))
            .collect::<Result<Vec<_>>>()?;
        for (name, mut life) in starting {
            match life.await_ready(vm) {
                Ok(()) => batch.push((name, life)),
                // It must not hold up the others.
                Err(error) => {
                    let result = life.finish(vm, Err(error));
                    report.verdict(&name, &result, Duration::ZERO);
                }
            }
        }
    }
    let update = match fate {
        Fate::Nothing => None,
        Fate::Update(to) => Some(update(vm, to)?),
    };
    let gone_on: Vec<_> = batch
        .iter()
        .map(|(_, life)| match &update {
            None => life.go(vm),
            Some(update) => life
                .go_after_kexec(vm)
                .with_context(|| update.about(life.name())),
        })
        .collect();
    for ((name, life), gone_on) in batch.iter().zip(gone_on) {
        let begun = Instant::now();
        let result = life.finish(vm, gone_on.and_then(|()| life.verdict(vm)));
        report.verdict(name, &result, begun.elapsed());
    }
    Ok(())
}

/// What the next kernel tells of an update.
struct Update {
    /// `/run/tracker/update.json`, or null where there is none.
    report: Value,
    /// What the early-boot stage has said.
    console: Vec<String>,
}

impl Update {
    /// What became of an application, and of all.
    fn about(&self, name: &str) -> String {
        let applications = self.report["applications"].as_array();
        let found = applications.and_then(|all| all.iter().find(|app| app["name"] == name));
        let about = found.map_or("not in the report".to_owned(), |app| {
            format!("{}, {}", app["status"], app["error"])
        });
        format!(
            "{about}; the update: {}, {}; its last words: {}",
            self.report["status"],
            self.report["warnings"],
            self.console[self.console.len().saturating_sub(3)..].join(" / ")
        )
    }
}

impl fmt::Display for Update {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |what: &str| seconds_of(self.report[what].as_u64().unwrap_or_default());
        write!(
            f,
            "{}; frozen {:.1} s, boot {:.1} s, restore {:.1} s",
            self.report["status"],
            seconds("frozen_until_kexec"),
            seconds("boot"),
            seconds("restore")
        )?;
        // Whoever wonders why it took so long wants to know of each step.
        let steps = self.report["timeline"].as_array().into_iter().flatten();
        let mut before = None;
        for step in steps {
            let at = step["at"].as_u64().unwrap_or_default();
            let since = at.saturating_sub(before.unwrap_or(at));
            let name = step["step"].as_str().unwrap_or_default();
            write!(f, "\nvm:   {name} +{:.1} s", seconds_of(since))?;
            before = Some(at);
        }
        Ok(())
    }
}

fn seconds_of(nanoseconds: u64) -> f64 {
    Duration::from_nanos(nanoseconds).as_secs_f64()
}

fn update(vm: &Vm, to: Kernel) -> Result<Update> {
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
    let report = vm.read_file("/run/tracker/update.json").unwrap_or_default();
    let update = Update {
        report: serde_json::from_slice(&report).unwrap_or_default(),
        console: vm
            .console()
            .into_iter()
            .filter(|line| line.starts_with("tracker: "))
            .collect(),
    };
    let seconds = begun.elapsed().as_secs_f32();
    eprintln!("vm: updated to {to} in {seconds:.1} s: {update}");
    Ok(update)
}
