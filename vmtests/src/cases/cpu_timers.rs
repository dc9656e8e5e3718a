//! POSIX timers on CPU clocks: of the process, and of single threads, whoever made them.

use std::sync::atomic::{AtomicI32, AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::signal::{SaFlags, SigSet, Signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

use super::probe::eventually;
use super::signals::{COUNT, LAST_VALUE, arm_timer, create_timer, handle, timer_left};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("cpu_timer_process", process),
    Entry::carried("cpu_timer_thread", thread),
    Entry::refused(
        "cpu_timer_ended",
        "on the CPU clock of a thread that has ended",
        ended,
    ),
];

const SECOND: i64 = 1_000_000_000;

/// CPU time that is used where some has to be.
const USED: i64 = SECOND / 5;

fn cpu_time() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).context("clock_gettime")?;
    Ok(now.tv_sec() * SECOND + now.tv_nsec())
}

/// Uses so many nanoseconds of CPU time.
fn burn(time: i64) -> Result<()> {
    let until = cpu_time()? + time;
    while cpu_time()? < until {}
    Ok(())
}

/// Uses CPU time until the signal has come as often.
fn burn_until(count: u64, what: &str) -> Result<()> {
    let until = cpu_time()? + 20 * SECOND;
    while COUNT.load(Ordering::SeqCst) < count {
        ensure!(cpu_time()? < until, "{what} does not fire");
    }
    Ok(())
}

/// What is left of a timer that was armed with a thousand seconds before `USED` was used.
fn ensure_counted(timer: i32, what: &str) -> Result<()> {
    let left = timer_left(timer)?;
    ensure!(
        (900 * SECOND..=1000 * SECOND - USED).contains(&left),
        "{what} has {left} ns left"
    );
    Ok(())
}

fn timer(clock: libc::clockid_t, value: usize) -> Result<i32> {
    create_timer(clock, libc::SIGEV_SIGNAL, libc::SIGUSR2, value, 0)
}

/// On the clock of the process: one far away, and one that goes on ticking.
fn process(case: &Case) -> Result<()> {
    handle(Signal::SIGUSR2, SaFlags::SA_RESTART, SigSet::empty())?;
    let clock = libc::CLOCK_PROCESS_CPUTIME_ID;
    let (far, ticking) = (timer(clock, 1)?, timer(clock, 2)?);
    arm_timer(far, 1000 * SECOND, 0)?;
    burn(USED)?;
    arm_timer(ticking, SECOND / 20, SECOND / 20)?;
    burn_until(1, "The timer")?;
    case.ready()?;
    ensure_counted(far, "The timer")?;
    burn_until(COUNT.load(Ordering::SeqCst) + 2, "The restored timer")?;
    let value = LAST_VALUE.load(Ordering::SeqCst);
    ensure!(value == 2, "The signal came with {value}");
    arm_timer(ticking, 0, 0)
}

/// The CPU clock of a thread, as pthread_getcpuclockid(3) names it.
fn clock_of(tid: i32) -> libc::clockid_t {
    /// `CPUCLOCK_PERTHREAD | CPUCLOCK_SCHED` of include/linux/posix-timers.h.
    const THREAD: i32 = 6;
    (!tid << 3) | THREAD
}

/// What the worker makes, and how far the two have come.
static WORKER: AtomicI32 = AtomicI32::new(0);
static OWN: AtomicI32 = AtomicI32::new(0);
static IDLE: AtomicI32 = AtomicI32::new(0);
static STAGE: AtomicU32 = AtomicU32::new(0);

fn reach(stage: u32) {
    STAGE.store(stage, Ordering::SeqCst);
}

fn wait_for(stage: u32) -> Result<()> {
    eventually("the other thread", || {
        Ok(STAGE.load(Ordering::SeqCst) >= stage)
    })
}

fn work() -> Result<()> {
    let clock = libc::CLOCK_THREAD_CPUTIME_ID;
    let far = timer(clock, 1)?;
    arm_timer(far, 1000 * SECOND, 0)?;
    OWN.store(far, Ordering::SeqCst);
    IDLE.store(timer(clock, 2)?, Ordering::SeqCst);
    WORKER.store(gettid().as_raw(), Ordering::SeqCst);
    reach(1);
    wait_for(2)?;
    burn(USED)?;
    reach(3);
    while STAGE.load(Ordering::SeqCst) < 4 {
        std::thread::sleep(Duration::from_millis(10));
    }
    burn_until(1, "The first thread's timer")?;
    reach(5);
    wait_for(6)?;
    burn_until(2, "The worker's timer")
}

/// On the clock of a worker: made by itself and by the first thread, armed and not. Only what the
/// worker uses counts.
fn thread(case: &Case) -> Result<()> {
    handle(Signal::SIGUSR2, SaFlags::SA_RESTART, SigSet::empty())?;
    let worker = std::thread::spawn(work);
    wait_for(1)?;
    let foreign = timer(clock_of(WORKER.load(Ordering::SeqCst)), 3)?;
    arm_timer(foreign, 1000 * SECOND, 0)?;
    reach(2);
    wait_for(3)?;
    case.ready()?;
    ensure_counted(OWN.load(Ordering::SeqCst), "The worker's timer")?;
    ensure_counted(foreign, "The first thread's timer")?;
    let fires = |timer, value, before, stage| -> Result<()> {
        arm_timer(timer, SECOND / 20, 0)?;
        burn(USED)?;
        // The worker, which sleeps, uses next to nothing.
        let count = COUNT.load(Ordering::SeqCst);
        ensure!(count == before, "It counts what another thread uses");
        reach(stage);
        eventually("the timer", || Ok(COUNT.load(Ordering::SeqCst) > before))?;
        let came = LAST_VALUE.load(Ordering::SeqCst);
        ensure!(came == value, "The signal came with {came}, not {value}");
        Ok(())
    };
    fires(foreign, 3, 0, 4).context("The first thread's timer")?;
    wait_for(5)?;
    fires(IDLE.load(Ordering::SeqCst), 2, 1, 6).context("The worker's timer")?;
    worker.join().map_err(|_| anyhow!("The worker panicked"))?
}

/// On the clock of a thread that has ended: nothing can make it again.
fn ended(case: &Case) -> Result<()> {
    let made = std::thread::spawn(|| timer(libc::CLOCK_THREAD_CPUTIME_ID, 1)).join();
    made.map_err(|_| anyhow!("The thread panicked"))??;
    case.ready()?;
    Ok(())
}
