//! `tracker status`.

use super::agent::SocketArgs;
use crate::agent::client::{self, ClientError};
use crate::agent::status::Status;
use crate::error::{ExitCode, HasExitCode};
use crate::handover::report::{ApplicationStatus, Status as UpdateStatus, UpdateReport};
use clap::Args;
use comfy_table::{Table, presets};
use std::collections::BTreeMap;
use std::thread;
use std::time::Duration;

/// Arguments of `tracker status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Only this application: its name, or the PID of a process
    #[arg(value_name = "NAME|PID")]
    application: Option<String>,
    #[command(flatten)]
    agent: SocketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Print again every second
    #[arg(long)]
    watch: bool,
}

/// The status cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum StatusError {
    /// The agent.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The application.
    #[error("No application or process {0} is tracked; see `tracker status`")]
    Unknown(String),
}

impl HasExitCode for StatusError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Client(error) => error.exit_code(),
            Self::Unknown(_) => ExitCode::Usage,
        }
    }
}

/// Prints what the agent tracks and how it is.
///
/// # Errors
///
/// There is no agent, or it does not track what was named.
pub fn run(args: &StatusArgs) -> Result<ExitCode, StatusError> {
    loop {
        let mut status = client::status(&args.agent.socket)?;
        if let Some(wanted) = &args.application {
            let pid = wanted.parse().ok();
            status.applications.retain(|application| {
                let holds = |pid: i32| application.pids.iter().any(|member| member.0 == pid);
                application.name == *wanted || pid.is_some_and(holds)
            });
            if status.applications.is_empty() {
                return Err(StatusError::Unknown(wanted.clone()));
            }
        }
        if args.watch && !args.json {
            // Clear the screen, cursor to the top.
            print!("\x1b[2J\x1b[H");
        }
        if args.json {
            super::print_json(&status);
        } else {
            print(&status);
        }
        if !args.watch {
            return Ok(ExitCode::Done);
        }
        thread::sleep(Duration::from_secs(1));
    }
}

fn print(status: &Status) {
    let set = serde_json::to_string(&status.hooks).unwrap_or_default();
    let counters = &status.counters;
    println!(
        "Hooks {}, {} events applied, {} behind, {} readings",
        set.trim_matches('"'),
        counters.events,
        status.lag,
        counters.readings
    );
    let agent = &status.agent;
    println!(
        "Agent {}: {:.1} s of CPU, {} MiB",
        agent.pid,
        agent.cpu_seconds,
        agent.resident_bytes >> 20
    );
    let spare = &status.spare_iterators;
    println!(
        "Spare iterators: {}, lent {} times",
        spare.state, spare.lent
    );
    println!("Lost: {}", list(&counters.lost));
    println!("Suspect: {}", list(&status.suspects));
    if counters.malformed + counters.gaps > 0 {
        println!(
            "Malformed: {}, missing: {}",
            counters.malformed, counters.gaps
        );
    }
    if status.recursion_misses() > 0 {
        let misses = status.programs.iter();
        let misses = misses.map(|one| (one.name.clone(), one.recursion_misses));
        println!("Missed by programs: {}", list(&misses.collect()));
    }
    let mut table = Table::new();
    table.load_preset(presets::NOTHING).set_header([
        "APPLICATION",
        "PIDS",
        "THREADS",
        "FDS",
        "SOCKETS",
        "EPOLL ITEMS",
        "MAPPINGS",
        "OPEN FILES",
    ]);
    for application in &status.applications {
        let sizes = &application.sizes;
        let pids: Vec<String> = application
            .pids
            .iter()
            .take(4)
            .map(ToString::to_string)
            .collect();
        let more = application.pids.len().saturating_sub(pids.len());
        let more = if more > 0 {
            format!(" +{more}")
        } else {
            String::new()
        };
        table.add_row([
            application.name.clone(),
            format!("{}{more}", pids.join(" ")),
            sizes.threads.to_string(),
            sizes.descriptors.to_string(),
            sizes.sockets.to_string(),
            sizes.epoll_items.to_string(),
            sizes.mappings.to_string(),
            list(&sizes.kinds),
        ]);
    }
    println!("{table}");
    if let Some(audit) = &status.last_audit {
        println!(
            "Last audit: {} differences in {} descriptors and what belongs to them",
            audit.differences, audit.descriptors
        );
    }
    if let Some(report) = &status.last_update {
        print_update(report);
    }
}

/// What the update that started this kernel did, and all that went wrong in it.
fn print_update(report: &UpdateReport) {
    let milliseconds = |nanoseconds: u64| nanoseconds / 1_000_000;
    let word = match report.status {
        UpdateStatus::Done => "done",
        UpdateStatus::Partial => "PARTIAL",
        UpdateStatus::Failed => "FAILED",
    };
    println!(
        "Last update: {word}, {} to {}, applications stood still for {} ms \
         ({} until kexec, {} boot, {} restore)",
        report.kernel_before,
        report.kernel_after,
        milliseconds(report.total),
        milliseconds(report.frozen_until_kexec),
        milliseconds(report.boot),
        milliseconds(report.restore),
    );
    for app in &report.applications {
        if let Some(error) = &app.error {
            let what = match app.status {
                ApplicationStatus::Restored => "restored",
                ApplicationStatus::Restarted => "started afresh",
                ApplicationStatus::Failed => "not running",
            };
            println!("  {}: {what}: {error}", app.name);
        }
    }
    for warning in &report.warnings {
        println!("  {warning}");
    }
}

/// `12 socket, 3 pipe`, without what is zero.
fn list(counts: &BTreeMap<String, u64>) -> String {
    let counts = counts.iter().filter(|(_, count)| **count > 0);
    let text: Vec<String> = counts
        .map(|(name, count)| format!("{count} {name}"))
        .collect();
    if text.is_empty() {
        "nothing".to_owned()
    } else {
        text.join(", ")
    }
}
