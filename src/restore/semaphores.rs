//! System V semaphore sets: made with their old ids, set by the processes that used them last,
//! which is how the kernel tells later whose they are.

use super::RestoreError;
use super::signals::number;
use super::sysv::{Left, left, make_with_id};
use super::tape::{Script, Tape};
use crate::model::frozen::{Application, Process, SemaphoreSet};
use crate::model::ids::Pid;
use crate::sys::sysv::{create_semaphores, remove_semaphores, set_semaphores_owner};
use nix::errno::Errno;
use nix::libc;
use std::collections::BTreeSet;

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

/// Who is to be the last user of a semaphore: the one who was, or the first process in the place of
/// one that is gone.
fn setter(app: &Application, last: Pid) -> Option<Pid> {
    let living = || app.processes.iter().filter(|p| p.zombie.is_none());
    let there = living().find(|p| p.pid == last);
    there.or_else(|| living().next()).map(|p| p.pid)
}

/// Adds the calls that set those values that `process` was the last to change; the first process
/// sets those of processes that are gone.
pub fn values(script: &mut Script, app: &Application, process: &Process) {
    for set in &app.header.semaphores {
        for (index, (value, last)) in (0_u64..).zip(&set.semaphores) {
            // One that nobody has used is 0 in a new set, and in one that was left.
            let untouched = last.0 == 0 && *value == 0;
            if setter(app, *last) == Some(process.pid) && !untouched {
                let id = number(set.id);
                let args = [id, index, number(libc::SETVAL), u64::from(*value)];
                script.zero(libc::SYS_semctl, &args);
            }
        }
    }
}

/// The operations of `process` that leave all values as they are and make the kernel undo, when
/// it ends, what it would have undone. To be done when all values are set: that forgets what was to
/// be undone, of all processes.
///
/// # Errors
/// The tape has no room for them.
pub fn adjust(
    tape: &mut Tape,
    app: &Application,
    process: &Process,
) -> Result<Script, RestoreError> {
    let mut script = Script::default();
    for set in &app.header.semaphores {
        let own = set
            .adjustments
            .iter()
            .filter(|(pid, ..)| *pid == process.pid);
        for &(_, number, by) in own {
            let value = set
                .semaphores
                .get(usize::from(number))
                .map_or(0, |(value, _)| *value);
            operate(&mut script, tape, set.id, number, &undone(value, by))?;
        }
    }
    Ok(script)
}

/// The operations of `process` that make it the last again that has used a semaphore, after
/// [`adjust`].
///
/// # Errors
/// The tape has no room for them.
pub fn touch(
    tape: &mut Tape,
    app: &Application,
    process: &Process,
) -> Result<Script, RestoreError> {
    let mut script = Script::default();
    for set in &app.header.semaphores {
        let adjusted: BTreeSet<_> = set
            .adjustments
            .iter()
            .map(|(_, number, _)| *number)
            .collect();
        for number in adjusted {
            let found = set.semaphores.get(usize::from(number));
            let Some(&(value, last)) = found else {
                continue;
            };
            if setter(app, last) == Some(process.pid) {
                let by = if value == MOST { -1 } else { 1 };
                operate(&mut script, tape, set.id, number, &[(by, 0), (-by, 0)])?;
            }
        }
    }
    Ok(script)
}

/// `SEMVMX` of include/uapi/linux/sem.h.
const MOST: u16 = 32767;

/// Operations, with their flags, on a semaphore of this value that come out even and add `by` to
/// what is done to it at the end. They are one call, so that nobody sees what is in between: the
/// value goes to 0 first, from where there is room for all others.
fn undone(value: u16, by: i16) -> Vec<(i16, i16)> {
    let value = i16::try_from(value).unwrap_or(i16::MAX);
    let undo = i16::try_from(libc::SEM_UNDO).unwrap_or(0);
    let mut operations = vec![(-value, 0)];
    // The least adjustment is one more than a semaphore can have.
    let half = by / 2;
    for by in [half, by - half] {
        // What is subtracted is added at the end.
        let there = (by.saturating_neg(), undo);
        let back = (by, 0);
        operations.extend(if by > 0 { [back, there] } else { [there, back] });
    }
    operations.push((value, 0));
    // One of 0 would wait until the value is.
    operations.retain(|(by, _)| *by != 0);
    operations
}

fn operate(
    script: &mut Script,
    tape: &mut Tape,
    set: i32,
    number: u16,
    operations: &[(i16, i16)],
) -> Result<(), RestoreError> {
    // struct sembuf: semaphore, operation, flags.
    let bytes: Vec<u8> = operations
        .iter()
        .flat_map(|(by, flags)| {
            let [a, b] = number.to_ne_bytes();
            let [c, d] = by.to_ne_bytes();
            let [e, f] = flags.to_ne_bytes();
            [a, b, c, d, e, f]
        })
        .collect();
    let addr = tape.data(&bytes).ok_or(RestoreError::NoRoom)?;
    let args = [self::number(set), addr, operations.len() as u64];
    script.zero(libc::SYS_semop, &args);
    Ok(())
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
    fn operations_come_out_even_and_never_leave_the_range() {
        let undo = i16::try_from(libc::SEM_UNDO).unwrap();
        for value in [0, 1, 7, 20_000, MOST] {
            for by in [1, -1, 3, 20_000, -20_000, i16::MAX, i16::MIN] {
                let (mut now, mut adjusted) = (i32::from(value), 0);
                for (operation, flags) in undone(value, by) {
                    assert_ne!(operation, 0);
                    now += i32::from(operation);
                    assert!((0..=i32::from(MOST)).contains(&now), "{value} {by}: {now}");
                    adjusted -= if flags == undo {
                        i32::from(operation)
                    } else {
                        0
                    };
                }
                assert_eq!((now, adjusted), (i32::from(value), i32::from(by)));
            }
        }
    }

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
