//! Timers, which go on while their process is frozen: what one has done when it is read, and what
//! it is still to do in the restored process.

use super::restart::Now;
use crate::bpf::events::{ProcessFlag, ProcessRec, TimerRec};
use crate::bpf::iter::Tasks;
use crate::model::frozen::{IntervalTimer, PosixTimer, SigInfo};
use crate::model::ids::Tid;
use nix::libc;

/// Adds the queued signals of timers to the masks of pending signals, which were read before.
pub fn note_queued(tasks: &mut Tasks) {
    for timer in tasks.timers.iter().filter(|timer| timer.queued != 0) {
        let bit = bit(timer.signo);
        if timer.target == 0 {
            let process = tasks.processes.iter_mut().find(|p| p.pid == timer.pid);
            process.into_iter().for_each(|p| p.shared_pending |= bit);
        } else {
            let thread = tasks.threads.iter_mut().find(|t| t.tid == timer.target);
            thread.into_iter().for_each(|t| t.pending |= bit);
        }
    }
}

/// Whether a timer that fired after it was read has queued this signal: the restored one will.
/// `mask` is what was pending when the timers of the process were read.
pub fn will_send<'a>(
    info: &SigInfo,
    mask: u64,
    process: &ProcessRec,
    mut timers: impl Iterator<Item = &'a TimerRec>,
) -> bool {
    let [signo, code, id] = [0, 8, 16].map(|at| {
        let bytes = info.0.get(at..).and_then(<[u8]>::first_chunk);
        bytes.map_or(0, |bytes| i32::from_ne_bytes(*bytes))
    });
    match code {
        libc::SI_TIMER => {
            timers.any(|timer| timer.id == id && timer.expires_ns != 0 && timer.queued == 0)
        }
        libc::SI_KERNEL if mask & bit(signo) == 0 => match signo {
            libc::SIGALRM => is_armed(process),
            libc::SIGVTALRM => process.itimer_virt_expires_ns != 0,
            libc::SIGPROF => process.itimer_prof_expires_ns != 0,
            _ => false,
        },
        _ => false,
    }
}

/// The bit of a signal in a mask.
fn bit(signo: i32) -> u64 {
    let number = u32::try_from(signo - 1).unwrap_or(u32::MAX);
    1_u64.checked_shl(number).unwrap_or(0)
}

/// Time left until `expires`; an armed timer has at least a nanosecond.
fn left(expires: u64, now: u64) -> u64 {
    if expires == 0 {
        return 0;
    }
    expires.saturating_sub(now).max(1)
}

/// Whether `ITIMER_REAL` is.
fn is_armed(process: &ProcessRec) -> bool {
    process.flags & ProcessFlag::REAL_TIMER_ARMED != 0
}

/// setitimer(2)'s, in the order of their numbers.
pub fn interval(rec: &ProcessRec, now: &Now) -> [IntervalTimer; 3] {
    let mut real = IntervalTimer {
        remaining: left(rec.itimer_real_expires_ns, now.monotonic),
        interval: rec.itimer_real_interval_ns,
    };
    // The kernel arms a periodic timer again when its signal is taken; the restored one is
    // armed now, since that signal is queued by us.
    if !is_armed(rec) && real.interval > 0 && rec.shared_pending & bit(libc::SIGALRM) != 0 {
        real.remaining = real.interval;
    }
    let user = rec.cpu_utime_ns;
    let both = rec.cpu_utime_ns + rec.cpu_stime_ns;
    [
        real,
        IntervalTimer {
            remaining: left(rec.itimer_virt_expires_ns, user),
            interval: rec.itimer_virt_interval_ns,
        },
        IntervalTimer {
            remaining: left(rec.itimer_prof_expires_ns, both),
            interval: rec.itimer_prof_interval_ns,
        },
    ]
}

/// What marks the CPU clock of one thread (`CPUCLOCK_PERTHREAD_MASK` of
/// include/linux/posix-timers.h).
const PER_THREAD: i32 = 4;

/// Which time a CPU clock counts (`CPUCLOCK_CLOCK_MASK`).
const COUNTED: i32 = 3;

/// Whether a clock is the CPU clock of one thread.
fn is_of_thread(clock: i32) -> bool {
    clock == libc::CLOCK_THREAD_CPUTIME_ID || clock < 0 && clock & PER_THREAD != 0
}

/// Whose CPU clock a timer is on, if it cannot be made again.
pub fn refusal(rec: &TimerRec) -> Option<(&TimerRec, &'static str)> {
    let whose = match rec.clock {
        clock if is_of_thread(clock) => (rec.clock_tid == 0).then_some("a thread that has ended"),
        clock if clock >= 0 => None,
        // The number of its process, or 0 for the caller of timer_create(2).
        clock => {
            let pid = !(clock >> 3);
            (pid != 0 && pid != rec.pid.cast_signed()).then_some("another process")
        }
    };
    whose.map(|whose| (rec, whose))
}

/// The POSIX timers of a process, by their numbers.
pub fn posix<'a>(
    own: impl Iterator<Item = &'a TimerRec>,
    process: &ProcessRec,
    now: &Now,
) -> Vec<PosixTimer> {
    let mut timers: Vec<_> = own.map(|timer| posix_timer(timer, process, now)).collect();
    timers.sort_by_key(|timer| timer.id);
    timers
}

fn posix_timer(rec: &TimerRec, process: &ProcessRec, now: &Now) -> PosixTimer {
    let base = rec.base_clock.cast_signed();
    let used = match base {
        clock if is_of_thread(clock) => rec.used_ns,
        clock if clock < 0 => match clock & COUNTED {
            0 => process.cpu_utime_ns + process.cpu_stime_ns,
            1 => process.cpu_utime_ns,
            _ => process.cpu_runtime_ns,
        },
        libc::CLOCK_PROCESS_CPUTIME_ID => process.cpu_runtime_ns,
        clock => now.clock(clock),
    };
    let mut remaining = left(rec.expires_ns, used);
    // As above.
    if remaining == 0 && rec.queued != 0 {
        remaining = rec.interval_ns;
    }
    let clock = match rec.clock {
        // Who asked for its own clock is named: another thread will ask.
        clock if is_of_thread(clock) => {
            !rec.clock_tid.cast_signed() << 3 | clock & (PER_THREAD | COUNTED)
        }
        clock => clock,
    };
    PosixTimer {
        id: rec.id,
        clock,
        notify: rec.notify,
        signo: rec.signo,
        value: rec.value,
        thread: Tid(rec.target.cast_signed()),
        remaining,
        interval: rec.interval_ns,
        overrun: rec.overrun_last.max(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::events::ThreadRec;

    fn timer() -> TimerRec {
        TimerRec {
            pid: 5,
            id: 3,
            signo: 12,
            ..TimerRec::default()
        }
    }

    fn info(signo: i32, code: i32, id: i32) -> SigInfo {
        let words = [signo, 0, code, 0, id];
        SigInfo(words.iter().flat_map(|word| word.to_ne_bytes()).collect())
    }

    #[test]
    fn the_cpu_clock_of_a_thread_is_named() {
        let now = Now {
            monotonic: 0,
            boottime: 0,
            realtime: 0,
            offset: 0,
        };
        let on = |clock: i32, clock_tid| TimerRec {
            clock,
            clock_tid,
            base_clock: clock.cast_unsigned(),
            expires_ns: 500,
            used_ns: 300,
            ..timer()
        };
        // CLOCK_THREAD_CPUTIME_ID as the kernel keeps it, and pthread_getcpuclockid(3)'s.
        for clock in [-2, !9 << 3 | 6] {
            let rec = on(clock, 9);
            assert!(refusal(&rec).is_none());
            let carried = posix_timer(&rec, &ProcessRec::default(), &now);
            assert_eq!((carried.clock, carried.remaining), (!9 << 3 | 6, 200));
            assert!(refusal(&on(clock, 0)).is_some());
        }
        // That of the process, asked for in two ways, and that of another one.
        assert!(refusal(&on(-6, 0)).is_none() && refusal(&on(!5 << 3 | 2, 0)).is_none());
        assert!(refusal(&on(!7 << 3 | 2, 0)).is_some());
    }

    #[test]
    fn a_queued_signal_is_pending_where_it_goes() {
        let mut tasks = Tasks {
            processes: vec![ProcessRec {
                pid: 5,
                ..ProcessRec::default()
            }],
            threads: vec![ThreadRec {
                tid: 6,
                tgid: 5,
                ..ThreadRec::default()
            }],
            timers: vec![timer()],
            ..Tasks::default()
        };
        let mut masks = |timer: TimerRec| {
            tasks.timers = vec![timer];
            tasks.processes[0].shared_pending = 1;
            tasks.threads[0].pending = 2;
            note_queued(&mut tasks);
            (tasks.processes[0].shared_pending, tasks.threads[0].pending)
        };
        let queued = TimerRec {
            queued: 1,
            ..timer()
        };
        assert_eq!(masks(timer()), (1, 2));
        assert_eq!(masks(queued), (1 | 1 << 11, 2));
        let directed = TimerRec {
            target: 6,
            ..queued
        };
        assert_eq!(masks(directed), (1, 2 | 1 << 11));
    }

    #[test]
    fn a_timer_fires_before_or_after() {
        let armed = TimerRec {
            expires_ns: 9,
            ..timer()
        };
        let process = ProcessRec::default();
        let later = |timer: TimerRec, id| {
            let info = info(12, libc::SI_TIMER, id);
            will_send(&info, 0, &process, [timer].iter())
        };
        // Armed when it was read, its signal is one of a later moment.
        assert!(later(armed, 3) && !later(armed, 4));
        // Set again before its signal was taken: both are there.
        assert!(!later(TimerRec { queued: 1, ..armed }, 3));
        assert!(!later(
            TimerRec {
                queued: 1,
                ..timer()
            },
            3
        ));
        assert!(!will_send(
            &info(12, libc::SI_USER, 3),
            0,
            &process,
            [armed].iter()
        ));
    }

    #[test]
    fn an_alarm_goes_off_before_or_after() {
        let armed = ProcessRec {
            flags: ProcessFlag::REAL_TIMER_ARMED,
            ..ProcessRec::default()
        };
        let alarm = |process: &ProcessRec, mask, code| {
            let info = info(libc::SIGALRM, code, 0);
            will_send(&info, mask, process, std::iter::empty())
        };
        assert!(alarm(&armed, 0, libc::SI_KERNEL));
        assert!(!alarm(&armed, 1 << 13, libc::SI_KERNEL));
        assert!(!alarm(&armed, 0, libc::SI_USER));
        assert!(!alarm(&ProcessRec::default(), 0, libc::SI_KERNEL));
    }

    #[test]
    fn a_periodic_timer_whose_signal_waits_is_armed() {
        let now = Now {
            monotonic: 100,
            boottime: 0,
            realtime: 0,
            offset: 0,
        };
        let remaining = |timer: TimerRec| {
            let timer = TimerRec {
                base_clock: libc::CLOCK_MONOTONIC.cast_unsigned(),
                interval_ns: 50,
                ..timer
            };
            posix_timer(&timer, &ProcessRec::default(), &now).remaining
        };
        assert_eq!(remaining(timer()), 0);
        assert_eq!(
            remaining(TimerRec {
                queued: 1,
                ..timer()
            }),
            50
        );
        let armed = |expires_ns| {
            remaining(TimerRec {
                expires_ns,
                ..timer()
            })
        };
        assert_eq!([armed(90), armed(130)], [1, 30]);
    }

    #[test]
    fn an_overdue_timer_is_still_armed() {
        assert_eq!(left(50, 100), 1);
        assert_eq!(left(150, 100), 50);
        assert_eq!(left(0, 100), 0);
    }
}
