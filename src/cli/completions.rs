//! `tracker completions`: shell completion scripts.

use crate::error::ExitCode;
use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// Arguments of `tracker completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

/// Prints the script to stdout.
pub fn run(args: &CompletionsArgs) -> ExitCode {
    let mut command = super::Cli::command();
    clap_complete::generate(args.shell, &mut command, "tracker", &mut std::io::stdout());
    ExitCode::Done
}
