//! Processes: trees, sessions, groups, zombies, credentials, limits and the
//! many small attributes.

use std::ffi::CString;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::stat::{Mode, umask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{
    Gid, Pid, Uid, getgroups, getpgid, getpgrp, getpid, getppid, getresgid, getresuid, getsid,
    setgroups, setpgid, setresgid, setresuid, setsid,
};

use super::child::Child;
use super::probe::{eventually, status, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("process_tree", tree),
    Entry::carried("process_zombie", zombie),
    Entry::carried("process_wait", wait),
    Entry::carried("process_orphan", orphan),
    Entry::carried("process_highest", highest),
    Entry::carried("process_vforks", vforks),
    Entry::carried("process_identity", identity),
    Entry::carried("credentials", credentials),
    Entry::carried("attributes", attributes),
];

/// A program that has children by vfork(2), as one that starts others does. As long as such a
/// child has its parent's memory nothing can be carried, and the parent cannot be stopped; the
/// freeze is repeated, and none of that is noticed by the other threads. These and the child have
/// another CPU than the parent may be bound to.
fn vforks(case: &Case) -> Result<()> {
    const WAIT: Duration = Duration::from_millis(10);
    /// No function of a library: a child has its parent's memory.
    fn leave() -> libc::c_int {
        let first: libc::c_ulong = 1;
        // SAFETY: the mask is only read.
        unsafe { libc::sched_setaffinity(0, size_of_val(&first), (&raw const first).cast()) }
    }
    extern "C" fn child(_: *mut libc::c_void) -> libc::c_int {
        let wait = libc::timespec {
            tv_sec: 0,
            tv_nsec: WAIT.subsec_nanos().into(),
        };
        let moved = leave();
        // SAFETY: the time is read, and nothing is written.
        unsafe { libc::nanosleep(&raw const wait, std::ptr::null_mut()) };
        moved
    }
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let end = EventFd::new()?;
    epoll.add(&end, EpollEvent::new(EpollFlags::EPOLLIN, 7))?;
    let waiter = std::thread::spawn(move || {
        // A child's end is none of this thread's business.
        SigSet::all().thread_block()?;
        leave();
        let mut events = [EpollEvent::empty()];
        epoll
            .wait(&mut events, EpollTimeout::NONE)
            .map(|_| events[0].data())
    });
    let mut stack = vec![0_u64; 8192];
    let (mut born, mut error) = (0_u64, None);
    case.ready_polling(2 * WAIT, || {
        let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
        let top = stack.as_mut_ptr_range().end.cast();
        // SAFETY: the parent waits while the child uses the stack, which nobody else does.
        let pid = unsafe { libc::clone(child, top, flags, std::ptr::null_mut()) };
        match sys("clone", pid.into()).and_then(|_| Ok(waitpid(Pid::from_raw(pid), None)?)) {
            Ok(WaitStatus::Exited(_, 0)) => born += 1,
            other => error = Some(format!("{other:?}")),
        }
    })?;
    ensure!(error.is_none(), "A child: {error:?}");
    ensure!(born > 0, "It never had a child");
    end.write(1)?;
    let woken = waiter.join().map_err(|_| anyhow!("The waiter panicked"))?;
    ensure!(woken == Ok(7), "epoll_wait: {woken:?}");
    Ok(())
}

/// Three generations; a session and two process groups inside.
fn tree(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let (me, my_group, my_session) = (getpid(), getpgrp(), getsid(None)?);
    let grandchild_dir = dir.clone();
    let leader = Child::start(&dir, "leader", move |turn| {
        let own = setsid()?;
        let member = Child::start(&grandchild_dir, "member", move |turn| {
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            turn.wait();
            ensure!(getppid() == own, "The member's parent is {}", getppid());
            ensure!(getpgrp() == getpid(), "The member's group is {}", getpgrp());
            ensure!(
                getsid(None)? == own,
                "The member's session is {}",
                getsid(None)?
            );
            Ok(())
        })?;
        let other = Child::start(&grandchild_dir, "other", move |turn| {
            turn.wait();
            ensure!(
                getpgrp() == own && getsid(None)? == own,
                "The other's group or session differs"
            );
            Ok(())
        })?;
        member.waits()?;
        other.waits()?;
        turn.wait();
        ensure!(
            getpid() == own && getppid() == me,
            "The leader is {} of {}",
            getpid(),
            getppid()
        );
        ensure!(
            getsid(None)? == own && getpgrp() == own,
            "The leader's session is {}",
            getsid(None)?
        );
        ensure!(
            getpgid(Some(member.pid))? == member.pid,
            "The member's group seen by its parent"
        );
        ensure!(
            setsid().is_err(),
            "A session leader can start another session"
        );
        member.finish()?;
        other.finish()
    })?;
    let plain = Child::start(&dir, "plain", move |turn| {
        turn.wait();
        ensure!(
            getppid() == me && getpgrp() == my_group,
            "The plain child is in group {}",
            getpgrp()
        );
        Ok(())
    })?;
    leader.waits()?;
    plain.waits()?;
    case.ready()?;
    ensure!(
        (getpid(), getpgrp(), getsid(None)?) == (me, my_group, my_session),
        "PID, group or session has changed"
    );
    leader.finish()?;
    plain.finish()?;
    let third = Child::start(&dir, "third", |_| Ok(()))?;
    third.join()
}

/// Zombies keep their codes and signals until somebody asks.
fn zombie(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let exited = Child::start(&dir, "exits", |_| {
        // SAFETY: ends the child.
        unsafe { libc::_exit(7) }
    })?;
    let killed = Child::start(&dir, "killed", |turn| {
        turn.wait();
        Ok(())
    })?;
    killed.waits()?;
    kill(killed.pid, Signal::SIGKILL)?;
    let is_zombie =
        |pid: Pid| -> Result<bool> { Ok(status(&pid.to_string(), "State")?.starts_with('Z')) };
    eventually("two zombies", || {
        Ok(is_zombie(exited.pid)? && is_zombie(killed.pid)?)
    })?;

    case.ready()?;

    ensure!(
        is_zombie(exited.pid)? && is_zombie(killed.pid)?,
        "A zombie is none any more"
    );
    let first = waitpid(exited.pid, None)?;
    ensure!(
        first == WaitStatus::Exited(exited.pid, 7),
        "The first ended by {first:?}"
    );
    let second = waitpid(killed.pid, None)?;
    ensure!(
        second == WaitStatus::Signaled(killed.pid, Signal::SIGKILL, false),
        "The second ended by {second:?}"
    );
    std::mem::forget((exited, killed));
    ensure!(
        waitpid(None, Some(WaitPidFlag::WNOHANG)).is_err(),
        "There are more children"
    );
    Ok(())
}

/// A parent asleep in wait4 for a child that ends afterwards.
fn wait(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let inner = dir.clone();
    let parent = Child::start(&dir, "parent", move |_| {
        let child = Child::start(&inner, "child", |turn| {
            turn.wait();
            Ok(())
        })?;
        fs::write(inner.join("pid"), child.pid.to_string())?;
        child.join()
    })?;
    parent.sleeps_in(libc::SYS_wait4)?;
    let pid: i32 = fs::read_to_string(dir.join("pid"))?.parse()?;
    super::probe::blocked_in(Pid::from_raw(pid), libc::SYS_rt_sigsuspend)?;
    case.ready()?;
    kill(Pid::from_raw(pid), Signal::SIGUSR1)?;
    parent.join()
}

/// A process whose parent is gone before.
fn orphan(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let inner = dir.clone();
    let done = dir.join("done");
    let parent = Child::start(&dir, "parent", move |_| {
        let child = Child::start(&inner, "orphan", |turn| {
            turn.wait();
            fs::write(inner.join("done"), getppid().to_string())?;
            Ok(())
        })?;
        child.waits()?;
        fs::write(inner.join("pid"), child.pid.to_string())?;
        // It lives on without its parent.
        std::mem::forget(child);
        Ok(())
    })?;
    parent.join()?;
    let pid = Pid::from_raw(fs::read_to_string(dir.join("pid"))?.parse()?);
    let session = getsid(Some(pid))?;
    case.ready()?;
    ensure!(
        getsid(Some(pid))? == session,
        "The orphan's session has changed"
    );
    kill(pid, Signal::SIGUSR1).context("Wake the orphan")?;
    eventually("the orphan's report", || Ok(done.exists()))?;
    eventually("the orphan's end", || {
        // Who reaps it may do so between the two looks.
        let zombie = || status(&pid.to_string(), "State").is_ok_and(|it| it.starts_with('Z'));
        Ok(kill(pid, None).is_err() || zombie())
    })
}

/// The highest PID there is: what restores applications, this one or others, must not take it.
fn highest(case: &Case) -> Result<()> {
    let max: i32 = fs::read_to_string("/proc/sys/kernel/pid_max")?
        .trim_end()
        .parse()?;
    let pid = Pid::from_raw(max - 1);
    let child = Child::numbered(pid, case.dir(), "highest", |turn| {
        turn.wait();
        ensure!(getpid() == pid, "The PID is {}", getpid());
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    child.finish()
}

/// What /proc says about the program: executable, command line, environment,
/// auxiliary vector, start time.
fn identity(case: &Case) -> Result<()> {
    let names = [
        "cmdline",
        "environ",
        "auxv",
        "comm",
        "personality",
        "cgroup",
    ];
    let read = || -> Result<Vec<Vec<u8>>> {
        names
            .iter()
            .map(|name| {
                fs::read(format!("/proc/self/{name}")).with_context(|| format!("Read {name}"))
            })
            .collect()
    };
    let links = || -> Result<Vec<_>> {
        ["exe", "cwd", "root"]
            .iter()
            .map(|name| Ok(fs::read_link(format!("/proc/self/{name}"))?))
            .collect()
    };
    let (before, links_before) = (read()?, links()?);
    let exe = fs::metadata("/proc/self/exe")?.ino();
    case.ready()?;
    let (after, links_after) = (read()?, links()?);
    for ((name, was), is) in names.iter().zip(before).zip(after) {
        ensure!(
            was == is,
            "{name} was {:?}, is {:?}",
            String::from_utf8_lossy(&was),
            String::from_utf8_lossy(&is)
        );
    }
    ensure!(
        links_before == links_after,
        "Links were {links_before:?}, are {links_after:?}"
    );
    ensure!(
        fs::metadata("/proc/self/exe")?.ino() == exe,
        "The executable is another file"
    );
    ensure!(
        // SAFETY: reads the auxiliary vector.
        unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) } != 0,
        "The auxiliary vector has no vDSO"
    );
    Ok(())
}

/// User and group IDs, groups, capabilities, securebits, no_new_privs.
fn credentials(case: &Case) -> Result<()> {
    let keys = [
        "Uid",
        "Gid",
        "Groups",
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Seccomp",
    ];
    let all =
        |pid: &str| -> Result<Vec<String>> { keys.iter().map(|key| status(pid, key)).collect() };
    let dir = case.dir().to_owned();
    let nobody = Child::start(&dir, "nobody", |turn| {
        setgroups(&[Gid::from_raw(4242), Gid::from_raw(7)])?;
        setresgid(
            Gid::from_raw(65534),
            Gid::from_raw(65534),
            Gid::from_raw(65534),
        )?;
        setresuid(
            Uid::from_raw(65534),
            Uid::from_raw(65534),
            Uid::from_raw(65534),
        )?;
        sys(
            "PR_SET_NO_NEW_PRIVS",
            // SAFETY: only sets a flag.
            unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into(),
        )?;
        let before = all("self")?;
        turn.wait();
        let after = all("self")?;
        for ((key, was), is) in keys.iter().zip(before).zip(after) {
            // The kernel shows the groups in its own order.
            ensure!(was == is, "{key} was {was}, is {is}");
        }
        ensure!(getgroups()?.len() == 2, "Groups {:?}", getgroups()?);
        ensure!(
            fs::read("/etc/shadow").is_err(),
            "Nobody can read /etc/shadow"
        );
        ensure!(
            setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_err(),
            "Nobody can become root"
        );
        Ok(())
    });
    let nobody = nobody?;
    let mixed = Child::start(&dir, "mixed", |turn| {
        // SAFETY: these only set attributes of this process.
        unsafe {
            sys(
                "PR_SET_KEEPCAPS",
                libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0).into(),
            )?;
            // CAP_SYS_RAWIO leaves the bounding set.
            sys(
                "PR_CAPBSET_DROP",
                libc::prctl(libc::PR_CAPBSET_DROP, 17, 0, 0, 0).into(),
            )?;
        }
        setresgid(
            Gid::from_raw(1001),
            Gid::from_raw(1002),
            Gid::from_raw(1003),
        )?;
        setresuid(Uid::from_raw(2001), Uid::from_raw(2002), Uid::from_raw(0))?;
        // SAFETY: as above; fsuid is set last since the others set it too.
        unsafe { libc::setfsuid(2001) };
        let before = all("self")?;
        turn.wait();
        let after = all("self")?;
        for ((key, was), is) in keys.iter().zip(before).zip(after) {
            ensure!(was == is, "{key} was {was}, is {is}");
        }
        let (user, group) = (getresuid()?, getresgid()?);
        ensure!(
            user.saved == Uid::from_raw(0) && group.real == Gid::from_raw(1001),
            "IDs differ"
        );
        ensure!(
            // SAFETY: asks only.
            unsafe { libc::prctl(libc::PR_CAPBSET_READ, 17, 0, 0, 0) } == 0,
            "The bounding set is whole again"
        );
        setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0))
            .context("Back to root by the saved ID")
    })?;
    nobody.waits()?;
    mixed.waits()?;
    case.ready()?;
    // Only root may wake them now; this process is root.
    nobody.finish()?;
    mixed.finish()
}

/// `prctl` with plain numbers.
fn ask(name: &str, option: i32) -> Result<i32> {
    // SAFETY: an option that only returns a number.
    let value = unsafe { libc::prctl(option, 0, 0, 0, 0) };
    Ok(i32::try_from(sys(name, value.into())?)?)
}

/// umask, working directory, priority, OOM score, name, affinity and flags of
/// prctl.
fn attributes(case: &Case) -> Result<()> {
    /// `IOPRIO_CLASS_IDLE` with a level, which it ignores.
    const IDLE: i64 = 3 << 13 | 5;
    let ioprio = |value: Option<i64>| -> i64 {
        const WHO_PROCESS: i64 = 1;
        // SAFETY: takes integers.
        unsafe {
            match value {
                Some(value) => libc::syscall(libc::SYS_ioprio_set, WHO_PROCESS, 0i64, value),
                None => libc::syscall(libc::SYS_ioprio_get, WHO_PROCESS, 0i64),
            }
        }
    };
    let inside = case.dir().join("here");
    fs::create_dir_all(&inside)?;
    let dir = case.dir().to_owned();
    let cpus = sched_getaffinity(Pid::from_raw(0))?;
    let child = Child::start(&dir, "attributes", move |turn| {
        umask(Mode::from_bits_truncate(0o137));
        std::env::set_current_dir(&inside)?;
        fs::write("/proc/self/oom_score_adj", "321")?;
        fs::write("/proc/self/coredump_filter", "0x6b")?;
        sys("ioprio_set", ioprio(Some(IDLE)))?;
        let mut first = CpuSet::new();
        let lowest = (0..CpuSet::count())
            .find(|&cpu| cpus.is_set(cpu).unwrap_or(false))
            .context("No CPU")?;
        first.set(lowest)?;
        sched_setaffinity(Pid::from_raw(0), &first)?;
        let name = CString::new("odd (name) x")?;
        let batch = libc::sched_param { sched_priority: 0 };
        // SAFETY: these set attributes of this process; the name lives across
        // its call.
        unsafe {
            sys(
                "setpriority",
                libc::setpriority(libc::PRIO_PROCESS, 0, 7).into(),
            )?;
            sys(
                "sched_setscheduler",
                libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const batch).into(),
            )?;
            sys(
                "PR_SET_NAME",
                libc::prctl(libc::PR_SET_NAME, name.as_ptr()).into(),
            )?;
            sys(
                "PR_SET_TIMERSLACK",
                libc::prctl(libc::PR_SET_TIMERSLACK, 123_456, 0, 0, 0).into(),
            )?;
            sys(
                "PR_SET_CHILD_SUBREAPER",
                libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0).into(),
            )?;
            sys(
                "PR_SET_PDEATHSIG",
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGHUP, 0, 0, 0).into(),
            )?;
            sys(
                "PR_SET_DUMPABLE",
                libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0).into(),
            )?;
            sys(
                "PR_SET_THP_DISABLE",
                libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0).into(),
            )?;
        }
        turn.wait();
        ensure!(umask(Mode::empty()).bits() == 0o137, "The umask differs");
        let filter = fs::read_to_string("/proc/self/coredump_filter")?;
        ensure!(filter.trim() == "0000006b", "The core filter is {filter}");
        let priority = sys("ioprio_get", ioprio(None))?;
        ensure!(priority == IDLE, "The I/O priority is {priority:#x}");
        ensure!(
            std::env::current_dir()? == inside,
            "In {}",
            std::env::current_dir()?.display()
        );
        ensure!(
            fs::read_to_string("/proc/self/comm")? == "odd (name) x\n",
            "Another name"
        );
        ensure!(
            sched_getaffinity(Pid::from_raw(0))? == first,
            "Another affinity"
        );
        ensure!(
            ask("PR_GET_DUMPABLE", libc::PR_GET_DUMPABLE)? == 0,
            "Dumpable again"
        );
        ensure!(
            ask("PR_GET_TIMERSLACK", libc::PR_GET_TIMERSLACK)? == 123_456,
            "Another timer slack"
        );
        ensure!(
            ask("PR_GET_THP_DISABLE", libc::PR_GET_THP_DISABLE)? == 1,
            "Huge pages are allowed again"
        );
        let (mut reaper, mut signal) = (0i32, 0i32);
        // SAFETY: the first two write an int; the others only ask.
        let (priority, policy) = unsafe {
            sys(
                "PR_GET_CHILD_SUBREAPER",
                libc::prctl(libc::PR_GET_CHILD_SUBREAPER, &raw mut reaper).into(),
            )?;
            sys(
                "PR_GET_PDEATHSIG",
                libc::prctl(libc::PR_GET_PDEATHSIG, &raw mut signal).into(),
            )?;
            (
                libc::getpriority(libc::PRIO_PROCESS, 0),
                libc::sched_getscheduler(0),
            )
        };
        ensure!(reaper == 1, "No subreaper any more");
        ensure!(signal == libc::SIGHUP, "Death signal {signal}");
        ensure!(priority == 7, "Nice {priority}");
        ensure!(policy == libc::SCHED_BATCH, "Policy {policy}");
        // A process that is not dumpable cannot read all of /proc/self.
        sys(
            "PR_SET_DUMPABLE",
            // SAFETY: only sets a flag.
            unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) }.into(),
        )?;
        ensure!(
            fs::read_to_string("/proc/self/oom_score_adj")?.trim() == "321",
            "Another OOM score"
        );
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    child.finish()
}
