//! A worker restores one application, in a process of its own: what goes wrong there, or hangs,
//! does not touch the others.

use super::early::{NAME, timeout};
use super::stage::{APPLICATION, open_application};
use crate::bpf::features::cgroup2_mount;
use crate::image::Pages;
use crate::model::ids::Pid;
use crate::restore::{self, RestoreError, RestoreOptions};
use crate::sys::process::pidfd_open;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::Duration;

/// The stage says that it is this application's turn.
const BEGIN: u8 = b'b';

/// The worker says that the application stands.
const STANDS: u8 = b's';

/// The stage says that it may run.
const RUN: u8 = b'r';

/// The stage's side of a worker.
pub(super) struct Worker {
    child: Child,
    pidfd: OwnedFd,
    /// The worker's standard input, which it also writes to.
    channel: UnixStream,
    /// Where it leaves its error. A pipe would be open in what it restores.
    errors: PathBuf,
}

impl Worker {
    /// Starts one for application number `index` of the image. It reads what there is to restore,
    /// and waits for its turn. Numbers for processes that do not belong to any application are
    /// taken from `spare`, and none of `led_elsewhere`.
    pub fn start(
        index: usize,
        spare: &Range<i32>,
        led_elsewhere: &BTreeSet<i32>,
    ) -> Result<Self, String> {
        let errors = Path::new(crate::applications::STATE_DIR);
        let errors = errors.join(format!("restore.{index}.error"));
        let file =
            File::create(&errors).map_err(|e| format!("create {}: {e}", errors.display()))?;
        let (channel, theirs) = UnixStream::pair().map_err(|e| format!("socketpair: {e}"))?;
        let mut child = Command::new("/proc/self/exe")
            .arg0(NAME)
            .args([APPLICATION, &index.to_string()])
            .args([spare.start, spare.end].map(|number| number.to_string()))
            .args(led_elsewhere.iter().map(ToString::to_string))
            .stdin(OwnedFd::from(theirs))
            .stderr(file)
            .spawn()
            .map_err(|e| format!("start a worker: {e}"))?;
        let pid = i32::try_from(child.id()).map_err(|e| e.to_string());
        match pid.and_then(|pid| pidfd_open(Pid(pid)).map_err(|e| e.to_string())) {
            Ok(pidfd) => Ok(Self {
                child,
                pidfd,
                channel,
                errors,
            }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Has it restore, until the whole application stands and nothing of it runs. If it does not
    /// within `deadline`, that is the worker's end.
    pub fn restore(mut self, deadline: Duration) -> Result<Self, String> {
        // One that has ended already is found out below.
        let _ = self.channel.write_all(&[BEGIN]);
        let mut fds = [
            PollFd::new(self.channel.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN),
        ];
        let event = poll(&mut fds, timeout(deadline)).is_ok_and(|ready| ready > 0);
        let said = fds[0].any().unwrap_or(false);
        let mut byte = [0];
        if said && self.channel.read_exact(&mut byte).is_ok() && byte == [STANDS] {
            return Ok(self);
        }
        // It has ended, or is about to, with an error.
        Err(self
            .end(event, deadline)
            .err()
            .unwrap_or_else(|| "the worker ended before the application stood".to_owned()))
    }

    /// Lets the application run.
    pub fn let_run(&mut self) {
        // A worker that has ended meanwhile is found out by [`Self::until_it_runs`].
        let _ = self.channel.write_all(&[RUN]);
    }

    /// Waits until the application runs.
    pub fn until_it_runs(self, deadline: Duration) -> Result<(), String> {
        self.end(true, deadline)
    }

    /// Waits for the worker's end, unless it is late already, and says what it said.
    fn end(mut self, in_time: bool, deadline: Duration) -> Result<(), String> {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        let ended = in_time && poll(&mut fds, timeout(deadline)) == Ok(1);
        if !ended {
            let _ = self.child.kill();
        }
        let status = self.child.wait().map_err(|e| e.to_string())?;
        let text = fs::read_to_string(&self.errors).unwrap_or_default();
        let _ = fs::remove_file(&self.errors);
        match (ended, status.success(), text.trim()) {
            (false, _, _) => Err(format!("not done after {} s", deadline.as_secs())),
            (true, true, _) => Ok(()),
            (true, false, "") => Err(format!("the worker ended with {status}")),
            (true, false, text) => Err(text.to_owned()),
        }
    }
}

/// Restores application number `index`; what goes wrong is told on stderr.
pub(super) fn main(index: usize, spare: Range<i32>, led_elsewhere: BTreeSet<i32>) -> ExitCode {
    match restore_one(index, spare, led_elsewhere) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(crate::error::ExitCode::RestoreFailed as u8)
        }
    }
}

fn restore_one(
    index: usize,
    spare: Range<i32>,
    led_elsewhere: BTreeSet<i32>,
) -> Result<(), String> {
    // Ended with the stage: nobody may restore behind the back of the real init.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|e| format!("prctl(PR_SET_PDEATHSIG): {e}"))?;
    let (store, image) = open_application(index).map_err(|e| e.to_string())?;
    let app = image.applications.first();
    let app = app.ok_or_else(|| format!("The image has no application {index}"))?;
    let cgroup_root = cgroup2_mount().map_err(|e| e.to_string())?;
    let turn = channel().and_then(|mut channel| await_word(&mut channel, BEGIN));
    turn.map_err(|e| e.to_string())?;
    let options = RestoreOptions {
        cgroup_root,
        // The stage holds the lock itself, over all applications.
        network_lock: None,
        early: true,
        spare,
        led_elsewhere,
    };
    let pages = Pages::new(&store, &image.slots);
    let restored = restore::restore(app, pages, &options, ask_stage);
    let restored = restored.map_err(|e| e.to_string())?;
    tracing::debug!("{} runs, {:?}", app.header.name, restored.roots);
    Ok(())
}

/// The worker's side of its channel: to be closed before anything is forked.
fn channel() -> Result<UnixStream, RestoreError> {
    let stdin = std::io::stdin().as_fd().try_clone_to_owned();
    stdin
        .map(UnixStream::from)
        .map_err(RestoreError::io("dup of stdin"))
}

fn await_word(channel: &mut UnixStream, word: u8) -> Result<(), RestoreError> {
    let mut said = [0];
    match channel.read_exact(&mut said) {
        Ok(()) if said == [word] => Ok(()),
        _ => Err(RestoreError::Abandoned),
    }
}

/// Says that the application stands, and waits until it may run.
fn ask_stage() -> Result<(), RestoreError> {
    let mut channel = channel()?;
    let asked = channel.write_all(&[STANDS]);
    asked.map_err(|_| RestoreError::Abandoned)?;
    await_word(&mut channel, RUN)
}
