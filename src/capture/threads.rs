//! Reads the threads of a frozen cgroup: their registers from the iterator's records, and, stopped
//! under ptrace and let go again unharmed, those of which these do not tell all.

use super::error::CheckpointError;
use super::restart::{self, Now};
use super::wakeups::Wakeups;
use crate::bpf::events::ThreadRec;
use crate::bpf::iter::{Tasks, ThreadRegisters};
use crate::model::frozen::{Registers, Rseq, SigInfo, SyscallInProgress};
use crate::model::ids::{Pid, Tid};
use crate::sys::memory::read_words;
use crate::sys::process::CallError;
use crate::sys::ptrace::{self, Options, Stop};
use nix::errno::Errno;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Of `task_struct.__state` (include/linux/sched.h): "D" to /proc.
pub(super) const TASK_UNINTERRUPTIBLE: u32 = 2;

/// One thread that stands still.
#[derive(Debug)]
pub struct Stopped {
    /// Who.
    pub tid: Tid,
    /// Its process.
    pub pid: Pid,
    /// Registers as an image carries them: `orig_rax` names the call in progress.
    pub regs: Registers,
    /// How that call goes on.
    pub syscall: SyscallInProgress,
    found: Registers,
    /// Extended registers in the standard XSAVE format, if the iterator told them.
    xstate: Option<Vec<u8>>,
}

impl Stopped {
    /// Whether ptrace has to have its call go on, which the kernel would not.
    fn is_reissued(&self) -> bool {
        matches!(self.syscall, SyscallInProgress::Reissue { .. })
    }
}

/// Threads of a frozen cgroup, some of them under ptrace. Dropping it lets these go, with calls
/// that only the freeze had interrupted set to go on.
#[derive(Debug, Default)]
pub struct Tracees {
    seized: Vec<Tid>,
    /// Of these, who may not have stopped yet.
    stopping: Vec<Tid>,
    /// All of them.
    pub threads: Vec<Stopped>,
    /// Where each is among them.
    places: HashMap<Tid, usize>,
    untouched: bool,
}

/// What tells how the calls of threads go on.
struct Records<'a> {
    threads: Vec<&'a ThreadRec>,
    /// Of the processes that have any.
    shared_pending: HashMap<u32, u64>,
    now: &'a Now,
}

impl<'a> Records<'a> {
    /// Of live threads that are to be looked at.
    fn of(tasks: &'a Tasks, now: &'a Now, wanted: impl Fn(&ThreadRec) -> bool) -> Self {
        let threads = tasks.threads.iter();
        let processes = tasks.processes.iter();
        let pending = processes.filter(|process| process.shared_pending != 0);
        Self {
            threads: threads
                .filter(|rec| !rec.is_zombie() && wanted(rec))
                .collect(),
            shared_pending: pending.map(|p| (p.pid, p.shared_pending)).collect(),
            now,
        }
    }

    fn signalled(&self, rec: &ThreadRec) -> bool {
        let shared = self.shared_pending.get(&rec.tgid).unwrap_or(&0);
        (rec.pending | shared) & !rec.blocked != 0
    }

    fn read(&self, rec: &ThreadRec, found: Registers, xstate: Option<Vec<u8>>) -> Stopped {
        let (syscall, regs) = restart::classify(&found, rec, self.now, self.signalled(rec));
        Stopped {
            tid: Tid(rec.tid.cast_signed()),
            pid: Pid(rec.tgid.cast_signed()),
            regs,
            syscall,
            found,
            xstate,
        }
    }

    /// Whether ptrace has to tell something about a thread whose registers are known: which
    /// signals wait for it or for its process, what its filters are.
    fn asks_ptrace(&self, rec: &ThreadRec) -> bool {
        let leads = rec.tid == rec.tgid;
        rec.pending != 0
            || leads && (rec.seccomp_filters != 0 || self.shared_pending.contains_key(&rec.tgid))
    }
}

impl Tracees {
    /// Reads the registers of all live threads among `tasks`, which were read since the cgroup was
    /// frozen. Those of which ptrace tells more are seized and interrupted.
    ///
    /// # Errors
    /// A thread is traced by somebody else, or does not stop before the deadline (a
    /// parent in vfork(2), which no ptrace stops).
    pub fn stop(
        tasks: &mut Tasks,
        wakeups: &Wakeups,
        limit: Duration,
        now: &Now,
    ) -> Result<Self, CheckpointError> {
        let known = std::mem::take(&mut tasks.registers);
        let records = Records::of(tasks, now, |_| true);
        Self::read(&records, known, Some(wakeups), limit)
    }

    /// Stops those that the freezer holds, but for whom their registers say that nothing has to be
    /// done, and lets them go at once, with calls that only the freeze had interrupted set to go
    /// on. A request to abort does not keep it from that.
    /// A thread that sleeps without the freezer (a parent in vfork(2)) has not been woken by it
    /// either: nothing of it is interrupted, and seized it would stop later, and stay.
    ///
    /// # Errors
    /// Some could not be stopped; they are let go when tracker ends.
    pub fn repair(
        tasks: &mut Tasks,
        wakeups: Option<&Wakeups>,
        limit: Duration,
        now: &Now,
    ) -> Result<(), CheckpointError> {
        let known = std::mem::take(&mut tasks.registers);
        let held = |rec: &ThreadRec| rec.state & TASK_UNINTERRUPTIBLE == 0;
        let records = Records::of(tasks, now, held);
        Self::read(&records, known, wakeups, limit).map(drop)
    }

    fn read(
        records: &Records<'_>,
        mut known: HashMap<u32, ThreadRegisters>,
        wakeups: Option<&Wakeups>,
        limit: Duration,
    ) -> Result<Self, CheckpointError> {
        let mut this = Self::default();
        let mut awaited = Vec::new();
        for &rec in &records.threads {
            let told = known.remove(&rec.tid).filter(|_| !records.asks_ptrace(rec));
            let told = told.map(|told| records.read(rec, told.general, Some(told.extended)));
            let tid = Tid(rec.tid.cast_signed());
            if told.as_ref().is_none_or(Stopped::is_reissued) {
                ptrace::seize(tid, Options::SYSGOOD)?;
                this.seized.push(tid);
                ptrace::interrupt(tid)?;
            }
            match told {
                Some(thread) => {
                    if thread.is_reissued() {
                        // It has to have stopped when it is to run again, and not before.
                        this.stopping.push(tid);
                    }
                    this.add(thread);
                }
                None => awaited.push(tid),
            }
        }
        let stopped = wait(&awaited, wakeups, limit);
        for &rec in &records.threads {
            let tid = Tid(rec.tid.cast_signed());
            if this.places.contains_key(&tid) {
                continue;
            }
            let found = match ptrace::registers(tid) {
                // Those that did stop are read all the same: dropping them repairs their calls.
                Err(_) if stopped.is_err() => continue,
                found => found?,
            };
            this.add(records.read(rec, found, None));
        }
        stopped.map(|()| this)
    }

    fn add(&mut self, thread: Stopped) {
        self.places.insert(thread.tid, self.threads.len());
        self.threads.push(thread);
    }

    /// The registers of one thread.
    #[must_use]
    pub fn of(&self, tid: Tid) -> Option<&Stopped> {
        let at = self.places.get(&tid)?;
        self.threads.get(*at)
    }

    /// The extended registers of one thread in the standard XSAVE format, to be asked for once.
    ///
    /// # Errors
    /// `ESRCH`: it is not stopped.
    pub fn take_xstate(&mut self, tid: Tid) -> Result<Vec<u8>, CallError> {
        let at = self.places.get(&tid);
        let thread = at.and_then(|at| self.threads.get_mut(*at));
        match thread.and_then(|thread| thread.xstate.take()) {
            Some(known) => Ok(known),
            None => ptrace::xstate(tid),
        }
    }

    /// Lets go without undoing anything: the threads are about to be killed.
    pub fn abandon(mut self) {
        self.untouched = true;
    }
}

/// Waits until all of these have stopped.
fn wait(seized: &[Tid], wakeups: Option<&Wakeups>, limit: Duration) -> Result<(), CheckpointError> {
    let deadline = Instant::now() + limit;
    // One after another: all will have stopped when the last one has, and each that reports
    // wakes us.
    for &tid in seized {
        loop {
            match ptrace::poll_stop(tid)? {
                None => {}
                Some(Stop::Exited(_) | Stop::Killed(_)) => {
                    return Err(CallError {
                        call: "ptrace(INTERRUPT)",
                        task: tid.0,
                        errno: Errno::ESRCH,
                    }
                    .into());
                }
                Some(_) => break,
            }
            // A request to abort waits until all have stopped: one that is let go before
            // could not have its call repaired.
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Err(CheckpointError::Deadline {
                    task: format!("Thread {tid}"),
                    limit,
                    hint: "it is in vfork(2) or waits for a device: try again later",
                });
            }
            // SIGCHLD wakes us; should another thread of tracker have taken it, look again.
            let pause = rest.min(Duration::from_millis(20));
            match wakeups {
                Some(wakeups) => wakeups.wait_for_child(pause)?,
                None => std::thread::sleep(pause.min(Duration::from_millis(1))),
            }
        }
    }
    Ok(())
}

impl Drop for Tracees {
    fn drop(&mut self) {
        /// For machines that are very busy, as in a repair.
        const LIMIT: Duration = Duration::from_secs(5);
        if !self.untouched {
            if let Err(e) = wait(&self.stopping, None, LIMIT) {
                tracing::warn!("{e}");
            }
            for thread in self.threads.iter().filter(|thread| thread.is_reissued()) {
                let registers = restart::reissued(&thread.found);
                if let Err(e) = ptrace::set_registers(thread.tid, &registers) {
                    tracing::warn!("{e}; its system call ends with EINTR");
                }
            }
        }
        for &tid in &self.seized {
            // A thread that never stopped cannot be let go: it is when tracker ends.
            if let Err(e) = ptrace::detach(tid) {
                tracing::debug!("{e}");
            }
        }
    }
}

/// The rseq registrations of threads of one process, with their critical sections.
///
/// # Errors
/// `ESRCH`: one is not stopped; `EFAULT`: its area cannot be read.
pub fn rseqs(
    pid: Pid,
    threads: &[(&Stopped, &ThreadRec)],
) -> Result<HashMap<Tid, Rseq>, CallError> {
    /// struct rseq: cpu_id_start, cpu_id, rseq_cs; what follows was added later.
    const CS: u64 = 8;
    const ORIGINAL_LEN: u32 = 32;
    let mut found = Vec::new();
    for (thread, rec) in threads {
        let rseq = match thread.xstate {
            Some(_) => (rec.rseq != 0).then_some(Rseq {
                addr: rec.rseq,
                len: if rec.rseq_len == 0 {
                    ORIGINAL_LEN
                } else {
                    rec.rseq_len
                },
                sig: rec.rseq_sig,
                cs: 0,
            }),
            None => ptrace::rseq_configuration(thread.tid)?,
        };
        found.extend(rseq.map(|rseq| (thread.tid, rseq)));
    }
    let places: Vec<u64> = found.iter().map(|(_, rseq)| rseq.addr + CS).collect();
    for ((_, rseq), cs) in found.iter_mut().zip(read_words(pid, &places)?) {
        rseq.cs = cs;
    }
    Ok(found.into_iter().collect())
}

/// Signals queued for a thread or, with `shared`, for its process.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn pending(tid: Tid, shared: bool) -> Result<Vec<SigInfo>, CallError> {
    ptrace::pending_signals(tid, shared)
}
