//! `cargo xtask setup`: installs what is missing, and only that.

use std::process::Command;

use anyhow::Result;
use clap::Args;

use crate::{find_program, guest_image, shell};

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
    // The VM and its image.
    "qemu-system-x86",
    "seabios",
    "mmdebstrap",
    "e2fsprogs",
    "cpio",
    "kmod",
    "tar",
    "zstd",
    "xz-utils",
];

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
    let missing: Vec<_> = PACKAGES.iter().filter(|name| !installed(name)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    eprintln!("setup: installing {missing:?}");
    shell::run(shell::privileged("apt-get").args(["update", "-qq"]))?;
    let mut install = shell::privileged("env");
    install.args([
        "DEBIAN_FRONTEND=noninteractive",
        "apt-get",
        "install",
        "-qq",
        "--no-install-recommends",
    ]);
    shell::run(install.args(missing))
}

fn installed(package: &str) -> bool {
    Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .output()
        .is_ok_and(|output| output.status.success() && output.stdout == b"installed")
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
    shell::run(Command::new("cargo").args(["install", "--quiet", "--locked", "cargo-deny"]))
}
