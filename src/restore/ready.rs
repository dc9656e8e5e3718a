//! The state that threads go on with, when everything stands: system calls in progress, timers,
//! registers. The tape goes with it.

use super::RestoreError;
use super::execute::await_stop;
use super::resume::{self, Resumption, Timeout};
use super::signals;
use super::supervisor::Supervisor;
use super::tape::{Refusal, Script, Tape};
use crate::model::frozen::{Process, Registers, Thread};
use crate::model::ids::Pid;
use crate::sys::process::write_memory;
use crate::sys::ptrace::{self, Stop};
use nix::libc;

type Result<T> = std::result::Result<T, RestoreError>;

impl Supervisor<'_> {
    /// Gives every thread the state it goes on with. After this nothing but [`Self::release`]
    /// may be done to it.
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn make_ready(&mut self) -> Result<()> {
        let processes = self.living();
        let ready = self.prime_all(&processes)?;
        let elapsed = self.clocks.elapsed()?;
        self.run_all(&processes, |tape, process| {
            let mut script = Script::default();
            signals::arm(&mut script, tape, process, elapsed)?;
            Ok(script)
        })?;
        self.drop_tapes(&processes)?;
        for (process, ready) in processes.iter().zip(&ready) {
            // What of the registers the kernel has room for is the same for all threads.
            let xstate = ptrace::xstate(process.pid.leader())?;
            for (thread, regs) in process.threads.iter().zip(ready) {
                put_registers(thread, regs, &xstate)?;
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

    /// Has calls issued that were sleeping with a timeout, so that the kernel holds their restart
    /// blocks again; the registers that each thread of each process goes on with.
    fn prime_all(&mut self, processes: &[&Process]) -> Result<Vec<Vec<Registers>>> {
        let mut ready = vec![Vec::new(); processes.len()];
        let parts = |process: &&Process| process.threads.len().div_ceil(Tape::CAPACITY);
        let most = processes.iter().map(parts).max().unwrap_or(0);
        // As many threads of a process as its tape has room for, of all processes together.
        for part in 0..most {
            let mut primed = Vec::new();
            for (number, process) in processes.iter().enumerate() {
                self.tape(process.pid)?.clear_data();
                let threads = process.threads.chunks(Tape::CAPACITY).nth(part);
                for (slot, thread) in threads.unwrap_or_default().iter().enumerate() {
                    let regs = self.prime(process.pid, thread, slot)?;
                    if regs.is_none() {
                        primed.push((number, ready[number].len(), process.pid, thread));
                    }
                    ready[number].push(regs.unwrap_or(thread.regs));
                }
            }
            for (_, _, pid, thread) in &primed {
                await_stop(*pid, thread.tid, |stop| matches!(stop, Stop::Syscall))?;
                // Asked to stop at its entry, the call finds a signal pending as soon as it
                // would sleep: no need to wait until it does.
                ptrace::interrupt(thread.tid)?;
                ptrace::cont(thread.tid, 0)?;
            }
            for (number, at, pid, thread) in primed {
                await_stop(pid, thread.tid, |stop| matches!(stop, Stop::Interrupted(_)))?;
                let result = ptrace::registers(thread.tid)?.rax.cast_signed();
                ready[number][at] = resume::after_priming(&thread.regs, result);
            }
        }
        Ok(ready)
    }

    /// The registers that a thread goes on with, or has it enter a call, which is in a slot of the
    /// tape.
    fn prime(&mut self, pid: Pid, thread: &Thread, slot: usize) -> Result<Option<Registers>> {
        let now = self.clocks.now()?;
        let (mut call, timeout) = match resume::resumption(thread, now) {
            Resumption::Registers(regs) => return Ok(Some(regs)),
            Resumption::Prime { call, timeout } => (call, timeout),
        };
        let tape = self.tape(pid)?;
        if let Timeout::Timespec { index, nanos } = timeout {
            let words = [nanos / 1_000_000_000, nanos % 1_000_000_000];
            call.args[index] = signals::words_to(tape, &words)?;
        }
        tape.load(slot, &[call]);
        let regs = ptrace::registers(thread.tid)?;
        ptrace::set_registers(thread.tid, &tape.registers(&regs, slot, 1))?;
        ptrace::run_to_syscall(thread.tid)?;
        Ok(None)
    }

    /// The leaders' last calls: `SIGTRAP` gets its action, the tape goes. No `int3` any more from
    /// here on, so they are followed from one system call to the next.
    fn drop_tapes(&mut self, processes: &[&Process]) -> Result<()> {
        let mut scripts = Vec::with_capacity(processes.len());
        for process in processes {
            let tape = self.tape(process.pid)?;
            tape.clear_data();
            let mut script = Script::default();
            signals::trap_action(&mut script, tape, process)?;
            script.zero(libc::SYS_munmap, &[tape.addr(), Tape::LEN as u64]);
            tape.load(0, &script.calls);
            let tid = process.pid.leader();
            let regs = ptrace::registers(tid)?;
            ptrace::set_registers(tid, &tape.registers(&regs, 0, script.calls.len()))?;
            ptrace::run_to_syscall(tid)?;
            scripts.push((process.pid, script));
        }
        for (pid, script) in &scripts {
            let tid = pid.leader();
            for (number, call) in script.calls.iter().enumerate() {
                if number > 0 {
                    ptrace::run_to_syscall(tid)?;
                }
                await_stop(*pid, tid, |stop| matches!(stop, Stop::Syscall))?;
                ptrace::run_to_syscall(tid)?;
                await_stop(*pid, tid, |stop| matches!(stop, Stop::Syscall))?;
                let result = ptrace::registers(tid)?.rax.cast_signed();
                if result != 0 {
                    let refusal = Box::new(Refusal {
                        call: *call,
                        result,
                    });
                    let pid = *pid;
                    return Err(RestoreError::Refused { pid, tid, refusal });
                }
            }
            // From a system call stop the kernel would not restart what the saved registers say.
            ptrace::interrupt(tid)?;
            ptrace::cont(tid, 0)?;
        }
        for (pid, _) in &scripts {
            await_stop(*pid, pid.leader(), |stop| {
                matches!(stop, Stop::Interrupted(_))
            })?;
        }
        Ok(())
    }
}

fn put_registers(thread: &Thread, regs: &Registers, xstate: &[u8]) -> Result<()> {
    let tid = thread.tid;
    if !thread.xstate.is_empty() {
        let (state, lost) = resume::fit_xstate(&thread.xstate, xstate);
        if lost != 0 {
            tracing::warn!(%tid, "This CPU lacks extended register sets {lost:#x}; they are lost");
        }
        ptrace::set_xstate(tid, &state)?;
    }
    ptrace::set_registers(tid, regs)?;
    ptrace::set_sigmask(tid, thread.sigmask)?;
    Ok(())
}
