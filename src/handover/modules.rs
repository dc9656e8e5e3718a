//! Kernel modules, by modprobe(8): the only program of others that is run.

use std::path::Path;
use std::process::{Command, Stdio};

/// Loads the modules that are not there yet. A module that does not load shows by what
/// is missing afterwards, so this reports nothing.
pub fn load(names: &[&str]) {
    let there = |name: &str| {
        Path::new("/sys/module")
            .join(name.replace('-', "_"))
            .exists()
    };
    let missing: Vec<_> = names.iter().filter(|name| !there(name)).collect();
    if missing.is_empty() {
        return;
    }
    let mut command = Command::new("modprobe");
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command.arg("-a").args(&missing);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    match command.stderr(Stdio::null()).status() {
        Ok(status) => tracing::debug!("modprobe -a {missing:?}: {status}"),
        Err(error) => tracing::warn!("modprobe: {error}"),
    }
}
