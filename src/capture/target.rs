//! What is checkpointed: the cgroup of an application, or a process tree moved into one.

use super::cgroups::settings;
use super::error::CheckpointError;
use crate::applications::{NamedApplication, PARENT_CGROUP};
use crate::bpf::features::cgroup2_mount;
use crate::bpf::iter::{Iterators, Scope};
use crate::model::frozen::ApplicationHeader;
use crate::model::ids::Pid;
use crate::sys::cgroup::{self, Cgroup, CgroupError};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What to checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Selection {
    /// An application started by `tracker run --name`.
    Name(String),
    /// A process and everything below it.
    Tree(Pid),
}

/// A cgroup that holds exactly what is checkpointed.
#[derive(Debug)]
pub struct Target {
    /// The cgroup.
    pub cgroup: Cgroup,
    /// What the image says about the application before its tasks are looked at.
    pub header: ApplicationHeader,
    /// Cgroup the processes were moved out of; they go back on [`Target::put_back`].
    pub moved_from: Option<PathBuf>,
}

impl Target {
    /// Finds the cgroup of an application, or names the one a tree will be moved to.
    ///
    /// # Errors
    /// Nothing of this name runs, or cgroup2 is not mounted.
    pub fn find(selection: &Selection) -> Result<Self, CheckpointError> {
        match selection {
            Selection::Name(name) => Self::named(name),
            Selection::Tree(pid) => Self::tree(*pid),
        }
    }

    fn named(name: &str) -> Result<Self, CheckpointError> {
        let application = NamedApplication::new(name)?;
        if application.pids()?.is_empty() {
            return Err(CheckpointError::NotRunning(name.to_owned()));
        }
        let record = application.record()?.unwrap_or_default();
        let header = ApplicationHeader {
            name: name.to_owned(),
            cgroup: application.cgroup_below_mount(),
            command: record.command,
            directory: record.directory,
            cgroup_settings: settings(application.cgroup()),
            ..ApplicationHeader::default()
        };
        Ok(Self {
            cgroup: Cgroup::open(application.cgroup())?,
            header,
            moved_from: None,
        })
    }

    fn tree(pid: Pid) -> Result<Self, CheckpointError> {
        let mount = cgroup2_mount().map_err(CheckpointError::io("find", "cgroup2"))?;
        let from = cgroup::of_process(pid)
            .map_err(|_| CheckpointError::NotRunning(format!("PID {pid}")))?;
        let from = mount.join(from.trim_start_matches('/'));
        let name = format!("pid-{pid}");
        let below = format!("{PARENT_CGROUP}/{name}");
        let header = ApplicationHeader {
            name,
            cgroup: below.clone(),
            ..ApplicationHeader::default()
        };
        Ok(Self {
            cgroup: cgroup::create(&mount.join(below))?,
            header,
            moved_from: Some(from),
        })
    }

    /// Moves a tree into its cgroup. Repeats until nothing of it is outside: what is forked
    /// meanwhile is born next to its parent.
    ///
    /// # Errors
    /// The process is gone, contains tracker, may not be moved, or what is below it is in
    /// another cgroup.
    pub fn gather(
        &self,
        selection: &Selection,
        iter: &mut Iterators,
    ) -> Result<(), CheckpointError> {
        let Selection::Tree(root) = *selection else {
            return Ok(());
        };
        loop {
            let processes = iter.threads(Scope::System)?;
            let pairs: Vec<(i32, i32)> = processes
                .processes
                .iter()
                .map(|p| (p.pid.cast_signed(), p.ppid.cast_signed()))
                .collect();
            let tree = descendants(root.0, &pairs);
            if tree.contains(&std::process::id().cast_signed()) {
                return Err(CheckpointError::Ourselves(root));
            }
            let inside: BTreeSet<i32> = self.cgroup.processes()?.iter().map(|p| p.0).collect();
            let dead: BTreeSet<u32> = processes
                .threads
                .iter()
                .filter(|t| t.is_zombie())
                .map(|t| t.tid)
                .collect();
            let outside: Vec<i32> = tree
                .into_iter()
                .filter(|pid| !inside.contains(pid) && !dead.contains(&pid.cast_unsigned()))
                .collect();
            if outside.is_empty() && inside.contains(&root.0) {
                return Ok(());
            }
            if outside.is_empty() {
                return Err(CheckpointError::NotRunning(format!("PID {root}")));
            }
            for pid in outside {
                self.comes_from_there(Pid(pid))?;
                match self.cgroup.add(Pid(pid)) {
                    // Ended meanwhile.
                    Err(e) if e.source.raw_os_error() == Some(nix::libc::ESRCH) => {}
                    result => result?,
                }
            }
        }
    }

    /// All of a tree is moved back to one place.
    fn comes_from_there(&self, pid: Pid) -> Result<(), CheckpointError> {
        let mount = cgroup2_mount().map_err(CheckpointError::io("find", "cgroup2"))?;
        // Of a process that has ended meanwhile there is nothing to move.
        let Ok(theirs) = cgroup::of_process(pid) else {
            return Ok(());
        };
        let path = mount.join(theirs.trim_start_matches('/'));
        if self.moved_from.as_ref().is_some_and(|from| *from != path) {
            return Err(CheckpointError::Scattered {
                pid,
                cgroup: theirs,
            });
        }
        Ok(())
    }

    /// Moves a tree back where it came from and removes the cgroup made for it.
    pub fn put_back(&self) {
        if let Some(from) = &self.moved_from
            && let Err(e) = disband(&self.cgroup, from)
        {
            tracing::warn!("{e}");
        }
    }
}

/// Moves every process of one cgroup to another and removes the one. Repeats that for some
/// seconds: what is forked meanwhile is born next to its parent.
///
/// # Errors
/// Somebody is still in it.
pub fn disband(from: &Cgroup, to: &Path) -> Result<(), CgroupError> {
    let begun = Instant::now();
    loop {
        for pid in from.processes()? {
            // It may have ended; who may not be moved is in the way of the removal.
            let _ = cgroup::move_to(to, pid);
        }
        match cgroup::remove(from.path()) {
            Err(_) if begun.elapsed() < DISBANDING => std::thread::sleep(PAUSE),
            result => return result,
        }
    }
}

const DISBANDING: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(5);

/// A PID and all below it, by (PID, parent) pairs.
fn descendants(root: i32, pairs: &[(i32, i32)]) -> BTreeSet<i32> {
    let mut tree = BTreeSet::from([root]);
    loop {
        let before = tree.len();
        let found = pairs.iter().filter(|(_, parent)| tree.contains(parent));
        let found: Vec<i32> = found.map(|(pid, _)| *pid).collect();
        tree.extend(found);
        if tree.len() == before {
            return tree;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_is_found_in_any_order() {
        let pairs = [(5, 4), (4, 2), (3, 1), (2, 1), (6, 3)];
        assert_eq!(descendants(2, &pairs), BTreeSet::from([2, 4, 5]));
        assert_eq!(descendants(6, &pairs), BTreeSet::from([6]));
    }
}
