//! Processes and threads.

use super::MemoryPolicy;
use crate::model::ids::{FilesId, FsId, InodeId, MmId, Pid, Tid};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// One thread group, or one zombie.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Process {
    /// Its PID in the initial PID namespace.
    pub pid: Pid,
    /// Parent within the application; `None` when the parent is outside of it.
    pub parent: Option<Pid>,
    /// Process group, which may be outside (its leader dead or not tracked).
    pub pgid: Pid,
    /// Session, which may be outside.
    pub sid: Pid,
    /// Signal sent to the parent at exit; `SIGCHLD` for a plain fork.
    pub exit_signal: i32,
    /// `Some(wait status)` for a zombie, which has nothing below but `threads[0].comm`.
    pub zombie: Option<i32>,
    /// A stop signal stopped it, and it was not continued.
    #[serde(default)]
    pub stopped: Option<JobStop>,
    /// It was continued, and its parent was not told by a wait with `WCONTINUED`.
    #[serde(default)]
    pub continued: bool,
    /// Address space.
    pub mm: MmId,
    /// Descriptor table.
    pub files: FilesId,
    /// Directories and umask, as an identity: processes may share them (`CLONE_FS`).
    #[serde(default)]
    pub fs: FsId,
    /// Its cgroup below that of the application, without slashes at the ends; empty = that one.
    #[serde(default)]
    pub cgroup: String,
    /// Program file, working and root directory.
    pub exe: PathRef,
    /// Working directory.
    pub cwd: PathRef,
    /// Root directory; `/` unless it called chroot(2).
    pub root: PathRef,
    /// File mode creation mask.
    pub umask: u32,
    /// personality(2) bits.
    pub personality: u32,
    /// `PR_SET_DUMPABLE` value: 0, 1 or 2.
    pub dumpable: u8,
    /// `PR_SET_CHILD_SUBREAPER`.
    pub child_subreaper: bool,
    /// `PR_SET_THP_DISABLE`.
    pub thp_disable: bool,
    /// `/proc/PID/oom_score_adj`.
    pub oom_score_adj: i16,
    /// `/proc/PID/coredump_filter`; `None` in images from before it was carried.
    #[serde(default)]
    pub coredump_filter: Option<u32>,
    /// Who may trace it without being an ancestor, by Yama's leave (`PR_SET_PTRACER`).
    #[serde(default)]
    pub ptracer: Option<Ptracer>,
    /// `/proc/PID/autogroup`: nice value of the session that it leads.
    #[serde(default)]
    pub autogroup_nice: i8,
    /// `/proc/PID/loginuid`: who logged in, as audit(8) notes it.
    #[serde(default)]
    pub loginuid: Option<u32>,
    /// Filters of system calls, which all of its threads share, in the order they were
    /// installed in.
    #[serde(default)]
    pub seccomp: Vec<SeccompFilter>,
    /// getrlimit(2) pairs (soft, hard), indexed by resource number.
    pub rlimits: Vec<(u64, u64)>,
    /// Signal actions, index 0 is signal 1.
    pub sigactions: Vec<SigAction>,
    /// Signals queued for the process as raw `siginfo_t` (128 bytes each), oldest first.
    pub pending: Vec<SigInfo>,
    /// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF.
    pub itimers: [IntervalTimer; 3],
    /// timer_create(2) timers in order of their ids.
    pub posix_timers: Vec<PosixTimer>,
    /// Threads, leader first.
    pub threads: Vec<Thread>,
}

/// Whom a process has named as its tracer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ptracer {
    /// `PR_SET_PTRACER_ANY`.
    Any,
    /// A thread of the application, with its descendants.
    Thread(Tid),
}

/// A classic BPF program that decides about system calls (seccomp(2)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompFilter {
    /// `struct sock_filter` after `struct sock_filter`, 8 bytes each.
    pub program: ByteBuf,
    /// `SECCOMP_FILTER_FLAG_LOG`.
    pub log: bool,
}

/// A group stop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobStop {
    /// `SIGSTOP`, `SIGTSTP`, `SIGTTIN` or `SIGTTOU`.
    pub signal: i32,
    /// Its parent was told by a wait with `WUNTRACED`.
    pub reported: bool,
}

/// A file by name, with what proves after the restore that it is the same one.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PathRef {
    /// Absolute path in the application's root; bytes, since Linux paths need not be UTF-8.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// The inode it named when captured.
    pub inode: InodeId,
    /// Through which mounts the name leads there.
    #[serde(default, skip_serializing_if = "Through::is_own")]
    pub through: Through,
}

/// Which mounts a name leads through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Through {
    /// Those of the mount namespace that the application lives in.
    #[default]
    Own,
    /// As above, to a filesystem that a restore makes anew: inode numbers are others then.
    Remade,
    /// Those of the machine's mount namespace, although the application lives in one of its own.
    Machine,
}

impl Through {
    /// Whether it is what it is for most.
    #[must_use]
    pub fn is_own(&self) -> bool {
        *self == Self::Own
    }
}

/// `struct kernel_sigaction` as rt_sigaction(2) reads and writes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SigAction {
    /// Handler address, 0 = `SIG_DFL`, 1 = `SIG_IGN`.
    pub handler: u64,
    /// `SA_*` flags, `SA_RESTORER` included.
    pub flags: u64,
    /// Return trampoline.
    pub restorer: u64,
    /// Mask while the handler runs.
    pub mask: u64,
}

/// A queued signal as rt_sigqueueinfo(2) takes it: raw `siginfo_t`, 128 bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SigInfo(#[serde(with = "serde_bytes")] pub Vec<u8>);

/// setitimer(2) state in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    /// Time left until it fires; 0 = not armed.
    pub remaining: u64,
    /// Period; 0 = once.
    pub interval: u64,
}

/// A timer_create(2) timer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    /// Kernel id of the timer, which user space holds.
    pub id: i32,
    /// `CLOCK_*`, or the CPU clock of a thread by its TID (pthread_getcpuclockid(3)).
    pub clock: i32,
    /// `sigev_notify`.
    pub notify: i32,
    /// `sigev_signo`.
    pub signo: i32,
    /// `sigev_value`.
    pub value: u64,
    /// `sigev_notify_thread_id` when `SIGEV_THREAD_ID` is set.
    pub thread: Tid,
    /// Time left in nanoseconds; 0 = not armed.
    pub remaining: u64,
    /// Period in nanoseconds.
    pub interval: u64,
    /// Overruns not yet reported.
    pub overrun: i32,
}

/// One thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Thread {
    /// Its id in the initial PID namespace.
    pub tid: Tid,
    /// `PR_SET_NAME`, at most 15 bytes.
    #[serde(with = "serde_bytes")]
    pub comm: Vec<u8>,
    /// General registers, as PTRACE_GETREGSET NT_PRSTATUS gives them.
    pub regs: Registers,
    /// NT_X86_XSTATE bytes in the standard (not compacted) format.
    #[serde(with = "serde_bytes")]
    pub xstate: Vec<u8>,
    /// The system call it was stopped in, and how it goes on.
    pub syscall: SyscallInProgress,
    /// Blocked signals (the real mask, not that of a sigsuspend or ppoll in progress).
    pub sigmask: u64,
    /// Signals queued for this thread, oldest first.
    pub pending: Vec<SigInfo>,
    /// sigaltstack(2): sp, flags, size.
    pub altstack: AltStack,
    /// set_robust_list(2) head and length; 0 = none.
    pub robust_list: (u64, u64),
    /// set_tid_address(2).
    pub clear_child_tid: u64,
    /// rseq(2) registration, if any.
    pub rseq: Option<Rseq>,
    /// Credentials (per thread in Linux).
    pub creds: Credentials,
    /// Scheduling.
    pub sched: Scheduling,
    /// `PR_SET_PDEATHSIG`.
    pub pdeathsig: i32,
    /// `PR_SET_TIMERSLACK` in nanoseconds.
    pub timer_slack: u64,
    /// ioprio_set(2) value; 0 where it follows from the nice value.
    #[serde(default)]
    pub ioprio: u16,
    /// Where its memory comes from; `None`: as the system has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<MemoryPolicy>,
    /// `PR_SET_IO_FLUSHER`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub io_flusher: bool,
    /// `PR_MCE_KILL`: whether to be told early of memory that is broken; `None`: as the system
    /// has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mce_kill_early: Option<bool>,
}

/// `struct user_regs_struct` of x86-64, in its order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// How a thread that was stopped inside a system call goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SyscallInProgress {
    /// In user mode, or the saved registers make the kernel restart the call
    /// by itself (`-ERESTARTSYS`, `-ERESTARTNOINTR`, `-ERESTARTNOHAND`).
    #[default]
    None,
    /// `-ERESTART_RESTARTBLOCK`: the timeout lives in the kernel. The call is
    /// issued again with the time that is left, then restarted by the kernel.
    RestartBlock {
        /// Absolute `CLOCK_MONOTONIC` deadline as the application saw that
        /// clock, in nanoseconds; `None` when the call waits without a limit
        /// or its own argument is absolute.
        deadline: Option<u64>,
    },
    /// The freezer and ptrace end the call with a plain `-EINTR` (epoll_wait and
    /// others): issued again as if never interrupted.
    Reissue {
        /// Absolute `CLOCK_MONOTONIC` deadline in nanoseconds as above.
        deadline: Option<u64>,
    },
}

/// sigaltstack(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AltStack {
    /// Lowest address.
    pub sp: u64,
    /// `SS_*`.
    pub flags: u32,
    /// Bytes.
    pub size: u64,
}

/// rseq(2) registration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    /// Address of the thread's `struct rseq`.
    pub addr: u64,
    /// Registered length in bytes.
    pub len: u32,
    /// Abort signature.
    pub sig: u32,
    /// `rseq_cs` pointer found in memory at the freeze; written back last, or
    /// the critical section would go on unprotected.
    pub cs: u64,
}

/// Credentials of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, filesystem user id.
    pub uids: [u32; 4],
    /// Real, effective, saved, filesystem group id.
    pub gids: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Inheritable, permitted, effective, bounding, ambient capability sets.
    pub caps: [u64; 5],
    /// `PR_SET_SECUREBITS`.
    pub securebits: u32,
    /// `PR_SET_NO_NEW_PRIVS`.
    pub no_new_privs: bool,
}

/// Scheduling attributes of one thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    /// `SCHED_*`, with `SCHED_RESET_ON_FORK`.
    pub policy: u32,
    /// -20..=19.
    pub nice: i32,
    /// Real-time priority, 0 unless FIFO or RR.
    pub priority: u32,
    /// sched_setaffinity(2) mask, bit = CPU, little-endian bytes.
    #[serde(with = "serde_bytes")]
    pub affinity: Vec<u8>,
    /// The slice it asked for by sched_setattr(2), nanoseconds; 0 = none (before Linux 6.12).
    #[serde(default)]
    pub slice: u64,
}
