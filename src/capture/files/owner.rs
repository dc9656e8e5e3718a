//! Who gets the signals of an open file description: `F_SETOWN` and `F_SETSIG` of fcntl(2).

use super::pidfd::Processes;
use crate::bpf::events::FileRec;
use crate::bpf::iter::Tasks;
use crate::model::frozen::FileOwner;
use std::collections::{BTreeMap, BTreeSet};

/// Who there is to be told, beside the processes.
#[derive(Clone, Debug, Default)]
pub(super) struct Owners {
    /// Process groups, and whether somebody of one is made again.
    groups: BTreeMap<u32, bool>,
    /// Threads that do not lead their process: a restore makes them after its descriptors.
    followers: BTreeSet<u32>,
}

impl Owners {
    /// Reads them off a pass.
    pub fn of(tasks: &Tasks, processes: &Processes) -> Self {
        let mut groups = BTreeMap::new();
        for process in &tasks.processes {
            *groups.entry(process.pgid).or_default() |= processes.is_made(process.pid);
        }
        let followers = tasks.threads.iter().filter(|t| t.tid != t.tgid);
        Self {
            groups,
            followers: followers.map(|thread| thread.tid).collect(),
        }
    }

    /// Whether the owner is made again; `None` where he is not of the application.
    fn is_made(&self, rec: &FileRec, processes: &Processes) -> Option<bool> {
        let id = rec.owner_pid;
        match kind(rec) {
            GROUP => self.groups.get(&id).copied(),
            _ => processes.has(id).then(|| processes.is_made(id)),
        }
    }

    /// Why a description is not carried for its owner; `None` when it is.
    pub fn refusal(&self, rec: &FileRec, processes: &Processes) -> Option<String> {
        let (kind, id) = (kind(rec), rec.owner_pid);
        if id == 0 || self.is_made(rec, processes).is_some() {
            return None;
        }
        let whom = ["thread", "process", "process group"][kind];
        let what = match kind == 0 && self.followers.contains(&id) {
            true => "alone, which is not carried yet",
            false => "outside the application",
        };
        Some(format!(
            "its signals go to {whom} {id} {what}; set another owner (F_SETOWN of fcntl(2))"
        ))
    }

    /// What a restore sets; nobody in the place of one who has ended by then.
    pub fn carried(&self, rec: &FileRec, processes: &Processes) -> Option<FileOwner> {
        let there = self.is_made(rec, processes) == Some(true);
        let id = if there { rec.owner_pid } else { 0 };
        (id != 0 || rec.owner_sig != 0).then(|| FileOwner {
            kind: rec.owner_type.cast_signed(),
            id: id.cast_signed(),
            signal: rec.owner_sig,
        })
    }
}

/// `F_OWNER_PGRP`.
const GROUP: usize = 2;

/// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`, which the kernel's `enum pid_type` counts alike.
fn kind(rec: &FileRec) -> usize {
    usize::try_from(rec.owner_type).unwrap_or(0).min(GROUP)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::events::{ProcessRec, ThreadRec};

    fn rec(owner_type: u32, owner_pid: u32, owner_sig: i32) -> FileRec {
        FileRec {
            owner_type,
            owner_pid,
            owner_sig,
            ..FileRec::default()
        }
    }

    #[test]
    fn only_who_is_inside_is_told() {
        let process = |pid, pgid| ProcessRec {
            pid,
            pgid,
            ..ProcessRec::default()
        };
        let thread = |tid, tgid, exit_state| ThreadRec {
            tid,
            tgid,
            exit_state,
            ..ThreadRec::default()
        };
        let tasks = Tasks {
            // Nobody inside waits for the second one.
            processes: vec![process(7, 5), process(9, 9)],
            threads: vec![thread(7, 7, 0), thread(8, 7, 0), thread(9, 9, 32)],
            ..Tasks::default()
        };
        let processes = Processes::of(&tasks);
        let owners = Owners::of(&tasks, &processes);
        let refusal = |rec: &FileRec| owners.refusal(rec, &processes);
        let carried = |rec: &FileRec| {
            let owner = owners.carried(rec, &processes);
            owner.map(|owner| (owner.id, owner.signal))
        };
        for inside in [rec(0, 7, 10), rec(1, 7, 10), rec(2, 5, 10)] {
            assert_eq!(refusal(&inside), None);
            let id = inside.owner_pid.cast_signed();
            assert_eq!(carried(&inside), Some((id, 10)));
        }
        let refused = |rec| refusal(&rec).unwrap_or_default();
        assert!(refused(rec(0, 8, 0)).contains("alone"));
        assert!(refused(rec(1, 8, 0)).contains("outside"));
        assert_eq!(refusal(&rec(1, 9, 0)), None);
        assert_eq!(carried(&rec(1, 9, 0)), None, "a zombie");
        assert_eq!(carried(&rec(1, 0, 10)), Some((0, 10)), "a signal alone");
    }
}
