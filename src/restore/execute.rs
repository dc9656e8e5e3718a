//! How scripts are executed: by one thread, or by many at the same time. Each time that the
//! supervisor waits for one alone, both are woken for little; so whatever need not wait for another
//! is begun first and waited for afterwards.

use super::RestoreError;
use super::supervisor::Supervisor;
use super::tape::{Call, Script, Tape};
use super::tree::lost;
use crate::model::ids::{Pid, Tid};
use crate::sys::ptrace::{self, Stop};
use nix::libc;

type Result<T> = std::result::Result<T, RestoreError>;

impl Supervisor<'_> {
    /// Executes a script on one stopped thread; its results.
    pub(super) fn run(&self, pid: Pid, tid: Tid, script: &Script) -> Result<Vec<i64>> {
        self.begin(pid, tid, script)?;
        self.complete(pid, tid, script)
    }

    /// Begins to execute a script on a stopped thread; no other thread of the process may be
    /// executing one.
    pub(super) fn begin(&self, pid: Pid, tid: Tid, script: &Script) -> Result<()> {
        let first = script.calls.chunks(Tape::CAPACITY).next();
        first.map_or(Ok(()), |calls| self.start(pid, tid, 0, calls))
    }

    /// Waits until the script is executed that was begun; its results.
    pub(super) fn complete(&self, pid: Pid, tid: Tid, script: &Script) -> Result<Vec<i64>> {
        let mut results = Vec::with_capacity(script.calls.len());
        for (number, calls) in script.calls.chunks(Tape::CAPACITY).enumerate() {
            if number > 0 {
                self.start(pid, tid, 0, calls)?;
            }
            results.extend(self.finish(pid, tid, 0, calls)?);
        }
        Ok(results)
    }

    /// Begins to execute scripts on stopped threads of one process. If they are several, they must
    /// fit on the tape together.
    pub(super) fn begin_together(&self, pid: Pid, scripts: &[(Tid, Script)]) -> Result<()> {
        if let [(tid, script)] = scripts {
            return self.begin(pid, *tid, script);
        }
        let mut first = 0;
        for (tid, script) in scripts {
            self.start(pid, *tid, first, &script.calls)?;
            first += script.calls.len();
        }
        Ok(())
    }

    /// Waits until the scripts are executed that were begun together.
    pub(super) fn complete_together(&self, pid: Pid, scripts: &[(Tid, Script)]) -> Result<()> {
        if let [(tid, script)] = scripts {
            return self.complete(pid, *tid, script).map(drop);
        }
        let mut first = 0;
        for (tid, script) in scripts {
            self.finish(pid, *tid, first, &script.calls)?;
            first += script.calls.len();
        }
        Ok(())
    }

    /// Has a stopped thread execute calls, as entries of its tape from `first` on.
    pub(super) fn start(&self, pid: Pid, tid: Tid, first: usize, calls: &[Call]) -> Result<()> {
        let tape = self.tapes.get(&pid).ok_or(RestoreError::NoRoom)?;
        tape.load(first, calls);
        let regs = ptrace::registers(tid)?;
        ptrace::set_registers(tid, &tape.registers(&regs, first, calls.len()))?;
        ptrace::cont(tid, 0)?;
        Ok(())
    }

    /// Waits until a thread has executed its calls; their results.
    fn finish(&self, pid: Pid, tid: Tid, first: usize, calls: &[Call]) -> Result<Vec<i64>> {
        await_stop(pid, tid, |stop| matches!(stop, Stop::Signal(libc::SIGTRAP)))?;
        let tape = self.tapes.get(&pid).ok_or(RestoreError::NoRoom)?;
        let results = tape.results(first, calls.len());
        match Script::refused(calls, &results) {
            None => Ok(results),
            Some(refusal) => Err(RestoreError::Refused {
                pid,
                tid,
                refusal: Box::new(refusal),
            }),
        }
    }
}

/// Waits for a stop of a thread, which must be of this kind.
pub(super) fn await_stop(pid: Pid, tid: Tid, is_it: impl Fn(&Stop) -> bool) -> Result<()> {
    match ptrace::wait_stop(tid)? {
        stop if is_it(&stop) => Ok(()),
        other => Err(lost(pid, other, "")),
    }
}
