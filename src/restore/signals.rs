//! Signal actions, queued signals, interval timers and POSIX timers.

use super::RestoreError;
use super::tape::{Expect, Script, Tape};
use crate::model::frozen::{IntervalTimer, PosixTimer, Process, SigAction, SigInfo};
use crate::model::ids::Tid;
use nix::libc;

const SIGSET_LEN: u64 = 8;
const PR_TIMER_CREATE_RESTORE_IDS: u64 = 77;

/// Adds the calls that set every action but that of `SIGTRAP`, which the tape itself needs.
/// All were `SIG_DFL` before. Setting `SIGCHLD` and `SIGCONT` to their default also discards what
/// the deaths of restored zombies, and their own stops and those of children, queued.
///
/// # Errors
/// The tape has no room for the data.
pub fn actions(
    script: &mut Script,
    tape: &mut Tape,
    process: &Process,
) -> Result<(), RestoreError> {
    for ignored in [libc::SIGCHLD, libc::SIGCONT] {
        set_action(script, tape, ignored, &SigAction::default())?;
    }
    for (signal, action) in (1..).zip(&process.sigactions) {
        let fixed = [libc::SIGKILL, libc::SIGSTOP, libc::SIGTRAP].contains(&signal);
        if !fixed && *action != SigAction::default() {
            set_action(script, tape, signal, action)?;
        }
    }
    Ok(())
}

/// Adds the call that sets the action of `SIGTRAP`, if it is not the default; returns whether.
/// After it the process must not run into an `int3` any more.
///
/// # Errors
/// The tape has no room for the data.
pub fn trap_action(
    script: &mut Script,
    tape: &mut Tape,
    process: &Process,
) -> Result<bool, RestoreError> {
    let index = usize::try_from(libc::SIGTRAP - 1).unwrap_or(0);
    match process.sigactions.get(index) {
        Some(action) if *action != SigAction::default() => {
            set_action(script, tape, libc::SIGTRAP, action)?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

fn set_action(
    script: &mut Script,
    tape: &mut Tape,
    signal: i32,
    action: &SigAction,
) -> Result<(), RestoreError> {
    let words = [action.handler, action.flags, action.restorer, action.mask];
    let addr = words_to(tape, &words)?;
    let args = [number(signal), addr, 0, SIGSET_LEN];
    script.zero(libc::SYS_rt_sigaction, &args);
    Ok(())
}

/// Adds the calls that queue signals again. The process does it itself: nobody else may queue
/// one that says it is from the kernel.
///
/// # Errors
/// The tape has no room, or a siginfo is damaged.
pub fn queue(
    script: &mut Script,
    tape: &mut Tape,
    process: &Process,
    tid: Option<Tid>,
    signals: &[SigInfo],
) -> Result<(), RestoreError> {
    for info in signals {
        let signal = info.0.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b));
        let signal = match signal {
            Some(libc::SIGTRAP | libc::SIGSTOP | libc::SIGKILL) | None => {
                return Err(RestoreError::Unsupported {
                    pid: process.pid,
                    what: format!("queued signal {signal:?}"),
                });
            }
            Some(signal) => number(signal),
        };
        let addr = tape.data(&info.0).ok_or(RestoreError::NoRoom)?;
        let pid = number(process.pid.0);
        match tid {
            None => script.zero(libc::SYS_rt_sigqueueinfo, &[pid, signal, addr]),
            Some(tid) => {
                let args = [pid, number(tid.0), signal, addr];
                script.zero(libc::SYS_rt_tgsigqueueinfo, &args);
            }
        }
    }
    Ok(())
}

/// Whether this kernel gives out POSIX timer ids on request; tells the process to.
pub fn request_timer_ids(script: &mut Script) {
    let args = [PR_TIMER_CREATE_RESTORE_IDS, 1];
    script.add(libc::SYS_prctl, &args, Expect::Anything);
}

/// Adds the calls that create the POSIX timers, not armed, with their ids. Without kernel help
/// ids are counted up by creating and deleting timers in between.
///
/// # Errors
/// The tape has no room for the data.
pub fn create_timers(
    script: &mut Script,
    tape: &mut Tape,
    timers: &[PosixTimer],
    ids_on_request: bool,
) -> Result<Vec<(u64, i32)>, RestoreError> {
    let mut out = Vec::new();
    let mut next = 0;
    for timer in timers {
        while !ids_on_request && next < timer.id {
            let filler = PosixTimer {
                id: next,
                clock: libc::CLOCK_MONOTONIC,
                notify: libc::SIGEV_NONE,
                ..PosixTimer::default()
            };
            create_timer(script, tape, &filler)?;
            script.zero(libc::SYS_timer_delete, &[number(next)]);
            next += 1;
        }
        out.push((create_timer(script, tape, timer)?, timer.id));
        next = timer.id + 1;
    }
    if ids_on_request {
        script.zero(libc::SYS_prctl, &[PR_TIMER_CREATE_RESTORE_IDS, 0]);
    }
    Ok(out)
}

fn create_timer(
    script: &mut Script,
    tape: &mut Tape,
    timer: &PosixTimer,
) -> Result<u64, RestoreError> {
    // struct sigevent: value, signo, notify, thread id, padding to 64 bytes.
    let mut event = [0_u8; 64];
    event[..8].copy_from_slice(&timer.value.to_le_bytes());
    event[8..12].copy_from_slice(&timer.signo.to_le_bytes());
    event[12..16].copy_from_slice(&timer.notify.to_le_bytes());
    event[16..20].copy_from_slice(&timer.thread.0.to_le_bytes());
    let event = tape.data(&event).ok_or(RestoreError::NoRoom)?;
    // Read as the wanted id where the kernel gives out ids on request.
    let id = tape
        .data(&timer.id.to_le_bytes())
        .ok_or(RestoreError::NoRoom)?;
    script.zero(libc::SYS_timer_create, &[number(timer.clock), event, id]);
    Ok(id)
}

/// Adds the calls that arm interval and POSIX timers with what was left of them, less the
/// `elapsed` nanoseconds since. They run from then on.
///
/// # Errors
/// The tape has no room for the data.
pub fn arm(
    script: &mut Script,
    tape: &mut Tape,
    process: &Process,
    elapsed: u64,
) -> Result<(), RestoreError> {
    let left = |remaining: u64| remaining.saturating_sub(elapsed);
    for (which, timer) in (0_u64..).zip(&process.itimers) {
        if timer.remaining == 0 {
            continue;
        }
        // Process times did not pass meanwhile; microseconds, and zero would disarm.
        let remaining = if which == 0 {
            left(timer.remaining)
        } else {
            timer.remaining
        };
        let micros = |nanos: u64| [nanos / NANOS, nanos % NANOS / 1000];
        let words = [micros(timer.interval), micros(remaining.max(1000))].concat();
        let addr = words_to(tape, &words)?;
        script.zero(libc::SYS_setitimer, &[which, addr, 0]);
    }
    for timer in process.posix_timers.iter().filter(|t| t.remaining > 0) {
        let cpu_clock = timer.clock < 0
            || [
                libc::CLOCK_PROCESS_CPUTIME_ID,
                libc::CLOCK_THREAD_CPUTIME_ID,
            ]
            .contains(&timer.clock);
        let interval = IntervalTimer {
            remaining: if cpu_clock {
                timer.remaining
            } else {
                left(timer.remaining).max(1)
            },
            interval: timer.interval,
        };
        let nanos = |nanos: u64| [nanos / NANOS, nanos % NANOS];
        let words = [nanos(interval.interval), nanos(interval.remaining)].concat();
        let addr = words_to(tape, &words)?;
        script.zero(libc::SYS_timer_settime, &[number(timer.id), 0, addr, 0]);
    }
    Ok(())
}

const NANOS: u64 = 1_000_000_000;

/// A C `int` as a system call argument.
pub(super) fn number(value: i32) -> u64 {
    i64::from(value).cast_unsigned()
}

pub(super) fn words_to(tape: &mut Tape, words: &[u64]) -> Result<u64, RestoreError> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    tape.data(&bytes).ok_or(RestoreError::NoRoom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(script: &Script, nr: i64) -> usize {
        script.calls.iter().filter(|c| c.nr == nr).count()
    }

    #[test]
    fn timer_ids_are_counted_up() {
        let timers = [1, 4].map(|id| PosixTimer {
            id,
            ..PosixTimer::default()
        });
        let mut tape = Tape::new(0x2600_0000_0000).unwrap();
        let mut script = Script::default();
        create_timers(&mut script, &mut tape, &timers, false).unwrap();
        assert_eq!(count(&script, libc::SYS_timer_create), 5);
        assert_eq!(count(&script, libc::SYS_timer_delete), 3);
        let mut script = Script::default();
        create_timers(&mut script, &mut tape, &timers, true).unwrap();
        assert_eq!(count(&script, libc::SYS_timer_create), 2);
    }

    #[test]
    fn an_overdue_timer_fires_at_once_instead_of_never() {
        let mut process = Process::default();
        process.itimers[0].remaining = 5_000;
        let mut tape = Tape::new(0x2700_0000_0000).unwrap();
        let mut script = Script::default();
        arm(&mut script, &mut tape, &process, 1_000_000).unwrap();
        let mut value = [0; 32];
        tape.read_data(script.calls[0].args[1], &mut value);
        assert_eq!(value[24], 1, "one microsecond left");
    }

    #[test]
    fn the_traps_own_action_waits() {
        let mut process = Process::default();
        let action = SigAction {
            handler: 1,
            ..SigAction::default()
        };
        process.sigactions = vec![action; 64];
        let mut tape = Tape::new(0x2800_0000_0000).unwrap();
        let mut script = Script::default();
        actions(&mut script, &mut tape, &process).unwrap();
        assert!(script.calls.iter().all(|c| c.args[0] != 5));
        assert_eq!(script.calls.len(), 63);
        assert!(trap_action(&mut script, &mut tape, &process).unwrap());
    }
}
