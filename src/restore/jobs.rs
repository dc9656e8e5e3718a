//! Job control: foreground process groups, stopped and continued processes.

use super::RestoreError;
use super::files::OpenedFiles;
use super::signals::number;
use super::supervisor::Supervisor;
use super::tape::{Expect, Script};
use super::tree::lost;
use crate::model::frozen::{Application, JobStop, Process};
use crate::model::ids::Pid;
use crate::sys::ptrace::{self, Stop};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use std::os::fd::AsRawFd;

type Result<T> = std::result::Result<T, RestoreError>;

impl Supervisor<'_> {
    /// Puts groups in the foreground of their terminals. All groups must exist, and what is
    /// to die must live: the group in the foreground may be gone soon.
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn foreground(&mut self, files: &OpenedFiles, restorer: Pid) -> Result<()> {
        let leaders: Vec<Pid> = self.living().iter().map(|p| p.pid).collect();
        for leader in leaders {
            // With a terminal its leader's own group comes to the foreground (TIOCSCTTY).
            let Some((fd, group)) = files.terminal(self.app, leader) else {
                continue;
            };
            if group == leader {
                continue;
            }
            let mut script = Script::default();
            let args = [number(restorer.0), 0];
            script.add(libc::SYS_pidfd_open, &args, Expect::Ok);
            let pidfd = self.run(leader, leader.leader(), &script)?[0];
            let pidfd = pidfd.cast_unsigned();
            let mut script = Script::default();
            let args = [pidfd, number(fd.as_raw_fd()), 0];
            script.add(libc::SYS_pidfd_getfd, &args, Expect::Ok);
            let terminal = self.run(leader, leader.leader(), &script)?[0];
            let terminal = terminal.cast_unsigned();
            let tape = self.tape(leader)?;
            tape.clear_data();
            let group = tape
                .data(&group.0.to_le_bytes())
                .ok_or(RestoreError::NoRoom)?;
            let mut script = Script::default();
            // SIGTTOU is blocked, so that the background may ask for it too (tty_check_change()).
            let args = [terminal, libc::TIOCSPGRP, group];
            script.zero(libc::SYS_ioctl, &args);
            script.zero(libc::SYS_close, &[terminal]);
            script.zero(libc::SYS_close, &[pidfd]);
            self.run(leader, leader.leader(), &script)?;
        }
        Ok(())
    }

    /// Stops what was stopped, and continues what was continued. Such a process still runs its
    /// tape: a tracer's PTRACE_CONT has it run in a group stop, to which it goes back as soon as
    /// nobody traces it (__ptrace_unlink()). What that queues for parents goes with
    /// [`super::signals::actions`].
    ///
    /// # Errors
    /// A process does not stop.
    pub fn stop_jobs(&mut self) -> Result<()> {
        let app = self.app;
        let living: Vec<Pid> = self.living().iter().map(|p| p.pid).collect();
        for process in app.processes.iter().filter(|p| living.contains(&p.pid)) {
            let parent = process.parent.filter(|parent| living.contains(parent));
            match (process.stopped, parent) {
                (Some(stop), Some(parent)) => {
                    self.stop(process, stop.signal_of(app, process))?;
                    if stop.reported {
                        self.take_report(parent, process.pid)?;
                    }
                }
                (Some(_), None) => self.stop(process, libc::SIGSTOP)?,
                (None, Some(_)) if process.continued => {
                    self.stop(process, libc::SIGSTOP)?;
                    self.continue_(process.pid)?;
                }
                (None, _) => {}
            }
        }
        Ok(())
    }

    /// Instead of the trap that its tape ended with, the process gets the signal.
    fn stop(&self, process: &Process, signal: i32) -> Result<()> {
        let tid = process.pid.leader();
        let blocked = ptrace::sigmask(tid)?;
        let bit = u32::try_from(signal - 1).map_or(0, |n| 1_u64 << n);
        // A blocked one would be put back (ptrace_signal()).
        ptrace::set_sigmask(tid, blocked & !bit)?;
        ptrace::cont(tid, signal)?;
        match ptrace::wait_stop(tid)? {
            Stop::Interrupted(found) if found == signal => {}
            other => return Err(lost(process.pid, other, "")),
        }
        ptrace::set_sigmask(tid, blocked)?;
        Ok(())
    }

    /// The parent waits for it, as it has done.
    fn take_report(&mut self, parent: Pid, pid: Pid) -> Result<()> {
        let mut script = Script::default();
        let flags = number(libc::WUNTRACED | libc::WNOHANG | libc::__WALL);
        let expect = Expect::Is(pid.0.into());
        script.add(libc::SYS_wait4, &[number(pid.0), 0, flags, 0], expect);
        self.run(parent, parent.leader(), &script)?;
        Ok(())
    }

    fn continue_(&self, pid: Pid) -> Result<()> {
        let raw = nix::unistd::Pid::from_raw(pid.0);
        kill(raw, Signal::SIGCONT).map_err(RestoreError::system(format!("kill {pid}")))?;
        // Resumed, it tells its parent and then stops again to tell us (JOBCTL_TRAP_NOTIFY).
        ptrace::cont(pid.leader(), 0)?;
        match ptrace::wait_stop(pid.leader())? {
            Stop::Interrupted(_) => Ok(()),
            other => Err(lost(pid, other, "")),
        }
    }
}

impl JobStop {
    /// The signal to stop it with. Once it was reported nothing shows which one it was, and all
    /// but `SIGSTOP` leave an orphaned process group alone (get_signal()).
    fn signal_of(self, app: &Application, process: &Process) -> i32 {
        if self.reported || is_orphaned(app, process.pgid, process.sid) {
            return libc::SIGSTOP;
        }
        self.signal
    }
}

/// will_become_orphaned_pgrp(): nobody in the group has a parent in another group of the session.
fn is_orphaned(app: &Application, pgid: Pid, sid: Pid) -> bool {
    let of = |pid: Pid| app.processes.iter().find(|p| p.pid == pid);
    let members = app
        .processes
        .iter()
        .filter(|p| p.pgid == pgid && p.zombie.is_none());
    let mut parents = members.filter_map(|p| p.parent.and_then(of));
    !parents.any(|parent| parent.pgid != pgid && parent.sid == sid)
}
