//! `tracker audit`.

use super::agent::SocketArgs;
use crate::agent::client::{self, ClientError};
use crate::error::ExitCode;
use crate::track::audit::{Difference, Report};
use clap::Args;
use comfy_table::{Table, presets};

/// Arguments of `tracker audit`.
#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(flatten)]
    agent: SocketArgs,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent compare its model with /proc and prints what differs.
///
/// # Errors
///
/// There is no agent, or it failed.
pub fn run(args: &AuditArgs) -> Result<ExitCode, ClientError> {
    let report = client::audit(&args.agent.socket)?;
    if args.json {
        super::print_json(&report);
    } else {
        print(&report);
    }
    Ok(if report.differences.is_empty() {
        ExitCode::Done
    } else {
        ExitCode::Difference
    })
}

fn print(report: &Report) {
    let compared = &report.compared;
    let counts = [
        (compared.processes, "processes"),
        (compared.threads, "threads"),
        (compared.credentials, "sets of credentials"),
        (compared.directories, "sets of directories"),
        (compared.descriptors, "descriptors"),
        (compared.names, "names of files"),
        (compared.sockets, "sockets"),
        (compared.epoll_items, "epoll items"),
        (compared.watches, "inotify watches"),
        (compared.watched_paths, "paths of them"),
        (compared.address_spaces, "address spaces"),
        (compared.mappings, "mappings"),
    ];
    let counts = counts.map(|(count, what)| format!("{count} {what}"));
    println!("Compared {}", counts.join(", "));
    table("Differences", &report.differences);
    table("Changing while they were compared", &report.unstable);
    if report.differences.is_empty() {
        println!("The model is as the kernel has it");
    }
}

fn table(title: &str, differences: &[Difference]) {
    if differences.is_empty() {
        return;
    }
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_header(["PID", "OBJECT", "MODEL", "KERNEL"]);
    for d in differences {
        table.add_row([&d.pid.to_string(), &d.object, &d.model, &d.kernel]);
    }
    println!("{title}:\n{table}");
}
