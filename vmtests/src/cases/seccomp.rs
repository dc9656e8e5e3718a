//! Filters of system calls.

use std::io::{Read, Write, pipe};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc;

use anyhow::{Context, Result, anyhow, ensure};
use libc::{
    SECCOMP_FILTER_FLAG_LOG as FLAG_LOG, SECCOMP_FILTER_FLAG_NEW_LISTENER as FLAG_NEW_LISTENER,
    SECCOMP_FILTER_FLAG_TSYNC as FLAG_TSYNC, SECCOMP_RET_ALLOW as RET_ALLOW,
    SECCOMP_RET_ERRNO as RET_ERRNO, SECCOMP_RET_KILL_PROCESS as RET_KILL_PROCESS,
    SECCOMP_RET_USER_NOTIF as RET_USER_NOTIF, SECCOMP_SET_MODE_FILTER as SET_MODE_FILTER,
};
use nix::errno::Errno;
use nix::sys::prctl::set_no_new_privs;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Gid, Pid, Uid, fork, setresgid, setresuid};

use super::probe::{blocked_in, join, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("seccomp_filters", filters),
    Entry::carried("seccomp_threads", threads),
    Entry::carried("seccomp_sandbox", sandbox),
    Entry::refused(
        "refused_seccomp_listener",
        "seccomp filter with a listener",
        listener,
    ),
    Entry::refused(
        "refused_seccomp_thread",
        "seccomp filters of its own",
        one_thread,
    ),
    Entry::refused("refused_seccomp_strict", "strict seccomp", strict),
];

/// Installs a filter that does `action` for one of these calls and `otherwise` for all others.
fn install(flags: u64, calls: &[i64], action: u32, otherwise: u32) -> Result<i64> {
    let instruction = |code: u32, jt, k| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf: 0,
        k,
    };
    // The number of the call is the first word there is.
    let mut program = vec![instruction(
        libc::BPF_LD | libc::BPF_W | libc::BPF_ABS,
        0,
        0,
    )];
    for (left, call) in (0..calls.len()).rev().zip(calls) {
        let jump = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
        let over = u8::try_from(left + 1)?;
        program.push(instruction(jump, over, u32::try_from(*call)?));
    }
    program.push(instruction(libc::BPF_RET, 0, otherwise));
    program.push(instruction(libc::BPF_RET, 0, action));
    let described = libc::sock_fprog {
        len: u16::try_from(program.len())?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program, which outlives the call.
    let set = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            SET_MODE_FILTER,
            flags,
            &raw const described,
        )
    };
    sys("seccomp", set)
}

fn getcpu() -> Result<i64, Errno> {
    // SAFETY: null pointers are not written.
    Errno::result(unsafe { libc::syscall(libc::SYS_getcpu, 0, 0, 0) })
}

fn sched_yield() -> Result<i64, Errno> {
    // SAFETY: takes and touches nothing.
    Errno::result(unsafe { libc::syscall(libc::SYS_sched_yield) })
}

/// Two filters that do not agree: which one wins tells their order.
fn filters(case: &Case) -> Result<()> {
    let answers = || (getcpu(), sched_yield());
    let error = |code| Err(Errno::from_raw(code));
    install(0, &[libc::SYS_getcpu], RET_ERRNO | 71, RET_ALLOW)?;
    let both = [libc::SYS_getcpu, libc::SYS_sched_yield];
    install(FLAG_LOG, &both, RET_ERRNO | 72, RET_ALLOW)?;
    let before = answers();
    ensure!(before == (error(72), error(72)), "At first: {before:?}");

    case.ready()?;

    let after = answers();
    ensure!(after == before, "{before:?} before, {after:?} now");
    install(0, &[libc::SYS_getcpu], RET_ERRNO | 73, RET_ALLOW)?;
    ensure!(getcpu() == error(73), "One more: {:?}", getcpu());
    Ok(())
}

/// Threads have one filter together, and get the next one together.
fn threads(case: &Case) -> Result<()> {
    let mut workers = Vec::new();
    for number in 0..3 {
        let ((go, wait), (say, said)) = (mpsc::channel::<()>(), mpsc::channel());
        let name = format!("worker {number}");
        let worker = std::thread::Builder::new().name(name).spawn(move || {
            while wait.recv().is_ok() && say.send((getcpu(), sched_yield())).is_ok() {}
            Ok(())
        })?;
        workers.push((go, said, worker));
    }
    let all_say = |wanted| -> Result<()> {
        for (go, said, _) in &workers {
            go.send(())?;
            let answers = said.recv()?;
            ensure!(answers == wanted, "A worker got {answers:?}");
        }
        Ok(())
    };
    let error = |code| Err(Errno::from_raw(code));
    let call = [libc::SYS_getcpu];
    install(FLAG_TSYNC, &call, RET_ERRNO | 71, RET_ALLOW)?;
    all_say((error(71), Ok(0)))?;

    case.ready()?;

    all_say((error(71), Ok(0)))?;
    // It says which thread it cannot take along.
    let call = [libc::SYS_sched_yield];
    let alone = install(FLAG_TSYNC, &call, RET_ERRNO | 72, RET_ALLOW)?;
    ensure!(alone == 0, "Thread {alone} has other filters");
    all_say((error(71), error(72)))?;
    for (go, _, worker) in workers {
        drop(go);
        join("worker", worker)?;
    }
    Ok(())
}

/// A process nobody trusts: most of what restores it is forbidden to it.
fn sandbox(case: &Case) -> Result<()> {
    let child = talker(|| {
        let nobody = 65534;
        set_no_new_privs()?;
        let (uid, gid) = (Uid::from_raw(nobody), Gid::from_raw(nobody));
        setresgid(gid, gid, gid)?;
        setresuid(uid, uid, uid)?;
        let allowed = [libc::SYS_read, libc::SYS_write, libc::SYS_exit];
        install(0, &allowed, RET_ALLOW, RET_KILL_PROCESS).map(|_| ())
    })?;
    case.ready()?;
    child.answers()
}

fn strict(case: &Case) -> Result<()> {
    let child = talker(|| {
        // SAFETY: takes integers.
        let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT) };
        sys("prctl(PR_SET_SECCOMP)", set.into()).map(|_| ())
    })?;
    case.ready()?;
    child.answers()
}

/// A child that waits for a byte and gives it back.
struct Talker {
    pid: Pid,
    ask: std::io::PipeWriter,
    answer: std::io::PipeReader,
}

/// Starts one, which confines itself first.
fn talker(confine: impl FnOnce() -> Result<()>) -> Result<Talker> {
    let ((mut asked, ask), (answer, mut say)) = (pipe()?, pipe()?);
    // SAFETY: this process has one thread.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            blocked_in(child, libc::SYS_read)?;
            Ok(Talker {
                pid: child,
                ask,
                answer,
            })
        }
        ForkResult::Child => {
            let mut byte = [0];
            let done = confine()
                .and_then(|()| Ok(asked.read_exact(&mut byte)?))
                .and_then(|()| Ok(say.write_all(&byte)?));
            // exit_group(2) is not among what strict mode allows.
            // SAFETY: ends this thread, the only one, and nothing runs after it.
            unsafe { libc::syscall(libc::SYS_exit, i32::from(done.is_err())) };
            unreachable!("It has ended");
        }
    }
}

impl Talker {
    fn answers(mut self) -> Result<()> {
        self.ask.write_all(b"?").context("Ask the child")?;
        let mut byte = [0];
        let answered = self.answer.read_exact(&mut byte);
        let status = waitpid(self.pid, None)?;
        ensure!(
            answered.is_ok() && byte == *b"?" && status == WaitStatus::Exited(self.pid, 0),
            "{answered:?}, {byte:?}, {status:?}"
        );
        Ok(())
    }
}

fn listener(case: &Case) -> Result<()> {
    let calls = [libc::SYS_getcpu];
    let fd = install(FLAG_NEW_LISTENER, &calls, RET_USER_NOTIF, RET_ALLOW)?;
    // SAFETY: a new descriptor, owned by nobody else.
    let held = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) };
    case.ready()?;
    let link = std::fs::read_link(format!("/proc/self/fd/{}", held.as_raw_fd()))?;
    ensure!(
        link.to_string_lossy().contains("seccomp notify"),
        "The listener is {}",
        link.display()
    );
    Ok(())
}

fn one_thread(case: &Case) -> Result<()> {
    let (filtered, is_filtered) = mpsc::channel();
    let (go, wait) = mpsc::channel::<()>();
    let worker = std::thread::spawn(move || -> Result<_> {
        install(0, &[libc::SYS_getcpu], RET_ERRNO | 71, RET_ALLOW)?;
        filtered.send(())?;
        wait.recv()?;
        Ok(getcpu())
    });
    is_filtered
        .recv()
        .map_err(|_| anyhow!("It has no filter"))?;
    case.ready()?;
    go.send(())?;
    let answer = join("worker", worker)?;
    ensure!(answer == Err(Errno::from_raw(71)), "Its own: {answer:?}");
    ensure!(getcpu().is_ok(), "The first thread has the filter");
    Ok(())
}
