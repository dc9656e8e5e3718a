//! `cargo xtask setup`: installs what is missing, and only that.

use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::{apt, find_program, guest_image, shell};

/// Debian packages and what needs them.
const PACKAGES: &[&str] = &[
    // The BPF programs and libbpf.
    "clang",
    "llvm",
    "clang-format",
    "libclang-dev",
    "libelf-dev",
    "zlib1g-dev",
    "pkg-config",
    "make",
    "gcc",
    "libc6-dev",
    "binutils",
    // The VM's image.
    "mmdebstrap",
    "e2fsprogs",
    "cpio",
    "kmod",
    "tar",
    "zstd",
    "xz-utils",
];

const QEMU: &[&str] = &["qemu-system-x86", "qemu-utils", "seabios"];

/// Options of `cargo xtask setup`.
#[derive(Args, Default)]
pub struct Arguments {
    /// Build the guest image anew, with the packages of today
    #[arg(long)]
    rebuild_image: bool,
}

/// All of it.
pub fn run(arguments: &Arguments) -> Result<()> {
    packages()?;
    rust_components()?;
    cargo_deny()?;
    guest_image::ensure(arguments.rebuild_image)
}

/// What VMs need, without the tools of `cargo xtask test`.
pub fn for_vm() -> Result<()> {
    packages()?;
    guest_image::ensure(false)
}

fn packages() -> Result<()> {
    let missing = apt::missing(PACKAGES);
    if !missing.is_empty() {
        apt::install(&missing)?;
    }
    qemu()
}

/// QEMU before 8.1 may translate an instruction while another processor changes it and keep
/// the old one (its page was write-protected only afterwards): a guest that patches its own
/// code, as Linux does whenever a static key changes, then dies of a stray breakpoint. Debian 12
/// has a newer one in its backports.
fn qemu() -> Result<()> {
    let new = qemu_version().is_some_and(|version| version >= (8, 1));
    if new && find_program("qemu-img").is_some() {
        return Ok(());
    }
    if let Err(error) = apt::install_backports(QEMU) {
        eprintln!(
            "setup: {error:#}; VMs run with the release's own QEMU, and a guest kernel may \
             crash now and then"
        );
        let missing = apt::missing(QEMU);
        if !missing.is_empty() {
            apt::install(&missing)?;
        }
    }
    Ok(())
}

/// Major and minor version.
fn qemu_version() -> Option<(u32, u32)> {
    find_program("qemu-system-x86_64")?;
    let text = shell::output(Command::new("qemu-system-x86_64").arg("--version")).ok()?;
    let mut numbers = text
        .split_once("version ")?
        .1
        .split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn rust_components() -> Result<()> {
    // Rustup has a stub for each, whether the component is there or not.
    let works = |tool: &str| shell::output(Command::new("cargo").args([tool, "--version"])).is_ok();
    if works("clippy") && works("fmt") {
        return Ok(());
    }
    shell::run(Command::new("rustup").args(["component", "add", "clippy", "rustfmt"]))
}

fn cargo_deny() -> Result<()> {
    if find_program("cargo-deny").is_some() {
        return Ok(());
    }
    eprintln!("setup: building cargo-deny (once per machine)");
    // Optimised it takes minutes more to build than it will ever run.
    let install = [
        "install",
        "--quiet",
        "--locked",
        "--profile",
        "dev",
        "cargo-deny",
    ];
    shell::run(Command::new("cargo").args(install))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a machine where nothing is installed yet, `cargo xtask setup` must build.
    #[test]
    fn xtask_builds_without_what_setup_installs() {
        let tree = shell::output(Command::new(env!("CARGO")).args([
            "tree",
            "--offline",
            "--package",
            "xtask",
            "--prefix",
            "none",
        ]));
        let tree = tree.unwrap();
        assert!(tree.contains("vmtests"), "{tree}");
        for needs_more in ["libbpf-sys", "bindgen"] {
            assert!(
                !tree.contains(needs_more),
                "{needs_more} is needed:\n{tree}"
            );
        }
    }
}
