//! A forked process that takes part in a case.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{
    SaFlags, SigAction, SigHandler, SigSet, SigmaskHow, Signal, kill, sigaction, sigprocmask,
};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::probe::blocked_in;

/// A forked process; killed on drop.
pub struct Child {
    /// Its PID.
    pub pid: Pid,
    name: String,
    error: PathBuf,
    ended: bool,
}

/// The child's way to wait for its parent.
pub struct Turn(());

/// fork(2), or clone(2) without a stack, which is the same but for what is shared.
///
/// # Safety
/// As for fork(2); no `CLONE_VM`.
unsafe fn fork_sharing(flags: i32) -> nix::Result<ForkResult> {
    if flags == 0 {
        // SAFETY: as for this function.
        return unsafe { fork() };
    }
    // SAFETY: as for this function; null pointers are not used by these flags.
    let result = unsafe { libc::syscall(libc::SYS_clone, flags | libc::SIGCHLD, 0, 0, 0, 0) };
    forked(result)
}

/// As fork(2); the child gets this PID.
///
/// # Safety
/// As for fork(2).
unsafe fn fork_numbered(pid: Pid) -> nix::Result<ForkResult> {
    let number = pid.as_raw();
    // SAFETY: all of it may be zeroes.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.exit_signal = libc::SIGCHLD.unsigned_abs().into();
    args.set_tid = (&raw const number).addr() as u64;
    args.set_tid_size = 1;
    // SAFETY: as for this function; the number is read only.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) };
    forked(result)
}

fn forked(result: libc::c_long) -> nix::Result<ForkResult> {
    Ok(match nix::errno::Errno::result(result)? {
        0 => ForkResult::Child,
        child => ForkResult::Parent {
            child: Pid::from_raw(i32::try_from(child).unwrap_or(-1)),
        },
    })
}

extern "C" fn nothing(_: libc::c_int) {}

impl Turn {
    /// Sleeps in sigsuspend until the parent says [`Child::go`].
    pub fn wait(&self) {
        let mut mask = SigSet::thread_get_mask().unwrap_or_else(|_| SigSet::empty());
        mask.remove(Signal::SIGUSR1);
        // Returns EINTR by definition.
        // SAFETY: the mask lives across the call.
        unsafe { libc::sigsuspend(mask.as_ref()) };
    }
}

impl Child {
    /// Forks; the child runs `body` and exits with 0 if it succeeds. The
    /// caller must have no other thread.
    pub fn start(dir: &Path, name: &str, body: impl FnOnce(&Turn) -> Result<()>) -> Result<Child> {
        Child::sharing(0, dir, name, body)
    }

    /// As [`Child::start`], by clone(2) with these `CLONE_*` flags. With
    /// `CLONE_FILES` the body must own no descriptor: it would be closed for
    /// both.
    pub fn sharing(
        flags: i32,
        dir: &Path,
        name: &str,
        body: impl FnOnce(&Turn) -> Result<()>,
    ) -> Result<Child> {
        // SAFETY: this process has one thread.
        Child::born(|| unsafe { fork_sharing(flags) }, dir, name, body)
    }

    /// As [`Child::start`]; it gets this PID.
    pub fn numbered(
        pid: Pid,
        dir: &Path,
        name: &str,
        body: impl FnOnce(&Turn) -> Result<()>,
    ) -> Result<Child> {
        // SAFETY: this process has one thread.
        Child::born(|| unsafe { fork_numbered(pid) }, dir, name, body)
    }

    fn born(
        fork: impl FnOnce() -> nix::Result<ForkResult>,
        dir: &Path,
        name: &str,
        body: impl FnOnce(&Turn) -> Result<()>,
    ) -> Result<Child> {
        let error = dir.join(format!("child-{name}"));
        let mut mask = SigSet::empty();
        mask.add(Signal::SIGUSR1);
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None).context("Block SIGUSR1")?;
        match fork().context("Fork")? {
            ForkResult::Parent { child } => Ok(Child {
                pid: child,
                name: name.to_owned(),
                error,
                ended: false,
            }),
            ForkResult::Child => {
                let action = SigAction::new(
                    SigHandler::Handler(nothing),
                    SaFlags::empty(),
                    SigSet::empty(),
                );
                // SAFETY: the handler does nothing.
                let prepared =
                    unsafe { sigaction(Signal::SIGUSR1, &action) }.context("Handle SIGUSR1");
                let code = match prepared.and_then(|_| body(&Turn(()))) {
                    Ok(()) => 0,
                    Err(reason) => {
                        // The exit code tells as well.
                        let _ = fs::write(&error, format!("{reason:#}"));
                        1
                    }
                };
                // SAFETY: ends the process without running the parent's
                // exit handlers.
                unsafe { libc::_exit(code) }
            }
        }
    }

    /// Waits until the child sleeps in [`Turn::wait`].
    pub fn waits(&self) -> Result<()> {
        self.sleeps_in(libc::SYS_rt_sigsuspend)
    }

    /// Waits until the child sleeps in this system call.
    pub fn sleeps_in(&self, number: i64) -> Result<()> {
        blocked_in(self.pid, number).with_context(|| self.said())
    }

    /// Ends the child's [`Turn::wait`].
    pub fn go(&self) -> Result<()> {
        kill(self.pid, Signal::SIGUSR1).with_context(|| format!("Wake child {}", self.name))
    }

    /// Waits for the child's end, which must be a success.
    pub fn join(mut self) -> Result<()> {
        let status =
            waitpid(self.pid, None).with_context(|| format!("Wait for child {}", self.name))?;
        self.ended = true;
        if status != WaitStatus::Exited(self.pid, 0) {
            bail!("{} ({status:?})", self.said());
        }
        Ok(())
    }

    /// [`Child::go`], then [`Child::join`].
    pub fn finish(self) -> Result<()> {
        self.go()?;
        self.join()
    }

    fn said(&self) -> String {
        let reason = fs::read_to_string(&self.error).unwrap_or_default();
        format!("Child {}: {reason}", self.name)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if !self.ended {
            // It may be gone already.
            let _ = kill(self.pid, Signal::SIGKILL);
            let _ = waitpid(self.pid, None);
        }
    }
}
