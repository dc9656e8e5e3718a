//! System V semaphore sets: those that a process of the application used last, or that change
//! when one ends.
//!
//! The namespace is the machine's and a set belongs to nobody; who did the last operation on
//! each semaphore is all that tells whose it is.

use super::error::CheckpointError;
use super::sysv::table;
use crate::bpf::events::{SemUndoRec, ThreadFlag, ThreadRec};
use crate::bpf::iter::Tasks;
use crate::model::frozen::{Blocker, SemaphoreSet};
use crate::model::ids::Pid;
use crate::sys::sysv::{semaphore_pid, semaphore_value};
use nix::errno::Errno;
use std::collections::BTreeSet;
use std::path::Path;

/// What cannot be carried of these sets, which the application uses.
pub fn blockers(tasks: &Tasks, sets: &[SemaphoreSet]) -> Vec<Blocker> {
    let mut found = adjustments_not_carried(tasks, sets);
    let inside = inside(tasks);
    for set in sets {
        let outside = set.semaphores.iter().map(|(_, pid)| *pid).find(|pid| {
            pid.0 > 0 && !inside.contains(pid) && Path::new(&format!("/proc/{pid}")).exists()
        });
        let last = set.semaphores.iter().map(|(_, pid)| *pid);
        let adjusting = set.adjustments.iter().map(|(pid, ..)| *pid);
        let user = last.chain(adjusting).find(|pid| inside.contains(pid));
        found.extend(outside.zip(user).map(|(outside, user)| Blocker {
            pid: user,
            fd: None,
            object: format!("System V semaphore set {}", set.id),
            reason: format!(
                "PID {outside}, which is outside the application, uses it as well; checkpoint \
                 both together"
            ),
        }));
    }
    found
}

/// What is undone at an end that is not a process's own.
fn adjustments_not_carried(tasks: &Tasks, sets: &[SemaphoreSet]) -> Vec<Blocker> {
    let blocker = |tgid: u32, reason: &str| Blocker {
        pid: Pid(tgid.cast_signed()),
        fd: None,
        object: "System V semaphore adjustments".to_owned(),
        reason: format!("{reason} (SEM_UNDO), which is not carried; stop the process first"),
    };
    let of_thread = |rec: &&ThreadRec| rec.flags & ThreadFlag::SEM_UNDO != 0;
    let threads = tasks.threads.iter().filter(of_thread);
    let threads = threads.map(|rec| (rec.tgid, "one of its threads has some of its own"));
    let undos = tasks.sem_undos.iter().filter(|rec| rec.semid >= 0);
    let cannot = |rec: &SemUndoRec| {
        let mut sharers = tasks
            .sem_undos
            .iter()
            .filter(|other| other.list == rec.list);
        let set = sets.iter().find(|set| set.id == rec.semid);
        let count = set.map_or(0, |set| set.semaphores.len());
        let reason = if rec.failed != 0 {
            "they cannot be read"
        } else if sharers.any(|other| other.tgid != rec.tgid) {
            "it shares them with another process"
        } else if count > rec.adjust.len() {
            "they are of a set with more than 256 semaphores"
        } else {
            return None;
        };
        Some((rec.tgid, reason))
    };
    let mut found: Vec<_> = threads.chain(undos.filter_map(cannot)).collect();
    found.dedup();
    found
        .into_iter()
        .map(|(tgid, reason)| blocker(tgid, reason))
        .collect()
}

/// What is added to the semaphores of a set when processes end.
fn adjustments(tasks: &Tasks, set: i32, count: usize) -> Vec<(Pid, u16, i16)> {
    let undos = tasks.sem_undos.iter().filter(|rec| rec.semid == set);
    let each = undos.flat_map(|rec| {
        let adjust = (0_u16..).zip(rec.adjust).take(count);
        let adjust = adjust.filter(|(_, by)| *by != 0);
        adjust.map(|(number, by)| (Pid(rec.tgid.cast_signed()), number, by))
    });
    each.collect()
}

/// PIDs of the application.
pub fn inside(tasks: &Tasks) -> BTreeSet<Pid> {
    let pids = tasks.processes.iter().map(|p| Pid(p.pid.cast_signed()));
    pids.collect()
}

/// Reads the sets that the application uses.
///
/// # Errors
/// procfs cannot be read.
pub fn read(tasks: &Tasks) -> Result<Vec<SemaphoreSet>, CheckpointError> {
    let inside = inside(tasks);
    let mut found = Vec::new();
    for line in table("/proc/sysvipc/sem")? {
        let Some(mut set) = set(&line) else {
            continue;
        };
        let count = line.get(3).copied().unwrap_or(0);
        let one = |number| -> Result<(u16, Pid), Errno> {
            let value = semaphore_value(set.id, number)?;
            Ok((
                u16::try_from(value).unwrap_or(0),
                Pid(semaphore_pid(set.id, number)?),
            ))
        };
        // A set that is gone by now is no longer used.
        let Ok(semaphores) = (0..i32::try_from(count).unwrap_or(0))
            .map(one)
            .collect::<Result<Vec<_>, _>>()
        else {
            continue;
        };
        set.adjustments = adjustments(tasks, set.id, semaphores.len());
        let used = semaphores.iter().any(|(_, pid)| inside.contains(pid));
        if used || !set.adjustments.is_empty() {
            set.semaphores = semaphores;
            found.push(set);
        }
    }
    Ok(found)
}

/// A line of /proc/sysvipc/sem.
fn set(line: &[i64]) -> Option<SemaphoreSet> {
    let [key, id, mode, _, uid, gid, cuid, cgid, ..] = *line else {
        return None;
    };
    let number = |value: i64| u32::try_from(value).unwrap_or(0);
    Some(SemaphoreSet {
        id: i32::try_from(id).ok()?,
        key: i32::try_from(key).ok()?,
        mode: number(mode) & 0o777,
        uid: number(uid),
        gid: number(gid),
        creator_uid: number(cuid),
        creator_gid: number(cgid),
        semaphores: Vec::new(),
        adjustments: Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_procfs_is_read() {
        let line = [0x1234, 32770, 0o660, 3, 33, 44, 5, 6, 1, 2];
        let set = set(&line).unwrap();
        assert_eq!((set.key, set.id, set.mode), (0x1234, 32770, 0o660));
        assert_eq!((set.uid, set.gid), (33, 44));
        assert_eq!((set.creator_uid, set.creator_gid), (5, 6));
    }
}
