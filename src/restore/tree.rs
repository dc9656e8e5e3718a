//! The processes themselves: born with their PIDs, each going through ordinary Rust code that
//! sets what can be set from inside, then parked for its supervisor.
//!
//! They stop once on the way, when all are born: descriptors may name processes (pidfds), and
//! those who share a descriptor table take turns.

use super::RestoreError;
use super::files::{self, OpenedFiles};
use super::namespaces::place;
use super::sources::Sources;
use super::tape::Tape;
use crate::model::frozen::{Application, Process};
use crate::model::ids::{Pid, Tid};
use crate::model::plan::{Shares, Step};
use crate::sys::area::{exit_now, meet_tracer, park};
use crate::sys::process::{CallError, Fork, fork_sharing, fork_with_pid};
use crate::sys::ptrace::{self, Options, Stop};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// What all processes of the tree know from their birth.
#[derive(Debug)]
pub struct Births<'a> {
    /// The application.
    pub app: &'a Application,
    /// The order of births.
    pub steps: &'a [Step],
    /// A tape for each process.
    pub tapes: &'a BTreeMap<Pid, Tape>,
    /// All open file descriptions.
    pub files: &'a OpenedFiles,
    /// The restorer.
    pub restorer: Pid,
    /// Its login UID.
    pub loginuid: Option<u32>,
    /// A number that is not needed otherwise for the go-between of each orphan.
    pub go_betweens: BTreeMap<Pid, Pid>,
}

/// Options every task of the tree is traced with.
pub(super) const OPTIONS: Options = Options::EXIT_KILL
    .union(Options::SYSGOOD)
    .union(Options::TRACE_FORK)
    .union(Options::TRACE_CLONE);

const LOGINUID: &str = "/proc/self/loginuid";

/// This process's login UID, which those that it starts inherit.
pub fn loginuid() -> Option<u32> {
    let text = fs::read_to_string(LOGINUID).ok()?;
    let number = text.trim_end().parse().ok()?;
    (number != u32::MAX).then_some(number)
}

fn set_loginuid(number: Option<u32>) -> Result<(), String> {
    let number = number.unwrap_or(u32::MAX);
    fs::write(LOGINUID, number.to_string())
        .map_err(|e| format!("write {number} to {LOGINUID}: {e}"))
}

impl Births<'_> {
    /// Creates all processes and returns when every one of them has made its children and stands
    /// stopped under this thread as their tracer.
    ///
    /// # Errors
    /// One could not be created or failed on the way.
    pub fn create(&self, born: &mut BTreeSet<Pid>) -> Result<(), RestoreError> {
        for step in self.steps {
            if let Step::Fork {
                parent: None,
                child,
                ..
            } = *step
            {
                match fork_with_pid(Some(child), self.exit_signal(child))? {
                    Fork::Child => self.live(child, true),
                    Fork::Parent(_) => {
                        born.insert(child);
                        ptrace::seize(child.leader(), OPTIONS)?;
                        self.tape(child)?.release();
                    }
                }
            }
        }
        let mut waiting: BTreeSet<_> = self.tapes.keys().copied().collect();
        while !waiting.is_empty() {
            let stopped = self.next_stopped(&waiting, |pid| {
                born.insert(pid);
            })?;
            waiting.remove(&stopped);
        }
        Ok(())
    }

    /// Lets the living ones put their descriptors in place and returns when every one is parked
    /// (stopped at an `int3`, with `SIGTRAP` about to be delivered).
    ///
    /// # Errors
    /// One failed on the way.
    pub fn furnish_all(&self) -> Result<(), RestoreError> {
        let living = self.app.processes.iter().filter(|p| p.zombie.is_none());
        let mut later: Vec<&Process> = living.filter(|p| self.tapes.contains_key(&p.pid)).collect();
        let mut waiting: BTreeSet<Pid> = BTreeSet::new();
        let mut tables = BTreeSet::new();
        loop {
            // One at a time of those who share a table, parents before children.
            let mut blocked = Vec::new();
            for process in later {
                if tables.insert(process.files) {
                    waiting.insert(process.pid);
                    ptrace::cont(process.pid.leader(), 0)?;
                } else {
                    blocked.push(process);
                }
            }
            later = blocked;
            if waiting.is_empty() {
                return Ok(());
            }
            let stopped = self.next_stopped(&waiting, |_| ())?;
            waiting.remove(&stopped);
            if let Some(process) = self.process(stopped) {
                tables.remove(&process.files);
            }
        }
    }

    fn tape(&self, pid: Pid) -> Result<&Tape, RestoreError> {
        self.tapes.get(&pid).ok_or(RestoreError::NoRoom)
    }

    fn exit_signal(&self, pid: Pid) -> i32 {
        self.process(pid).map_or(0, |p| p.exit_signal)
    }

    fn process(&self, pid: Pid) -> Option<&Process> {
        self.app.processes.iter().find(|p| p.pid == pid)
    }

    /// Waits until one of those `waiting` traps, and lets all others go on.
    fn next_stopped(
        &self,
        waiting: &BTreeSet<Pid>,
        mut seen: impl FnMut(Pid),
    ) -> Result<Pid, RestoreError> {
        loop {
            let (tid, stop) = ptrace::wait_any()?;
            let pid = Pid(tid.0);
            if waiting.contains(&pid) {
                seen(pid);
            }
            match stop {
                Stop::Signal(signal) if signal == Signal::SIGTRAP as i32 => return Ok(pid),
                Stop::Interrupted(_) | Stop::Event(_) => ptrace::cont(tid, 0)?,
                Stop::Syscall => ptrace::cont(tid, 0)?,
                Stop::Signal(signal) => ptrace::cont(tid, signal)?,
                Stop::Exited(_) | Stop::Killed(_) if waiting.contains(&pid) => {
                    return Err(self.lost(tid, stop));
                }
                Stop::Exited(_) | Stop::Killed(_) => {}
            }
        }
    }

    fn lost(&self, tid: Tid, stop: Stop) -> RestoreError {
        let pid = Pid(tid.0);
        let message = self.tapes.get(&pid).map(Tape::message).unwrap_or_default();
        lost(pid, stop, &message)
    }

    /// A process's life until it is parked.
    fn live(&self, pid: Pid, root: bool) -> ! {
        let result = catch_unwind(AssertUnwindSafe(|| {
            self.prepare(pid, root)?;
            // A process that is to be a zombie goes no further.
            meet_tracer();
            self.furnish(self.process(pid).ok_or("not in the image")?)
        }));
        let message = match result {
            Ok(Ok(())) => park(),
            Ok(Err(message)) => message,
            Err(_) => "the restorer's code panicked".to_owned(),
        };
        if let Some(tape) = self.tapes.get(&pid) {
            tape.leave_message(&message);
        }
        exit_now(1)
    }

    fn prepare(&self, pid: Pid, root: bool) -> Result<(), String> {
        if root {
            // Until it is traced nothing else ends it together with the restorer.
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
                .map_err(|e| format!("prctl(PR_SET_PDEATHSIG): {e}"))?;
            self.tapes.get(&pid).ok_or("no tape")?.wait_released();
        }
        self.log_in(pid)?;
        for step in self.steps {
            match *step {
                Step::Fork {
                    parent,
                    child,
                    orphan,
                    shares,
                } if parent == Some(pid) => self.bear(child, orphan, shares)?,
                Step::LeadSession(who) if who == pid => {
                    unistd::setsid().map_err(|e| format!("setsid: {e}"))?;
                    files::take_terminal(self.app, pid, self.files).map_err(|e| e.to_string())?;
                }
                Step::LeadGroup(who) if who == pid => {
                    let own = unistd::Pid::from_raw(0);
                    unistd::setpgid(own, own).map_err(|e| format!("setpgid: {e}"))?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Only the process itself may set its login UID, which its children inherit.
    fn log_in(&self, pid: Pid) -> Result<(), String> {
        let parent = self.steps.iter().find_map(|step| match *step {
            Step::Fork { parent, child, .. } if child == pid => parent,
            _ => None,
        });
        let inherited = match parent {
            Some(parent) => self.process(parent).and_then(|parent| parent.loginuid),
            None => self.loginuid,
        };
        match self.process(pid) {
            Some(process) if process.loginuid != inherited => set_loginuid(process.loginuid),
            _ => Ok(()),
        }
    }

    fn bear(&self, child: Pid, orphan: bool, shares: Shares) -> Result<(), String> {
        let told = |e: CallError| e.to_string();
        if !orphan {
            let exit_signal = self.exit_signal(child);
            if fork_sharing(Some(child), exit_signal, shares).map_err(told)? == Fork::Child {
                self.live(child, false);
            }
            return Ok(());
        }
        // No exit signal: nothing of the go-between may stay pending in its parent.
        let go_between = self.go_betweens.get(&child).copied();
        match fork_with_pid(go_between, 0).map_err(told)? {
            Fork::Child => match fork_with_pid(Some(child), self.exit_signal(child)) {
                Ok(Fork::Child) => self.live(child, false),
                Ok(Fork::Parent(_)) => exit_now(0),
                Err(_) => exit_now(1),
            },
            Fork::Parent(pid) => {
                let raw = unistd::Pid::from_raw(pid.0);
                let flags = nix::sys::wait::WaitPidFlag::__WALL;
                match nix::sys::wait::waitpid(raw, Some(flags)) {
                    Ok(nix::sys::wait::WaitStatus::Exited(_, 0)) => Ok(()),
                    other => Err(format!("cannot create PID {child} as an orphan: {other:?}")),
                }
            }
        }
    }

    /// What a process shares with its parent, which sees to it then.
    fn shares(&self, pid: Pid) -> Shares {
        let born = self.steps.iter().find_map(|step| match *step {
            Step::Fork { child, shares, .. } if child == pid => Some(shares),
            _ => None,
        });
        born.unwrap_or_default()
    }

    /// Descriptors, root, working directory, and what memory is put back from.
    fn furnish(&self, process: &Process) -> Result<(), String> {
        let table = self.app.files.get(&process.files);
        let table = table.ok_or("its descriptor table is not in the image")?;
        let shares = self.shares(process.pid);
        if !shares.files {
            let told = |e: files::FilesError| e.to_string();
            files::fetch(self.app, self.files, self.restorer).map_err(told)?;
            files::install(self.app, table, self.files).map_err(told)?;
            files::finish(self.app, process.pid, self.files).map_err(told)?;
        }
        let sources = Sources::of(self.app, process);
        sources.open_shared(
            self.restorer,
            |id| self.files.content(id),
            |id| self.files.description(id),
        )?;
        // Names are those of the mount namespace, wherever the process has its root directory.
        sources.open_named(self.restorer, &process.exe)?;
        if !shares.fs {
            let cwd = &place(&process.cwd, self.restorer);
            unistd::chdir(cwd).map_err(|e| format!("chdir {}: {e}", cwd.display()))?;
            umask(Mode::from_bits_truncate(process.umask));
        }
        let root = &place(&process.root, self.restorer);
        if root != Path::new("/") {
            unistd::chroot(root).map_err(|e| format!("chroot {}: {e}", root.display()))?;
        }
        Ok(())
    }
}

/// An error for a task that ended or stopped as it must not.
#[must_use]
pub fn lost(pid: Pid, stop: Stop, message: &str) -> RestoreError {
    let signal = |number: i32| {
        Signal::try_from(number).map_or_else(|_| number.to_string(), |s| s.to_string())
    };
    let how = match stop {
        Stop::Exited(status) => format!("exited with {status}"),
        Stop::Killed(by) => format!("was killed by {}", signal(by)),
        Stop::Signal(got) => format!("got {}", signal(got)),
        other => format!("stopped unexpectedly ({other:?})"),
    };
    let message = match message {
        "" => String::new(),
        text => format!(": {text}"),
    };
    RestoreError::Lost { pid, how, message }
}
