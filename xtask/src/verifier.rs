//! `cargo xtask verifier`: what each kernel makes of the BPF programs.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Args;
use vmtests::image::Kernel;
use vmtests::payload::{self, Profile};
use vmtests::vm::{Exec, Vm};

use crate::{setup, shell, workspace};

/// Options of `cargo xtask verifier`.
#[derive(Args)]
pub struct Arguments {
    /// Also on this machine's kernel (needs root)
    #[arg(long)]
    host: bool,
    /// Print what libbpf and the verifier say, too
    #[arg(long)]
    log: bool,
}

/// Prints the table of every kernel; returns 1 if one of them refused a program. This machine's
/// kernel is shown and not judged.
pub fn run(arguments: &Arguments) -> Result<u8> {
    setup::for_vm()?;
    let mut tracker = vec!["tracker"];
    if arguments.log {
        tracker.push("-vvv");
    }
    tracker.extend(["check", "--programs"]);
    if arguments.host {
        on_host(&tracker)?;
    }
    let mut refused = false;
    for kernel in Kernel::ALL {
        let vm = Vm::builder(workspace())
            .kernel(kernel)
            .quiet(true)
            .start()?;
        let check = Exec::new(tracker.iter().copied()).timeout(Duration::from_secs(300));
        let output = vm.exec(check)?;
        println!("\n{}", vm.hello().release);
        print!("{}{}", output.error_text(), output.text());
        ensure!(
            output.code().is_some(),
            "tracker check --programs on {kernel}: {}",
            output.status
        );
        refused |= !output.success();
    }
    Ok(u8::from(refused))
}

fn on_host(command: &[&str]) -> Result<()> {
    payload::build(&workspace(), Profile::Dev)?;
    let program = Profile::Dev.directory(&workspace()).join(command[0]);
    println!("This machine");
    let program = program
        .to_str()
        .context("The workspace's path is not UTF-8")?;
    shell::privileged(program)
        .args(&command[1..])
        .stdin(Stdio::null())
        .status()
        .context("Run tracker check --programs")?;
    Ok(())
}
