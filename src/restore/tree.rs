//! The processes themselves: born with their PIDs, each going through ordinary Rust code that
//! sets what can be set from inside, then parked for its supervisor.

use super::RestoreError;
use super::files::{self, OpenedFiles};
use super::sources::{PageFile, Sources, os_path};
use super::tape::Tape;
use crate::model::frozen::{Application, Process};
use crate::model::ids::{Pid, Tid};
use crate::model::plan::Step;
use crate::sys::area::{exit_now, park};
use crate::sys::process::{CallError, Fork, fork_with_pid};
use crate::sys::ptrace::{self, Options, Stop};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, umask};
use nix::unistd;
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};

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
    /// Descriptor of the page slots in the restorer.
    pub pages: PageFile,
    /// A number that is not needed otherwise for the go-between of each orphan.
    pub go_betweens: BTreeMap<Pid, Pid>,
}

/// Options every task of the tree is traced with.
const OPTIONS: Options = Options::EXIT_KILL
    .union(Options::SYSGOOD)
    .union(Options::TRACE_FORK)
    .union(Options::TRACE_CLONE);

impl Births<'_> {
    /// Creates all processes and returns when every one of them is parked (stopped under this
    /// thread as their tracer at an `int3`, with `SIGTRAP` about to be delivered).
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
        self.await_parked(born)
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

    fn await_parked(&self, born: &mut BTreeSet<Pid>) -> Result<(), RestoreError> {
        let mut waiting: BTreeSet<_> = self.tapes.keys().copied().collect();
        while !waiting.is_empty() {
            let (tid, stop) = ptrace::wait_any()?;
            let pid = Pid(tid.0);
            if waiting.contains(&pid) {
                born.insert(pid);
            }
            match stop {
                Stop::Signal(signal) if signal == Signal::SIGTRAP as i32 => {
                    waiting.remove(&pid);
                }
                Stop::Interrupted(_) | Stop::Event(_) => ptrace::cont(tid, 0)?,
                Stop::Syscall => ptrace::cont(tid, 0)?,
                Stop::Signal(signal) => ptrace::cont(tid, signal)?,
                Stop::Exited(_) | Stop::Killed(_) if waiting.contains(&pid) => {
                    return Err(self.lost(tid, stop));
                }
                Stop::Exited(_) | Stop::Killed(_) => {}
            }
        }
        Ok(())
    }

    fn lost(&self, tid: Tid, stop: Stop) -> RestoreError {
        let pid = Pid(tid.0);
        let message = self.tapes.get(&pid).map(Tape::message).unwrap_or_default();
        lost(pid, stop, &message)
    }

    /// A process's life until it is parked.
    fn live(&self, pid: Pid, root: bool) -> ! {
        let result = catch_unwind(AssertUnwindSafe(|| self.prepare(pid, root)));
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
        for step in self.steps {
            match *step {
                Step::Fork {
                    parent,
                    child,
                    orphan,
                } if parent == Some(pid) => self.bear(child, orphan)?,
                Step::LeadSession(who) if who == pid => {
                    unistd::setsid().map_err(|e| format!("setsid: {e}"))?;
                }
                Step::LeadGroup(who) if who == pid => {
                    let own = unistd::Pid::from_raw(0);
                    unistd::setpgid(own, own).map_err(|e| format!("setpgid: {e}"))?;
                }
                _ => {}
            }
        }
        let process = self.process(pid).ok_or("not in the image")?;
        if process.zombie.is_some() {
            return Ok(());
        }
        self.furnish(process)
    }

    fn bear(&self, child: Pid, orphan: bool) -> Result<(), String> {
        let told = |e: CallError| e.to_string();
        if !orphan {
            if fork_with_pid(Some(child), self.exit_signal(child)).map_err(told)? == Fork::Child {
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

    /// Descriptors, root, working directory, and what memory is put back from.
    fn furnish(&self, process: &Process) -> Result<(), String> {
        let table = self.app.files.get(&process.files);
        let table = table.ok_or("its descriptor table is not in the image")?;
        files::install(self.app, table, self.files).map_err(|e| e.to_string())?;
        files::finish(self.app, process.pid, self.files).map_err(|e| e.to_string())?;
        let sources = Sources::of(self.app, process);
        sources.open_shared(self.restorer, self.pages, |id| self.files.content(id))?;
        let root = os_path(&process.root.path);
        if root != os_path(b"/") {
            unistd::chroot(root).map_err(|e| format!("chroot {}: {e}", root.display()))?;
        }
        let cwd = os_path(&process.cwd.path);
        unistd::chdir(cwd).map_err(|e| format!("chdir {}: {e}", cwd.display()))?;
        sources.open_named(&process.exe)?;
        umask(Mode::from_bits_truncate(process.umask));
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
