//! Timers that fire all the time: while the program is frozen and read, too.

use std::mem::MaybeUninit;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::probe::{eventually, sys};
use super::signals::{arm_timer, create_timer};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[Entry::carried("timers_firing", firing)];

/// How many there are of each kind.
const EACH: usize = 32;

/// They expire within this, and are looked at as often.
const TURN: Duration = Duration::from_millis(20);

enum Source {
    Posix(i32),
    Descriptor(TimerFd),
    Alarm,
}

/// A timer that is set again when it has fired.
struct Timer {
    source: Source,
    /// How often it was set.
    set: u64,
    fired: u64,
}

impl Timer {
    fn arm(&mut self, after: Duration) -> Result<()> {
        self.set += 1;
        match &self.source {
            Source::Posix(id) => arm_timer(*id, i64::try_from(after.as_nanos())?, 0),
            Source::Descriptor(timer) => timer
                .set(
                    Expiration::OneShot(after.into()),
                    TimerSetTimeFlags::empty(),
                )
                .context("timerfd_settime"),
            Source::Alarm => {
                // SAFETY: plain numbers.
                let mut time: libc::itimerval = unsafe { std::mem::zeroed() };
                time.it_value.tv_usec = i64::try_from(after.as_micros())?;
                // SAFETY: the time lives across the call.
                let set = unsafe {
                    libc::setitimer(libc::ITIMER_REAL, &raw const time, std::ptr::null_mut())
                };
                sys("setitimer", set.into()).map(drop)
            }
        }
    }
}

/// The POSIX timers first, in the order of their values; the alarm last.
struct Timers(Vec<Timer>);

impl Timers {
    fn make(signal: i32) -> Result<Timers> {
        let mut sources = Vec::new();
        for value in 0..EACH {
            let (clock, notify) = (libc::CLOCK_MONOTONIC, libc::SIGEV_SIGNAL);
            let id = create_timer(clock, notify, signal, value, 0)?;
            sources.push(Source::Posix(id));
        }
        for _ in 0..EACH {
            let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, TimerFlags::TFD_NONBLOCK)?;
            sources.push(Source::Descriptor(timer));
        }
        sources.push(Source::Alarm);
        let timer = |source| Timer {
            source,
            set: 0,
            fired: 0,
        };
        Ok(Timers(sources.into_iter().map(timer).collect()))
    }

    /// Counts what has fired.
    fn look(&mut self, signals: &SigSet) -> Result<()> {
        while let Some((signal, value)) = taken(signals)? {
            let alarm = signal == libc::SIGALRM;
            let index = if alarm { self.0.len() - 1 } else { value };
            let timer = self.0.get_mut(index);
            timer.with_context(|| format!("Value {value}"))?.fired += 1;
        }
        for timer in &mut self.0 {
            let Source::Descriptor(descriptor) = &timer.source else {
                continue;
            };
            let mut ticks = [0; 8];
            match nix::unistd::read(descriptor, &mut ticks) {
                Ok(_) => timer.fired += u64::from_ne_bytes(ticks),
                Err(Errno::EAGAIN) => {}
                Err(errno) => return Err(errno).context("Read a timerfd"),
            }
        }
        for (index, timer) in self.0.iter().enumerate() {
            ensure!(
                timer.fired <= timer.set,
                "Timer {index} was set {} times and has fired {}",
                timer.set,
                timer.fired
            );
        }
        Ok(())
    }

    /// Sets those again that have fired.
    fn arm(&mut self, seed: &mut u64) -> Result<()> {
        let turn = u64::try_from(TURN.as_micros())?;
        for timer in &mut self.0 {
            if timer.fired == timer.set {
                // Knuth's linear congruential generator.
                *seed = seed
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                timer.arm(Duration::from_micros(1 + (*seed >> 33) % turn))?;
            }
        }
        Ok(())
    }
}

/// Takes a pending signal of the set, with its value.
fn taken(signals: &SigSet) -> Result<Option<(i32, usize)>> {
    let now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: all three live across the call.
    let got = unsafe { libc::sigtimedwait(signals.as_ref(), info.as_mut_ptr(), &raw const now) };
    match Errno::result(got) {
        Ok(signal) => {
            // SAFETY: zeroed, and filled by the call; timers set a value.
            let value = unsafe { info.assume_init().si_value() };
            Ok(Some((signal, value.sival_ptr.addr())))
        }
        Err(Errno::EAGAIN) => Ok(None),
        Err(errno) => bail!("sigtimedwait: {errno}"),
    }
}

/// Timers of three kinds, each set again when it has fired: each fires once for each time that it
/// was set, no matter when it was frozen.
fn firing(case: &Case) -> Result<()> {
    let signal = libc::SIGRTMIN() + 3;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGALRM);
    let mut raw = *signals.as_ref();
    // SAFETY: adds a signal that exists to a set of our own.
    let signals = unsafe {
        libc::sigaddset(&raw mut raw, signal);
        SigSet::from_sigset_t_unchecked(raw)
    };
    signals.thread_block()?;
    let mut timers = Timers::make(signal)?;
    let (mut seed, mut failure) = (u64::from(std::process::id()), Ok(()));
    case.ready_polling(TURN, || {
        if failure.is_ok() {
            failure = timers.look(&signals).and_then(|()| timers.arm(&mut seed));
        }
    })?;
    failure?;
    eventually("each timer fires", || {
        timers.look(&signals)?;
        Ok(timers.0.iter().all(|timer| timer.fired == timer.set))
    })?;
    std::thread::sleep(TURN * 2);
    timers.look(&signals)
}
