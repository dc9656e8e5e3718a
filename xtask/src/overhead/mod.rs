//! `cargo xtask overhead`: what tracking costs applications, in instructions.
//!
//! The VM's clock advances by a nanosecond with every instruction, so CPU
//! times are instruction counts, and what is measured twice is nearly equal.
//! Everything of one kernel is measured in one boot, and always below
//! `tracker run`, in cgroups that differ in nothing but being tracked.

mod servers;
mod table;

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};
use serde::Serialize;
use vmtests::apps;
use vmtests::image::Kernel;
use vmtests::overhead::{Cost, NAMES};
use vmtests::payload::{Profile, TESTS_DIR};
use vmtests::vm::{Exec, Vm};

use crate::{setup, workspace};

/// Options of `cargo xtask overhead`.
#[derive(Args)]
pub struct Arguments {
    /// Only this kernel: 6.1 or 6.12
    #[arg(long)]
    kernel: Option<Kernel>,
    /// Only this hook set
    #[arg(long, value_enum)]
    hooks: Option<Hooks>,
    /// Only this operation or kind of request, by its name in the table; may be repeated
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,
    /// No redis and no nginx
    #[arg(long)]
    no_servers: bool,
    /// Batches of each operation
    #[arg(long, value_name = "N", default_value_t = 21)]
    batches: usize,
    /// Requests to each server in each round
    #[arg(long, value_name = "N", default_value_t = 2000)]
    requests: u32,
    /// Rounds of requests
    #[arg(long, value_name = "N", default_value_t = 3)]
    rounds: usize,
    /// Also list the BPF programs that each operation of a tracked process runs
    #[arg(long)]
    programs: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// Whether something of this name is to be measured.
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == name)
    }
}

/// Time for one step on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(1200);

/// Where the agent runs, to know what it uses.
const AGENT_CGROUP: &str = "/sys/fs/cgroup/agent";

/// The agent's hook sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
enum Hooks {
    Fentry,
    Fallback,
}

impl Hooks {
    fn name(self) -> &'static str {
        match self {
            Hooks::Fentry => "fentry",
            Hooks::Fallback => "fallback",
        }
    }
}

/// The application that is measured, by its name for `tracker run`. The agent
/// tracks the cgroup of only one of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Place {
    Outside,
    Inside,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Place::Outside => "outside",
            Place::Inside => "inside",
        }
    }

    fn cgroup(self) -> String {
        format!("/sys/fs/cgroup/tracker/{}", self.name())
    }

    /// A command as this application.
    fn run(self, command: &[&str]) -> Exec {
        let run = ["tracker", "run", "--name", self.name(), "--"];
        Exec::new([&run[..], command].concat()).timeout(PATIENCE)
    }
}

/// All measurements of one kernel.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    /// Without an agent.
    without: Vec<Cost>,
    /// The same once more, after everything else: how well a run repeats.
    again: Vec<Cost>,
    sets: Vec<SetReport>,
}

/// Measurements with an agent that uses one hook set.
#[derive(Debug, Serialize)]
struct SetReport {
    hooks: Hooks,
    /// With the same hooks, but programs that return at once, and no agent: what no hook can
    /// cost less than.
    idle: Vec<Cost>,
    untracked: Vec<Cost>,
    tracked: Vec<Cost>,
    /// The tracked operations again, with the statistics of BPF programs on.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    programs: Vec<Cost>,
}

/// Returns the exit code.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if let Some(unknown) = arguments
        .only
        .iter()
        .find(|name| !NAMES.contains(&name.as_str()) && !servers::names().any(|n| n == *name))
    {
        let names: Vec<&str> = NAMES.iter().copied().chain(servers::names()).collect();
        bail!("Nothing is named {unknown}; there are {}", names.join(", "));
    }
    setup::for_vm()?;
    let kernels = Kernel::ALL
        .into_iter()
        .filter(|&kernel| arguments.kernel.is_none_or(|only| only == kernel));
    let mut reports = Vec::new();
    for kernel in kernels {
        let report = measure(arguments, kernel).with_context(|| format!("Linux {kernel}"))?;
        if !arguments.json {
            print!("{}", table::text(&report)?);
        }
        reports.push(report);
    }
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&reports)?);
    }
    Ok(0)
}

fn measure(arguments: &Arguments, kernel: Kernel) -> Result<Report> {
    let vm = Vm::builder(workspace())
        .kernel(kernel)
        .icount(true)
        .profile(Profile::Release)
        // Where things lie changes what they cost, a little.
        .append("nokaslr")
        .append("norandmaps")
        .quiet(arguments.json)
        .start()?;
    // The first `tracker run` enables the controllers, which makes much dearer; the cgroups
    // are to be there when the agent starts.
    for place in [Place::Outside, Place::Inside] {
        vm.exec(place.run(&["true"]))?.check()?;
    }
    vm.sh(&format!("mkdir {AGENT_CGROUP}"))?.check()?;
    let bench = Bench { vm: &vm, arguments };
    let without = bench.costs(Place::Outside, "no agent", false)?;
    let mut sets = Vec::new();
    for hooks in [Hooks::Fentry, Hooks::Fallback] {
        if arguments.hooks.is_none_or(|only| only == hooks) {
            sets.push(
                bench
                    .with_agent(hooks)
                    .with_context(|| format!("Hooks {}", hooks.name()))?,
            );
        }
    }
    Ok(Report {
        kernel: vm.hello().release,
        without,
        again: bench.costs(Place::Outside, "no agent", false)?,
        sets,
    })
}

/// A VM and what is to be measured in it.
struct Bench<'a> {
    vm: &'a Vm,
    arguments: &'a Arguments,
}

impl Bench<'_> {
    fn with_agent(&self, hooks: Hooks) -> Result<SetReport> {
        let idle = self.with_idle_hooks(hooks)?;
        let agent = self.start_agent(hooks)?;
        let whose = format!("agent with {}", hooks.name());
        let untracked = self.costs(Place::Outside, &whose, true)?;
        let tracked = self.costs(Place::Inside, &whose, true)?;
        let programs = match self.arguments.programs {
            true => self.program_runs()?,
            false => Vec::new(),
        };
        self.stop(agent)?;
        Ok(SetReport {
            hooks,
            idle,
            untracked,
            tracked,
            programs,
        })
    }

    fn with_idle_hooks(&self, hooks: Hooks) -> Result<Vec<Cost>> {
        let program = format!("{TESTS_DIR}/iter_check");
        let log = "/root/idle-hooks.log";
        let command = Exec::new([&program, "--idle-hooks", hooks.name()]);
        let pid = self.vm.spawn(command, Some(log))?;
        let attached = format!("grep -q attached {log}");
        self.await_that(&attached)
            .with_context(|| self.said("iter_check", log))?;
        let whose = format!("idle hooks of {}", hooks.name());
        let costs = self.costs(Place::Outside, &whose, false)?;
        self.stop(pid)?;
        Ok(costs)
    }

    /// Waits until a command succeeds.
    fn await_that(&self, command: &str) -> Result<()> {
        let script = format!(
            "for i in $(seq 300); do {command} >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1"
        );
        let shell = Exec::new(["sh", "-c", &script]).timeout(PATIENCE);
        self.vm.exec(shell)?.check().map(drop)
    }

    /// What a spawned program has said.
    fn said(&self, program: &str, log: &str) -> String {
        let said = self.vm.read_file(log).unwrap_or_default();
        format!("{program}: {}", String::from_utf8_lossy(&said))
    }

    /// `beside`: what else runs, for who looks on.
    fn costs(&self, place: Place, beside: &str, agent: bool) -> Result<Vec<Cost>> {
        self.say(&format!("{beside}, {}", place.name()));
        let mut costs = self.operations(place, agent, &[])?;
        if !self.arguments.no_servers {
            costs.extend(servers::costs(self, place, agent)?);
        }
        Ok(costs)
    }

    fn say(&self, what: &str) {
        if !self.arguments.json {
            eprintln!("measuring: {what}");
        }
    }

    /// Runs the guest program `ops`.
    fn operations(&self, place: Place, agent: bool, more: &[&str]) -> Result<Vec<Cost>> {
        let chosen: Vec<&str> = NAMES
            .iter()
            .copied()
            .filter(|name| self.arguments.wants(name))
            .collect();
        if chosen.is_empty() {
            return Ok(Vec::new());
        }
        let program = format!("{TESTS_DIR}/ops");
        let batches = self.arguments.batches.to_string();
        let stat = format!("{AGENT_CGROUP}/cpu.stat");
        let mut command = vec![program.as_str(), "--batches", &batches];
        if agent {
            command.extend(["--agent", &stat]);
        }
        command.extend(more);
        command.extend(chosen);
        let output = self.vm.exec(place.run(&command))?.check()?;
        serde_json::from_slice(&output.stdout).with_context(|| output.text())
    }

    fn program_runs(&self) -> Result<Vec<Cost>> {
        let switch = "/proc/sys/kernel/bpf_stats_enabled";
        self.vm.write_file(switch, b"1")?;
        let costs = self.operations(Place::Inside, false, &["--programs"]);
        self.vm.write_file(switch, b"0")?;
        costs
    }

    fn start_agent(&self, hooks: Hooks) -> Result<i32> {
        let script = "echo $$ >\"$1/cgroup.procs\"; \
                      exec tracker agent --cgroup \"$2\" --hooks \"$3\"";
        let tracked = Place::Inside.cgroup();
        let command = [
            "sh",
            "-c",
            script,
            "sh",
            AGENT_CGROUP,
            &tracked,
            hooks.name(),
        ];
        let log = "/root/agent.log";
        let pid = self.vm.spawn(Exec::new(command), Some(log))?;
        self.await_that("tracker status")
            .with_context(|| self.said("tracker agent", log))?;
        // What it does once is not what tracking costs.
        apps::await_spare(self.vm)?;
        let status = self
            .vm
            .exec(Exec::new(["tracker", "status", "--json"]))?
            .check()?;
        let status: serde_json::Value = serde_json::from_slice(&status.stdout)?;
        ensure!(
            status["hooks"] == hooks.name(),
            "The agent uses the hooks {}",
            status["hooks"]
        );
        Ok(pid)
    }

    /// Ends a process that was spawned.
    fn stop(&self, pid: i32) -> Result<()> {
        self.vm.kill(pid, libc::SIGTERM)?;
        ensure!(
            self.vm.wait(pid, PATIENCE)?.is_some(),
            "Process {pid} did not end"
        );
        Ok(())
    }
}
