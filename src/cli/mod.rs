//! The command line: one file per subcommand.

mod agent;
mod audit;
mod check;
mod checkpoint;
mod completions;
mod inspect;
mod programs;
mod restore;
mod run;
mod status;
mod update;

use crate::error::{ExitCode, HasExitCode};
use clap::{Parser, Subcommand};
use std::error::Error;

/// Update the Linux kernel under running applications
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    /// Say more on stderr (-vv for everything)
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

const EXIT_CODES: &str = "Exit codes: 0 done, 1 difference found or application failed, 2 usage, \
3 not eligible, 4 kernel lacks a feature or a capability is missing, 5 image invalid, \
6 aborted and rolled back, 7 restore failed.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Start an application in a cgroup of its own, or wait for one that was resumed
    Run(run::RunArgs),
    /// Keep the model of all applications, and answer for it
    Agent(agent::AgentArgs),
    /// Compare the agent's model with the kernel
    Audit(audit::AuditArgs),
    /// Show what the kernel can do for tracker
    Check(check::CheckArgs),
    /// Show what the agent tracks
    Status(status::StatusArgs),
    /// Freeze an application into an image
    Checkpoint(checkpoint::CheckpointArgs),
    /// Boot the next kernel under the running applications
    Update(update::UpdateArgs),
    /// Restore an application from an image
    Restore(restore::RestoreArgs),
    /// Print what an image holds
    Inspect(inspect::InspectArgs),
    /// Print a completion script for a shell
    Completions(completions::CompletionsArgs),
}

/// Why a command failed, with the code the process ends with.
#[derive(Debug)]
pub struct Failure {
    code: ExitCode,
    error: Box<dyn Error>,
}

impl<E: Error + HasExitCode + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self {
            code: error.exit_code(),
            error: Box::new(error),
        }
    }
}

/// Parses the command line, runs the command and reports its error.
#[must_use]
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    init_logging(cli.verbose);
    match run(cli.command) {
        Ok(code) => code,
        Err(failure) => {
            eprintln!("tracker: {}", chain(failure.error.as_ref()));
            failure.code
        }
    }
}

fn run(command: Command) -> Result<ExitCode, Failure> {
    match command {
        Command::Run(args) => Ok(run::run(&args)?),
        Command::Agent(args) => Ok(agent::run(args)?),
        Command::Audit(args) => Ok(audit::run(&args)?),
        Command::Check(args) => Ok(check::run(&args)?),
        Command::Status(args) => Ok(status::run(&args)?),
        Command::Update(args) => Ok(update::run(&args)?),
        Command::Restore(args) => Ok(restore::run(&args)?),
        Command::Checkpoint(args) => Ok(checkpoint::run(&args)?),
        Command::Inspect(args) => Ok(inspect::run(&args)?),
        Command::Completions(args) => Ok(completions::run(&args)),
    }
}

/// Prints a value for machines.
fn print_json(value: &impl serde::Serialize) {
    match serde_json::to_string_pretty(value) {
        Ok(text) => println!("{text}"),
        // Only a map with keys that are no strings could fail, which none of ours has.
        Err(error) => eprintln!("tracker: {error}"),
    }
}

/// An error and its sources on one line; a source already told is not repeated.
fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let message = inner.to_string();
        if !text.contains(&message) {
            text.push_str(": ");
            text.push_str(&message);
        }
        source = inner.source();
    }
    text
}

fn init_logging(verbose: u8) {
    use tracing_subscriber::EnvFilter;
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_target(false)
        .init();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}
