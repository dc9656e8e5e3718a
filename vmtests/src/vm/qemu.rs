//! The emulator's process, its files and its console.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, ExitStatus};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use crate::control::Shared;

/// Directory of one VM's files, removed with it.
#[derive(Debug)]
pub(super) struct WorkDir {
    pub path: PathBuf,
    pub keep: bool,
}

impl WorkDir {
    pub fn create(workspace: &Path, keep: bool) -> Result<WorkDir> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = workspace.join(format!("target/vm/{}.{number}", std::process::id()));
        if path.exists() {
            fs::remove_dir_all(&path).with_context(|| format!("Remove {}", path.display()))?;
        }
        fs::create_dir_all(&path).with_context(|| format!("Create {}", path.display()))?;
        Ok(WorkDir { path, keep })
    }

    /// The disk with our programs.
    pub fn programs(&self) -> PathBuf {
        self.path.join("programs.tar")
    }

    /// QEMU's monitor, where it has one.
    pub fn monitor(&self) -> PathBuf {
        self.path.join("monitor")
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.keep {
            eprintln!("vm: kept {}", self.path.display());
        } else {
            // A leftover in target/ harms nobody.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The emulator's process, killed on drop.
#[derive(Debug)]
pub(super) struct Qemu {
    pub child: Mutex<Child>,
}

impl Qemu {
    pub fn ended(&self) -> Option<ExitStatus> {
        self.child
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .try_wait()
            .ok()
            .flatten()
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(PoisonError::into_inner);
        // It may have ended by itself.
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Why a VM ended whose kernel did not panic.
pub(super) const EXITED: &str = "QEMU exited";

/// Copies the guest's console to a file and looks for a kernel panic.
pub(super) fn watch_console(
    console: ChildStdout,
    mut file: File,
    log: &Mutex<Vec<String>>,
    shared: &Shared,
) {
    let mut reader = BufReader::new(console);
    let mut panic = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => break,
            Ok(_) => {}
        }
        // The log is a help only: a full disk must not end the VM.
        let _ = file.write_all(&line);
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if panic.is_none() && text.contains("Kernel panic") {
            panic = Some(text.clone());
        }
        log.lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text);
    }
    shared.end(|| panic.unwrap_or_else(|| EXITED.to_owned()));
}
