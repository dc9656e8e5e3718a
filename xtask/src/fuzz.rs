//! `cargo xtask fuzz`: hostile input for what decodes records and images.
//!
//! libFuzzer with the stable compiler: its coverage instrumentation is a pass of LLVM that needs
//! no nightly flag, and libfuzzer-sys brings the engine, which takes a C++ compiler.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::{shell, workspace};

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub struct Arguments {
    /// How long each target runs
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only these: events, image
    targets: Vec<String>,
}

const TARGETS: [&str; 2] = ["events", "image"];
const TRIPLE: &str = "x86_64-unknown-linux-gnu";
/// The passes cargo-fuzz asks for, without a sanitizer: those need a nightly compiler.
const FLAGS: &str = "--cfg fuzzing -Cdebug-assertions -Coverflow-checks -Ccodegen-units=1 \
     -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
     -Cllvm-args=-sanitizer-coverage-pc-table \
     -Cllvm-args=-sanitizer-coverage-trace-compares";
/// More than a decoder may use on an input of the largest size, in megabytes.
const MEMORY: u32 = 512;
const LONGEST_INPUT: u32 = 16 << 10;

/// Runs each target; what breaks one is left in `fuzz/artifacts`.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let chosen: Vec<&str> = match &arguments.targets[..] {
        [] => TARGETS.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    if let Some(unknown) = chosen.iter().find(|name| !TARGETS.contains(name)) {
        bail!(
            "There is no fuzz target {unknown}; there are {}",
            TARGETS.join(" and ")
        );
    }
    let fuzz = workspace().join("fuzz");
    // Dependencies and build scripts are those of the workspace, built once.
    let target = workspace().join("target");
    let cargo = |arguments: &[&str]| {
        let mut command = Command::new("cargo");
        command.args(arguments).env("CARGO_TARGET_DIR", &target);
        command.current_dir(&fuzz);
        command
    };
    let corpus = fuzz.join("corpus");
    shell::run(cargo(&["run", "--locked", "--bin", "seeds", "--"]).arg(&corpus))?;
    let bins = TARGETS.iter().flat_map(|name| ["--bin", name]);
    let mut build = cargo(&["build", "--locked", "--target", TRIPLE]);
    shell::run(build.args(bins).env("RUSTFLAGS", FLAGS))?;
    let programs = target.join(TRIPLE).join("debug");
    for name in chosen {
        println!("\n=== {name}");
        fuzz_one(&programs.join(name), &fuzz, name, arguments.seconds)?;
    }
    Ok(0)
}

fn fuzz_one(program: &Path, fuzz: &Path, name: &str, seconds: u32) -> Result<()> {
    let corpus = fuzz.join("corpus").join(name);
    let artifacts = fuzz.join("artifacts").join(name);
    for dir in [&corpus, &artifacts] {
        std::fs::create_dir_all(dir).with_context(|| format!("Create {}", dir.display()))?;
    }
    let mut command = Command::new(program);
    command
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={LONGEST_INPUT}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg(format!("-artifact_prefix={}/", artifacts.display()))
        .args(["-timeout=10", "-print_final_stats=1"])
        .arg(&corpus);
    shell::run(&mut command)
        .with_context(|| format!("An input in {} breaks {name}", artifacts.display()))
}
