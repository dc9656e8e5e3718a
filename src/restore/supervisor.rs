//! Drives the parked processes through their tapes until every thread stands, then lets go.

use super::creds::{Rights, option};
use super::execute::await_stop;
use super::layout::Layout;
use super::memory::{MemoryPlan, Rebuild};
use super::signals::{self, number};
use super::sources::Sources;
use super::tape::{Expect, Script, Tape};
use super::time::RestoredClocks;
use super::tree::{OPTIONS, lost};
use super::{RestoreError, semaphores, threads};
use crate::model::frozen::{Application, LockKind, Process, Thread};
use crate::model::ids::{Pid, Tid};
use crate::model::plan::Step;
use crate::sys::process::{prlimit, write_memory};
use crate::sys::ptrace::{self, Options, Stop};
use nix::libc;
use std::collections::BTreeMap;

/// What the supervisor knows of the application and its surroundings.
#[derive(Debug)]
pub struct Supervisor<'a> {
    /// The application.
    pub app: &'a Application,
    /// Addresses agreed on.
    pub layout: &'a Layout,
    /// A tape for each process.
    pub tapes: BTreeMap<Pid, Tape>,
    /// What may be handed on.
    pub rights: Rights,
    /// The application's clocks.
    pub clocks: RestoredClocks,
}

type Result<T> = std::result::Result<T, RestoreError>;

impl<'a> Supervisor<'a> {
    pub(super) fn tape(&mut self, pid: Pid) -> Result<&mut Tape> {
        self.tapes.get_mut(&pid).ok_or(RestoreError::NoRoom)
    }

    pub(super) fn living(&self) -> Vec<&'a Process> {
        let lives = |p: &&Process| p.zombie.is_none() && self.tapes.contains_key(&p.pid);
        self.app.processes.iter().filter(lives).collect()
    }

    /// Process groups that others lead.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn regroup(&mut self, steps: &[Step]) -> Result<()> {
        for step in steps {
            if let Step::JoinGroup { pid, pgid } = *step {
                let mut script = Script::default();
                script.zero(libc::SYS_setpgid, &[0, number(pgid.0)]);
                self.run(pid, pid.leader(), &script)?;
            }
        }
        Ok(())
    }

    /// The deaths of those who died.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn bury_all(&mut self, steps: &[Step]) -> Result<()> {
        for step in steps {
            if let Step::Die(pid) = *step {
                self.bury(pid)?;
            }
        }
        Ok(())
    }

    /// A zombie ends as it did: with its status, or by its signal (without a core file).
    fn bury(&mut self, pid: Pid) -> Result<()> {
        let Some(process) = self.app.processes.iter().find(|p| p.pid == pid) else {
            return Ok(());
        };
        if let Some(thread) = process.threads.first() {
            let mut comm = thread.comm.clone();
            comm.push(0);
            let tape = self.tape(pid)?;
            let comm = tape.data(&comm).ok_or(RestoreError::NoRoom)?;
            let mut script = Script::default();
            script.zero(libc::SYS_prctl, &[option(libc::PR_SET_NAME), comm]);
            self.run(pid, pid.leader(), &script)?;
        }
        prlimit(pid, libc::RLIMIT_CORE, Some((0, 0)))?;
        let status = process.zombie.unwrap_or(0);
        let tid = pid.leader();
        if libc::WIFSIGNALED(status) {
            ptrace::cont(tid, libc::WTERMSIG(status))?;
        } else {
            let mut script = Script::default();
            let code = number(libc::WEXITSTATUS(status));
            script.add(libc::SYS_exit_group, &[code], Expect::Anything);
            self.start(pid, tid, 0, &script.calls)?;
        }
        match ptrace::wait_stop(tid)? {
            Stop::Exited(_) | Stop::Killed(_) => Ok(()),
            other => Err(lost(pid, other, "")),
        }
    }

    /// Has all processes map what they had; what is left to be done to their memory when its
    /// pages are there.
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn map_all(&mut self) -> Result<Vec<(&'a Process, MemoryPlan)>> {
        let mut plans = Vec::new();
        for process in self.living() {
            let plan = self.plan_memory(process)?;
            self.begin(process.pid, process.pid.leader(), &plan.build)?;
            plans.push((process, plan));
        }
        for (process, plan) in &plans {
            self.complete(process.pid, process.pid.leader(), &plan.build)?;
        }
        Ok(plans)
    }

    /// The rest of the address spaces, signal actions and threads of all processes.
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn rebuild_all(&mut self, plans: &[(&Process, MemoryPlan)]) -> Result<()> {
        let app = self.app;
        for (process, plan) in plans {
            self.complete_memory(process, plan)?;
            self.begin(process.pid, process.pid.leader(), &plan.seal)?;
        }
        for (process, plan) in plans {
            self.complete(process.pid, process.pid.leader(), &plan.seal)?;
        }
        let processes: Vec<_> = plans.iter().map(|(process, _)| *process).collect();
        self.run_all(&processes, |tape, process| actions(tape, app, process))?;
        self.undo_semaphores(&processes)?;
        for process in &processes {
            write_proc(process)?;
            self.install_filters(process)?;
        }
        self.clone_threads(&processes)?;
        self.settle_all(&processes)?;
        for process in &processes {
            self.restore_timers(process)?;
        }
        self.run_all(&processes, last_calls)?;
        for process in &processes {
            for (resource, limit) in (0_u32..).zip(&process.rlimits) {
                prlimit(process.pid, resource, Some(*limit))?;
            }
        }
        // Now that nobody closes anything any more: closing any descriptor of a file gives up
        // all POSIX locks of the table on it (fcntl_locking(2)).
        self.run_all(&processes, |tape, process| posix_locks(tape, app, process))
    }

    /// What is undone of semaphore operations when a process ends.
    fn undo_semaphores(&mut self, processes: &[&Process]) -> Result<()> {
        let app = self.app;
        let sets = &app.header.semaphores;
        if sets.iter().all(|set| set.adjustments.is_empty()) {
            return Ok(());
        }
        self.run_all(processes, |tape, process| {
            semaphores::adjust(tape, app, process)
        })?;
        self.run_all(processes, |tape, process| {
            semaphores::touch(tape, app, process)
        })
    }

    /// Has the leaders of all processes execute a script each.
    pub(super) fn run_all(
        &mut self,
        processes: &[&Process],
        write: impl Fn(&mut Tape, &Process) -> Result<Script>,
    ) -> Result<()> {
        let mut scripts = Vec::with_capacity(processes.len());
        for process in processes {
            let pid = process.pid;
            let tape = self.tape(pid)?;
            tape.clear_data();
            let script = write(tape, process)?;
            self.begin(pid, pid.leader(), &script)?;
            scripts.push((pid, script));
        }
        for (pid, script) in &scripts {
            self.complete(*pid, pid.leader(), script)?;
        }
        Ok(())
    }

    fn plan_memory(&mut self, process: &Process) -> Result<MemoryPlan> {
        let app = self.app;
        let pid = process.pid;
        let mm = app.mms.get(&process.mm).ok_or(RestoreError::NoRoom)?;
        let mut pages = mm.pages.clone();
        pages.sort_unstable_by_key(|run| run.addr);
        let rebuild = Rebuild {
            process,
            mm,
            pages: &pages,
            layout: self.layout,
            sources: &Sources::of(app, process),
            stale_rseq: ptrace::rseq_configuration(pid.leader())?,
        };
        let tape = self.tape(pid)?;
        tape.clear_data();
        rebuild.plan(tape)
    }

    /// What is neither pages nor to be sealed.
    fn complete_memory(&mut self, process: &Process, plan: &MemoryPlan) -> Result<()> {
        let app = self.app;
        let pid = process.pid;
        let mm = app.mms.get(&process.mm).ok_or(RestoreError::NoRoom)?;
        let sources = &Sources::of(app, process);
        let readable = sources.exe().ok_or(RestoreError::NoRoom)?;
        for (addr, bytes) in &plan.pokes {
            write_memory(pid, *addr, bytes)?;
        }
        self.make_contexts(pid, mm, readable)?;
        self.map_rings(pid, mm, sources)
    }

    /// All threads but the leaders.
    fn clone_threads(&mut self, processes: &[&Process]) -> Result<()> {
        let several = processes.iter().filter(|p| p.threads.len() > 1);
        let several: Vec<_> = several.copied().collect();
        for process in &several {
            // They are traced from birth for being cloned so. An event of each would stop the
            // leader.
            let mut options = OPTIONS.difference(Options::TRACE_CLONE);
            options.set(Options::SUSPEND_SECCOMP, !process.seccomp.is_empty());
            ptrace::set_options(process.pid.leader(), options)?;
        }
        self.run_all(&several, threads::clone_all)?;
        for process in several {
            for thread in process.threads.iter().skip(1) {
                await_stop(process.pid, thread.tid, |stop| {
                    matches!(stop, Stop::Interrupted(_))
                })?;
            }
        }
        Ok(())
    }

    /// What each thread has of its own.
    fn settle_all(&mut self, processes: &[&Process]) -> Result<()> {
        let mut begun = Vec::with_capacity(processes.len());
        for process in processes {
            let scripts = self.settlements(process, &process.threads)?;
            self.begin_together(process.pid, &scripts)?;
            begun.push(scripts);
        }
        for (process, mut scripts) in processes.iter().zip(begun) {
            let mut left = &process.threads[..];
            loop {
                self.complete_together(process.pid, &scripts)?;
                left = &left[scripts.len()..];
                if left.is_empty() {
                    break;
                }
                scripts = self.settlements(process, left)?;
                self.begin_together(process.pid, &scripts)?;
            }
        }
        Ok(())
    }

    /// The scripts of as many threads as the tape has room for, and of one at least.
    fn settlements(&mut self, process: &Process, left: &[Thread]) -> Result<Vec<(Tid, Script)>> {
        let rights = self.rights;
        let tape = self.tape(process.pid)?;
        tape.clear_data();
        let (mut scripts, mut calls) = (Vec::new(), 0);
        for thread in left {
            let mut script = Script::default();
            match threads::settle(&mut script, tape, process, thread, rights) {
                Err(RestoreError::NoRoom) if !scripts.is_empty() => break,
                settled => settled?,
            }
            calls += script.calls.len();
            if calls > Tape::CAPACITY && !scripts.is_empty() {
                break;
            }
            scripts.push((thread.tid, script));
        }
        Ok(scripts)
    }

    /// Filters of system calls, while there is one thread: those it clones share them, which
    /// `SECCOMP_FILTER_FLAG_TSYNC` counts on. What the tape still has to call may be forbidden, so
    /// they apply only when the tracer lets go.
    fn install_filters(&mut self, process: &Process) -> Result<()> {
        let pid = process.pid;
        if process.seccomp.is_empty() {
            return Ok(());
        }
        let options = OPTIONS.union(Options::SUSPEND_SECCOMP);
        ptrace::set_options(pid.leader(), options)?;
        for filter in &process.seccomp {
            let tape = self.tape(pid)?;
            tape.clear_data();
            let mut script = Script::default();
            threads::filter(&mut script, tape, filter)?;
            self.run(pid, pid.leader(), &script)?;
        }
        Ok(())
    }

    fn restore_timers(&mut self, process: &Process) -> Result<()> {
        if process.posix_timers.is_empty() {
            return Ok(());
        }
        let pid = process.pid;
        let mut script = Script::default();
        signals::request_timer_ids(&mut script);
        let on_request = self.run(pid, pid.leader(), &script)? == [0];
        let tape = self.tape(pid)?;
        tape.clear_data();
        let mut script = Script::default();
        let timers = &process.posix_timers;
        let ids = signals::create_timers(&mut script, tape, timers, on_request)?;
        self.run(pid, pid.leader(), &script)?;
        for (addr, wanted) in ids {
            let mut id = [0; 4];
            self.tape(pid)?.read_data(addr, &mut id);
            if i32::from_ne_bytes(id) != wanted {
                return Err(RestoreError::Unsupported {
                    pid,
                    what: format!("POSIX timer with id {wanted}"),
                });
            }
        }
        Ok(())
    }

    /// Lets all threads run.
    ///
    /// # Errors
    /// A thread is gone.
    pub fn release(&self) -> Result<()> {
        for process in self.living() {
            for thread in &process.threads {
                ptrace::detach(thread.tid)?;
            }
        }
        Ok(())
    }
}

/// Signal actions and what the process alone may say of itself.
fn actions(tape: &mut Tape, app: &Application, process: &Process) -> Result<Script> {
    let mut script = Script::default();
    signals::actions(&mut script, tape, process)?;
    if process.personality != 0 {
        let args = [process.personality.into()];
        script.add(libc::SYS_personality, &args, Expect::Ok);
    }
    if process.child_subreaper {
        script.zero(libc::SYS_prctl, &[option(libc::PR_SET_CHILD_SUBREAPER), 1]);
    }
    semaphores::values(&mut script, app, process);
    Ok(script)
}

/// What is said of a process through procfs.
fn write_proc(process: &Process) -> Result<()> {
    let pid = process.pid;
    let write = |file: &str, value: String| {
        let path = format!("/proc/{pid}/{file}");
        std::fs::write(&path, value).map_err(RestoreError::io(format!("write {path}")))
    };
    write("oom_score_adj", process.oom_score_adj.to_string())?;
    if process.autogroup_nice != 0 {
        write("autogroup", process.autogroup_nice.to_string())?;
    }
    match process.coredump_filter {
        None => Ok(()),
        Some(filter) => write("coredump_filter", format!("{filter:#x}")),
    }
}

/// The last calls before the process's limits apply.
fn last_calls(tape: &mut Tape, process: &Process) -> Result<Script> {
    let mut script = Script::default();
    signals::queue(&mut script, tape, process, None, &process.pending)?;
    // Changing ids resets it; 2 cannot be set, it comes with the change.
    if process.dumpable < 2 {
        let args = [option(libc::PR_SET_DUMPABLE), process.dumpable.into()];
        script.zero(libc::SYS_prctl, &args);
    }
    Ok(script)
}

/// The calls that take the process's POSIX locks.
fn posix_locks(tape: &mut Tape, app: &Application, process: &Process) -> Result<Script> {
    let mut script = Script::default();
    let table = app.files.get(&process.files).map_or(&[][..], |t| &t.fds);
    for entry in table {
        let locks = app.ofds.get(&entry.ofd).map_or(&[][..], |o| &o.locks);
        for lock in locks {
            if lock.kind != LockKind::Posix || lock.pid != process.pid {
                continue;
            }
            let kind = if lock.exclusive {
                libc::F_WRLCK
            } else {
                libc::F_RDLCK
            };
            // struct flock: type and whence (0 = SEEK_SET), start, length, PID.
            let words = [number(kind), lock.start, lock.len, 0];
            let addr = signals::words_to(tape, &words)?;
            let args = [number(entry.fd.0), number(libc::F_SETLK), addr];
            script.zero(libc::SYS_fcntl, &args);
        }
    }
    Ok(script)
}
