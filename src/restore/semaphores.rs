//! System V semaphore sets: made with their old ids, set by the processes that used them last,
//! which is how the kernel tells later whose they are.

use super::RestoreError;
use super::signals::number;
use super::sysv::{Left, left, make_with_id};
use super::tape::Script;
use crate::model::frozen::{Application, Process, SemaphoreSet};
use crate::model::ids::Pid;
use crate::sys::sysv::{create_semaphores, remove_semaphores, set_semaphores_owner};
use nix::errno::Errno;
use nix::libc;

fn refused(id: i32, call: &str) -> impl FnOnce(Errno) -> RestoreError + use<> {
    RestoreError::system(format!("{call} of System V semaphore set {id}"))
}

/// Makes every set; the ids of new ones are added to `created`. One that the checkpoint left
/// behind on this kernel is used as it is, but for its values.
///
/// # Errors
/// An id or key is in use, or the kernel refuses a step.
pub fn create_all(app: &Application, created: &mut Vec<i32>) -> Result<(), RestoreError> {
    for set in &app.header.semaphores {
        let count = set.semaphores.len() as u64;
        match left("/proc/sysvipc/sem", set.id, set.key, count)? {
            Left::Same(_) => continue,
            Left::Other => return Err(refused(set.id, "semget")(Errno::EEXIST)),
            Left::Nothing => {}
        }
        create(set)?;
        created.push(set.id);
        set_semaphores_owner(set.id, set.uid, set.gid, set.mode)
            .map_err(refused(set.id, "semctl(IPC_SET)"))?;
    }
    Ok(())
}

fn create(set: &SemaphoreSet) -> Result<(), RestoreError> {
    let count = i32::try_from(set.semaphores.len()).unwrap_or(0);
    let mode = i32::try_from(set.mode & 0o777).unwrap_or(0);
    make_with_id(
        "sem_next_id",
        set.id,
        (set.creator_uid, set.creator_gid),
        || create_semaphores(set.key, count, mode),
        remove_semaphores,
        refused(set.id, "semget"),
    )
}

/// Adds the calls that set those values that `process` was the last to change; the first process
/// sets those of processes that are gone.
pub fn values(script: &mut Script, app: &Application, process: &Process) {
    let living = || app.processes.iter().filter(|p| p.zombie.is_none());
    let first = living().next().map(|p| p.pid);
    let lives = |pid: Pid| living().any(|p| p.pid == pid);
    for set in &app.header.semaphores {
        for (index, (value, last)) in (0_u64..).zip(&set.semaphores) {
            let by = if lives(*last) { Some(*last) } else { first };
            // One that nobody has used is 0 in a new set, and in one that was left.
            let untouched = last.0 == 0 && *value == 0;
            if by == Some(process.pid) && !untouched {
                let id = number(set.id);
                let args = [id, index, number(libc::SETVAL), u64::from(*value)];
                script.zero(libc::SYS_semctl, &args);
            }
        }
    }
}

/// Takes back what was made, after a failure.
pub fn remove(created: &[i32]) {
    for id in created {
        let _ = remove_semaphores(*id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_the_last_sets_the_value() {
        let process = |pid, zombie| Process {
            pid: Pid(pid),
            zombie,
            ..Process::default()
        };
        let mut app = Application {
            processes: vec![process(5, None), process(6, None), process(7, Some(0))],
            ..Application::default()
        };
        app.header.semaphores.push(SemaphoreSet {
            id: 3,
            semaphores: vec![
                (1, Pid(6)),
                (0, Pid(6)),
                (2, Pid(7)),
                (0, Pid(0)),
                (4, Pid(99)),
            ],
            ..SemaphoreSet::default()
        });
        let set = |at: usize| -> Vec<(u64, u64)> {
            let mut script = Script::default();
            values(&mut script, &app, &app.processes[at]);
            let calls = script.calls.iter();
            calls.map(|call| (call.args[1], call.args[3])).collect()
        };
        assert_eq!(set(0), [(2, 2), (4, 4)]);
        assert_eq!(set(1), [(0, 1), (1, 0)]);
    }
}
