//! Our own programs as a tar archive that the guest unpacks at its first boot,
//! like a package: the image needs no rebuild when only they change.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Where the guest's programs lie in it.
pub const TESTS_DIR: &str = "/usr/lib/tracker/tests";

/// Builds the workspace's programs for the guest.
///
/// # Errors
/// If cargo fails.
pub fn build(workspace: &Path) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(workspace)
        .args([
            "build",
            "--quiet",
            "--package",
            "tracker",
            "--package",
            "vmtests",
            "--package",
            "iter_check",
            "--bins",
        ])
        .status()
        .context("Run cargo build")?;
    if !status.success() {
        bail!("cargo build failed");
    }
    Ok(())
}

/// Packs `tracker` and the guest programs from `programs` (cargo's output
/// directory) into `archive`, without debug information.
///
/// # Errors
/// If a program is missing, or objcopy or tar fails.
pub fn pack(programs: &Path, stage: &Path, archive: &Path) -> Result<()> {
    let tests = stage.join(TESTS_DIR.trim_start_matches('/'));
    let bin = stage.join("usr/bin");
    for dir in [&tests, &bin] {
        fs::create_dir_all(dir).with_context(|| format!("Create {}", dir.display()))?;
    }
    strip(&programs.join("tracker"), &bin.join("tracker"))?;
    symlink("../../bin/tracker", stage.join("usr/lib/tracker/early")).context("Link early")?;
    for name in GUEST_PROGRAMS {
        strip(&programs.join(name), &tests.join(name))?;
    }
    run(Command::new("tar")
        .args([
            "--create",
            "--owner=0",
            "--group=0",
            "--numeric-owner",
            "--file",
        ])
        .arg(archive)
        .arg("--directory")
        .arg(stage)
        .arg("usr"))?;
    fs::remove_dir_all(stage).with_context(|| format!("Remove {}", stage.display()))
}

/// The binaries below vmtests/ that go into the guest.
const GUEST_PROGRAMS: &[&str] = &["guestd", "cases", "iter_check", "heartbeat", "ops", "storm"];

fn strip(from: &Path, to: &PathBuf) -> Result<()> {
    run(Command::new("objcopy")
        .arg("--strip-debug")
        .arg(from)
        .arg(to))
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("Run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
