//! ptrace(2), the seize family only: the tracee is never signalled.
//!
//! Every call names the thread it failed on. A tracee belongs to the *thread* that
//! seized it, so all calls for one tracee come from one thread.

use super::process::{CallError, SIGINFO_LEN};
use crate::model::frozen::{Registers, Rseq, SigInfo};
use crate::model::ids::Tid;
use nix::errno::Errno;
use nix::libc;
use std::ffi::c_void;
use std::ptr::null_mut;

type Result<T> = std::result::Result<T, CallError>;

bitflags::bitflags! {
    /// `PTRACE_O_*` used here.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Options: i32 {
        /// System call stops are told apart from `SIGTRAP`.
        const SYSGOOD = 0x1;
        /// Processes the tracee forks are seized too.
        const TRACE_FORK = 0x2;
        /// Threads the tracee clones are seized too, and forks with another exit signal.
        const TRACE_CLONE = 0x8;
        /// The tracee dies with its tracer.
        const EXIT_KILL = 0x10_0000;
        /// No filter of system calls applies to the tracee.
        const SUSPEND_SECCOMP = 0x20_0000;
    }
}

/// Why wait4(2) reported a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It has exited with this status.
    Exited(i32),
    /// This signal killed it.
    Killed(i32),
    /// At the entry or exit of a system call.
    Syscall,
    /// `PTRACE_EVENT_STOP`: interrupted, newly cloned, or in a group stop; with the
    /// signal: `SIGTRAP`, or the stop signal of a group stop.
    Interrupted(i32),
    /// Another `PTRACE_EVENT_*`.
    Event(i32),
    /// About to receive this signal; `SIGTRAP` after an `int3` or a single step.
    Signal(i32),
}

const EVENT_STOP: i32 = 128;
/// `PTRACE_EVENT_CLONE`.
pub const EVENT_CLONE: i32 = 3;

/// What a wait status of a seized task with [`Options::SYSGOOD`] means.
#[must_use]
pub fn classify(status: i32) -> Stop {
    if libc::WIFEXITED(status) {
        return Stop::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Stop::Killed(libc::WTERMSIG(status));
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        EVENT_STOP => Stop::Interrupted(signal),
        0 if signal == libc::SIGTRAP | 0x80 => Stop::Syscall,
        0 => Stop::Signal(signal),
        event => Stop::Event(event),
    }
}

pub(super) fn request(
    name: &'static str,
    request: libc::c_uint,
    tid: Tid,
    addr: *mut c_void,
    data: *mut c_void,
) -> Result<i64> {
    Errno::clear();
    // SAFETY: each caller passes pointers that fit the request and live until it returns.
    let result = unsafe { libc::ptrace(request, tid.0, addr, data) };
    if result == -1 {
        return Err(CallError::last(name, tid.0));
    }
    Ok(result)
}

pub(super) fn number(value: usize) -> *mut c_void {
    std::ptr::without_provenance_mut(value)
}

fn signal_number(signal: i32) -> *mut c_void {
    number(usize::try_from(signal).unwrap_or(0))
}

/// Attaches without stopping (`PTRACE_SEIZE`).
///
/// # Errors
/// `EPERM`: already traced or not allowed; `ESRCH`: no such thread.
pub fn seize(tid: Tid, options: Options) -> Result<()> {
    let bits = usize::try_from(options.bits()).unwrap_or(0);
    request(
        "ptrace(SEIZE)",
        libc::PTRACE_SEIZE,
        tid,
        null_mut(),
        number(bits),
    )?;
    Ok(())
}

/// Sets the options of a stopped tracee; new threads have those of who clones them.
///
/// # Errors
/// `EPERM`: [`Options::SUSPEND_SECCOMP`] needs `CAP_SYS_ADMIN`, and no filters of one's own.
pub fn set_options(tid: Tid, options: Options) -> Result<()> {
    let bits = usize::try_from(options.bits()).unwrap_or(0);
    request(
        "ptrace(SETOPTIONS)",
        libc::PTRACE_SETOPTIONS,
        tid,
        null_mut(),
        number(bits),
    )?;
    Ok(())
}

/// Asks a seized thread to stop; [`wait_stop`] tells when it has.
///
/// # Errors
/// `ESRCH`: not seized, or gone.
pub fn interrupt(tid: Tid) -> Result<()> {
    request(
        "ptrace(INTERRUPT)",
        libc::PTRACE_INTERRUPT,
        tid,
        null_mut(),
        null_mut(),
    )?;
    Ok(())
}

/// Waits for the next report of one traced thread.
///
/// # Errors
/// `ECHILD`: it is not traced by this thread.
pub fn wait_stop(tid: Tid) -> Result<Stop> {
    match wait(tid, 0)? {
        Some((_, stop)) => Ok(stop),
        None => Err(CallError {
            call: "wait4",
            task: tid.0,
            errno: Errno::ECHILD,
        }),
    }
}

/// As [`wait_stop`], but returns `None` at once when there is nothing to report.
///
/// # Errors
/// `ECHILD`: it is not traced by this thread.
pub fn poll_stop(tid: Tid) -> Result<Option<Stop>> {
    Ok(wait(tid, libc::WNOHANG)?.map(|(_, stop)| stop))
}

/// Waits for the next report of any child or tracee of this thread.
///
/// # Errors
/// `ECHILD`: there is none.
pub fn wait_any() -> Result<(Tid, Stop)> {
    wait(Tid(-1), 0)?.ok_or(CallError {
        call: "wait4",
        task: -1,
        errno: Errno::ECHILD,
    })
}

fn wait(tid: Tid, flags: i32) -> Result<Option<(Tid, Stop)>> {
    loop {
        let mut status = 0;
        // SAFETY: `status` is a live int; no rusage is asked for.
        let got = unsafe { libc::wait4(tid.0, &raw mut status, libc::__WALL | flags, null_mut()) };
        match got {
            0 => return Ok(None),
            -1 if Errno::last() == Errno::EINTR => {}
            -1 => return Err(CallError::last("wait4", tid.0)),
            got => return Ok(Some((Tid(got), classify(status)))),
        }
    }
}

/// Lets a stopped tracee run, with `signal` delivered (0 = none).
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn cont(tid: Tid, signal: i32) -> Result<()> {
    request(
        "ptrace(CONT)",
        libc::PTRACE_CONT,
        tid,
        null_mut(),
        signal_number(signal),
    )?;
    Ok(())
}

/// Lets a stopped tracee run to its next system call entry or exit.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn run_to_syscall(tid: Tid) -> Result<()> {
    request(
        "ptrace(SYSCALL)",
        libc::PTRACE_SYSCALL,
        tid,
        null_mut(),
        null_mut(),
    )?;
    Ok(())
}

/// Executes one instruction; the stop is [`Stop::Signal`] with `SIGTRAP`.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn single_step(tid: Tid) -> Result<()> {
    request(
        "ptrace(SINGLESTEP)",
        libc::PTRACE_SINGLESTEP,
        tid,
        null_mut(),
        null_mut(),
    )?;
    Ok(())
}

/// Lets go of a stopped tracee for good.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn detach(tid: Tid) -> Result<()> {
    request(
        "ptrace(DETACH)",
        libc::PTRACE_DETACH,
        tid,
        null_mut(),
        null_mut(),
    )?;
    Ok(())
}

/// The value that goes with the last event: the new TID for a clone.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn event_message(tid: Tid) -> Result<u64> {
    let mut message = 0_u64;
    request(
        "ptrace(GETEVENTMSG)",
        libc::PTRACE_GETEVENTMSG,
        tid,
        null_mut(),
        (&raw mut message).cast(),
    )?;
    Ok(message)
}

/// The siginfo of a signal delivery stop.
///
/// # Errors
/// `EINVAL`: another kind of stop.
pub fn signal_info(tid: Tid) -> Result<SigInfo> {
    let mut bytes = vec![0_u8; SIGINFO_LEN];
    request(
        "ptrace(GETSIGINFO)",
        libc::PTRACE_GETSIGINFO,
        tid,
        null_mut(),
        bytes.as_mut_ptr().cast(),
    )?;
    Ok(SigInfo(bytes))
}

/// Room for the largest XSAVE area in use (AMX included) with headroom.
const XSTATE_MAX: usize = 16 * 1024;

fn regset(
    name: &'static str,
    req: libc::c_uint,
    tid: Tid,
    set: i32,
    base: *mut c_void,
    len: usize,
) -> Result<usize> {
    let mut iov = libc::iovec {
        iov_base: base,
        iov_len: len,
    };
    request(name, req, tid, signal_number(set), (&raw mut iov).cast())?;
    Ok(iov.iov_len)
}

/// General registers (`NT_PRSTATUS`), the segment bases and `orig_rax` included.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn registers(tid: Tid) -> Result<Registers> {
    // SAFETY: plain integers, for which zero is a value.
    let mut raw: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    regset(
        "ptrace(GETREGSET NT_PRSTATUS)",
        libc::PTRACE_GETREGSET,
        tid,
        libc::NT_PRSTATUS,
        (&raw mut raw).cast(),
        size_of_val(&raw),
    )?;
    Ok(from_raw(&raw))
}

/// Sets the general registers.
///
/// # Errors
/// `EIO`, `EINVAL`: a segment register or base is not canonical.
pub fn set_registers(tid: Tid, registers: &Registers) -> Result<()> {
    let mut raw = to_raw(registers);
    regset(
        "ptrace(SETREGSET NT_PRSTATUS)",
        libc::PTRACE_SETREGSET,
        tid,
        libc::NT_PRSTATUS,
        (&raw mut raw).cast(),
        size_of_val(&raw),
    )?;
    Ok(())
}

/// `NT_X86_XSTATE`, which the libc crate does not name.
const NT_X86_XSTATE: i32 = 0x202;

/// Extended registers in the standard XSAVE format.
///
/// # Errors
/// `ESRCH`: it is not stopped; `ENODEV`: a CPU without XSAVE.
pub fn xstate(tid: Tid) -> Result<Vec<u8>> {
    let mut bytes = Vec::<u8>::with_capacity(XSTATE_MAX);
    let len = regset(
        "ptrace(GETREGSET NT_X86_XSTATE)",
        libc::PTRACE_GETREGSET,
        tid,
        NT_X86_XSTATE,
        bytes.as_mut_ptr().cast(),
        bytes.capacity(),
    )?;
    // SAFETY: the kernel has written so many, no more than there is room for.
    unsafe { bytes.set_len(len) };
    // A copy as long as they are: of many threads, the room would be much.
    Ok(bytes.as_slice().to_vec())
}

/// Sets the extended registers: all of them or, on error, none.
///
/// # Errors
/// `EINVAL`: a feature bit this CPU does not have; `EFAULT`: too short.
pub fn set_xstate(tid: Tid, bytes: &[u8]) -> Result<()> {
    let mut copy = bytes.to_vec();
    regset(
        "ptrace(SETREGSET NT_X86_XSTATE)",
        libc::PTRACE_SETREGSET,
        tid,
        NT_X86_XSTATE,
        copy.as_mut_ptr().cast(),
        copy.len(),
    )?;
    Ok(())
}

/// The blocked signals: the real mask also while a ppoll or sigsuspend has another in place.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn sigmask(tid: Tid) -> Result<u64> {
    let mut mask = 0_u64;
    request(
        "ptrace(GETSIGMASK)",
        libc::PTRACE_GETSIGMASK,
        tid,
        number(size_of_val(&mask)),
        (&raw mut mask).cast(),
    )?;
    Ok(mask)
}

/// Sets the blocked signals.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn set_sigmask(tid: Tid, mask: u64) -> Result<()> {
    let mut mask = mask;
    request(
        "ptrace(SETSIGMASK)",
        libc::PTRACE_SETSIGMASK,
        tid,
        number(size_of_val(&mask)),
        (&raw mut mask).cast(),
    )?;
    Ok(())
}

/// The signals queued for the thread, or with `shared` for its process, oldest first.
/// They stay queued.
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn pending_signals(tid: Tid, shared: bool) -> Result<Vec<SigInfo>> {
    const BATCH: usize = 32;
    let mut found = Vec::new();
    loop {
        let mut bytes = [0_u8; BATCH * SIGINFO_LEN];
        let mut args = libc::ptrace_peeksiginfo_args {
            off: found.len() as u64,
            flags: if shared {
                libc::PTRACE_PEEKSIGINFO_SHARED
            } else {
                0
            },
            nr: i32::try_from(BATCH).unwrap_or(1),
        };
        let got = request(
            "ptrace(PEEKSIGINFO)",
            libc::PTRACE_PEEKSIGINFO,
            tid,
            (&raw mut args).cast(),
            bytes.as_mut_ptr().cast(),
        )?;
        let got = usize::try_from(got).unwrap_or(0);
        let infos = bytes.chunks_exact(SIGINFO_LEN).take(got);
        found.extend(infos.map(|info| SigInfo(info.to_vec())));
        if got < BATCH {
            return Ok(found);
        }
    }
}

/// The rseq registration of a thread, with `cs` left 0 (it lies in the thread's memory).
///
/// # Errors
/// `ESRCH`: it is not stopped.
pub fn rseq_configuration(tid: Tid) -> Result<Option<Rseq>> {
    // SAFETY: plain integers, for which zero is a value.
    let mut raw: libc::ptrace_rseq_configuration = unsafe { std::mem::zeroed() };
    request(
        "ptrace(GET_RSEQ_CONFIGURATION)",
        libc::PTRACE_GET_RSEQ_CONFIGURATION,
        tid,
        number(size_of_val(&raw)),
        (&raw mut raw).cast(),
    )?;
    Ok((raw.rseq_abi_pointer != 0).then_some(Rseq {
        addr: raw.rseq_abi_pointer,
        len: raw.rseq_abi_size,
        sig: raw.signature,
        cs: 0,
    }))
}

macro_rules! convert {
    ($($field:ident)*) => {
        fn from_raw(raw: &libc::user_regs_struct) -> Registers {
            Registers { $($field: raw.$field),* }
        }

        fn to_raw(registers: &Registers) -> libc::user_regs_struct {
            libc::user_regs_struct { $($field: registers.$field),* }
        }
    };
}

convert!(r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss
    fs_base gs_base ds es fs gs);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::{Fork, fork_with_pid};

    struct Child(Tid);

    impl Child {
        fn paused() -> Self {
            match fork_with_pid(None, libc::SIGCHLD).unwrap() {
                Fork::Child => loop {
                    // SAFETY: pause(2) has no arguments.
                    unsafe { libc::pause() };
                },
                Fork::Parent(pid) => Self(pid.leader()),
            }
        }
    }

    impl Drop for Child {
        fn drop(&mut self) {
            // SAFETY: signals and reaps our own child only.
            unsafe {
                libc::kill(self.0.0, libc::SIGKILL);
                libc::waitpid(self.0.0, null_mut(), libc::__WALL);
            }
        }
    }

    #[test]
    fn statuses_are_told_apart() {
        assert_eq!(classify(0x0300), Stop::Exited(3));
        assert_eq!(classify(9), Stop::Killed(9));
        assert_eq!(classify(0x0080_057f), Stop::Interrupted(5));
        assert_eq!(classify(0x0080_137f), Stop::Interrupted(19));
        assert_eq!(classify(0x857f), Stop::Syscall);
        assert_eq!(classify(0x057f), Stop::Signal(5));
        assert_eq!(classify(0x0003_057f), Stop::Event(EVENT_CLONE));
    }

    #[test]
    fn state_is_read_and_set() {
        let child = Child::paused();
        let tid = child.0;
        seize(tid, Options::EXIT_KILL | Options::SYSGOOD).unwrap();
        interrupt(tid).unwrap();
        assert_eq!(wait_stop(tid).unwrap(), Stop::Interrupted(libc::SIGTRAP));
        let mut regs = registers(tid).unwrap();
        regs.r12 = 0x1234_5678_9abc;
        set_registers(tid, &regs).unwrap();
        assert_eq!(registers(tid).unwrap(), regs);
        let state = xstate(tid).unwrap();
        assert!(state.len() >= 576);
        set_xstate(tid, &state).unwrap();
        set_sigmask(tid, 1 << 9).unwrap();
        assert_eq!(sigmask(tid).unwrap(), 1 << 9);
        // SAFETY: signals our own child, which blocks this signal.
        unsafe { libc::kill(tid.0, 10) };
        assert_eq!(pending_signals(tid, true).unwrap().len(), 1);
        assert_eq!(pending_signals(tid, false).unwrap().len(), 0);
        rseq_configuration(tid).unwrap();
    }

    #[test]
    fn errors_name_the_thread_and_the_call() {
        let error = interrupt(Tid(1)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "ptrace(INTERRUPT) on task 1: ESRCH: No such process"
        );
    }
}
