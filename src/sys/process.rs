//! Processes: creation with a chosen PID, pidfds, signals with their siginfo,
//! limits, and memory of other processes.

use crate::model::frozen::SigInfo;
use crate::model::ids::{Pid, Tid};
use crate::model::plan::Shares;
use nix::errno::Errno;
use nix::libc;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::thread;

/// A system call that failed on one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call} on task {task}: {errno}")]
pub struct CallError {
    /// The system call, with its request where it has one.
    pub call: &'static str,
    /// PID or TID it was about.
    pub task: i32,
    /// What the kernel answered.
    pub errno: Errno,
}

impl CallError {
    pub(crate) fn last(call: &'static str, task: i32) -> Self {
        Self {
            call,
            task,
            errno: Errno::last(),
        }
    }

    fn io(call: &'static str, task: i32, error: &io::Error) -> Self {
        Self {
            call,
            task,
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }
}

/// Bytes of a kernel `siginfo_t`.
pub const SIGINFO_LEN: usize = 128;

/// Opens a process by its PID (pidfd_open(2)).
///
/// # Errors
/// `ESRCH`: there is no such process.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd, CallError> {
    // SAFETY: takes two integers and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.0, 0) };
    owned(fd, "pidfd_open", pid.0)
}

/// Lowers the nice value of the calling thread, and of those it will start, to this unless it
/// is lower already (setpriority(2)).
///
/// # Errors
/// `EACCES`: not allowed without `CAP_SYS_NICE`.
pub fn raise_priority(nice: i32) -> io::Result<()> {
    // SAFETY: takes integers; 0 is the calling thread.
    let now = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // An error cannot be told from -1, and does not happen to oneself.
    if now <= nice {
        return Ok(());
    }
    // SAFETY: as above.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Lowers the calling thread's share of the CPU to that of this nice(2) value, if it has more.
///
/// # Errors
/// Those of setpriority(2).
pub fn lower_priority(nice: i32) -> io::Result<()> {
    // SAFETY: takes integers; 0 is the calling thread.
    let now = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    if now >= nice {
        return Ok(());
    }
    // SAFETY: as above.
    match unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A duplicate of descriptor `fd` of another process (pidfd_getfd(2)); it has `FD_CLOEXEC`.
///
/// # Errors
/// `EBADF`: no such descriptor; `EPERM`: not allowed to trace the process.
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, pid: Pid, fd: i32) -> Result<OwnedFd, CallError> {
    // SAFETY: takes three integers and returns a new descriptor.
    let new = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), fd, 0) };
    owned(new, "pidfd_getfd", pid.0)
}

/// Signals the process behind a pidfd (pidfd_send_signal(2)).
///
/// # Errors
/// `ESRCH`: it is gone.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, pid: Pid, signal: i32) -> Result<(), CallError> {
    // SAFETY: a null siginfo asks for that of kill(2).
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    check(result, "pidfd_send_signal", pid.0)
}

fn owned(result: i64, call: &'static str, task: i32) -> Result<OwnedFd, CallError> {
    match i32::try_from(result) {
        // SAFETY: the kernel has just handed out this descriptor to us alone.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(CallError::last(call, task)),
    }
}

pub(crate) fn check(result: i64, call: &'static str, task: i32) -> Result<(), CallError> {
    if result < 0 {
        Err(CallError::last(call, task))
    } else {
        Ok(())
    }
}

/// Which side of a fork this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fork {
    /// The new process.
    Child,
    /// The old one.
    Parent(Pid),
}

/// Forks with a chosen PID in the current PID namespace (clone3(2) `set_tid`).
///
/// The child has the caller's memory copied and goes on as ordinary code; but for what it
/// `shares`, everything is as fork(2) leaves it.
/// glibc's fork handlers do not run: call it single-threaded only.
///
/// # Errors
/// `EEXIST`: the number is in use (also as process group or session of others);
/// `EINVAL`: beyond `pid_max`; `EPERM`: needs `CAP_CHECKPOINT_RESTORE` or `CAP_SYS_ADMIN`.
pub fn fork_with_pid(pid: Option<Pid>, exit_signal: i32) -> Result<Fork, CallError> {
    fork_sharing(pid, exit_signal, Shares::default())
}

/// As [`fork_with_pid`]; the child has its descriptor table or its directories in common with
/// the caller (`CLONE_FILES`, `CLONE_FS`).
///
/// # Errors
/// As [`fork_with_pid`].
pub fn fork_sharing(pid: Option<Pid>, exit_signal: i32, shares: Shares) -> Result<Fork, CallError> {
    // SAFETY: clone_args is plain data for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    for (shared, flag) in [
        (shares.files, libc::CLONE_FILES),
        (shares.fs, libc::CLONE_FS),
    ] {
        if shared {
            args.flags |= u64::from(flag.cast_unsigned());
        }
    }
    fork(pid, exit_signal, args)
}

/// As [`fork_with_pid`]; the child is born in the cgroup whose directory `cgroup` is
/// (`CLONE_INTO_CGROUP`, Linux 5.7). To move a process waits for all CPUs instead, some
/// hundredths of a second (`cgroup_threadgroup_rwsem` in kernel/cgroup/cgroup.c).
///
/// # Errors
/// As [`fork_with_pid`]; `EBUSY`: the cgroup has controllers for children; `EOPNOTSUPP`: it
/// takes no processes.
pub fn fork_in_cgroup(
    pid: Option<Pid>,
    exit_signal: i32,
    cgroup: BorrowedFd<'_>,
) -> Result<Fork, CallError> {
    /// include/uapi/linux/sched.h; libc has a constant that is too narrow.
    const CLONE_INTO_CGROUP: u64 = 1 << 33;
    // SAFETY: clone_args is plain data for which zero means "not used".
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = CLONE_INTO_CGROUP;
    args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    fork(pid, exit_signal, args)
}

fn fork(pid: Option<Pid>, exit_signal: i32, mut args: libc::clone_args) -> Result<Fork, CallError> {
    let wanted = pid.unwrap_or_default();
    let set_tid = [wanted.0];
    args.exit_signal = u64::from(exit_signal.cast_unsigned());
    if pid.is_some() {
        args.set_tid = set_tid.as_ptr() as u64;
        args.set_tid_size = 1;
    }
    // SAFETY: without CLONE_VM the child runs on a copy of this stack. `set_tid` outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const args,
            size_of::<libc::clone_args>(),
        )
    };
    match i32::try_from(result) {
        Ok(0) => Ok(Fork::Child),
        Ok(child) if child > 0 => Ok(Fork::Parent(Pid(child))),
        _ => Err(CallError::last("clone3", wanted.0)),
    }
}

/// Gives every signal its default action and blocks all but `SIGTRAP`, as a process that is
/// to be replaced by another program's state needs it.
pub fn quiet_signals() {
    // SAFETY: SIG_DFL handlers run no code; for the signals that cannot be changed the call
    // fails and nothing happens. A zeroed action is SIG_DFL without flags, with an empty mask.
    // The raw calls reach glibc's two internal signals, and leave no SA_RESTORER behind.
    unsafe {
        let action = [0_u64; 4];
        for signal in 1..=64_i64 {
            let null = std::ptr::null_mut::<u64>();
            libc::syscall(libc::SYS_rt_sigaction, signal, action.as_ptr(), null, 8);
        }
        let all_but_trap = !(1_u64 << (libc::SIGTRAP - 1));
        let null = std::ptr::null_mut::<u64>();
        let (how, mask) = (libc::SIG_SETMASK, &raw const all_but_trap);
        libc::syscall(libc::SYS_rt_sigprocmask, how, mask, null, 8);
    }
}

/// Runs `act` in a thread of its own: one that enters a namespace has no way back.
///
/// # Errors
/// Those of `act`.
pub fn apart<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| scope.spawn(act).join())
        .unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

/// Moves children made from now on into a new time namespace (unshare(2) `CLONE_NEWTIME`).
///
/// # Errors
/// `EPERM`: needs `CAP_SYS_ADMIN`; `EINVAL`: a kernel without time namespaces.
pub fn unshare_time() -> Result<(), CallError> {
    // SAFETY: takes an integer; memory is not affected.
    let result = unsafe { libc::unshare(libc::CLONE_NEWTIME) };
    check(result.into(), "unshare(CLONE_NEWTIME)", 0)
}

/// Queues a signal for a process with its siginfo (rt_sigqueueinfo(2)). Only the process
/// itself may queue one that claims to come from the kernel or from kill(2).
///
/// # Errors
/// `EPERM`: such a siginfo for another process; `EINVAL`: not 128 bytes.
pub fn queue_signal(pid: Pid, info: &SigInfo) -> Result<(), CallError> {
    let (signal, bytes) = siginfo_parts(info, "rt_sigqueueinfo", pid.0)?;
    // SAFETY: the kernel reads SIGINFO_LEN bytes, checked above.
    let result = unsafe { libc::syscall(libc::SYS_rt_sigqueueinfo, pid.0, signal, bytes.as_ptr()) };
    check(result, "rt_sigqueueinfo", pid.0)
}

/// Queues a signal for a thread with its siginfo (rt_tgsigqueueinfo(2)).
///
/// # Errors
/// As [`queue_signal`].
pub fn queue_thread_signal(pid: Pid, tid: Tid, info: &SigInfo) -> Result<(), CallError> {
    let (signal, bytes) = siginfo_parts(info, "rt_tgsigqueueinfo", tid.0)?;
    // SAFETY: the kernel reads SIGINFO_LEN bytes, checked above.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            pid.0,
            tid.0,
            signal,
            bytes.as_ptr(),
        )
    };
    check(result, "rt_tgsigqueueinfo", tid.0)
}

fn siginfo_parts<'a>(
    info: &'a SigInfo,
    call: &'static str,
    task: i32,
) -> Result<(i32, &'a [u8]), CallError> {
    match (info.0.len(), info.0.first_chunk::<4>()) {
        (SIGINFO_LEN, Some(signal)) => Ok((i32::from_ne_bytes(*signal), &info.0)),
        _ => Err(CallError {
            call,
            task,
            errno: Errno::EINVAL,
        }),
    }
}

/// Reads or sets a resource limit of another process (prlimit(2)): (soft, hard), all ones = infinity.
///
/// # Errors
/// `EPERM`: raising a hard limit needs `CAP_SYS_RESOURCE`.
pub fn prlimit(pid: Pid, resource: u32, new: Option<(u64, u64)>) -> Result<(u64, u64), CallError> {
    let new = new.map(|(soft, hard)| libc::rlimit64 {
        rlim_cur: soft,
        rlim_max: hard,
    });
    let mut old = libc::rlimit64 {
        rlim_cur: 0,
        rlim_max: 0,
    };
    let new_ptr = new.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: both pointers are null or point to a live rlimit64.
    let result =
        unsafe { libc::syscall(libc::SYS_prlimit64, pid.0, resource, new_ptr, &raw mut old) };
    check(result, "prlimit64", pid.0)?;
    Ok((old.rlim_cur, old.rlim_max))
}

/// Raises a resource limit of this process; without `CAP_SYS_RESOURCE` as far as its hard limit.
///
/// # Errors
/// `EPERM`: `most` is more than the kernel allows anybody (`fs.nr_open`).
pub fn raise_limit(resource: u32, most: u64) -> Result<(), CallError> {
    if prlimit(Pid(0), resource, Some((most, most))).is_err() {
        let (_, hard) = prlimit(Pid(0), resource, None)?;
        prlimit(Pid(0), resource, Some((hard, hard)))?;
    }
    Ok(())
}

/// Lets this process have as many descriptors as the kernel allows.
///
/// # Errors
/// As [`raise_limit`].
pub fn raise_descriptor_limit() -> Result<(), CallError> {
    let most = std::fs::read_to_string("/proc/sys/fs/nr_open").unwrap_or_default();
    let most = most.trim_end().parse().unwrap_or(1 << 20);
    raise_limit(libc::RLIMIT_NOFILE, most)
}

/// Reads memory of another process (process_vm_readv(2)); returns how many bytes could be
/// read before the first unmapped or unreadable page.
///
/// # Errors
/// `EFAULT`: not even the first byte; `EPERM`, `ESRCH`.
pub fn read_memory(pid: Pid, addr: u64, buffer: &mut [u8]) -> Result<usize, CallError> {
    use nix::sys::uio::process_vm_readv;
    let remote = [remote_iov(addr, buffer.len())];
    let mut local = [io::IoSliceMut::new(buffer)];
    process_vm_readv(nix::unistd::Pid::from_raw(pid.0), &mut local, &remote).map_err(|errno| {
        CallError {
            call: "process_vm_readv",
            task: pid.0,
            errno,
        }
    })
}

/// Reads exactly `buffer.len()` bytes of another process.
///
/// # Errors
/// `EFAULT`: some of it is not readable.
pub fn read_memory_exact(pid: Pid, addr: u64, buffer: &mut [u8]) -> Result<(), CallError> {
    let wanted = buffer.len();
    if read_memory(pid, addr, buffer)? == wanted {
        return Ok(());
    }
    Err(CallError {
        call: "process_vm_readv",
        task: pid.0,
        errno: Errno::EFAULT,
    })
}

/// Writes to memory of another process (process_vm_writev(2)); writable mappings only.
///
/// # Errors
/// `EFAULT`: some of it is not writable.
pub fn write_memory(pid: Pid, addr: u64, bytes: &[u8]) -> Result<(), CallError> {
    scatter_memory(pid, bytes, &[(addr, bytes.len())])
}

/// Writes `bytes` to memory of another process in pieces, (address, length) of each in their
/// order (process_vm_writev(2)); writable mappings only. At most `IOV_MAX`, 1,024, pieces.
///
/// # Errors
/// `EFAULT`: some of it is not writable, or there is no memory for it.
pub fn scatter_memory(pid: Pid, bytes: &[u8], pieces: &[(u64, usize)]) -> Result<(), CallError> {
    use nix::sys::uio::process_vm_writev;
    let remote: Vec<_> = pieces.iter().map(|p| remote_iov(p.0, p.1)).collect();
    let local = [io::IoSlice::new(bytes)];
    match process_vm_writev(nix::unistd::Pid::from_raw(pid.0), &local, &remote) {
        Ok(written) if written == bytes.len() => Ok(()),
        Ok(_) => Err(Errno::EFAULT),
        Err(errno) => Err(errno),
    }
    .map_err(|errno| CallError {
        call: "process_vm_writev",
        task: pid.0,
        errno,
    })
}

fn remote_iov(addr: u64, len: usize) -> nix::sys::uio::RemoteIoVec {
    nix::sys::uio::RemoteIoVec {
        // usize is 64 bits wide on the one architecture supported.
        base: usize::try_from(addr).unwrap_or(usize::MAX),
        len,
    }
}

/// `/proc/PID/mem`: reads and writes regardless of page protection (`FOLL_FORCE`).
#[derive(Debug)]
pub struct ProcMem {
    pid: Pid,
    file: File,
}

impl ProcMem {
    /// Opens the memory of a process for reading and writing. It refers to the address
    /// space of this moment: open it again after an exec.
    ///
    /// # Errors
    /// No such process, or not allowed to trace it.
    pub fn open(pid: Pid) -> Result<Self, CallError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/mem"))
            .map_err(|e| CallError::io("open(/proc/PID/mem)", pid.0, &e))?;
        Ok(Self { pid, file })
    }

    /// Reads exactly `buffer.len()` bytes.
    ///
    /// # Errors
    /// `EIO`: some of it is not mapped.
    pub fn read(&self, addr: u64, buffer: &mut [u8]) -> Result<(), CallError> {
        self.file
            .read_exact_at(buffer, addr)
            .map_err(|e| CallError::io("pread(/proc/PID/mem)", self.pid.0, &e))
    }

    /// Writes all of `bytes`, into read-only private mappings too.
    ///
    /// # Errors
    /// `EIO`: not mapped, or shared and read-only.
    pub fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), CallError> {
        self.file
            .write_all_at(bytes, addr)
            .map_err(|e| CallError::io("pwrite(/proc/PID/mem)", self.pid.0, &e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::wait::{WaitStatus, waitpid};

    fn this() -> Pid {
        Pid(std::process::id().cast_signed())
    }

    #[test]
    fn memory_is_read_and_written() {
        let mut target = *b"before";
        let addr = target.as_mut_ptr() as u64;
        let mut copy = [0_u8; 6];
        read_memory_exact(this(), addr, &mut copy).unwrap();
        assert_eq!(&copy, b"before");
        write_memory(this(), addr, b"after!").unwrap();
        assert_eq!(std::hint::black_box(&target), b"after!");
    }

    #[test]
    fn an_unmapped_address_is_named_with_the_task() {
        let error = read_memory_exact(this(), 4096, &mut [0; 8]).unwrap_err();
        assert_eq!(error.errno, Errno::EFAULT);
        assert_eq!(error.task, this().0);
    }

    #[test]
    fn a_signal_needs_a_whole_siginfo() {
        let error = queue_signal(this(), &SigInfo(vec![0; 12])).unwrap_err();
        assert_eq!(error.errno, Errno::EINVAL);
    }

    #[test]
    fn a_child_is_forked_and_signalled_by_pidfd() {
        use std::os::fd::AsFd;
        match fork_with_pid(None, libc::SIGCHLD).unwrap() {
            Fork::Child => loop {
                // SAFETY: pause(2) has no arguments.
                unsafe { libc::pause() };
            },
            Fork::Parent(pid) => {
                let pidfd = pidfd_open(pid).unwrap();
                pidfd_send_signal(pidfd.as_fd(), pid, libc::SIGKILL).unwrap();
                let status = waitpid(nix::unistd::Pid::from_raw(pid.0), None).unwrap();
                assert!(matches!(status, WaitStatus::Signaled(..)));
            }
        }
    }
}
