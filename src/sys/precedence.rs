//! Going first while somebody stands still for it.

use crate::model::ids::Tid;
use nix::libc;
use std::io;
use std::marker::PhantomData;

/// A thread runs before all ordinary ones for as long as this lives: with the lowest real-time
/// priority (`SCHED_FIFO`, sched(7)), of which threads that it starts inherit nothing. A
/// thread of real-time priority goes before it, and the kernel keeps 5 % of each CPU for ordinary
/// ones (`sched_rt_runtime_us`).
///
/// Does nothing if the thread has real-time priority already, or may not have it (`CAP_SYS_NICE`).
/// What a thread has taken for itself ends there: it cannot be sent to another one.
#[derive(Debug)]
pub struct Precedence {
    /// 0: the one that has taken it.
    thread: libc::pid_t,
    before: Option<Policy>,
    here: PhantomData<*const ()>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Policy {
    /// `SCHED_OTHER` and the like, with `SCHED_RESET_ON_FORK`.
    policy: libc::c_int,
    /// Static priority, 0 for all but real-time policies.
    priority: libc::c_int,
}

impl Policy {
    /// That of a thread, if the kernel tells.
    fn of(thread: libc::pid_t) -> Option<Self> {
        let mut param = libc::sched_param { sched_priority: 0 };
        // SAFETY: the kernel writes the one structure it is given.
        let (policy, told) = unsafe {
            let told = libc::sched_getparam(thread, &raw mut param);
            (libc::sched_getscheduler(thread), told)
        };
        (policy >= 0 && told == 0).then_some(Self {
            policy,
            priority: param.sched_priority,
        })
    }

    fn is_ordinary(self) -> bool {
        let policy = self.policy & !libc::SCHED_RESET_ON_FORK;
        [libc::SCHED_OTHER, libc::SCHED_BATCH, libc::SCHED_IDLE].contains(&policy)
    }

    /// Gives it to a thread, whose nice value stays.
    fn set(self, thread: libc::pid_t) -> io::Result<()> {
        let param = libc::sched_param {
            sched_priority: self.priority,
        };
        // SAFETY: the structure is only read.
        match unsafe { libc::sched_setscheduler(thread, self.policy, &raw const param) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Precedence {
    /// Takes it for the calling thread.
    #[must_use]
    pub fn take() -> Self {
        Self::of(0)
    }

    /// Gives it to another thread of this process, which may be asleep: one that is to answer.
    #[must_use]
    pub fn lend(to: Tid) -> Self {
        Self::of(to.0)
    }

    fn of(thread: libc::pid_t) -> Self {
        const FIRST: Policy = Policy {
            policy: libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK,
            priority: 1,
        };
        let ordinary = Policy::of(thread).filter(|policy| policy.is_ordinary());
        let taken = ordinary.map(|_| FIRST.set(thread));
        if let Some(Err(error)) = &taken {
            tracing::debug!("sched_setscheduler: {error}; others may go before this thread");
        }
        Self {
            thread,
            before: ordinary.filter(|_| matches!(taken, Some(Ok(())))),
            here: PhantomData,
        }
    }
}

impl Drop for Precedence {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = before.set(self.thread)
        {
            tracing::warn!("sched_setscheduler: {error}; this thread keeps its precedence");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Also of a user who may not have it.
    #[test]
    fn it_ends_with_whoever_took_it_first() {
        let before = Policy::of(0).unwrap();
        assert!(before.is_ordinary());
        let first = Precedence::take();
        let during = Policy::of(0).unwrap();
        assert_eq!(during != before, first.before.is_some());
        let child = std::thread::spawn(|| Policy::of(0).unwrap().policy);
        assert_eq!(child.join().unwrap(), libc::SCHED_OTHER);
        drop(Precedence::take());
        drop(Precedence::lend(Tid(nix::unistd::gettid().as_raw())));
        assert_eq!(Policy::of(0).unwrap(), during);
        drop(first);
        assert_eq!(Policy::of(0).unwrap(), before);
    }
}
