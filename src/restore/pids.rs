//! PIDs: the application's must be free, the restorer's own must not be one of them.

use super::RestoreError;
use crate::model::frozen::Application;
use crate::model::ids::Pid;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::getsid;
use std::collections::BTreeSet;
use std::path::Path;

/// All PIDs and TIDs of an application.
#[must_use]
pub fn numbers(app: &Application) -> BTreeSet<i32> {
    let threads = app.processes.iter().flat_map(|p| {
        let tids = p.threads.iter().map(|t| t.tid.0);
        std::iter::once(p.pid.0).chain(tids)
    });
    threads.collect()
}

/// Whether nobody uses a number, as a PID, a TID, a process group or a session.
#[must_use]
pub fn is_free(number: i32) -> bool {
    // /proc/N answers for threads too; kill(-N) for groups whose leader is gone.
    !Path::new(&format!("/proc/{number}")).exists()
        && kill(nix::unistd::Pid::from_raw(-number), None) == Err(Errno::ESRCH)
}

/// Checks that every PID and TID of the application can be given out.
///
/// # Errors
/// The first that is in use, with the name of its user.
pub fn check_free(app: &Application) -> Result<(), RestoreError> {
    for process in &app.processes {
        let tids = process.threads.iter().map(|t| ("TID", t.tid.0));
        for (kind, number) in std::iter::once(("PID", process.pid.0)).chain(tids) {
            if is_free(number) {
                continue;
            }
            let user = std::fs::read_to_string(format!("/proc/{number}/comm"));
            return Err(RestoreError::NumberInUse {
                kind,
                number,
                user: user.map_or_else(
                    |_| "a process group or session".to_owned(),
                    |comm| comm.trim_end().to_owned(),
                ),
            });
        }
    }
    Ok(())
}

/// A free number for the restorer that the application does not need: its session leader's if
/// that is not in the tree (so that the number lives on), else one from the top.
///
/// # Errors
/// `pid_max` cannot be read, or nothing is free.
pub fn restorer_pid(app: &Application) -> Result<Pid, RestoreError> {
    let used = numbers(app);
    if let Some(sid) = foreign_session(app)
        && sid.0 > 1
        && is_free(sid.0)
    {
        return Ok(sid);
    }
    unneeded(&used)
}

/// A free number from the top that is not in `used`.
///
/// # Errors
/// `pid_max` cannot be read, or nothing is free.
pub fn unneeded(used: &BTreeSet<i32>) -> Result<Pid, RestoreError> {
    let path = "/proc/sys/kernel/pid_max";
    let max: i32 = std::fs::read_to_string(path)
        .map_err(RestoreError::io(format!("read {path}")))?
        .trim_end()
        .parse()
        .unwrap_or(32768);
    let free = (2..max).rev().find(|n| !used.contains(n) && is_free(*n));
    free.map(Pid).ok_or(RestoreError::System {
        what: "find a free PID".to_owned(),
        errno: Errno::EAGAIN,
    })
}

/// The session of the first process whose leader is not in the tree.
#[must_use]
pub fn foreign_session(app: &Application) -> Option<Pid> {
    let mut sids = app.processes.iter().map(|p| p.sid);
    sids.find(|sid| app.processes.iter().all(|p| p.pid != *sid || p.sid != *sid))
}

/// Whether the caller is in that session already.
#[must_use]
pub fn in_session(sid: Option<Pid>) -> bool {
    getsid(None).is_ok_and(|own| Some(Pid(own.as_raw())) == sid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::{Process, Thread};
    use crate::model::ids::Tid;

    fn app(pid: i32, sid: i32) -> Application {
        Application {
            processes: vec![Process {
                pid: Pid(pid),
                sid: Pid(sid),
                threads: vec![Thread {
                    tid: Tid(pid),
                    ..Thread::default()
                }],
                ..Process::default()
            }],
            ..Application::default()
        }
    }

    #[test]
    fn a_number_in_use_is_named() {
        let this = std::process::id().cast_signed();
        let error = check_free(&app(this, this)).unwrap_err().to_string();
        assert!(
            error.starts_with(&format!("PID {this} is in use by ")),
            "{error}"
        );
    }

    #[test]
    fn the_restorer_keeps_out_of_the_way() {
        let app = app(77, 77);
        assert_eq!(foreign_session(&app), None);
        let pid = restorer_pid(&app).unwrap();
        assert!(!numbers(&app).contains(&pid.0));
    }

    #[test]
    fn a_leader_outside_is_found() {
        assert_eq!(foreign_session(&app(77, 5)), Some(Pid(5)));
    }
}
