//! Stops the threads of a frozen cgroup under ptrace and lets them go again unharmed.

use super::error::CheckpointError;
use super::restart::{self, Now};
use super::wakeups::Wakeups;
use crate::bpf::events::ThreadRec;
use crate::model::frozen::{Registers, Rseq, SigInfo, SyscallInProgress};
use crate::model::ids::{Pid, Tid};
use crate::sys::process::{CallError, read_memory_exact};
use crate::sys::ptrace::{self, Options, Stop};
use nix::errno::Errno;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Of `task_struct.__state` (include/linux/sched.h): "D" to /proc.
pub(super) const TASK_UNINTERRUPTIBLE: u32 = 2;

/// What ptrace tells about one stopped thread.
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
}

/// Threads under ptrace. Dropping it lets them go, with calls that only the freeze had
/// interrupted set to go on.
#[derive(Debug, Default)]
pub struct Tracees {
    seized: Vec<Tid>,
    /// In the order of the records given.
    pub threads: Vec<Stopped>,
    /// Where each is among them.
    places: HashMap<Tid, usize>,
    untouched: bool,
}

impl Tracees {
    /// Seizes, interrupts and waits for all live threads among `recs`, then reads their
    /// registers. The cgroup must be frozen, `recs` read since.
    ///
    /// # Errors
    /// A thread is traced by somebody else, or does not stop before the deadline (a
    /// parent in vfork(2), which no ptrace stops).
    pub fn stop(
        recs: &[ThreadRec],
        wakeups: &Wakeups,
        limit: Duration,
        now: &Now,
        shared_pending: impl Fn(u32) -> u64,
    ) -> Result<Self, CheckpointError> {
        Self::stop_unless(recs, Some(wakeups), limit, now, shared_pending)
    }

    /// Stops those that the freezer holds and lets them go at once, with calls that only the
    /// freeze had interrupted set to go on. A request to abort does not keep it from that.
    /// A thread that sleeps without the freezer (a parent in vfork(2)) has not been woken by it
    /// either: nothing of it is interrupted, and seized it would stop later, and stay.
    ///
    /// # Errors
    /// Some could not be stopped; they are let go when tracker ends.
    pub fn repair(
        recs: &[ThreadRec],
        limit: Duration,
        now: &Now,
        shared_pending: impl Fn(u32) -> u64,
    ) -> Result<(), CheckpointError> {
        let held = |rec: &&ThreadRec| rec.state & TASK_UNINTERRUPTIBLE == 0;
        let held: Vec<ThreadRec> = recs.iter().filter(held).copied().collect();
        Self::stop_unless(&held, None, limit, now, shared_pending).map(drop)
    }

    fn stop_unless(
        recs: &[ThreadRec],
        wakeups: Option<&Wakeups>,
        limit: Duration,
        now: &Now,
        shared_pending: impl Fn(u32) -> u64,
    ) -> Result<Self, CheckpointError> {
        let deadline = Instant::now() + limit;
        let live: Vec<&ThreadRec> = recs.iter().filter(|rec| !rec.is_zombie()).collect();
        let mut this = Self::default();
        for rec in &live {
            let tid = Tid(rec.tid.cast_signed());
            ptrace::seize(tid, Options::SYSGOOD)?;
            this.seized.push(tid);
        }
        for &tid in &this.seized {
            ptrace::interrupt(tid)?;
        }
        let stopped = this.wait(wakeups, deadline, limit);
        for rec in live {
            let signalled = (rec.pending | shared_pending(rec.tgid)) & !rec.blocked != 0;
            let tid = Tid(rec.tid.cast_signed());
            let found = match ptrace::registers(tid) {
                // Those that did stop are read all the same: dropping them repairs their calls.
                Err(_) if stopped.is_err() => continue,
                found => found?,
            };
            let (syscall, regs) = restart::classify(&found, rec, now, signalled);
            this.places.insert(tid, this.threads.len());
            this.threads.push(Stopped {
                tid,
                pid: Pid(rec.tgid.cast_signed()),
                regs,
                syscall,
                found,
            });
        }
        stopped.map(|()| this)
    }

    fn wait(
        &self,
        wakeups: Option<&Wakeups>,
        deadline: Instant,
        limit: Duration,
    ) -> Result<(), CheckpointError> {
        // One after another: all will have stopped when the last one has, and each that reports
        // wakes us.
        for &tid in &self.seized {
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

    /// The registers of one thread.
    #[must_use]
    pub fn of(&self, tid: Tid) -> Option<&Stopped> {
        let at = self.places.get(&tid)?;
        self.threads.get(*at)
    }

    /// Lets go without undoing anything: the threads are about to be killed.
    pub fn abandon(mut self) {
        self.untouched = true;
    }
}

impl Drop for Tracees {
    fn drop(&mut self) {
        for thread in &self.threads {
            if let SyscallInProgress::Reissue { .. } = thread.syscall
                && !self.untouched
                && let Err(e) = ptrace::set_registers(thread.tid, &restart::reissued(&thread.found))
            {
                tracing::warn!("{e}; its system call ends with EINTR");
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

/// The rseq registration of a stopped thread, with its critical section.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn rseq(thread: &Stopped) -> Result<Option<Rseq>, CallError> {
    let Some(mut rseq) = ptrace::rseq_configuration(thread.tid)? else {
        return Ok(None);
    };
    // struct rseq: cpu_id_start, cpu_id, rseq_cs.
    const CS: u64 = 8;
    let mut cs = [0_u8; 8];
    read_memory_exact(thread.pid, rseq.addr + CS, &mut cs)?;
    rseq.cs = u64::from_le_bytes(cs);
    Ok(Some(rseq))
}

/// Signals queued for a thread or, with `shared`, for its process.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn pending(tid: Tid, shared: bool) -> Result<Vec<SigInfo>, CallError> {
    ptrace::pending_signals(tid, shared)
}
