//! Scheduling beyond policy and priority, and who may trace whom.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::unistd::{Pid, getpid, setgid, setgroups, setsid, setuid};

use super::child::Child;
use super::probe::sys;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("sched_reset_on_fork", reset_on_fork),
    Entry::carried("sched_slice", slice),
    Entry::carried("sched_autogroup", autogroup),
    Entry::carried("process_ptracer", ptracer),
];

/// The policy of this thread, with `SCHED_RESET_ON_FORK`.
fn policy() -> Result<i32> {
    // SAFETY: takes an integer.
    let policy = unsafe { libc::sched_getscheduler(0) };
    Ok(i32::try_from(sys("sched_getscheduler", policy.into())?)?)
}

fn nice() -> Result<i32> {
    Errno::clear();
    // SAFETY: takes integers.
    let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    ensure!(Errno::last_raw() == 0, "getpriority: {}", Errno::last());
    Ok(nice)
}

/// What a thread has that its children do not inherit.
fn reset_on_fork(case: &Case) -> Result<()> {
    const WANTED: i32 = libc::SCHED_BATCH | libc::SCHED_RESET_ON_FORK;
    let favoured = Child::start(case.dir(), "favoured", |turn| {
        // SAFETY: all of it may be zeroes.
        let param: libc::sched_param = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel reads one sched_param.
        let set = unsafe { libc::sched_setscheduler(0, WANTED, &raw const param) };
        sys("sched_setscheduler", set.into())?;
        // SAFETY: takes integers.
        let set = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, -7) };
        sys("setpriority", set.into())?;
        turn.wait();
        ensure!(policy()? == WANTED, "Its policy is {:#x}", policy()?);
        ensure!(nice()? == -7, "Its nice value is {}", nice()?);
        let heir = Child::start(case.dir(), "heir", |_| {
            let found = (policy()?, nice()?);
            ensure!(found == (libc::SCHED_BATCH, 0), "It inherits {found:?}");
            Ok(())
        })?;
        heir.join()
    })?;
    favoured.waits()?;
    case.ready()?;
    favoured.finish()
}

/// The slice of this thread as sched_getattr(2) tells it, nanoseconds, after it is set to
/// `wanted`, if there is one.
fn slice_of(wanted: Option<u64>) -> Result<u64> {
    const SIZE: u32 = 48;
    // struct sched_attr, first version: size, policy, 64 flags, nice, priority, runtime, ...
    let mut attr = [0_u8; SIZE as usize];
    attr[..4].copy_from_slice(&SIZE.to_ne_bytes());
    if let Some(slice) = wanted {
        attr[24..32].copy_from_slice(&slice.to_ne_bytes());
        // SAFETY: the kernel reads as many bytes as they say.
        let set = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, attr.as_ptr(), 0) };
        sys("sched_setattr", set)?;
    }
    // SAFETY: the kernel writes at most so many bytes.
    let got = unsafe { libc::syscall(libc::SYS_sched_getattr, 0, attr.as_mut_ptr(), SIZE, 0) };
    sys("sched_getattr", got)?;
    Ok(u64::from_ne_bytes(attr[24..32].try_into()?))
}

/// The slice a thread asks for, where this kernel keeps it; another one has the usual.
fn slice(case: &Case) -> Result<()> {
    const WANTED: u64 = 7_000_000;
    let usual = slice_of(None)?;
    let own = Child::start(case.dir(), "own", |turn| {
        let kept = slice_of(Some(WANTED))? == WANTED;
        turn.wait();
        let found = slice_of(None)?;
        ensure!(!kept || found == WANTED, "Its slice is {found} ns");
        Ok(())
    })?;
    own.waits()?;
    case.ready()?;
    let found = slice_of(None)?;
    ensure!(
        found != WANTED && usual != WANTED,
        "The other's is {found} ns, was {usual}"
    );
    own.finish()
}

/// The nice value of a session.
fn autogroup(case: &Case) -> Result<()> {
    const FILE: &str = "/proc/self/autogroup";
    let leader = Child::start(case.dir(), "leader", |turn| {
        setsid().context("setsid")?;
        fs::write(FILE, "6").context("Write its autogroup")?;
        turn.wait();
        let found = fs::read_to_string(FILE)?;
        ensure!(found.trim_end().ends_with(" nice 6"), "It is {found}");
        Ok(())
    })?;
    leader.waits()?;
    case.ready()?;
    leader.finish()
}

/// Becomes a process that Yama does not let trace others, and that others of the same user may
/// trace but for Yama.
fn become_nobody() -> Result<()> {
    const NOBODY: u32 = 65_534;
    setgroups(&[])?;
    setgid(NOBODY.into())?;
    setuid(NOBODY.into())?;
    // SAFETY: takes integers.
    let set = unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) };
    sys("PR_SET_DUMPABLE", set.into()).map(drop)
}

/// Yama lets whom a process has named trace it, where only parents may.
fn ptracer(case: &Case) -> Result<()> {
    const ANY: usize = usize::MAX;
    let name = |tracer: usize| {
        // SAFETY: takes integers.
        let set = unsafe { libc::prctl(libc::PR_SET_PTRACER, tracer, 0, 0, 0) };
        sys("PR_SET_PTRACER", set.into())
    };
    // Of siblings that do not know each other's PIDs yet: a file tells them.
    let file = |name: &str| case.path(&format!("pid-{name}"));
    let tracee = |who: &'static str, tracer: Option<usize>| {
        Child::start(case.dir(), who, move |turn| {
            become_nobody()?;
            if let Some(tracer) = tracer {
                name(tracer)?;
            }
            turn.wait();
            Ok(())
        })
    };
    let tries = |turn: &super::child::Turn, expected: [bool; 3]| -> Result<()> {
        turn.wait();
        let pids = ["named", "any", "closed"].map(|who| fs::read_to_string(file(who)));
        become_nobody()?;
        for (pid, expected) in pids.into_iter().zip(expected) {
            let pid = Pid::from_raw(pid?.parse()?);
            let seized = ptrace::seize(pid, ptrace::Options::empty());
            let wanted = if expected { Ok(()) } else { Err(Errno::EPERM) };
            ensure!(
                seized == wanted,
                "PID {} seizes {pid}: {seized:?}",
                getpid()
            );
        }
        Ok(())
    };
    let tracer = Child::start(case.dir(), "tracer", |turn| {
        tries(turn, [true, true, false])
    })?;
    let stranger = Child::start(case.dir(), "stranger", |turn| {
        tries(turn, [false, true, false])
    })?;
    let named = tracee("named", Some(usize::try_from(tracer.pid.as_raw())?))?;
    let (any, closed) = (tracee("any", Some(ANY))?, tracee("closed", None)?);
    for (who, child) in [("named", &named), ("any", &any), ("closed", &closed)] {
        fs::write(file(who), child.pid.to_string())?;
        child.waits()?;
    }
    tracer.waits()?;
    stranger.waits()?;
    case.ready()?;
    // A setting of the machine, which lets all do what they like at first.
    fs::write("/proc/sys/kernel/yama/ptrace_scope", "1").context("Yama's scope")?;
    // One after another: who traces has what it traces to itself until it ends.
    tracer.finish()?;
    stranger.finish()?;
    for child in [named, any, closed] {
        child.finish()?;
    }
    Ok(())
}
