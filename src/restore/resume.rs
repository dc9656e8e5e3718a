//! How a thread goes on: system calls that were in progress, and its final registers.

use super::creds::option;
use super::tape::{Call, Expect};
use crate::model::frozen::{Registers, SyscallInProgress, Thread};
use nix::errno::Errno;
use nix::libc;

const RESTART_BLOCK: i64 = -516;
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// What has to happen before a thread gets its registers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resumption {
    /// Nothing: these are they.
    Registers(Registers),
    /// This call, whose timeout (the words at the given argument, if any) is on the tape, is
    /// issued and interrupted: the kernel then holds a restart block as it did before.
    Prime {
        /// The call; its timeout argument is filled in by [`Timeout`].
        call: Call,
        /// Where the timeout goes.
        timeout: Timeout,
    },
}

/// A relative timeout of a primed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timeout {
    /// Argument `index` points to a timespec with this many nanoseconds.
    Timespec {
        /// Which argument.
        index: usize,
        /// How long.
        nanos: u64,
    },
    /// Milliseconds in the argument itself, in place already.
    InPlace,
}

/// Decides for one thread at `now` (the application's `CLOCK_MONOTONIC`, nanoseconds).
#[must_use]
pub fn resumption(thread: &Thread, now: u64) -> Resumption {
    let regs = thread.regs;
    match thread.syscall {
        SyscallInProgress::None => Resumption::Registers(regs),
        SyscallInProgress::Reissue { deadline } => {
            let mut again = reissued(&regs);
            let nr = regs.orig_rax.cast_signed();
            if let Some(deadline) = deadline
                && [libc::SYS_epoll_wait, libc::SYS_epoll_pwait].contains(&nr)
            {
                again.r10 = millis(deadline.saturating_sub(now));
            }
            Resumption::Registers(again)
        }
        SyscallInProgress::RestartBlock { deadline: None } => {
            Resumption::Registers(reissued(&regs))
        }
        SyscallInProgress::RestartBlock {
            deadline: Some(deadline),
        } => prime(&regs, deadline.saturating_sub(now)),
    }
}

/// Registers that execute the call again from its beginning.
fn reissued(regs: &Registers) -> Registers {
    if regs.orig_rax.cast_signed() == libc::SYS_restart_syscall {
        // What was restarted is not known any more: the program sees an interrupted call.
        return finished(regs, -i64::from(Errno::EINTR as i32));
    }
    Registers {
        rax: regs.orig_rax,
        rip: regs.rip - SYSCALL_LEN,
        orig_rax: u64::MAX,
        ..*regs
    }
}

fn finished(regs: &Registers, result: i64) -> Registers {
    Registers {
        rax: result.cast_unsigned(),
        orig_rax: u64::MAX,
        ..*regs
    }
}

/// The registers of a thread whose primed call ended or was interrupted with `result`.
#[must_use]
pub fn after_priming(regs: &Registers, result: i64) -> Registers {
    if result == RESTART_BLOCK {
        // The kernel turns it into restart_syscall(2) when the thread is let go.
        return Registers {
            rax: result.cast_unsigned(),
            ..*regs
        };
    }
    finished(regs, result)
}

fn prime(regs: &Registers, nanos: u64) -> Resumption {
    let nr = regs.orig_rax.cast_signed();
    let mut args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    // Zero would not sleep at all and leave no restart block.
    let nanos = nanos.max(1);
    let timeout = match nr {
        libc::SYS_nanosleep => Timeout::Timespec { index: 0, nanos },
        libc::SYS_clock_nanosleep => Timeout::Timespec { index: 2, nanos },
        libc::SYS_futex => Timeout::Timespec { index: 3, nanos },
        libc::SYS_poll => {
            args[2] = millis(nanos);
            Timeout::InPlace
        }
        _ => return Resumption::Registers(reissued(regs)),
    };
    Resumption::Prime {
        call: Call {
            nr,
            args,
            expect: Expect::Anything,
        },
        timeout,
    }
}

/// Rounded up: a timeout is never early. At least one, at most what an `int` holds.
fn millis(nanos: u64) -> u64 {
    nanos.div_ceil(1_000_000).clamp(1, option(i32::MAX))
}

/// Extended registers fit for this CPU and kernel: as long as `current` and without features
/// it does not have. The second value is the feature bits that were lost.
///
/// Layout of the XSAVE area: the feature mask the kernel uses (xcr0) lies in the software
/// bytes at 464, the mask of what is saved (`XSTATE_BV`) at 512.
#[must_use]
pub fn fit_xstate(saved: &[u8], current: &[u8]) -> (Vec<u8>, u64) {
    let word = |bytes: &[u8], at: usize| {
        let chunk = bytes.get(at..).and_then(|b| b.first_chunk::<8>());
        chunk.map_or(0, |b| u64::from_le_bytes(*b))
    };
    let mut fitted = saved.to_vec();
    fitted.resize(current.len(), 0);
    let features = word(current, XCR0);
    let present = word(saved, XSTATE_BV);
    let mut put = |at: usize, value: u64| {
        if let Some(place) = fitted.get_mut(at..at + 8) {
            place.copy_from_slice(&value.to_le_bytes());
        }
    };
    put(XCR0, features);
    put(XSTATE_BV, present & features);
    (fitted, present & !features)
}

const XCR0: usize = 464;
const XSTATE_BV: usize = 512;

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(nr: i64, syscall: SyscallInProgress) -> Thread {
        let mut thread = Thread {
            syscall,
            ..Thread::default()
        };
        thread.regs.orig_rax = nr.cast_unsigned();
        thread.regs.rip = 0x1002;
        thread.regs.rax = (-4_i64).cast_unsigned();
        thread
    }

    #[test]
    fn an_epoll_wait_gets_the_time_that_is_left() {
        let deadline = Some(5_000_001);
        let waiting = thread(
            libc::SYS_epoll_wait,
            SyscallInProgress::Reissue { deadline },
        );
        let Resumption::Registers(regs) = resumption(&waiting, 1_000_000) else {
            panic!("no priming needed");
        };
        assert_eq!((regs.rip, regs.rax, regs.r10), (0x1000, 232, 5));
        assert_eq!(regs.orig_rax, u64::MAX);
    }

    #[test]
    fn a_sleep_is_primed_with_a_timespec() {
        let deadline = Some(100);
        let block = SyscallInProgress::RestartBlock { deadline };
        let Resumption::Prime { call, timeout } =
            resumption(&thread(libc::SYS_clock_nanosleep, block), 500)
        else {
            panic!("must be primed");
        };
        assert_eq!(call.nr, 230);
        assert_eq!(timeout, Timeout::Timespec { index: 2, nanos: 1 });
    }

    #[test]
    fn a_wait_without_limit_is_issued_again() {
        let block = SyscallInProgress::RestartBlock { deadline: None };
        let resumption = resumption(&thread(libc::SYS_poll, block), 0);
        assert!(matches!(resumption, Resumption::Registers(r) if r.rip == 0x1000 && r.rax == 7));
    }

    #[test]
    fn a_restarted_call_of_unknown_kind_is_interrupted() {
        let block = SyscallInProgress::RestartBlock { deadline: None };
        let resumption = resumption(&thread(libc::SYS_restart_syscall, block), 0);
        assert!(
            matches!(resumption, Resumption::Registers(r) if r.rip == 0x1002
            && r.rax.cast_signed() == -4)
        );
    }

    #[test]
    fn a_primed_call_that_ended_gives_its_result() {
        let regs = thread(libc::SYS_poll, SyscallInProgress::None).regs;
        assert_eq!(after_priming(&regs, 2).rax, 2);
        assert_eq!(after_priming(&regs, 2).orig_rax, u64::MAX);
        assert_eq!(after_priming(&regs, -516).orig_rax, 7);
    }

    #[test]
    fn features_the_cpu_lacks_are_masked_and_told() {
        let mut saved = vec![7; 2696];
        let mut current = vec![0; 832];
        saved[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&0x207_u64.to_le_bytes());
        current[XCR0..XCR0 + 8].copy_from_slice(&0x7_u64.to_le_bytes());
        let (fitted, lost) = fit_xstate(&saved, &current);
        assert_eq!(fitted.len(), 832);
        assert_eq!(lost, 0x200);
        assert_eq!(fitted[XSTATE_BV], 7);
        assert_eq!(fitted[100], 7);
    }
}
