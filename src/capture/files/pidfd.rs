//! pidfds: which process each refers to, as far as the restored application can tell.

use crate::bpf::events::{FileRec, PidfdRec};
use crate::bpf::iter::Tasks;
use crate::model::ids::Pid;
use std::collections::BTreeSet;

/// `PIDFD_THREAD` (Linux 6.9), which is `O_EXCL`.
const PIDFD_THREAD: u32 = 0o200;

/// The processes of the application.
#[derive(Clone, Debug, Default)]
pub(in crate::capture) struct Processes {
    inside: BTreeSet<u32>,
    /// Zombies that nobody inside will wait for: they are not made again.
    unread: BTreeSet<u32>,
}

impl Processes {
    /// Reads them off a pass.
    pub fn of(tasks: &Tasks) -> Self {
        let inside: BTreeSet<u32> = tasks.processes.iter().map(|p| p.pid).collect();
        let zombies = tasks.threads.iter().filter(|t| t.tid == t.tgid);
        let zombies: BTreeSet<u32> = zombies.filter(|t| t.is_zombie()).map(|t| t.tid).collect();
        let unread = tasks
            .processes
            .iter()
            .filter(|p| zombies.contains(&p.pid) && !inside.contains(&p.ppid))
            .map(|p| p.pid)
            .collect();
        Self { inside, unread }
    }

    /// Whether this process is one of them.
    pub fn has(&self, pid: u32) -> bool {
        self.inside.contains(&pid)
    }

    /// Whether this process is one that a restore makes.
    pub fn is_made(&self, pid: u32) -> bool {
        self.has(pid) && !self.unread.contains(&pid)
    }

    /// What a pidfd is to refer to; 0 = a process that is gone.
    pub fn target(&self, pidfd: &PidfdRec) -> Pid {
        match self.unread.contains(&pidfd.pid) {
            true => Pid(0),
            false => Pid(pidfd.pid.cast_signed()),
        }
    }

    /// Why a pidfd is not carried; `None` when it is.
    pub fn refusal(&self, rec: &FileRec, pidfd: &PidfdRec) -> Option<String> {
        if rec.flags & PIDFD_THREAD != 0 {
            return Some(
                "pidfds of single threads are not carried yet; close it before the update".into(),
            );
        }
        let pid = pidfd.pid;
        (pid != 0 && !self.has(pid)).then(|| {
            format!(
                "it refers to PID {pid}, which is outside the application; close it, or \
                 checkpoint both together"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::events::{ProcessRec, ThreadRec};

    fn processes() -> Processes {
        let process = |pid, ppid| ProcessRec {
            pid,
            ppid,
            ..ProcessRec::default()
        };
        let thread = |pid, exit_state| ThreadRec {
            tid: pid,
            tgid: pid,
            exit_state,
            ..ThreadRec::default()
        };
        Processes::of(&Tasks {
            processes: vec![process(5, 1), process(6, 5), process(7, 1)],
            threads: vec![thread(5, 0), thread(6, 32), thread(7, 32)],
            ..Tasks::default()
        })
    }

    fn pidfd(pid: u32) -> PidfdRec {
        PidfdRec {
            pid,
            ..PidfdRec::default()
        }
    }

    #[test]
    fn a_zombie_is_there_as_long_as_somebody_waits_for_it() {
        let target = |pid| processes().target(&pidfd(pid));
        assert_eq!(target(6), Pid(6));
        assert_eq!(target(7), Pid(0));
    }

    #[test]
    fn only_processes_of_the_application_are_carried() {
        let refused = |pid, flags| {
            let rec = FileRec {
                flags,
                ..FileRec::default()
            };
            processes().refusal(&rec, &pidfd(pid)).is_some()
        };
        assert!(!refused(5, 0) && !refused(6, 0) && !refused(0, 0));
        assert!(refused(99, 0));
        assert!(refused(5, PIDFD_THREAD));
    }
}
