//! PIDs: the application's must be free, the restorer's own must not be one of them.

use super::RestoreError;
use crate::model::frozen::Application;
use crate::model::ids::Pid;
use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::getsid;
use procfs::process::Process;
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

/// All PIDs and TIDs of an application.
#[must_use]
pub fn numbers(app: &Application) -> BTreeSet<i32> {
    let threads = app.processes.iter().flat_map(|p| {
        let tids = p.threads.iter().map(|t| t.tid.0);
        std::iter::once(p.pid.0).chain(tids)
    });
    threads.collect()
}

/// All numbers that the machine gives out.
///
/// # Errors
/// `pid_max` cannot be read.
pub fn all() -> Result<Range<i32>, RestoreError> {
    let path = "/proc/sys/kernel/pid_max";
    let text = std::fs::read_to_string(path).map_err(RestoreError::io(format!("read {path}")))?;
    Ok(2..text.trim_end().parse().unwrap_or(32768))
}

/// The widest run of numbers within `from` that none of these applications needs: as a PID, a
/// TID, or that of a process group or a session.
#[must_use]
pub fn widest_gap(apps: &[Application], from: Range<i32>) -> Range<i32> {
    let processes = apps.iter().flat_map(|app| &app.processes);
    let groups = processes.flat_map(|process| [process.pgid.0, process.sid.0]);
    let mut needed: BTreeSet<_> = apps.iter().flat_map(numbers).chain(groups).collect();
    needed.retain(|number| from.contains(number));
    let mut widest = from.start..from.start;
    let mut start = from.start;
    for number in needed.into_iter().chain([from.end]) {
        if number - start > widest.end - widest.start {
            widest = start..number;
        }
        start = number + 1;
    }
    widest
}

/// The leaders of groups and sessions of application number `index` that are in others of these.
#[must_use]
pub fn led_elsewhere(apps: &[Application], index: usize) -> BTreeSet<i32> {
    let processes = apps.get(index).into_iter().flat_map(|app| &app.processes);
    let mut led: BTreeSet<_> = processes
        .flat_map(|process| [process.pgid.0, process.sid.0])
        .collect();
    let others = apps.iter().enumerate().filter(|(other, _)| *other != index);
    let others: BTreeSet<_> = others.flat_map(|(_, app)| numbers(app)).collect();
    led.retain(|number| others.contains(number));
    led
}

/// Whether nobody uses a number, as a PID, a TID, a process group or a session.
#[must_use]
pub fn is_free(number: i32) -> bool {
    // /proc/N answers for threads too; kill(-N) for groups whose leader is gone.
    !Path::new(&format!("/proc/{number}")).exists()
        && kill(nix::unistd::Pid::from_raw(-number), None) == Err(Errno::ESRCH)
}

/// Whether a task is on its way out, or has ended and was not waited for yet (proc_pid_stat(5)).
fn is_ending(number: i32) -> bool {
    const PF_EXITING: u32 = 4;
    let stat = Process::new(number).and_then(|task| task.stat());
    stat.is_ok_and(|stat| ['Z', 'X'].contains(&stat.state) || stat.flags & PF_EXITING != 0)
}

/// Checks that every PID and TID of the application can be given out. Those of tasks that are just
/// ending are waited for: a cgroup is empty before they have ended, and a CPU may be long in coming.
///
/// # Errors
/// The first that is in use, with the name of its user.
pub fn check_free(app: &Application) -> Result<(), RestoreError> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let begun = Instant::now();
    for process in &app.processes {
        let tids = process.threads.iter().map(|t| ("TID", t.tid.0));
        for (kind, number) in std::iter::once(("PID", process.pid.0)).chain(tids) {
            if is_free(number) {
                continue;
            }
            while is_ending(number) && begun.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
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
/// that is not in the tree (so that the number lives on) and not `taken`, else one of `spare`.
///
/// # Errors
/// Nothing is free.
pub fn restorer_pid(
    app: &Application,
    spare: Range<i32>,
    taken: impl Fn(i32) -> bool,
) -> Result<Pid, RestoreError> {
    let used = numbers(app);
    if let Some(sid) = foreign_session(app)
        && sid.0 > 1
        && !taken(sid.0)
        && is_free(sid.0)
    {
        return Ok(sid);
    }
    unneeded(&used, spare)
}

/// A free number from the top of `spare` that is not in `used`.
///
/// # Errors
/// Nothing is free.
pub fn unneeded(used: &BTreeSet<i32>, spare: Range<i32>) -> Result<Pid, RestoreError> {
    let mut spare = spare.rev();
    let free = spare.find(|n| !used.contains(n) && is_free(*n));
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
    fn who_has_ended_is_told_from_who_runs() {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        while !is_ending(pid) {
            std::thread::yield_now();
        }
        assert!(!is_ending(std::process::id().cast_signed()));
        assert!(check_free(&app(pid, pid)).is_err());
        let waiting = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(50));
            child.wait().unwrap()
        });
        check_free(&app(pid, pid)).unwrap();
        assert!(waiting.join().unwrap().success());
        assert!(!is_ending(pid));
    }

    #[test]
    fn the_restorer_keeps_out_of_the_way() {
        let app = app(77, 77);
        assert_eq!(foreign_session(&app), None);
        let pid = restorer_pid(&app, all().unwrap(), |_| false).unwrap();
        assert!(!numbers(&app).contains(&pid.0));
    }

    #[test]
    fn a_gap_has_nothing_that_is_needed() {
        let gap = |apps: &[(i32, i32)]| {
            let apps: Vec<_> = apps.iter().map(|(pid, sid)| app(*pid, *sid)).collect();
            widest_gap(&apps, 300..32768)
        };
        assert_eq!(gap(&[]), 300..32768);
        assert_eq!(gap(&[(32767, 32767)]), 300..32767);
        assert_eq!(gap(&[(300, 32767)]), 301..32767);
        assert_eq!(gap(&[(20_000, 19_000), (30_000, 5)]), 300..19_000);
        assert_eq!(gap(&[(1000, 900), (30_000, 0)]), 1001..30_000);
    }

    #[test]
    fn a_leader_of_another_application_is_known() {
        let apps = [app(77, 5), app(5, 5), app(78, 6)];
        let led = |index| led_elsewhere(&apps, index).into_iter().collect::<Vec<_>>();
        assert_eq!([led(0), led(1), led(2)], [vec![5], vec![], vec![]]);
        let free = (300..32768).rev().find(|n| is_free(*n)).unwrap();
        let pid = |taken| restorer_pid(&app(1, free), 300..free, |_| taken).unwrap();
        assert_eq!(pid(false), Pid(free));
        assert_ne!(pid(true), Pid(free));
    }

    #[test]
    fn a_leader_outside_is_found() {
        assert_eq!(foreign_session(&app(77, 5)), Some(Pid(5)));
    }
}
