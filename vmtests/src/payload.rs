//! Our own programs as a tar archive that the guest unpacks at its first boot,
//! like a package: the image needs no rebuild when only they change.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// Where the guest's programs lie in it.
pub const TESTS_DIR: &str = "/usr/lib/tracker/tests";

/// How the programs are compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Profile {
    /// Quickly, for tests.
    Dev,
    /// As they are shipped, for benchmarks.
    Release,
}

impl Profile {
    /// Cargo's output directory for it.
    #[must_use]
    pub fn directory(self, workspace: &Path) -> PathBuf {
        let name = match self {
            Profile::Dev => "debug",
            Profile::Release => "release",
        };
        let beside = std::env::current_exe().ok();
        let beside = beside.and_then(|exe| Some(exe.parent()?.parent()?.join(name)));
        beside
            .filter(|dir| dir.join("guestd").exists())
            .unwrap_or_else(|| workspace.join("target").join(name))
    }
}

/// Builds the workspace's programs for the guest.
///
/// # Errors
/// If cargo fails.
pub fn build(workspace: &Path, profile: Profile) -> Result<()> {
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
        .args((profile == Profile::Release).then_some("--release"))
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
const GUEST_PROGRAMS: &[&str] = &[
    "guestd",
    "cases",
    "iter_check",
    "heartbeat",
    "objects",
    "ops",
    "storm",
];

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
