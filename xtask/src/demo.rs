//! `cargo xtask demo`: a kernel update under redis and memcached, with
//! clients connected all the time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde::Deserialize;
use vmtests::apps;
use vmtests::image::Kernel;
use vmtests::load::{Load, Summary};
use vmtests::vm::{Exec, Outcome, Vm};

use crate::{setup, workspace};

/// Options of `cargo xtask demo`.
#[derive(Args)]
pub struct Arguments {
    /// Connections to redis
    #[arg(long, default_value_t = 40)]
    redis_clients: usize,
    /// Connections to memcached
    #[arg(long, default_value_t = 10)]
    memcached_clients: usize,
    /// Megabytes of data in redis
    #[arg(long, value_name = "MB", default_value_t = 200)]
    data: usize,
    /// Keep the VM's files (console log)
    #[arg(long)]
    keep: bool,
}

/// Time for one step on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(300);

/// Time for the update as a whole.
const UPDATE: Duration = Duration::from_secs(600);

/// The guest's file about its last update.
const RECORD: &str = "/run/tracker/update.json";

const APPLICATIONS: [&str; 2] = ["redis", "memcached"];

/// Returns the exit code: 0 if no connection and no acknowledged write is
/// lost and every process is the one it was.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let begun = Instant::now();
    let step = |text: &str| println!("[{:6.1} s] {text}", begun.elapsed().as_secs_f32());
    step("Setting up and building");
    setup::for_vm()?;
    let (from, to) = (Kernel::V6_1, Kernel::V6_12);
    let builder = Vm::builder(workspace())
        .kernel(from)
        .quiet(true)
        .keep(arguments.keep);
    let mut vm = apps::forwarded(builder).start()?;
    step(&format!("Booted Linux {} in a VM", vm.hello().release));
    let result = show(arguments, &vm, to, &step);
    if result.is_err() {
        vm.keep_files();
    }
    result
}

fn show(arguments: &Arguments, vm: &Vm, to: Kernel, step: &dyn Fn(&str)) -> Result<u8> {
    apps::start_agent(vm)?;
    apps::start_redis(vm, arguments.data)?;
    apps::start_memcached(vm)?;
    step(&format!(
        "Started tracker agent, redis with {} MB and memcached",
        arguments.data
    ));
    let clients = (arguments.redis_clients, arguments.memcached_clients);
    let load = Load::start(&apps::targets(vm, clients.0, clients.1))?;
    load.progress(20, PATIENCE).context("Before the update")?;
    let usual_gap = load.take_longest_gap();
    step(&format!(
        "{} clients of redis and {} of memcached write, read and check",
        clients.0, clients.1
    ));
    println!("\n$ tracker status");
    print!(
        "{}",
        vm.exec(Exec::new(["tracker", "status"]))?.check()?.text()
    );

    let before = State::read(vm)?;
    let (kernel, initrd) = (to.guest_vmlinuz()?, to.guest_initrd()?);
    println!("\n$ tracker update --kernel {kernel} --initrd {initrd}");
    let update = [
        "tracker", "update", "--kernel", &kernel, "--initrd", &initrd,
    ];
    let asked = Instant::now();
    match vm.exec_or_reboot(Exec::new(update).timeout(UPDATE))? {
        Outcome::Rebooted(_) => {}
        Outcome::Exited(output) => {
            let summary = load.finish();
            bail!(
                "tracker update: {}\n{}{}\n{} of {} connections were lost meanwhile",
                output.status,
                output.text(),
                output.error_text(),
                summary.lost.len(),
                summary.connections
            );
        }
    }
    let took = asked.elapsed();
    step(&format!("Linux {} says hello", vm.hello().release));
    load.progress(50, PATIENCE).context("After the update")?;
    let after = State::read(vm);
    let gap = load.take_longest_gap();
    step("All clients have gone on for a while; reading everything back");
    let summary = load.finish();
    let data = apps::check_redis_data(vm, arguments.data);
    let after = after?;

    println!();
    line("Kernel before", &before.kernel);
    line("Kernel after", &after.kernel);
    for (i, name) in APPLICATIONS.into_iter().enumerate() {
        line(&format!("PIDs of {name} before"), &list(&before.pids[i]));
        line(&format!("PIDs of {name} after"), &list(&after.pids[i]));
    }
    print_summary(&summary);
    line(
        "Data loaded before",
        &data
            .as_ref()
            .map_or_else(|error| format!("{error:#}"), |()| "intact".to_owned()),
    );
    line("Longest gap before", &seconds(usual_gap));
    line(
        "Longest gap seen by a client",
        &seconds(gap.max(summary.longest_gap)),
    );
    line("Command to the next kernel's hello", &seconds(took));
    let recorded = print_record(vm);
    if let Err(error) = &recorded {
        println!("{error:#}");
    }

    let same = before.pids == after.pids;
    let updated = after.kernel == to.release()?;
    ensure!(updated, "The guest runs {}", after.kernel);
    let good = summary.clean() && same && data.is_ok() && recorded.is_ok_and(|done| done);
    println!("\n{}", if good { "Nothing was lost." } else { "FAILED" });
    Ok(u8::from(!good))
}

/// What must be the same afterwards, and what must not.
struct State {
    kernel: String,
    pids: Vec<Vec<u32>>,
}

impl State {
    fn read(vm: &Vm) -> Result<State> {
        let kernel = vm.exec(Exec::new(["uname", "-r"]))?.check()?.text();
        let pids = APPLICATIONS.iter().map(|name| apps::pids(vm, name));
        Ok(State {
            kernel: kernel.trim().to_owned(),
            pids: pids.collect::<Result<_>>()?,
        })
    }
}

fn line(name: &str, value: &str) {
    println!("{name:<36} {value}");
}

fn list(pids: &[u32]) -> String {
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    pids.join(" ")
}

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

fn print_summary(summary: &Summary) {
    let kept = summary.connections - summary.lost.len();
    line("Connections kept", &kept.to_string());
    line(
        "Connections reset or closed",
        &summary.lost.len().to_string(),
    );
    line("Requests answered", &summary.answers.to_string());
    line("Writes acknowledged", &summary.acknowledged.to_string());
    line("Wrong answers", &summary.wrong.len().to_string());
    line(
        "Acknowledged writes lost",
        &summary.missing.len().to_string(),
    );
    let all = [&summary.lost, &summary.wrong, &summary.missing];
    for text in all.into_iter().flatten().take(20) {
        println!("    {text}");
    }
}

/// What the update itself has recorded; durations in nanoseconds.
#[derive(Debug, Deserialize)]
struct Record {
    status: String,
    timeline: Vec<Milestone>,
    frozen_until_kexec: u64,
    boot: u64,
    restore: u64,
    total: u64,
    verification: Option<Verification>,
    warnings: Vec<String>,
}

/// How the agent's model compared with the frozen applications.
#[derive(Debug, Deserialize)]
struct Verification {
    objects: u64,
    differing: u64,
    suspect: u64,
}

#[derive(Debug, Deserialize)]
struct Milestone {
    step: String,
    at: u64,
}

/// Prints the update's record; false if it says that something failed.
fn print_record(vm: &Vm) -> Result<bool> {
    let text = vm
        .read_file(RECORD)
        .with_context(|| format!("The update left no {RECORD}"))?;
    let record: Record = serde_json::from_slice(&text)
        .with_context(|| format!("{RECORD}: {}", String::from_utf8_lossy(&text)))?;
    let nanoseconds = |time| seconds(Duration::from_nanos(time));
    line("Frozen time", &nanoseconds(record.total));
    line("  until kexec", &nanoseconds(record.frozen_until_kexec));
    line("  kexec and boot", &nanoseconds(record.boot));
    line("  restore", &nanoseconds(record.restore));
    if let Some(known) = &record.verification {
        line("Objects the agent knew", &known.objects.to_string());
        line("  of them otherwise", &known.differing.to_string());
        line("  of them suspect", &known.suspect.to_string());
    }
    line("The update's own verdict", &record.status);
    for warning in &record.warnings {
        println!("    {warning}");
    }
    println!("\nTimeline, from the first step:");
    let mut last = record.timeline.first().map_or(0, |first| first.at);
    let first = last;
    for milestone in &record.timeline {
        let since = |from: u64| Duration::from_nanos(milestone.at.saturating_sub(from));
        println!(
            "  {:>9.3} s  (+{:.3})  {}",
            since(first).as_secs_f64(),
            since(last).as_secs_f64(),
            milestone.step
        );
        last = milestone.at;
    }
    Ok(record.status == "done")
}
