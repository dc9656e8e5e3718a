//! `cargo xtask test`: everything that must hold before a change lands.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use vmtests::image::Kernel;
use vmtests::suite::{self, Mode, Options, Totals};

use crate::{setup, shell, workspace};

/// Options of `cargo xtask test`.
#[derive(Args)]
pub struct Arguments {
    /// Leave out the tests in VMs
    #[arg(long)]
    no_vm: bool,
    /// Also run each case alone, and each scenario on both kernels: half as long again
    #[arg(long)]
    thorough: bool,
}

/// A step's outcome for the summary.
struct Row {
    name: &'static str,
    totals: Totals,
    seconds: f32,
}

/// Runs every step, whatever the earlier ones gave; returns the exit code.
pub fn run(arguments: &Arguments) -> Result<u8> {
    let mut rows = Vec::new();
    let mut step = |name: &'static str, run: &mut dyn FnMut() -> Result<Totals>| {
        println!("\n=== {name}");
        let begun = Instant::now();
        let totals = run().unwrap_or_else(|error| {
            println!("{name}: {error:#}");
            Totals {
                passed: 0,
                failed: 1,
            }
        });
        rows.push(Row {
            name,
            totals,
            seconds: begun.elapsed().as_secs_f32(),
        });
    };
    step("setup", &mut || {
        one(setup::run(&setup::Arguments::default()))
    });
    step("format", &mut || one(cargo(&["fmt", "--all", "--check"])));
    step("format of bpf/", &mut || one(clang_format()));
    step("clippy", &mut || {
        one(cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--",
            "--deny",
            "warnings",
        ]))
    });
    step("documentation", &mut || {
        let mut doc = Command::new("cargo");
        doc.args(["doc", "--workspace", "--no-deps"]);
        one(shell::run(
            doc.env("RUSTDOCFLAGS", "--deny warnings")
                .current_dir(workspace()),
        ))
    });
    step("dependencies", &mut || {
        cargo(&["fetch", "--locked"])?;
        one(cargo(&[
            "deny",
            "--offline",
            "check",
            "licenses",
            "bans",
            "sources",
        ]))
    });
    step("unprivileged tests", &mut unprivileged);
    if !arguments.no_vm {
        step("tests in VMs", &mut || Ok(in_vms(arguments.thorough)));
    }

    println!("\n=== summary");
    let mut sum = Totals::default();
    for Row {
        name,
        totals,
        seconds,
    } in rows
    {
        let Totals { passed, failed } = totals;
        println!("{name:<20} {passed:>4} passed {failed:>4} failed {seconds:>7.1} s");
        sum.passed += passed;
        sum.failed += failed;
    }
    println!("{} passed, {} failed", sum.passed, sum.failed);
    Ok(u8::from(sum.failed > 0))
}

/// A step that counts as one test.
fn one(result: Result<()>) -> Result<Totals> {
    result.map(|()| Totals {
        passed: 1,
        failed: 0,
    })
}

fn cargo(arguments: &[&str]) -> Result<()> {
    shell::run(
        Command::new("cargo")
            .args(arguments)
            .current_dir(workspace()),
    )
}

fn clang_format() -> Result<()> {
    let mut files: Vec<PathBuf> = Vec::new();
    let dir = workspace().join("bpf");
    for entry in std::fs::read_dir(&dir).with_context(|| format!("Read {}", dir.display()))? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "c" || extension == "h")
        {
            files.push(path);
        }
    }
    shell::run(
        Command::new("clang-format")
            .args(["--dry-run", "-Werror"])
            .args(files),
    )
}

/// `cargo test`, counting the results that its test programs print.
fn unprivileged() -> Result<Totals> {
    let mut child = Command::new("cargo")
        .args(["test", "--workspace", "--no-fail-fast"])
        .current_dir(workspace())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("Run cargo test")?;
    let mut totals = Totals::default();
    let stdout = child.stdout.take().context("No output of cargo test")?;
    for line in BufReader::new(stdout).lines() {
        let line = line.context("Read the output of cargo test")?;
        println!("{line}");
        if let Some(result) = line.strip_prefix("test result: ") {
            totals.passed += count(result, " passed");
            totals.failed += count(result, " failed");
        }
    }
    if !child.wait().context("Wait for cargo test")?.success() && totals.failed == 0 {
        // It did not even get to run some test program.
        totals.failed = 1;
    }
    Ok(totals)
}

/// The number before `word` in "ok. 3 passed; 0 failed; ...".
fn count(result: &str, word: &str) -> usize {
    let number = result
        .find(word)
        .map(|end| &result[..end])
        .and_then(|text| text.rsplit(' ').next());
    number.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn in_vms(thorough: bool) -> Totals {
    suite::run(&Options {
        workspace: workspace(),
        kernels: Kernel::ALL.to_vec(),
        modes: Mode::ALL.to_vec(),
        filter: None,
        keep: false,
        brief: !thorough,
        jobs: 2,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted() {
        let result = "FAILED. 31 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out";
        assert_eq!(
            (count(result, " passed"), count(result, " failed")),
            (31, 2)
        );
        assert_eq!(count("nonsense", " passed"), 0);
    }
}
