//! Runs cases and scenarios in VMs and counts what came of it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use std::{fmt, path::PathBuf};

use anyhow::{Result, anyhow};

use self::batch::Fate;
use crate::cases;
use crate::control::ControlError;
use crate::guest::case::{Entry, Expect};
use crate::image::Kernel;
use crate::scenarios::{self, Kernels, Scenario};
use crate::vm::{Vm, VmBuilder};

mod again;
mod batch;
mod life;

/// What is done to a case between "ready" and "go".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Nothing: shows that the case itself is right.
    Plain,
    /// Checkpoint and restore on one kernel; or the refusal, if that is due.
    Same,
    /// `tracker update` from 6.1 to 6.12, all cases in one batch; from 6.12 to itself, those that
    /// only kernels of one form carry.
    Kexec,
    /// A checkpoint that leaves it running, a restore from its image, and another
    /// checkpoint and restore.
    Again,
    /// Scenarios.
    Scenario,
}

impl Mode {
    /// All of them, in the order they run in.
    pub const ALL: [Mode; 5] = [
        Mode::Plain,
        Mode::Same,
        Mode::Kexec,
        Mode::Again,
        Mode::Scenario,
    ];

    /// As in test names and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Plain => "plain",
            Mode::Same => "same",
            Mode::Kexec => "kexec",
            Mode::Again => "again",
            Mode::Scenario => "scenario",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What to run, and how.
#[derive(Debug, Clone)]
pub struct Options {
    /// The repository's root.
    pub workspace: PathBuf,
    /// Kernels to boot first.
    pub kernels: Vec<Kernel>,
    /// Modes to run in.
    pub modes: Vec<Mode>,
    /// Only tests whose full name contains this.
    pub filter: Option<String>,
    /// Keep the files of all VMs, not only of those with failures.
    pub keep: bool,
    /// Leave out what another test of the run shows nearly as well: a case's life alone where it
    /// also has one beside others ([`Mode::Again`]), and a scenario's second kernel.
    pub brief: bool,
    /// How many VMs at a time.
    pub jobs: usize,
}

/// How many tests passed and failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Passed.
    pub passed: usize,
    /// Failed.
    pub failed: usize,
}

/// Tests that share a VM.
#[derive(Debug)]
enum Group {
    /// Cases one after another; the VM is booted again only if it dies.
    Cases {
        kernel: Kernel,
        entries: Vec<&'static Entry>,
    },
    /// Cases at the same time.
    Batch {
        kernel: Kernel,
        fate: Fate,
        entries: Vec<&'static Entry>,
    },
    /// Cases at the same time, restored twice.
    Again {
        kernel: Kernel,
        entries: Vec<&'static Entry>,
    },
    /// A scenario.
    Scenario {
        kernel: Kernel,
        scenario: &'static Scenario,
    },
}

impl Group {
    fn names(&self) -> Vec<String> {
        match self {
            Group::Cases { kernel, entries } => entries
                .iter()
                .map(|entry| case_name(*kernel, entry))
                .collect(),
            Group::Batch {
                kernel,
                fate,
                entries,
            } => entries
                .iter()
                .map(|entry| batch_name(*kernel, *fate, entry))
                .collect(),
            Group::Again { kernel, entries } => entries
                .iter()
                .flat_map(|entry| again_names(*kernel, entry))
                .collect(),
            Group::Scenario { kernel, scenario } => vec![scenario_name(*kernel, scenario)],
        }
    }
}

fn case_name(kernel: Kernel, entry: &Entry) -> String {
    match entry.expect.refusal(kernel) {
        None => format!("same/{kernel}/{}", entry.name),
        Some(_) => format!("refused/{kernel}/{}", entry.name),
    }
}

fn batch_name(kernel: Kernel, fate: Fate, entry: &Entry) -> String {
    match fate {
        Fate::Nothing => format!("plain/{kernel}/{}", entry.name),
        Fate::Update(to) => format!("kexec/{kernel}-{to}/{}", entry.name),
    }
}

/// Of the two verdicts that a case gets in [`Group::Again`].
fn again_names(kernel: Kernel, entry: &Entry) -> [String; 2] {
    ["leave", "twice"].map(|fate| format!("{fate}/{kernel}/{}", entry.name))
}

fn scenario_name(kernel: Kernel, scenario: &Scenario) -> String {
    format!("scenario/{kernel}/{}", scenario.name)
}

/// The full names of the tests that these options select.
pub fn list(options: &Options) -> Vec<String> {
    plan(options).iter().flat_map(Group::names).collect()
}

/// Whether [`Mode::Again`] has this case.
fn runs_again(kernel: Kernel, entry: &Entry) -> bool {
    entry.expect.refusal(kernel).is_none() && entry.expect != Expect::CarriedOnce
}

fn plan(options: &Options) -> Vec<Group> {
    let wanted = |name: &str| {
        options
            .filter
            .as_ref()
            .is_none_or(|filter| name.contains(filter))
    };
    let mut groups = Vec::new();
    let entries = |name: &dyn Fn(&Entry) -> String| -> Vec<_> {
        cases::all().filter(|entry| wanted(&name(entry))).collect()
    };
    for &kernel in &options.kernels {
        let name = |entry: &Entry| batch_name(kernel, Fate::Nothing, entry);
        if options.modes.contains(&Mode::Plain) {
            let entries = entries(&name);
            groups.push(Group::Batch {
                kernel,
                fate: Fate::Nothing,
                entries,
            });
        }
    }
    for &kernel in &options.kernels {
        if options.modes.contains(&Mode::Same) {
            let mut entries = entries(&|entry| case_name(kernel, entry));
            if options.brief && options.modes.contains(&Mode::Again) {
                entries.retain(|entry| !runs_again(kernel, entry));
            }
            groups.push(Group::Cases { kernel, entries });
        }
    }
    let to = Kernel::V6_12;
    for kernel in [Kernel::V6_1, to] {
        if options.modes.contains(&Mode::Kexec) && options.kernels.contains(&kernel) {
            let fate = Fate::Update(to);
            let mut entries = entries(&|entry| batch_name(kernel, fate, entry));
            entries.retain(|entry| match entry.expect {
                Expect::Carried | Expect::CarriedOnce | Expect::CarriedByNewer(_) => kernel != to,
                Expect::CarriedAlike => kernel == to,
                Expect::Refused(_) | Expect::RefusedFrozen(_) => false,
            });
            groups.push(Group::Batch {
                kernel,
                fate,
                entries,
            });
        }
    }
    for &kernel in &options.kernels {
        if options.modes.contains(&Mode::Again) {
            let carried = cases::all().filter(|entry| runs_again(kernel, entry));
            let wanted = |entry: &&Entry| again_names(kernel, entry).iter().any(|n| wanted(n));
            let entries = carried.filter(wanted).collect();
            groups.push(Group::Again { kernel, entries });
        }
    }
    if options.modes.contains(&Mode::Scenario) {
        let mut turns = Kernel::ALL.iter().cycle();
        for scenario in scenarios::all() {
            let kernels = match scenario.kernels {
                Kernels::Only(kernel) => vec![kernel],
                Kernels::Either if options.brief => turns.next().copied().into_iter().collect(),
                Kernels::Either | Kernels::Both => Kernel::ALL.to_vec(),
            };
            for kernel in kernels {
                let wanted = wanted(&scenario_name(kernel, scenario));
                if wanted && options.kernels.contains(&kernel) {
                    groups.push(Group::Scenario { kernel, scenario });
                }
            }
        }
    }
    groups.retain(|group| !group.names().is_empty());
    groups
}

/// Runs them all; prints a line per test and the failures' details.
pub fn run(options: &Options) -> Totals {
    let mut groups = plan(options);
    groups.reverse();
    let mut builder = Vm::builder(&options.workspace).keep(options.keep);
    // To save one machine and load another takes longer than to boot one.
    if groups.len() > 2 {
        builder = builder.boot_once();
    }
    let (queue, report) = (Mutex::new(groups), Report::default());
    std::thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                loop {
                    let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    let Some(group) = next else { break };
                    run_group(builder.clone(), &group, &report);
                }
            });
        }
    });
    let state = report
        .state
        .into_inner()
        .unwrap_or_else(PoisonError::into_inner);
    if !state.failures.is_empty() {
        // Again, as the end of a log is what is kept of it and looked at.
        println!("\nfailures:");
        for (name, text) in &state.failures {
            println!(
                "    {name}: {}",
                text.lines().take(8).collect::<Vec<_>>().join("\n        ")
            );
        }
    }
    Totals {
        passed: state.passed,
        failed: state.failures.len(),
    }
}

fn run_group(builder: VmBuilder, group: &Group, report: &Report) {
    match group {
        Group::Cases { kernel, entries } => {
            let mut lab = Lab::new(builder.kernel(*kernel).agent());
            for entry in entries {
                report.test(&case_name(*kernel, entry), || {
                    lab.run(|vm| life::run(vm, *kernel, entry))
                });
            }
        }
        Group::Batch {
            kernel,
            fate,
            entries,
        } => {
            let mut lab = Lab::new(builder.kernel(*kernel));
            let name = |entry: &Entry| batch_name(*kernel, *fate, entry);
            let result = lab.run(|vm| batch::run(vm, *fate, entries, report, &name));
            report.rest(group, result);
        }
        Group::Again { kernel, entries } => {
            let mut lab = Lab::new(again::disk(builder.kernel(*kernel).agent()));
            let names = |entry: &Entry| again_names(*kernel, entry);
            let result = lab.run(|vm| again::run(vm, entries, report, &names));
            report.rest(group, result);
        }
        Group::Scenario { kernel, scenario } => {
            let builder = (scenario.configure)(builder.kernel(*kernel));
            let mut lab = Lab::new(builder);
            report.test(&scenario_name(*kernel, scenario), || {
                lab.run(|vm| (scenario.run)(vm))
            });
        }
    }
}

/// A VM that is booted when needed, and again when it has died.
struct Lab {
    builder: VmBuilder,
    vm: Option<Vm>,
}

impl Lab {
    fn new(builder: VmBuilder) -> Self {
        Self { builder, vm: None }
    }

    fn run(&mut self, test: impl FnOnce(&Vm) -> Result<()>) -> Result<()> {
        let vm = match self.vm.take() {
            Some(vm) => vm,
            None => self.builder.clone().start()?,
        };
        let mut vm = vm;
        let result = test(&vm);
        if let Err(error) = &result {
            vm.keep_files();
            let lost = error.downcast_ref::<ControlError>().is_some_and(|error| {
                matches!(error, ControlError::Dead(_) | ControlError::Timeout(_))
            });
            if lost || !vm.alive() {
                return result;
            }
        }
        if vm.alive() {
            self.vm = Some(vm);
        }
        result
    }
}

/// Collects verdicts and prints them as they come.
#[derive(Debug, Default)]
pub(crate) struct Report {
    state: Mutex<ReportState>,
}

#[derive(Debug, Default)]
struct ReportState {
    passed: usize,
    /// Names, and what was wrong.
    failures: Vec<(String, String)>,
    seen: Vec<String>,
}

impl Report {
    /// Runs one test and records its verdict.
    fn test(&self, name: &str, test: impl FnOnce() -> Result<()>) {
        let begun = Instant::now();
        let result = test();
        self.verdict(name, &result, begun.elapsed());
    }

    /// Records a verdict.
    pub(crate) fn verdict(&self, name: &str, result: &Result<()>, took: Duration) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.seen.push(name.to_owned());
        let seconds = took.as_secs_f32();
        match result {
            Ok(()) => {
                state.passed += 1;
                println!("test {name} ... ok ({seconds:.1} s)");
            }
            Err(error) => {
                let text = format!("{error:#}");
                let shown = text.replace('\n', "\n    ");
                println!("test {name} ... FAILED ({seconds:.1} s)\n    {shown}");
                state.failures.push((name.to_owned(), text));
            }
        }
    }

    /// Records the end of a batch: if it failed, so did all that has no verdict yet.
    fn rest(&self, group: &Group, result: Result<()>) {
        let Err(error) = result else { return };
        let mut error = Err(error);
        for name in group.names().iter().filter(|name| !self.has(name)) {
            self.verdict(name, &error, Duration::ZERO);
            error = Err(anyhow!("The batch failed, see above"));
        }
    }

    /// True if there is a verdict for this test.
    fn has(&self, name: &str) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.seen.iter().any(|seen| seen == name)
    }
}
