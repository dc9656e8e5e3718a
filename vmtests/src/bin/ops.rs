//! Measures what system calls cost, and prints it as JSON.
//!
//! `ops [--batches N] [--agent CPU_STAT] [--programs] [OPERATION...]`: N
//! batches of each operation; CPU_STAT is the `cpu.stat` of the agent's cgroup;
//! `--programs` lists the BPF programs that ran (`kernel.bpf_stats_enabled`
//! must be set).

use anyhow::{Context, Result};
use vmtests::overhead::{Options, measure};

fn main() -> Result<()> {
    let mut options = Options {
        batches: 21,
        agent: None,
        programs: false,
        only: Vec::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || {
            arguments
                .next()
                .with_context(|| format!("{argument} what?"))
        };
        match argument.as_str() {
            "--batches" => options.batches = value()?.parse().context("--batches")?,
            "--agent" => options.agent = Some(value()?.into()),
            "--programs" => options.programs = true,
            _ => options.only.push(argument),
        }
    }
    println!("{}", serde_json::to_string(&measure(&options)?)?);
    Ok(())
}
