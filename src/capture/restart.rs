//! System calls a freeze interrupted, and how they go on.
//!
//! Freezer and ptrace end a blocking call with one of five results. The kernel restarts
//! three of them by itself when the thread runs on, also from registers that were saved and
//! set again. `-ERESTART_RESTARTBLOCK` has its timeout in kernel memory. Plain `-EINTR`
//! would be seen by the program, which nobody has signalled: it is undone.

use crate::bpf::events::{RestartKind, ThreadRec};
use crate::model::frozen::{Registers, SyscallInProgress};
use nix::libc;

const EINTR: i64 = -4;
const RESTART_BLOCK: i64 = -516;
/// Length of the `syscall` instruction.
const SYSCALL_LEN: u64 = 2;

/// What is left of a restart block's deadline, by the clock it counts on.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Host's `CLOCK_MONOTONIC` in nanoseconds.
    pub monotonic: u64,
    /// Host's `CLOCK_BOOTTIME`.
    pub boottime: u64,
    /// `CLOCK_REALTIME`.
    pub realtime: u64,
    /// The application's monotonic clock minus the host's.
    pub offset: i64,
}

impl Now {
    /// A clock's value; monotonic for those that follow it.
    #[must_use]
    pub fn clock(&self, clock: i32) -> u64 {
        match clock {
            libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_ALARM | libc::CLOCK_TAI => self.realtime,
            libc::CLOCK_BOOTTIME | libc::CLOCK_BOOTTIME_ALARM => self.boottime,
            _ => self.monotonic,
        }
    }
}

/// How the interrupted call of a thread goes on, with registers that name the call.
///
/// `signalled`: a signal that will be delivered is pending, so an `-EINTR` is the truth.
#[must_use]
pub fn classify(
    regs: &Registers,
    rec: &ThreadRec,
    now: &Now,
    signalled: bool,
) -> (SyscallInProgress, Registers) {
    // A stop in user mode: rax is a value of the program.
    if regs.orig_rax.cast_signed() < 0 {
        return (SyscallInProgress::None, *regs);
    }
    match regs.rax.cast_signed() {
        RESTART_BLOCK => {
            let nr = original_call(regs, rec);
            let regs = Registers {
                orig_rax: nr.cast_unsigned(),
                ..*regs
            };
            let deadline = deadline(&regs, nr, rec, now);
            (SyscallInProgress::RestartBlock { deadline }, regs)
        }
        EINTR if !signalled && is_reissued(regs.orig_rax.cast_signed()) => {
            // Where the call has a relative timeout, the kernel has forgotten when it began:
            // it waits its full timeout once more.
            (SyscallInProgress::Reissue { deadline: None }, *regs)
        }
        _ => (SyscallInProgress::None, *regs),
    }
}

/// Registers that execute the interrupted call again.
#[must_use]
pub fn reissued(regs: &Registers) -> Registers {
    Registers {
        rax: regs.orig_rax,
        rip: regs.rip - SYSCALL_LEN,
        orig_rax: u64::MAX,
        ..*regs
    }
}

/// Calls that did nothing when they return `-EINTR`, so that issuing them again is right.
/// connect(2) and close(2) are not among them: both go on behind the error.
fn is_reissued(nr: i64) -> bool {
    [
        libc::SYS_epoll_wait,
        libc::SYS_epoll_pwait,
        libc::SYS_epoll_pwait2,
        libc::SYS_semop,
        libc::SYS_semtimedop,
        libc::SYS_rt_sigtimedwait,
        libc::SYS_io_getevents,
        // It says so only if it has not taken any request.
        libc::SYS_io_uring_enter,
        libc::SYS_msgrcv,
        libc::SYS_msgsnd,
        // With SO_RCVTIMEO or SO_SNDTIMEO (sock_intr_errno).
        libc::SYS_read,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_recvfrom,
        libc::SYS_recvmsg,
        libc::SYS_recvmmsg,
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_sendmmsg,
        libc::SYS_accept,
        libc::SYS_accept4,
    ]
    .contains(&nr)
}

/// The call behind restart_syscall(2), whose arguments are still in the registers: it goes on
/// by that name after every interruption but the first.
fn original_call(regs: &Registers, rec: &ThreadRec) -> i64 {
    let nr = regs.orig_rax.cast_signed();
    if nr != libc::SYS_restart_syscall {
        return nr;
    }
    match rec.restart_kind {
        RestartKind::FUTEX_WAIT => libc::SYS_futex,
        RestartKind::POLL => libc::SYS_poll,
        // clock_nanosleep(clock, 0, request, remain) or nanosleep(request, remain): no
        // request lies at an address as small as a clock's number.
        _ if regs.rdi < 4096 || regs.rdi > u64::MAX / 2 => libc::SYS_clock_nanosleep,
        _ => libc::SYS_nanosleep,
    }
}

fn deadline(regs: &Registers, nr: i64, rec: &ThreadRec, now: &Now) -> Option<u64> {
    let expires = rec.restart_expires_ns;
    let clock = match rec.restart_kind {
        RestartKind::NANOSLEEP | RestartKind::CPU_NANOSLEEP | RestartKind::ALARM_NANOSLEEP => {
            rec.restart_clock.cast_signed()
        }
        RestartKind::FUTEX_WAIT => {
            const CMD_MASK: u64 = 0x7f;
            const FUTEX_WAIT: u64 = 0;
            // Every other futex wait takes an absolute time, which is in its argument.
            if nr == libc::SYS_futex && regs.rsi & CMD_MASK != FUTEX_WAIT {
                return None;
            }
            libc::CLOCK_MONOTONIC
        }
        RestartKind::POLL => {
            // An int: negative is without a limit.
            const SIGN: u64 = 1 << 31;
            if regs.rdx & SIGN != 0 {
                return None;
            }
            libc::CLOCK_MONOTONIC
        }
        _ => return None,
    };
    let left = expires.saturating_sub(now.clock(clock));
    Some((now.monotonic + left).saturating_add_signed(now.offset))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Now = Now {
        monotonic: 1_000,
        boottime: 5_000,
        realtime: 90_000,
        offset: 100,
    };

    fn record() -> ThreadRec {
        // Plain integers, for which the default of bindgen is zero.
        ThreadRec::default()
    }

    fn interrupted(nr: i64, result: i64) -> Registers {
        Registers {
            orig_rax: nr.cast_unsigned(),
            rax: result.cast_unsigned(),
            rip: 0x40_0002,
            rdi: 0x7fff_0000,
            ..Registers::default()
        }
    }

    #[test]
    fn a_thread_in_user_mode_is_left_alone() {
        let regs = interrupted(-1, -4);
        let (call, after) = classify(&regs, &record(), &NOW, false);
        assert_eq!((call, after), (SyscallInProgress::None, regs));
    }

    #[test]
    fn only_an_unsignalled_wait_is_issued_again() {
        let regs = interrupted(libc::SYS_epoll_wait, -4);
        let again = SyscallInProgress::Reissue { deadline: None };
        assert_eq!(classify(&regs, &record(), &NOW, false).0, again);
        let none = SyscallInProgress::None;
        assert_eq!(classify(&regs, &record(), &NOW, true).0, none);
        let connect = interrupted(libc::SYS_connect, -4);
        assert_eq!(classify(&connect, &record(), &NOW, false).0, none);
        for kernel_restarts in [-512, -513, -514] {
            let regs = interrupted(libc::SYS_read, kernel_restarts);
            assert_eq!(classify(&regs, &record(), &NOW, false).0, none);
        }
    }

    #[test]
    fn a_sleep_keeps_its_deadline_on_the_applications_clock() {
        let mut rec = record();
        rec.restart_kind = RestartKind::NANOSLEEP;
        rec.restart_clock = libc::CLOCK_MONOTONIC.cast_unsigned();
        rec.restart_expires_ns = 1_250;
        let regs = interrupted(libc::SYS_nanosleep, -516);
        let (call, _) = classify(&regs, &rec, &NOW, false);
        let deadline = Some(1_350);
        assert_eq!(call, SyscallInProgress::RestartBlock { deadline });
        rec.restart_clock = libc::CLOCK_REALTIME.cast_unsigned();
        rec.restart_expires_ns = 90_010;
        let (call, _) = classify(&regs, &rec, &NOW, false);
        let deadline = Some(1_110);
        assert_eq!(call, SyscallInProgress::RestartBlock { deadline });
    }

    #[test]
    fn a_restarted_call_gets_its_name_back() {
        let mut rec = record();
        rec.restart_kind = RestartKind::NANOSLEEP;
        let regs = interrupted(libc::SYS_restart_syscall, -516);
        let (_, named) = classify(&regs, &rec, &NOW, false);
        assert_eq!(named.orig_rax.cast_signed(), libc::SYS_nanosleep);
        let by_clock = Registers { rdi: 1, ..regs };
        let (_, named) = classify(&by_clock, &rec, &NOW, false);
        assert_eq!(named.orig_rax.cast_signed(), libc::SYS_clock_nanosleep);
        rec.restart_kind = RestartKind::POLL;
        let (_, named) = classify(&regs, &rec, &NOW, false);
        assert_eq!(named.orig_rax.cast_signed(), libc::SYS_poll);
    }

    #[test]
    fn waits_without_a_limit_have_no_deadline() {
        let mut rec = record();
        rec.restart_kind = RestartKind::POLL;
        let regs = Registers {
            rdx: u64::from(u32::MAX),
            ..interrupted(libc::SYS_poll, -516)
        };
        let (call, _) = classify(&regs, &rec, &NOW, false);
        assert_eq!(call, SyscallInProgress::RestartBlock { deadline: None });
        rec.restart_kind = RestartKind::FUTEX_WAIT;
        rec.restart_expires_ns = 77;
        let bitset = Registers {
            rsi: 9 | 0x80,
            ..interrupted(libc::SYS_futex, -516)
        };
        let (call, _) = classify(&bitset, &rec, &NOW, false);
        assert_eq!(call, SyscallInProgress::RestartBlock { deadline: None });
    }

    #[test]
    fn the_syscall_instruction_is_executed_again() {
        let again = reissued(&interrupted(libc::SYS_epoll_wait, -4));
        assert_eq!(again.rip, 0x40_0000);
        assert_eq!(again.rax.cast_signed(), libc::SYS_epoll_wait);
        assert_eq!(again.orig_rax, u64::MAX);
    }
}
