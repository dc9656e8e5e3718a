//! Process groups whose leader is gone: a stand-in with the leader's PID makes the group, lives
//! until all members have joined, and is reaped by a process of the same session.

use super::RestoreError;
use super::signals::number;
use super::supervisor::Supervisor;
use super::tape::{Expect, Script};
use crate::model::frozen::{Application, FileKind, Process, Thread};
use crate::model::ids::Pid;
use nix::libc;
use std::collections::BTreeSet;

/// The stand-ins an application needs, as processes that have died. A number that is in use
/// outside (`is_free`) is that of somebody else's group by now, and cannot be joined.
#[must_use]
pub fn stand_ins(app: &Application, is_free: impl Fn(i32) -> bool) -> Vec<Process> {
    let living = || app.processes.iter().filter(|p| p.zombie.is_none());
    let leads = |pid: Pid| {
        let born = |p: &&Process| p.zombie.is_none() || p.parent.is_some();
        app.processes.iter().filter(born).any(|p| p.pid == pid)
    };
    let members = living().map(|p| (p.pgid, p.sid, p.pid));
    let foregrounds = app.ofds.values().filter_map(|file| match &file.kind {
        FileKind::Pty {
            state: Some(state), ..
        } => {
            let sid = state.session?;
            Some((state.foreground?, sid, sid))
        }
        _ => None,
    });
    let mut seen = BTreeSet::new();
    members
        .chain(foregrounds)
        // The number of a session belongs to the restorer, if not to a leader in the tree.
        .filter(|(group, sid, _)| group != sid && !leads(*group))
        .filter(|(group, ..)| seen.insert(*group) && is_free(group.0))
        .map(|(group, sid, parent)| Process {
            pid: group,
            parent: Some(parent),
            pgid: group,
            sid,
            exit_signal: libc::SIGCHLD,
            zombie: Some(0),
            threads: vec![Thread {
                tid: group.leader(),
                ..Thread::default()
            }],
            ..Process::default()
        })
        .collect()
}

/// The application with its stand-ins.
#[must_use]
pub fn with(app: &Application, stand_ins: &[Process]) -> Application {
    let mut app = app.clone();
    app.processes.extend(stand_ins.iter().cloned());
    app
}

impl Supervisor<'_> {
    /// Has the parents of dead stand-ins wait for them. The `SIGCHLD` that is queued goes with
    /// [`super::signals::actions`].
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn reap(&mut self, stand_ins: &[Process]) -> Result<(), RestoreError> {
        for stand_in in stand_ins {
            let Some(parent) = stand_in.parent else {
                continue;
            };
            let mut script = Script::default();
            let args = [number(stand_in.pid.0), 0, number(libc::__WALL), 0];
            script.add(libc::SYS_wait4, &args, Expect::Is(stand_in.pid.0.into()));
            self.run(parent, parent.leader(), &script)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_without_its_leader_gets_a_stand_in() {
        let process = |pid, pgid, sid| Process {
            pid: Pid(pid),
            pgid: Pid(pgid),
            sid: Pid(sid),
            ..Process::default()
        };
        let app = Application {
            processes: vec![
                process(10, 10, 10),
                process(12, 11, 10),
                process(13, 11, 10),
                process(20, 20, 7),
                process(21, 7, 7),
                process(22, 8, 7),
            ],
            ..Application::default()
        };
        let found = stand_ins(&app, |number| number != 8);
        let found: Vec<_> = found.iter().map(|p| (p.pid.0, p.parent)).collect();
        assert_eq!(found, [(11, Some(Pid(12)))]);
    }
}
