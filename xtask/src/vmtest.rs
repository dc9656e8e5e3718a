//! `cargo xtask vmtest`: cases and scenarios on real kernels.

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};
use vmtests::image::Kernel;
use vmtests::suite::{self, Mode, Options, Totals};

use crate::{setup, workspace};

/// Options of `cargo xtask vmtest`.
#[derive(Args)]
pub struct Arguments {
    /// The kernel to boot first
    #[arg(long, value_enum, default_value = "all")]
    kernel: KernelChoice,
    /// What happens to the cases
    #[arg(long, value_enum, default_value = "all")]
    mode: ModeChoice,
    /// Keep the files of all VMs (those of failed tests are kept anyway)
    #[arg(long)]
    keep: bool,
    /// Only what `cargo xtask test` runs
    #[arg(long)]
    brief: bool,
    /// Print the names of the tests and run none
    #[arg(long)]
    list: bool,
    /// How many VMs at a time
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Only tests whose name contains this, e.g. "same/6.1/pipe"
    filter: Option<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum KernelChoice {
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
    All,
}

#[derive(Clone, Copy, ValueEnum)]
enum ModeChoice {
    /// The case alone: no checkpoint
    Plain,
    /// Checkpoint and restore on one kernel, and refusals
    Same,
    /// One update from 6.1 to 6.12 with all of them
    Kexec,
    /// A checkpoint that leaves the case running, a restore, and both again
    Again,
    /// Scenarios, driven from the host
    Scenario,
    /// All of these
    All,
}

/// Returns the exit code.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let options = Options {
        workspace: workspace(),
        kernels: match arguments.kernel {
            KernelChoice::V6_1 => vec![Kernel::V6_1],
            KernelChoice::V6_12 => vec![Kernel::V6_12],
            KernelChoice::All => Kernel::ALL.to_vec(),
        },
        modes: match arguments.mode {
            ModeChoice::Plain => vec![Mode::Plain],
            ModeChoice::Same => vec![Mode::Same],
            ModeChoice::Kexec => vec![Mode::Kexec],
            ModeChoice::Again => vec![Mode::Again],
            ModeChoice::Scenario => vec![Mode::Scenario],
            ModeChoice::All => Mode::ALL.to_vec(),
        },
        filter: arguments.filter.clone(),
        keep: arguments.keep,
        brief: arguments.brief,
        jobs: arguments.jobs,
    };
    if arguments.list {
        for name in suite::list(&options) {
            println!("{name}");
        }
        return Ok(0);
    }
    if suite::list(&options).is_empty() {
        bail!("No test has such a name; see --list");
    }
    setup::for_vm()?;
    let Totals { passed, failed } = suite::run(&options);
    println!("\n{passed} passed, {failed} failed");
    Ok(u8::from(failed > 0))
}
