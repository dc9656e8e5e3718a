//! A process that outlives tracker's own death: should tracker be killed in the middle of a
//! checkpoint, the guard thaws what is left frozen.

use super::error::CheckpointError;
use super::restart::Now;
use super::threads::{TASK_UNINTERRUPTIBLE, Tracees};
use crate::bpf::events::ThreadRec;
use crate::bpf::iter::Tasks;
use crate::model::ids::Pid;
use crate::sys::cgroup::{Cgroup, Event};
use crate::sys::process::{Fork, fork_with_pid, pidfd_getfd, pidfd_open};
use crate::sys::task::exit_now;
use crate::sys::tcp;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{getppid, pipe2, read, setsid, write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the guard undoes.
#[derive(Clone, Debug)]
pub struct Watch {
    /// The frozen cgroup.
    pub cgroup: PathBuf,
    /// Where tracker may have pinned the network lock.
    pub pins: PathBuf,
    /// Cgroup the processes came from, when they were moved for the checkpoint.
    pub back_to: Option<PathBuf>,
}

/// The live guard. Dropping it without [`Guard::done`] has the guard clean up.
#[derive(Debug)]
pub struct Guard {
    pid: Pid,
    pipe: Option<OwnedFd>,
}

/// How long the threads that a dead tracker had traced may take to be frozen again.
const FREEZE_AGAIN: Duration = Duration::from_secs(1);

const DONE: u8 = b'd';
const CLEAN_UP: u8 = b'c';

fn wait_for_end(tracker: BorrowedFd<'_>) {
    let mut fds = [PollFd::new(tracker, PollFlags::POLLIN)];
    while poll(&mut fds, PollTimeout::from(5_000_u16)) == Err(nix::errno::Errno::EINTR) {}
}

impl Guard {
    /// Forks the guard. Call it before anything is loaded or locked that must end with
    /// tracker: the guard holds copies of tracker's descriptors. Single-threaded only.
    ///
    /// # Errors
    /// fork fails.
    pub fn start(watch: &Watch) -> Result<Self, CheckpointError> {
        let failed = |errno: nix::errno::Errno| {
            CheckpointError::io("pipe2", "the guard process")(errno.into())
        };
        let (reader, writer) = pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(failed)?;
        match fork_with_pid(None, nix::libc::SIGCHLD)? {
            Fork::Parent(pid) => Ok(Self {
                pid,
                pipe: Some(writer),
            }),
            Fork::Child => {
                drop(writer);
                let tracker = pidfd_open(Pid(getppid().as_raw()));
                let _ = setsid();
                // The write end is held by tracker alone: end of file is its end.
                let mut byte = [0];
                let said = loop {
                    match read(&reader, &mut byte) {
                        Err(nix::errno::Errno::EINTR) => {}
                        said => break said,
                    }
                };
                match (said, byte[0]) {
                    (Ok(1), DONE) => {}
                    (Ok(1), _) => clean_up(watch),
                    // Its descriptors go before its tracees do: wait for the very end.
                    _ => {
                        if let Ok(tracker) = tracker {
                            wait_for_end(tracker.as_fd());
                        }
                        clean_up(watch);
                    }
                }
                exit_now(0)
            }
        }
    }

    /// Everything is in order without the guard.
    pub fn done(mut self) {
        if let Some(pipe) = self.pipe.take() {
            let _ = write(&pipe, &[DONE]);
        }
        self.reap();
    }

    fn reap(&self) {
        use nix::sys::wait::{WaitPidFlag, waitpid};
        let pid = nix::unistd::Pid::from_raw(self.pid.0);
        while waitpid(pid, Some(WaitPidFlag::__WALL)) == Err(nix::errno::Errno::EINTR) {}
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(pipe) = self.pipe.take() {
            let _ = write(&pipe, &[CLEAN_UP]);
            drop(pipe);
            self.reap();
        }
    }
}

fn clean_up(watch: &Watch) {
    // A new capability-free attempt at each step: one that fails must not keep the
    // application frozen.
    let Ok(cgroup) = Cgroup::open(&watch.cgroup) else {
        return;
    };
    if cgroup.is_to_be_frozen().unwrap_or(true) {
        // Threads that were traced leave the freezer with their tracer's end, to come back: that
        // it is not frozen right now says nothing of what was done to it.
        let _ = cgroup.wait(Event::Frozen, Instant::now() + FREEZE_AGAIN, None);
        let members = cgroup.members().unwrap_or_default();
        leave_repair(&members);
        continue_calls(&members);
    }
    remove_pins(&watch.pins);
    let _ = cgroup.set_frozen(false);
    if let Some(back) = &watch.back_to {
        // Nobody is left to tell.
        let _ = super::target::disband(&cgroup, back);
    }
}

/// A socket in repair mode is dead to its application.
fn leave_repair(members: &[Pid]) {
    for &pid in members {
        let Ok(pidfd) = pidfd_open(pid) else { continue };
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/fd")) else {
            continue;
        };
        for entry in entries.flatten() {
            let is_socket = std::fs::read_link(entry.path())
                .is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
            let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
            let (true, Some(number)) = (is_socket, number) else {
                continue;
            };
            if let Ok(fd) = pidfd_getfd(pidfd.as_fd(), pid, number) {
                // EINVAL or EPERM on sockets that are not TCP or not in repair mode.
                let _ = tcp::leave_repair(fd.as_fd());
            }
        }
    }
}

fn continue_calls(members: &[Pid]) {
    let mut tasks = Tasks::default();
    for &pid in members {
        let Ok(entries) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        let tids = entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str().and_then(|n| n.parse().ok()));
        tasks.threads.extend(tids.map(|tid| thread(pid, tid)));
    }
    let now = Now {
        monotonic: 0,
        boottime: 0,
        realtime: 0,
        offset: 0,
    };
    // Dropping them is what sets the calls to go on.
    let _ = Tracees::repair(&mut tasks, None, Duration::from_secs(1), &now);
}

/// What [`Tracees::repair`] looks at, from /proc/TID/status.
fn thread(pid: Pid, tid: u32) -> ThreadRec {
    let text = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let word = |name: &str| {
        let mut values = text.lines().filter_map(|line| line.strip_prefix(name));
        values.next().map_or("", str::trim)
    };
    let mask = |name: &str| u64::from_str_radix(word(name), 16).unwrap_or(0);
    ThreadRec {
        tid,
        tgid: pid.0.cast_unsigned(),
        pending: (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:"),
        state: if word("State:").starts_with('D') {
            TASK_UNINTERRUPTIBLE
        } else {
            0
        },
        ..ThreadRec::default()
    }
}

/// Unpinning the links of the network lock releases it: nobody else holds them any more.
pub fn remove_pins(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = std::fs::remove_file(entry.path());
    }
    let _ = std::fs::remove_dir(dir);
}
