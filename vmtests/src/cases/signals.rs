//! Signals: actions, masks, pending and queued ones, alternate stack, and the
//! timers that send them.

use std::mem::MaybeUninit;
use std::sync::atomic::{AtomicI32, AtomicU64, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::gettid;

use super::probe::{eventually, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("signals_actions", actions),
    Entry::carried("signals_pending", pending),
    Entry::carried("signals_stack", stack),
    Entry::carried("itimer", itimer),
    Entry::carried("posix_timer", posix_timer),
    Entry::carried("posix_timer_directed", posix_timer_directed),
];

/// How often the handler ran.
pub(super) static COUNT: AtomicU64 = AtomicU64::new(0);
/// With what the last time.
pub(super) static LAST_VALUE: AtomicI32 = AtomicI32::new(0);
static LAST_THREAD: AtomicI32 = AtomicI32::new(0);
static STACK_SEEN: AtomicUsize = AtomicUsize::new(0);

extern "C" fn count(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let here = 0u8;
    STACK_SEEN.store(&raw const here as usize, Ordering::SeqCst);
    // SAFETY: SA_SIGINFO handlers get a valid siginfo; every sender here sets
    // the value.
    let value = unsafe { (*info).si_value().sival_ptr } as usize;
    LAST_VALUE.store(
        i32::try_from(value & 0x7fff_ffff).unwrap_or(-1),
        Ordering::SeqCst,
    );
    // SAFETY: asks for this thread's ID.
    LAST_THREAD.store(unsafe { libc::gettid() }, Ordering::SeqCst);
    COUNT.fetch_add(1, Ordering::SeqCst);
}

/// Has the signal counted.
pub(super) fn handle(signal: Signal, flags: SaFlags, mask: SigSet) -> Result<()> {
    let action = SigAction::new(
        SigHandler::SigAction(count),
        flags | SaFlags::SA_SIGINFO,
        mask,
    );
    // SAFETY: the handler uses atomics only.
    unsafe { sigaction(signal, &action) }.with_context(|| format!("Handle {signal}"))?;
    Ok(())
}

/// Handler, flags and mask of each signal, straight from the kernel.
fn kernel_actions() -> Result<Vec<[u64; 4]>> {
    (1..=64)
        .map(|signal| {
            let mut action = [0u64; 4];
            // SAFETY: the kernel's struct has four words here: handler, flags,
            // restorer, mask.
            let asked = unsafe {
                libc::syscall(
                    libc::SYS_rt_sigaction,
                    signal,
                    0usize,
                    action.as_mut_ptr(),
                    8,
                )
            };
            sys("rt_sigaction", asked)?;
            Ok(action)
        })
        .collect()
}

fn queue(signal: i32, value: usize) -> Result<()> {
    let value = libc::sigval {
        sival_ptr: value as *mut libc::c_void,
    };
    // SAFETY: a signal to ourselves with a plain number as its value.
    sys(
        "sigqueue",
        unsafe { libc::sigqueue(libc::getpid(), signal, value) }.into(),
    )
    .map(|_| ())
}

/// All 64 actions, and handlers that still run with their masks.
fn actions(case: &Case) -> Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGTERM);
    handle(
        Signal::SIGUSR2,
        SaFlags::SA_RESTART | SaFlags::SA_NODEFER,
        mask,
    )?;
    handle(Signal::SIGWINCH, SaFlags::SA_RESETHAND, SigSet::empty())?;
    let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::empty(), SigSet::empty());
    // SAFETY: ignoring a signal runs nothing.
    unsafe {
        sigaction(Signal::SIGHUP, &ignore)?;
        sigaction(Signal::SIGTRAP, &ignore)?;
    }
    let before = kernel_actions()?;

    case.ready()?;

    let after = kernel_actions()?;
    for (i, (was, is)) in before.iter().zip(&after).enumerate() {
        ensure!(
            was == is,
            "Action of signal {} was {was:x?}, is {is:x?}",
            i + 1
        );
    }
    queue(libc::SIGUSR2, 4711)?;
    ensure!(
        COUNT.load(Ordering::SeqCst) == 1 && LAST_VALUE.load(Ordering::SeqCst) == 4711,
        "The handler did not run"
    );
    queue(libc::SIGWINCH, 1)?;
    ensure!(
        COUNT.load(Ordering::SeqCst) == 2,
        "The second handler did not run"
    );
    ensure!(
        kernel_actions()?[libc::SIGWINCH as usize - 1][0] == 0,
        "SA_RESETHAND has no effect"
    );
    nix::sys::signal::raise(Signal::SIGHUP)?;
    Ok(())
}

/// Blocked signals wait: plain ones once, real-time ones in order with their
/// values, for the process and for one thread.
fn pending(case: &Case) -> Result<()> {
    let real_time = libc::SIGRTMIN() + 3;
    let mut set = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the set is initialised by the first call; the mask is ours.
    let set = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for signal in [libc::SIGUSR2, libc::SIGTERM, real_time] {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        set.assume_init()
    };
    for value in 1..=5 {
        queue(real_time, value)?;
    }
    nix::sys::signal::raise(Signal::SIGUSR2)?;
    nix::sys::signal::kill(nix::unistd::getpid(), Signal::SIGTERM)?;
    let mask = SigSet::thread_get_mask()?;

    case.ready()?;

    ensure!(SigSet::thread_get_mask()? == mask, "The mask has changed");
    let mut taken = Vec::new();
    loop {
        let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
        let now = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: all three live across the call, which fills the info if it
        // returns a signal.
        let signal =
            unsafe { libc::sigtimedwait(&raw const set, info.as_mut_ptr(), &raw const now) };
        if signal < 0 {
            break;
        }
        // SAFETY: filled, see above.
        let info = unsafe { info.assume_init() };
        // SAFETY: each of these signals carries a sender and perhaps a value.
        let (value, sender) = unsafe { (info.si_value().sival_ptr as usize, info.si_pid()) };
        ensure!(
            sender == nix::unistd::getpid().as_raw(),
            "Signal {signal} comes from {sender}"
        );
        taken.push((
            signal,
            info.si_code,
            if signal == real_time { value } else { 0 },
        ));
    }
    taken.sort_by_key(|&(signal, ..)| signal);
    // glibc reports SI_TKILL as SI_USER.
    let mut wanted = vec![
        (libc::SIGUSR2, libc::SI_USER, 0),
        (libc::SIGTERM, libc::SI_USER, 0),
    ];
    wanted.extend((1..=5).map(|value| (real_time, libc::SI_QUEUE, value)));
    ensure!(taken == wanted, "Pending signals {taken:?}, not {wanted:?}");
    Ok(())
}

/// A handler runs on the alternate stack.
fn stack(case: &Case) -> Result<()> {
    let place = vec![0u8; 64 * 1024].leak();
    let wanted = libc::stack_t {
        ss_sp: place.as_mut_ptr().cast(),
        ss_flags: 0,
        ss_size: place.len(),
    };
    sys(
        "sigaltstack",
        // SAFETY: the memory is never freed.
        unsafe { libc::sigaltstack(&raw const wanted, std::ptr::null_mut()) }.into(),
    )?;
    handle(Signal::SIGUSR2, SaFlags::SA_ONSTACK, SigSet::empty())?;
    let range = place.as_ptr_range();
    let range = range.start as usize..range.end as usize;

    case.ready()?;

    // SAFETY: a null pointer asks for the current one.
    let now = unsafe {
        let mut now: libc::stack_t = std::mem::zeroed();
        libc::sigaltstack(std::ptr::null(), &raw mut now);
        now
    };
    ensure!(
        now.ss_sp == wanted.ss_sp && now.ss_size == wanted.ss_size && now.ss_flags == 0,
        "Another stack is set"
    );
    queue(libc::SIGUSR2, 2)?;
    let seen = STACK_SEEN.load(Ordering::SeqCst);
    ensure!(
        range.contains(&seen),
        "The handler ran at {seen:#x}, not in {range:x?}"
    );
    Ok(())
}

/// The three interval timers: a ticking one and two far away.
fn itimer(case: &Case) -> Result<()> {
    handle(Signal::SIGALRM, SaFlags::SA_RESTART, SigSet::empty())?;
    let set = |which, value_s, interval_us| -> Result<()> {
        let timer = libc::itimerval {
            it_interval: libc::timeval {
                tv_sec: 0,
                tv_usec: interval_us,
            },
            it_value: libc::timeval {
                tv_sec: value_s,
                tv_usec: interval_us,
            },
        };
        sys(
            "setitimer",
            // SAFETY: the timer lives across the call.
            unsafe { libc::setitimer(which, &raw const timer, std::ptr::null_mut()) }.into(),
        )?;
        Ok(())
    };
    let get = |which| -> Result<libc::itimerval> {
        // SAFETY: plain numbers, filled by the call.
        let (timer, got): (libc::itimerval, _) = unsafe {
            let mut timer = std::mem::zeroed();
            let got = libc::getitimer(which, &raw mut timer);
            (timer, got)
        };
        sys("getitimer", got.into())?;
        Ok(timer)
    };
    set(libc::ITIMER_REAL, 0, 150_000)?;
    set(libc::ITIMER_VIRTUAL, 10_000, 777)?;
    set(libc::ITIMER_PROF, 20_000, 888)?;
    eventually("the first alarm", || Ok(COUNT.load(Ordering::SeqCst) > 0))?;

    case.ready()?;

    let before = COUNT.load(Ordering::SeqCst);
    eventually("three more alarms", || {
        Ok(COUNT.load(Ordering::SeqCst) > before + 2)
    })?;
    let real = get(libc::ITIMER_REAL)?;
    ensure!(
        real.it_interval.tv_usec == 150_000,
        "The interval is {} us",
        real.it_interval.tv_usec
    );
    let virtual_left = get(libc::ITIMER_VIRTUAL)?;
    ensure!(
        virtual_left.it_interval.tv_usec == 777,
        "ITIMER_VIRTUAL's interval is lost"
    );
    ensure!(
        (9_000..=10_000).contains(&virtual_left.it_value.tv_sec),
        "ITIMER_VIRTUAL has {} s left",
        virtual_left.it_value.tv_sec
    );
    let prof_left = get(libc::ITIMER_PROF)?;
    ensure!(
        (19_000..=20_000).contains(&prof_left.it_value.tv_sec),
        "ITIMER_PROF has {} s left",
        prof_left.it_value.tv_sec
    );
    Ok(())
}

/// `timer_create`, with a notification that glibc has no function for.
pub(super) fn create_timer(
    clock: libc::clockid_t,
    notify: i32,
    signal: i32,
    value: usize,
    thread: i32,
) -> Result<i32> {
    // SAFETY: a struct of plain numbers and pointers.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = notify;
    event.sigev_signo = signal;
    event.sigev_value = libc::sigval {
        sival_ptr: value as *mut libc::c_void,
    };
    event.sigev_notify_thread_id = thread;
    let mut id = 0i32;
    // SAFETY: the kernel reads the event and writes the ID.
    let made =
        unsafe { libc::syscall(libc::SYS_timer_create, clock, &raw const event, &raw mut id) };
    sys("timer_create", made)?;
    Ok(id)
}

/// Sets first expiry and interval, in nanoseconds.
pub(super) fn arm_timer(id: i32, first: i64, interval: i64) -> Result<()> {
    let time = |ns: i64| libc::timespec {
        tv_sec: ns / 1_000_000_000,
        tv_nsec: ns % 1_000_000_000,
    };
    let new = libc::itimerspec {
        it_interval: time(interval),
        it_value: time(first),
    };
    // SAFETY: the times live across the call.
    sys("timer_settime", unsafe {
        libc::syscall(libc::SYS_timer_settime, id, 0usize, &raw const new, 0usize)
    })
    .map(|_| ())
}

pub(super) fn timer_left(id: i32) -> Result<i64> {
    // SAFETY: plain numbers, filled by the call.
    let mut time: libc::itimerspec = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    sys("timer_gettime", unsafe {
        libc::syscall(libc::SYS_timer_gettime, id, &raw mut time)
    })?;
    Ok(time.it_value.tv_sec * 1_000_000_000 + time.it_value.tv_nsec)
}

/// A periodic timer whose signal is one thread's, and most likely pending when it stops.
fn posix_timer_directed(case: &Case) -> Result<()> {
    handle(Signal::SIGUSR2, SaFlags::SA_RESTART, SigSet::empty())?;
    let (clock, notify) = (libc::CLOCK_MONOTONIC, libc::SIGEV_THREAD_ID);
    let me = gettid().as_raw();
    let timer = create_timer(clock, notify, libc::SIGUSR2, 0x9999, me)?;
    arm_timer(timer, 5_000_000, 5_000_000)?;
    eventually("the first tick", || Ok(COUNT.load(Ordering::SeqCst) > 0))?;
    case.ready()?;
    ticks_on(0x9999)?;
    arm_timer(timer, 0, 0)
}

/// A periodic timer goes on, with this value.
fn ticks_on(value: i32) -> Result<()> {
    let before = COUNT.load(Ordering::SeqCst);
    eventually("two more ticks", || {
        Ok(COUNT.load(Ordering::SeqCst) > before + 1)
    })?;
    ensure!(
        LAST_VALUE.load(Ordering::SeqCst) == value,
        "Wrong value with the tick"
    );
    Ok(())
}

/// POSIX timers by signal, by signal to one thread, and without a signal;
/// their IDs have a gap.
fn posix_timer(case: &Case) -> Result<()> {
    handle(Signal::SIGUSR2, SaFlags::SA_RESTART, SigSet::empty())?;
    let gap = create_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    let silent = create_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    let ticking = create_timer(
        libc::CLOCK_MONOTONIC,
        libc::SIGEV_SIGNAL,
        libc::SIGUSR2,
        0x7777,
        0,
    )?;
    // SAFETY: a timer of our own.
    sys("timer_delete", unsafe {
        libc::syscall(libc::SYS_timer_delete, gap)
    })?;
    let me = gettid().as_raw();
    let directed = create_timer(
        libc::CLOCK_REALTIME,
        libc::SIGEV_THREAD_ID,
        libc::SIGUSR2,
        0x8888,
        me,
    )?;
    arm_timer(silent, 50_000_000_000_000, 3_000_000_000)?;
    arm_timer(ticking, 100_000_000, 100_000_000)?;
    eventually("the first tick", || Ok(COUNT.load(Ordering::SeqCst) > 0))?;

    case.ready()?;

    ticks_on(0x7777)?;
    arm_timer(ticking, 0, 0)?;
    let left = timer_left(silent)?;
    ensure!(
        (40_000_000_000_000..=50_000_000_000_000).contains(&left),
        "The silent timer has {left} ns left"
    );
    LAST_VALUE.store(0, Ordering::SeqCst);
    arm_timer(directed, 1_000_000, 0)?;
    eventually("the directed timer's signal", || {
        Ok(LAST_VALUE.load(Ordering::SeqCst) == 0x8888)
    })?;
    ensure!(
        LAST_THREAD.load(Ordering::SeqCst) == me,
        "Another thread got the signal"
    );
    ensure!(
        // SAFETY: a timer that is gone: the call fails.
        unsafe { libc::syscall(libc::SYS_timer_delete, gap) } == -1,
        "The deleted timer is back"
    );
    let next = create_timer(libc::CLOCK_MONOTONIC, libc::SIGEV_NONE, 0, 0, 0)?;
    ensure!(
        ![silent, ticking, directed].contains(&next),
        "A new timer has an old ID"
    );
    Ok(())
}
