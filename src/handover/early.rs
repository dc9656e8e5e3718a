//! Early boot of the next kernel: PID 1 until the real init takes over.
//!
//! The distribution's initrd has mounted root and runs this program as its `init=`. PID 1
//! itself does only simple things: it starts the *stage* (`stage`), a process of its own,
//! waits for it with a deadline, and becomes the real init whatever happened. Nothing in
//! the stage can keep the machine from booting.

use super::cmdline::{Deadlines, Handed};
use super::report::UpdateReport;
use super::stage;
use crate::sys::clock;
use crate::sys::process::pidfd_open;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

/// Name of this program as the early-boot stage.
pub(super) const NAME: &str = "early";

/// Where an init is looked for, as the kernel itself does (init/main.c).
const INITS: [&str; 4] = ["/sbin/init", "/etc/init", "/bin/init", "/bin/sh"];

/// Whether this process is the early-boot stage: by the name it was called, or as PID 1.
#[must_use]
pub fn called() -> bool {
    let name = std::env::args_os().next().unwrap_or_default();
    std::process::id() == 1 || Path::new(&name).file_name() == Some(OsStr::new(NAME))
}

/// Runs as PID 1, or the part of the stage that the arguments name.
pub fn main() -> std::process::ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if std::process::id() == 1 {
        init(&arguments);
    }
    stage::main(&arguments)
}

/// Says something on the console.
pub(super) fn say(text: &str) {
    eprintln!("tracker: {text}");
}

fn init(arguments: &[OsString]) -> ! {
    let begun = clock::tsc();
    let line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let handed = Handed::parse(&line);
    let stage = Command::new("/proc/self/exe")
        .arg0(NAME)
        .args([stage::RESTORE, &begun.to_string()])
        .spawn();
    let failure = match stage {
        Ok(child) => wait(child, handed.deadlines),
        Err(error) => Some(format!("The restore cannot be started: {error}")),
    };
    if let Some(failure) = failure {
        say(&failure);
        tell(failure);
    }
    become_init(&handed, arguments)
}

/// Leaves a report, unless the stage has left a better one.
fn tell(failure: String) {
    if matches!(UpdateReport::read(), Ok(Some(_))) {
        return;
    }
    let report = UpdateReport {
        warnings: vec![failure],
        ..UpdateReport::default()
    };
    if let Err(error) = report.write() {
        say(&format!("The report cannot be written: {error}"));
    }
}

/// Waits for the stage, or ends it; returns what is wrong with how it ended.
fn wait(mut child: Child, deadlines: Deadlines) -> Option<String> {
    let pid = i32::try_from(child.id()).map(crate::model::ids::Pid);
    let in_time = pid.is_ok_and(|pid| match pidfd_open(pid) {
        Ok(pidfd) => {
            let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
            poll(&mut fds, timeout(Duration::from_secs(deadlines.all.into()))) == Ok(1)
        }
        Err(_) => true,
    });
    if !in_time {
        let _ = child.kill();
    }
    match child.wait() {
        _ if !in_time => Some(format!(
            "The restore was not done after {} s and was ended; the machine boots without it",
            deadlines.all
        )),
        Ok(status) if status.success() => None,
        Ok(status) => Some(format!("The restore ended with {status}")),
        Err(error) => Some(format!("Wait for the restore: {error}")),
    }
}

/// For poll(2); for ever when it is too long for it.
pub(super) fn timeout(deadline: Duration) -> PollTimeout {
    PollTimeout::try_from(deadline).unwrap_or(PollTimeout::NONE)
}

/// Executes the real init. With none left to try, PID 1 ends and the kernel panics, as it
/// does without us.
fn become_init(handed: &Handed, arguments: &[OsString]) -> ! {
    for path in handed.init.iter().map(String::as_str).chain(INITS) {
        let error = Command::new(path).args(arguments).exec();
        say(&format!("exec {path}: {error}"));
    }
    std::process::exit(1)
}
