//! Threads, processes, address spaces, signal actions, timers, zombies.

use std::collections::BTreeSet;
use std::fs;
use std::mem::MaybeUninit;
use std::ptr;

use anyhow::{Context, Result, ensure};
use tracker::bpf::events::{ProcessFlag, RestartKind, ThreadFlag};
use tracker::bpf::iter::{Iterators, Scope};

use crate::sys::{check, fork_exit, fork_sleep, wait_for_syscall};

fn me() -> Scope {
    Scope::Process(std::process::id())
}

fn status_field(name: &str) -> Result<String> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    Ok(line
        .with_context(|| format!("No {name} in /proc/self/status"))?
        .trim()
        .to_owned())
}

pub fn threads(iterators: &mut Iterators) -> Result<()> {
    let (stop, wait) = std::sync::mpsc::channel::<()>();
    let (ready, started) = std::sync::mpsc::channel();
    let worker = std::thread::Builder::new()
        .name("iter-worker".to_owned())
        .spawn(move || {
            let mut set = MaybeUninit::uninit();
            // SAFETY: sigemptyset initialises the set; the masks and numbers are valid.
            unsafe {
                libc::sigemptyset(set.as_mut_ptr());
                libc::sigaddset(set.as_mut_ptr(), libc::SIGUSR2);
                libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut());
                libc::syscall(
                    libc::SYS_tgkill,
                    libc::getpid(),
                    libc::gettid(),
                    libc::SIGUSR2,
                );
                libc::prctl(libc::PR_SET_TIMERSLACK, 77_000);
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGUSR1);
                ready.send(libc::gettid()).ok();
            }
            wait.recv().ok();
            // take the pending signal, so that it does not outlive the check
            let mut signal = 0;
            // SAFETY: the set was initialised above.
            unsafe { libc::sigwait(set.as_ptr(), &raw mut signal) };
        })?;
    let tid = u32::try_from(started.recv()?)?;
    let found = iterators.threads(me())?.threads;
    let usr2 = 1u64 << (libc::SIGUSR2 - 1);

    let listed: BTreeSet<u32> = fs::read_dir("/proc/self/task")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?))
        .collect::<Result<_>>()?;
    ensure!(
        found.iter().map(|t| t.tid).collect::<BTreeSet<_>>() == listed,
        "thread set"
    );

    let worker_rec = found
        .iter()
        .find(|t| t.tid == tid)
        .context("worker missing")?;
    ensure!(
        worker_rec.comm() == "iter-worker",
        "comm is {}",
        worker_rec.comm()
    );
    ensure!(
        worker_rec.blocked & usr2 != 0,
        "blocked {:x}",
        worker_rec.blocked
    );
    ensure!(
        worker_rec.pending & usr2 != 0,
        "pending {:x}",
        worker_rec.pending
    );
    ensure!(
        worker_rec.timer_slack_ns == 77_000,
        "slack {}",
        worker_rec.timer_slack_ns
    );
    ensure!(
        worker_rec.pdeath_signal == libc::SIGUSR1,
        "pdeath {}",
        worker_rec.pdeath_signal
    );
    ensure!(
        worker_rec.clear_child_tid != 0 && worker_rec.robust_list != 0,
        "thread pointers"
    );
    ensure!(
        worker_rec.sas_ss_size > 0,
        "Rust gives threads an alternate stack"
    );
    ensure!(!worker_rec.is_zombie(), "zombie");

    let leader = found
        .iter()
        .find(|t| t.tid == t.tgid)
        .context("leader missing")?;
    ensure!(leader.pending == 0, "pending of the leader");
    ensure!(leader.mm == worker_rec.mm && leader.mm != 0, "shared mm");
    ensure!(
        leader.files == worker_rec.files && leader.files != 0,
        "shared files"
    );
    ensure!(leader.sighand == worker_rec.sighand, "shared sighand");
    for (field, value) in [
        ("CapEff", leader.cap_effective),
        ("CapPrm", leader.cap_permitted),
        ("CapInh", leader.cap_inheritable),
        ("CapBnd", leader.cap_bset),
        ("CapAmb", leader.cap_ambient),
        ("SigBlk", leader.blocked),
    ] {
        ensure!(
            u64::from_str_radix(&status_field(field)?, 16)? == value,
            "{field} {value:x}"
        );
    }
    let uids = format!(
        "{}\t{}\t{}\t{}",
        leader.uid, leader.euid, leader.suid, leader.fsuid
    );
    ensure!(status_field("Uid")? == uids, "uids {uids}");
    ensure!(
        status_field("Seccomp")? == leader.seccomp_mode.to_string(),
        "seccomp"
    );
    for (name, inum) in [
        ("mnt", leader.mnt_ns),
        ("pid", leader.pid_ns),
        ("net", leader.net_ns),
        ("uts", leader.uts_ns),
        ("ipc", leader.ipc_ns),
        ("user", leader.user_ns),
        ("time", leader.time_ns),
        ("cgroup", leader.cgroup_ns),
    ] {
        let link = fs::read_link(format!("/proc/self/ns/{name}"))?;
        ensure!(
            link.to_string_lossy() == format!("{name}:[{inum}]"),
            "{name} is {inum}"
        );
    }
    let mut head = ptr::null_mut::<libc::c_void>();
    let mut len = 0usize;
    // SAFETY: the pointers are valid for the call.
    let result =
        unsafe { libc::syscall(libc::SYS_get_robust_list, 0, &raw mut head, &raw mut len) };
    check(result, "get_robust_list")?;
    ensure!(
        leader.robust_list == head as u64,
        "robust list {:x}",
        leader.robust_list
    );
    let no_new_privs = leader.flags & ThreadFlag::NO_NEW_PRIVS != 0;
    ensure!(
        (status_field("NoNewPrivs")? == "1") == no_new_privs,
        "no_new_privs"
    );
    stop.send(())?;
    worker.join().ok();
    Ok(())
}

pub fn process(iterators: &mut Iterators) -> Result<()> {
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 7,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: 5000,
            tv_usec: 0,
        },
    };
    // SAFETY: the timer is valid and no old value is asked for.
    unsafe {
        check(
            libc::setitimer(libc::ITIMER_REAL, &raw const timer, ptr::null_mut()).into(),
            "setitimer",
        )?;
        check(
            libc::setitimer(libc::ITIMER_PROF, &raw const timer, ptr::null_mut()).into(),
            "setitimer",
        )?;
        check(libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1).into(), "prctl")?;
    }
    fs::write("/proc/self/oom_score_adj", "123")?;
    let found = iterators.threads(me())?.processes;
    ensure!(found.len() == 1, "{} processes", found.len());
    let rec = found[0];
    ensure!(rec.pid == std::process::id(), "pid");
    ensure!(
        rec.ppid == std::os::unix::process::parent_id(),
        "ppid {}",
        rec.ppid
    );
    ensure!(
        i64::from(rec.pgid) == i64::from(nix::unistd::getpgrp().as_raw()),
        "pgid {}",
        rec.pgid
    );
    ensure!(
        i64::from(rec.sid) == i64::from(nix::unistd::getsid(None)?.as_raw()),
        "sid {}",
        rec.sid
    );
    ensure!(rec.flags & ProcessFlag::CHILD_SUBREAPER != 0, "subreaper");
    ensure!(
        rec.flags & ProcessFlag::REAL_TIMER_ARMED != 0,
        "itimer armed"
    );
    ensure!(
        rec.itimer_real_interval_ns == 7_000_000_000,
        "{}",
        rec.itimer_real_interval_ns
    );
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    let now_ns = u64::try_from(now.tv_sec())? * 1_000_000_000;
    let left = rec.itimer_real_expires_ns.saturating_sub(now_ns) / 1_000_000_000;
    ensure!((4000..=5001).contains(&left), "itimer has {left} s left");
    ensure!(
        rec.itimer_prof_interval_ns == 7_000_000_000,
        "prof {}",
        rec.itimer_prof_interval_ns
    );
    ensure!(
        rec.itimer_prof_expires_ns >= 5_000_000_000_000,
        "prof {}",
        rec.itimer_prof_expires_ns
    );
    ensure!(rec.oom_score_adj == 123, "oom {}", rec.oom_score_adj);
    let (cur, max) = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?;
    let nofile = rec.rlimits[usize::try_from(libc::RLIMIT_NOFILE)?];
    ensure!((nofile.cur, nofile.max) == (cur, max), "nofile {nofile:?}");
    let off = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
    };
    // SAFETY: as above.
    unsafe {
        check(
            libc::setitimer(libc::ITIMER_REAL, &raw const off, ptr::null_mut()).into(),
            "setitimer",
        )?;
        check(
            libc::setitimer(libc::ITIMER_PROF, &raw const off, ptr::null_mut()).into(),
            "setitimer",
        )?;
    }
    let rec = iterators.threads(me())?.processes[0];
    ensure!(
        rec.flags & ProcessFlag::REAL_TIMER_ARMED == 0,
        "itimer disarmed"
    );
    Ok(())
}

pub fn address_space(iterators: &mut Iterators) -> Result<()> {
    let found = iterators.threads(me())?.mms;
    let mm = found.first().context("no mm")?;
    let stat = fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = stat
        .rsplit_once(") ")
        .context("/proc/self/stat")?
        .1
        .split_whitespace()
        .collect();
    // field numbers of proc_pid_stat(5), which counts from 1; ours start at field 3
    for (field, value) in [
        (26, mm.start_code),
        (27, mm.end_code),
        (28, mm.start_stack),
        (45, mm.start_data),
        (46, mm.end_data),
        (47, mm.start_brk),
        (48, mm.arg_start),
        (49, mm.arg_end),
        (50, mm.env_start),
        (51, mm.env_end),
    ] {
        ensure!(
            fields[field - 3].parse::<u64>()? == value,
            "stat field {field}: {value}"
        );
    }
    // SAFETY: sbrk(0) only reads.
    let brk = unsafe { libc::sbrk(0) } as u64;
    ensure!(mm.brk == brk, "brk {:x}", mm.brk);
    // SAFETY: getauxval only reads.
    let vdso = unsafe { libc::getauxval(libc::AT_SYSINFO_EHDR) };
    ensure!(mm.vdso == vdso, "vdso {:x}", mm.vdso);
    let auxv = fs::read("/proc/self/auxv")?;
    let words: Vec<u64> = auxv
        .as_chunks::<8>()
        .0
        .iter()
        .map(|word| u64::from_ne_bytes(*word))
        .collect();
    ensure!(
        usize::try_from(mm.auxv_words)? >= words.len(),
        "auxv of {} words",
        mm.auxv_words
    );
    ensure!(mm.auxv[..words.len()] == words, "auxv");
    let exe = nix::sys::stat::stat("/proc/self/exe")?;
    ensure!(mm.exe_ino == exe.st_ino, "exe inode");
    ensure!(
        tracker::bpf::iter::user_dev(mm.exe_dev) == exe.st_dev,
        "exe device"
    );
    Ok(())
}

extern "C" fn handler(_signal: libc::c_int) {}

pub fn signal_actions(iterators: &mut Iterators) -> Result<()> {
    // SAFETY: zeroes are a valid sigaction.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
    // SAFETY: the handler does nothing; the pointers are valid.
    unsafe {
        libc::sigaddset(&raw mut action.sa_mask, libc::SIGTERM);
        check(
            libc::sigaction(libc::SIGUSR1, &raw const action, ptr::null_mut()).into(),
            "sigaction",
        )?;
    }
    let found = iterators.tasks(me())?.sigactions;
    ensure!(
        found.len() == 1 && found[0].pid == std::process::id(),
        "one process"
    );
    let at = |signal: i32| -> Result<_> { Ok(found[0].actions[usize::try_from(signal - 1)?]) };
    let usr1 = at(libc::SIGUSR1)?;
    ensure!(
        usr1.handler == handler as *const () as u64,
        "handler {:x}",
        usr1.handler
    );
    let flags = u64::try_from(libc::SA_RESTART | libc::SA_ONSTACK)?;
    ensure!(usr1.flags & flags == flags, "flags {:x}", usr1.flags);
    ensure!(
        usr1.mask == 1 << (libc::SIGTERM - 1),
        "mask {:x}",
        usr1.mask
    );
    // the Rust runtime ignores SIGPIPE
    ensure!(
        at(libc::SIGPIPE)?.handler == libc::SIG_IGN as u64,
        "SIGPIPE"
    );
    ensure!(
        at(libc::SIGCHLD)?.handler == libc::SIG_DFL as u64,
        "SIGCHLD"
    );
    Ok(())
}

pub fn posix_timers(iterators: &mut Iterators) -> Result<()> {
    let make = |clock: libc::clockid_t, value: usize| -> Result<libc::timer_t> {
        // SAFETY: zeroes are a valid sigevent.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_SIGNAL;
        event.sigev_signo = libc::SIGRTMIN() + 1;
        event.sigev_value.sival_ptr = value as *mut libc::c_void;
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: the pointers are valid for the call.
        let result = unsafe { libc::timer_create(clock, &raw mut event, &raw mut timer) };
        check(result.into(), "timer_create")?;
        Ok(timer)
    };
    let monotonic = make(libc::CLOCK_MONOTONIC, 0x1234)?;
    let cpu = make(libc::CLOCK_PROCESS_CPUTIME_ID, 0x5678)?;
    let idle = make(libc::CLOCK_REALTIME, 0x9abc)?;
    let spec = libc::itimerspec {
        it_interval: libc::timespec {
            tv_sec: 5,
            tv_nsec: 6,
        },
        it_value: libc::timespec {
            tv_sec: 4000,
            tv_nsec: 0,
        },
    };
    for timer in [monotonic, cpu] {
        // SAFETY: the timer exists and the specification is valid.
        let result = unsafe { libc::timer_settime(timer, 0, &raw const spec, ptr::null_mut()) };
        check(result.into(), "timer_settime")?;
    }
    let mut found = iterators.tasks(me())?.timers;
    for timer in [monotonic, cpu, idle] {
        // SAFETY: the timer exists.
        unsafe { libc::timer_delete(timer) };
    }
    found.sort_by_key(|timer| timer.value);
    ensure!(
        found.iter().map(|t| t.value).eq([0x1234, 0x5678, 0x9abc]),
        "{found:?}"
    );
    for timer in &found {
        ensure!(
            timer.signo == libc::SIGRTMIN() + 1 && timer.notify == libc::SIGEV_SIGNAL,
            "{timer:?}"
        );
    }
    let [first, second, third] = found[..] else {
        unreachable!()
    };
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    let left = first.expires_ns / 1_000_000_000 - u64::try_from(now.tv_sec())?;
    ensure!(
        (3000..=4001).contains(&left) && first.interval_ns == 5_000_000_006,
        "{first:?}"
    );
    ensure!(
        first.clock == libc::CLOCK_MONOTONIC && first.base_clock == 1,
        "{first:?}"
    );
    ensure!(
        second.expires_ns >= 4_000_000_000_000 && second.interval_ns == 5_000_000_006,
        "{second:?}"
    );
    ensure!(
        third.expires_ns == 0 && third.clock == libc::CLOCK_REALTIME,
        "{third:?}"
    );
    ensure!(
        iterators.tasks(me())?.timers.is_empty(),
        "deleted timers are gone"
    );
    Ok(())
}

pub fn restart_block(iterators: &mut Iterators) -> Result<()> {
    let sleeper = fork_sleep(3000)?;
    wait_for_syscall(sleeper.0, libc::SYS_clock_nanosleep)?;
    // A stop interrupts the sleep, which the kernel then means to continue by its restart block.
    // SAFETY: stops our child and waits for it.
    unsafe {
        check(libc::kill(sleeper.0, libc::SIGSTOP).into(), "kill")?;
        check(
            libc::waitpid(sleeper.0, ptr::null_mut(), libc::WUNTRACED).into(),
            "waitpid",
        )?;
    }
    let found = iterators
        .threads(Scope::Process(u32::try_from(sleeper.0)?))?
        .threads;
    let thread = found.first().context("sleeper missing")?;
    ensure!(
        thread.restart_kind == RestartKind::NANOSLEEP,
        "restart kind {}",
        thread.restart_kind
    );
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    let left = (thread.restart_expires_ns / 1_000_000_000)
        .checked_sub(u64::try_from(now.tv_sec())?)
        .context("deadline in the past")?;
    ensure!(
        (2000..=3001).contains(&left) && thread.restart_clock == 1,
        "{left} s left"
    );
    Ok(())
}

pub fn zombie(iterators: &mut Iterators) -> Result<()> {
    let pid = fork_exit(3)?;
    let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
    // SAFETY: waits for our child without reaping it; the pointer is valid.
    let waited = unsafe {
        libc::waitid(
            libc::P_PID,
            pid.cast_unsigned(),
            info.as_mut_ptr(),
            libc::WEXITED | libc::WNOWAIT,
        )
    };
    check(waited.into(), "waitid")?;
    let found = iterators.tasks(Scope::Process(u32::try_from(pid)?))?;
    // SAFETY: reaps our child.
    unsafe { libc::waitpid(pid, ptr::null_mut(), 0) };
    ensure!(
        found.threads.len() == 1 && found.processes.len() == 1,
        "{} threads",
        found.threads.len()
    );
    let thread = found.threads[0];
    ensure!(
        thread.is_zombie() && thread.exit_code == 3 << 8,
        "exit code {}",
        thread.exit_code
    );
    ensure!(
        thread.files == 0 && thread.mm == 0 && found.mms.is_empty(),
        "a zombie holds nothing"
    );
    ensure!(found.processes[0].ppid == std::process::id(), "parent");
    ensure!(
        found.sigactions.is_empty() || thread.sighand != 0,
        "signal actions of a zombie"
    );
    Ok(())
}
