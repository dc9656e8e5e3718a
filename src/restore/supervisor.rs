//! Drives the parked processes through their tapes until every thread stands, then lets go.

use super::creds::{Rights, option};
use super::layout::Layout;
use super::memory::{MemoryPlan, Rebuild};
use super::resume::{self, Resumption, Timeout};
use super::signals::{self, number};
use super::sources::Sources;
use super::tape::{Call, Expect, Script, Tape};
use super::time::RestoredClocks;
use super::tree::{OPTIONS, lost};
use super::{RestoreError, semaphores, threads};
use crate::model::frozen::{Application, LockKind, Process, Registers, Thread};
use crate::model::ids::{Pid, Tid};
use crate::model::plan::Step;
use crate::sys::process::{prlimit, write_memory};
use crate::sys::ptrace::{self, EVENT_CLONE, Stop};
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

    pub(super) fn living(&self) -> impl Iterator<Item = &Process> + use<'_> {
        let tapes = &self.tapes;
        let all = self.app.processes.iter();
        all.filter(|p| p.zombie.is_none() && tapes.contains_key(&p.pid))
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
        let app = self.app;
        let living: Vec<_> = self.living().map(|p| p.pid).collect();
        let living = app.processes.iter().filter(|p| living.contains(&p.pid));
        let plans = living.map(|process| Ok((process, self.map(process)?)));
        plans.collect()
    }

    /// The rest of the address spaces, signal actions and threads of all processes.
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn rebuild_all(&mut self, plans: &[(&Process, MemoryPlan)]) -> Result<()> {
        let app = self.app;
        for (process, plan) in plans {
            self.finish_memory(process, plan)?;
            self.rebuild_process(process)?;
            self.rebuild_threads(process)?;
        }
        // Now that nobody closes anything any more: closing any descriptor of a file gives up
        // all POSIX locks of the table on it (fcntl_locking(2)).
        for (process, _) in plans {
            let tape = self.tape(process.pid)?;
            tape.clear_data();
            let mut script = Script::default();
            posix_locks(&mut script, tape, app, process)?;
            self.run(process.pid, process.pid.leader(), &script)?;
        }
        Ok(())
    }

    fn map(&mut self, process: &Process) -> Result<MemoryPlan> {
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
        let plan = rebuild.plan(tape)?;
        self.run(pid, pid.leader(), &plan.build)?;
        Ok(plan)
    }

    fn finish_memory(&mut self, process: &Process, plan: &MemoryPlan) -> Result<()> {
        let app = self.app;
        let pid = process.pid;
        let mm = app.mms.get(&process.mm).ok_or(RestoreError::NoRoom)?;
        let sources = &Sources::of(app, process);
        let readable = sources.exe().ok_or(RestoreError::NoRoom)?;
        for (addr, bytes) in &plan.pokes {
            write_memory(pid, *addr, bytes)?;
        }
        self.make_contexts(pid, mm, readable)?;
        self.map_rings(pid, mm, sources)?;
        self.run(pid, pid.leader(), &plan.seal)?;
        Ok(())
    }

    fn rebuild_process(&mut self, process: &Process) -> Result<()> {
        let app = self.app;
        let pid = process.pid;
        let tape = self.tape(pid)?;
        tape.clear_data();
        let mut script = Script::default();
        signals::actions(&mut script, tape, process)?;
        if process.personality != 0 {
            let args = [process.personality.into()];
            script.add(libc::SYS_personality, &args, Expect::Ok);
        }
        let mut flag = |option_: i32, set: bool| {
            if set {
                script.zero(libc::SYS_prctl, &[option(option_), 1]);
            }
        };
        flag(libc::PR_SET_CHILD_SUBREAPER, process.child_subreaper);
        semaphores::values(&mut script, app, process);
        self.run(pid, pid.leader(), &script)?;
        let path = format!("/proc/{pid}/oom_score_adj");
        std::fs::write(&path, process.oom_score_adj.to_string())
            .map_err(RestoreError::io(format!("write {path}")))?;
        let Some(filter) = process.coredump_filter else {
            return Ok(());
        };
        let path = format!("/proc/{pid}/coredump_filter");
        std::fs::write(&path, format!("{filter:#x}"))
            .map_err(RestoreError::io(format!("write {path}")))
    }

    fn rebuild_threads(&mut self, process: &Process) -> Result<()> {
        let pid = process.pid;
        self.install_filters(process)?;
        let tape = self.tape(pid)?;
        tape.clear_data();
        let mut script = Script::default();
        threads::clone_all(&mut script, tape, process)?;
        self.run_cloning(process, &script)?;
        for thread in &process.threads {
            let rights = self.rights;
            let tape = self.tape(pid)?;
            tape.clear_data();
            let mut script = Script::default();
            threads::settle(&mut script, tape, process, thread, rights)?;
            self.run(pid, thread.tid, &script)?;
        }
        self.restore_timers(process)?;
        let tape = self.tape(pid)?;
        tape.clear_data();
        let mut script = Script::default();
        signals::queue(&mut script, tape, process, None, &process.pending)?;
        // Changing ids resets it; 2 cannot be set, it comes with the change.
        if process.dumpable < 2 {
            let args = [option(libc::PR_SET_DUMPABLE), process.dumpable.into()];
            script.zero(libc::SYS_prctl, &args);
        }
        self.run(pid, pid.leader(), &script)?;
        for (resource, limit) in (0_u32..).zip(&process.rlimits) {
            prlimit(pid, resource, Some(*limit))?;
        }
        Ok(())
    }

    /// Filters of system calls, while there is one thread: those it clones share them, which
    /// `SECCOMP_FILTER_FLAG_TSYNC` counts on. What the tape still has to call may be forbidden, so
    /// they apply only when the tracer lets go.
    fn install_filters(&mut self, process: &Process) -> Result<()> {
        let pid = process.pid;
        if process.seccomp.is_empty() {
            return Ok(());
        }
        let options = OPTIONS.union(ptrace::Options::SUSPEND_SECCOMP);
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

    /// Executes a script on one stopped thread; its results.
    pub(super) fn run(&mut self, pid: Pid, tid: Tid, script: &Script) -> Result<Vec<i64>> {
        let mut results = Vec::with_capacity(script.calls.len());
        for calls in script.calls.chunks(Tape::CAPACITY) {
            self.start(pid, tid, 0, calls)?;
            await_trap(pid, tid)?;
            results.extend(self.finish(pid, tid, calls)?);
        }
        Ok(results)
    }

    fn start(&self, pid: Pid, tid: Tid, first: usize, calls: &[Call]) -> Result<()> {
        let tape = self.tapes.get(&pid).ok_or(RestoreError::NoRoom)?;
        tape.load(first, calls);
        let regs = ptrace::registers(tid)?;
        ptrace::set_registers(tid, &tape.registers(&regs, first, calls.len()))?;
        ptrace::cont(tid, 0)?;
        Ok(())
    }

    fn finish(&self, pid: Pid, tid: Tid, calls: &[Call]) -> Result<Vec<i64>> {
        let tape = self.tapes.get(&pid).ok_or(RestoreError::NoRoom)?;
        let results = tape.results(0, calls.len());
        match Script::refused(calls, &results) {
            None => Ok(results),
            Some(refusal) => Err(RestoreError::Refused {
                pid,
                tid,
                refusal: Box::new(refusal),
            }),
        }
    }

    /// Executes the leader's script of clones: each makes it stop, and a new thread stop.
    fn run_cloning(&mut self, process: &Process, script: &Script) -> Result<()> {
        let pid = process.pid;
        let leader = pid.leader();
        let is_new = |tid: Tid| process.threads.iter().skip(1).any(|t| t.tid == tid);
        let mut missing = process.threads.len() - 1;
        for calls in script.calls.chunks(Tape::CAPACITY) {
            self.start(pid, leader, 0, calls)?;
            loop {
                match ptrace::wait_any()? {
                    (tid, Stop::Event(EVENT_CLONE)) if tid == leader => ptrace::cont(tid, 0)?,
                    (tid, Stop::Signal(libc::SIGTRAP)) if tid == leader => break,
                    (tid, Stop::Interrupted(_)) if is_new(tid) => missing -= 1,
                    (_, other) => return Err(lost(pid, other, "")),
                }
            }
            self.finish(pid, leader, calls)?;
        }
        while missing > 0 {
            match ptrace::wait_any()? {
                (tid, Stop::Interrupted(_)) if is_new(tid) => missing -= 1,
                (_, other) => return Err(lost(pid, other, "")),
            }
        }
        Ok(())
    }

    /// Gives every thread the state it goes on with. After this nothing but [`Self::release`]
    /// may be done to it.
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn make_ready(&mut self) -> Result<()> {
        let app = self.app;
        let living: Vec<_> = self.living().map(|p| p.pid).collect();
        for process in app.processes.iter().filter(|p| living.contains(&p.pid)) {
            let mut ready = Vec::with_capacity(process.threads.len());
            for thread in &process.threads {
                ready.push(self.primed(process.pid, thread)?);
            }
            self.drop_tape(process)?;
            for (thread, regs) in process.threads.iter().zip(&ready) {
                put_registers(thread, regs)?;
            }
            // A running tape clears it: the last thing before the thread runs.
            for rseq in process.threads.iter().filter_map(|t| t.rseq) {
                if rseq.cs != 0 {
                    const RSEQ_CS_OFFSET: u64 = 8;
                    let addr = rseq.addr + RSEQ_CS_OFFSET;
                    write_memory(process.pid, addr, &rseq.cs.to_le_bytes())?;
                }
            }
        }
        Ok(())
    }

    /// Issues a call that was sleeping with a timeout, so that the kernel holds its restart
    /// block again; the registers the thread goes on with.
    fn primed(&mut self, pid: Pid, thread: &Thread) -> Result<Registers> {
        let now = self.clocks.now()?;
        let (mut call, timeout) = match resume::resumption(thread, now) {
            Resumption::Registers(regs) => return Ok(regs),
            Resumption::Prime { call, timeout } => (call, timeout),
        };
        if let Timeout::Timespec { index, nanos } = timeout {
            let tape = self.tape(pid)?;
            tape.clear_data();
            let words = [nanos / 1_000_000_000, nanos % 1_000_000_000];
            call.args[index] = signals::words_to(tape, &words)?;
        }
        let tid = thread.tid;
        let tape = self.tapes.get(&pid).ok_or(RestoreError::NoRoom)?;
        tape.load(0, &[call]);
        let regs = ptrace::registers(tid)?;
        ptrace::set_registers(tid, &tape.registers(&regs, 0, 1))?;
        ptrace::run_to_syscall(tid)?;
        match ptrace::wait_stop(tid)? {
            Stop::Syscall => {}
            other => return Err(lost(pid, other, "")),
        }
        // Asked to stop at its entry, the call finds a signal pending as soon as it would
        // sleep: no need to wait until it does.
        ptrace::interrupt(tid)?;
        ptrace::cont(tid, 0)?;
        match ptrace::wait_stop(tid)? {
            Stop::Interrupted(_) => {}
            other => return Err(lost(pid, other, "")),
        }
        let result = ptrace::registers(tid)?.rax.cast_signed();
        Ok(resume::after_priming(&thread.regs, result))
    }

    /// The leader's last calls: timers start to run, `SIGTRAP` gets its action, the tape goes.
    /// No `int3` any more from here on, so it is followed from one system call to the next.
    fn drop_tape(&mut self, process: &Process) -> Result<()> {
        let pid = process.pid;
        let tid = pid.leader();
        let elapsed = self.clocks.elapsed()?;
        let tape = self.tape(pid)?;
        tape.clear_data();
        let mut script = Script::default();
        signals::arm(&mut script, tape, process, elapsed)?;
        self.run(pid, tid, &script)?;
        let tape = self.tape(pid)?;
        let mut script = Script::default();
        signals::trap_action(&mut script, tape, process)?;
        let addr = tape.addr();
        script.zero(libc::SYS_munmap, &[addr, Tape::LEN as u64]);
        tape.load(0, &script.calls);
        let regs = ptrace::registers(tid)?;
        ptrace::set_registers(tid, &tape.registers(&regs, 0, script.calls.len()))?;
        for call in &script.calls {
            for _ in ["entry", "exit"] {
                ptrace::run_to_syscall(tid)?;
                match ptrace::wait_stop(tid)? {
                    Stop::Syscall => {}
                    other => return Err(lost(pid, other, "")),
                }
            }
            let result = ptrace::registers(tid)?.rax.cast_signed();
            if result != 0 {
                let refusal = super::tape::Refusal {
                    call: *call,
                    result,
                };
                return Err(RestoreError::Refused {
                    pid,
                    tid,
                    refusal: Box::new(refusal),
                });
            }
        }
        // From a system call stop the kernel would not restart what the saved registers say.
        ptrace::interrupt(tid)?;
        ptrace::cont(tid, 0)?;
        match ptrace::wait_stop(tid)? {
            Stop::Interrupted(_) => Ok(()),
            other => Err(lost(pid, other, "")),
        }
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

/// Adds the calls that take the process's POSIX locks.
fn posix_locks(
    script: &mut Script,
    tape: &mut Tape,
    app: &Application,
    process: &Process,
) -> Result<()> {
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
    Ok(())
}

fn await_trap(pid: Pid, tid: Tid) -> Result<()> {
    match ptrace::wait_stop(tid)? {
        Stop::Signal(libc::SIGTRAP) => Ok(()),
        other => Err(lost(pid, other, "")),
    }
}

fn put_registers(thread: &Thread, regs: &Registers) -> Result<()> {
    let tid = thread.tid;
    if !thread.xstate.is_empty() {
        let current = ptrace::xstate(tid)?;
        let (state, lost) = resume::fit_xstate(&thread.xstate, &current);
        if lost != 0 {
            tracing::warn!(%tid, "This CPU lacks extended register sets {lost:#x}; they are lost");
        }
        ptrace::set_xstate(tid, &state)?;
    }
    ptrace::set_registers(tid, regs)?;
    ptrace::set_sigmask(tid, thread.sigmask)?;
    Ok(())
}
