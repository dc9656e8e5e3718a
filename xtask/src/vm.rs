//! `cargo xtask vm`: a VM with the programs of this worktree.

use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use vmtests::image::Kernel;
use vmtests::payload::Profile;
use vmtests::protocol::Status;
use vmtests::vm::{Exec, Outcome, Vm};

use crate::{setup, workspace};

/// Options of `cargo xtask vm`.
#[derive(Args)]
pub struct Arguments {
    /// The kernel to boot: 6.1 or 6.12
    #[arg(long, default_value = "6.1")]
    kernel: Kernel,
    /// Run this in the guest's sh, print its output and end with its exit code
    #[arg(long, value_name = "COMMAND", conflicts_with = "script")]
    exec: Option<String>,
    /// The same with a script from a file
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// The command leads to a kexec: run this afterwards
    #[arg(long, value_name = "COMMAND")]
    after_kexec: Option<String>,
    /// Seconds the command may take
    #[arg(long, default_value_t = 300)]
    timeout: u64,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 3072)]
    mem: u32,
    /// Number of virtual CPUs
    #[arg(long, default_value_t = 2)]
    smp: u32,
    /// Count instructions instead of time (one CPU)
    #[arg(long)]
    icount: bool,
    /// No memory set aside as /dev/pmem0
    #[arg(long)]
    no_pmem: bool,
    /// Add a word to the kernel command line
    #[arg(long, value_name = "WORD")]
    append: Vec<String>,
    /// Forward a TCP port of the guest to a free loopback port
    #[arg(long, value_name = "PORT")]
    forward: Vec<u16>,
    /// Copy a file into the guest first
    #[arg(long, value_name = "HOST:GUEST")]
    push: Vec<String>,
    /// Programs compiled for release, as benchmarks have them
    #[arg(long)]
    release: bool,
    /// Keep the VM's files (console log)
    #[arg(long)]
    keep: bool,
}

/// Returns the exit code.
pub fn run(arguments: &Arguments) -> Result<u8> {
    setup::for_vm()?;
    let script = match &arguments.script {
        Some(path) => Some(
            std::fs::read_to_string(path).with_context(|| format!("Read {}", path.display()))?,
        ),
        None => arguments.exec.clone(),
    };
    let mut builder = Vm::builder(workspace())
        .kernel(arguments.kernel)
        .memory_mib(arguments.mem)
        .cpus(arguments.smp)
        .icount(arguments.icount)
        .interactive(script.is_none())
        .keep(arguments.keep);
    if arguments.release {
        builder = builder.profile(Profile::Release);
    }
    if arguments.no_pmem {
        builder = builder.reserved(None);
    }
    for word in &arguments.append {
        builder = builder.append(word);
    }
    for &port in &arguments.forward {
        builder = builder.forward(port);
    }
    let vm = builder.start()?;
    for port in &arguments.forward {
        eprintln!("vm: guest port {port} is 127.0.0.1:{}", vm.port(*port));
    }
    for pair in &arguments.push {
        let (from, to) = pair.split_once(':').context("--push wants HOST:GUEST")?;
        vm.push(from.as_ref(), to, 0o755)?;
    }
    let Some(script) = script else {
        eprintln!("vm: the VM ends with this shell; Ctrl-A X kills it");
        vm.wait_for_end()?;
        return Ok(0);
    };
    let timeout = Duration::from_secs(arguments.timeout);
    let command = |script: &str| Exec::new(["sh", "-c", script]).timeout(timeout);
    let output = match &arguments.after_kexec {
        None => vm.exec(command(&script))?,
        Some(after) => match vm.exec_or_reboot(command(&script))? {
            Outcome::Exited(output) => output,
            Outcome::Rebooted(hello) => {
                eprintln!("vm: now on {}", hello.release);
                vm.exec(command(after))?
            }
        },
    };
    std::io::stdout().write_all(&output.stdout)?;
    std::io::stderr().write_all(&output.stderr)?;
    match output.status {
        Status::Exited(code) => Ok(u8::try_from(code).unwrap_or(1)),
        status => {
            eprintln!("vm: {status}");
            Ok(1)
        }
    }
}
