//! Triggers of pressure stall information: who waits for one is told when tasks wait too long.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::probe::eventually;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[Entry::carried("pressure_triggers", triggers)];

/// Opens a file and sets its trigger, if one is given.
fn open(path: &str, trigger: Option<&str>) -> Result<File> {
    let mut options = OpenOptions::new();
    let opened = options.read(true).write(true).open(path);
    let mut file = opened.with_context(|| format!("Open {path}"))?;
    if let Some(trigger) = trigger {
        file.write_all(trigger.as_bytes())
            .with_context(|| format!("Write {trigger} to {path}"))?;
    }
    Ok(file)
}

/// Says what a poll that does not wait finds.
fn found(file: &File) -> Result<PollFlags> {
    let mut asked = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
    poll(&mut asked, PollTimeout::ZERO)?;
    Ok(asked[0].revents().unwrap_or(PollFlags::empty()))
}

/// One of the system, one of the cgroup, one that is not reached, and a file without one.
fn triggers(case: &Case) -> Result<()> {
    let cgroup = std::fs::read_to_string("/proc/self/cgroup")?;
    let cgroup = cgroup.trim().strip_prefix("0::").context("No cgroup v2")?;
    let of_cgroup = |name: &str| format!("/sys/fs/cgroup{cgroup}/{name}");
    let system = open("/proc/pressure/cpu", Some("some 20000 500000\0"))?;
    let own = open(&of_cgroup("cpu.pressure"), Some("some 30000 600000\0"))?;
    let memory = open(&of_cgroup("memory.pressure"), Some("full 400000 1000000\0"))?;
    let none = open("/proc/pressure/io", None)?;
    case.ready()?;
    // What was seen of others before does not count.
    found(&system)?;
    let busy = AtomicBool::new(true);
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                while busy.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let told = [&system, &own].into_iter().try_for_each(|file| {
            eventually("the trigger", || {
                let found = found(file)?;
                ensure!(!found.contains(PollFlags::POLLERR), "It has no trigger");
                std::thread::sleep(Duration::from_millis(20));
                Ok(found.contains(PollFlags::POLLPRI))
            })
        });
        busy.store(false, Ordering::Relaxed);
        told
    })?;
    ensure!(found(&memory)?.is_empty(), "Memory: {:?}", found(&memory)?);
    ensure!(
        found(&none)?.contains(PollFlags::POLLERR),
        "A file without a trigger: {:?}",
        found(&none)?
    );
    // There is one already.
    for mut file in [system, own, memory] {
        let again = file
            .write_all(b"some 20000 500000\0")
            .map_err(|e| e.raw_os_error());
        ensure!(
            again == Err(Some(libc::EBUSY)),
            "A second trigger: {again:?}"
        );
    }
    Ok(())
}
