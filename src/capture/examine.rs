//! What keeps a running application from being carried: in general, and by what is to restore it.

use super::clocks::Offsets;
use super::eligibility::{self, Namespaces};
use super::error::CheckpointError;
use super::{Capture, files, iterators, namespaces};
use crate::bpf::iter::Scope;
use crate::model::frozen::Blocker;
use crate::model::ids::Pid;
use crate::sys::cgroup::{Cgroup, Event};
use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::path::Path;

/// What of the processes in a cgroup cannot be carried, named files on these devices
/// (major << 20 | minor) included, and mounts of what is not there then
/// ([`Capture::refuse_mounts_unless`]). Nothing is touched.
///
/// # Errors
/// The kernel lacks something, or there is no such cgroup.
pub fn survey(
    cgroup: &Path,
    devices: &BTreeSet<u32>,
    is_there: impl Fn(&[u8], &[u8], &str) -> bool,
) -> Result<Vec<Blocker>, CheckpointError> {
    let (mut iterators, ours) = (iterators()?, Namespaces::ours());
    let cgroup = Cgroup::open(cgroup)?;
    let mut found = eligibility::survey(&mut iterators, &cgroup, &ours)?;
    found.extend(eligibility::on_devices(&mut iterators, &cgroup, devices)?);
    let tasks = iterators.tasks(Scope::Cgroup(cgroup.id()))?;
    found.extend(namespaces::too_early(&tasks, &ours, is_there)?);
    Ok(found)
}

impl Capture {
    /// Looks at the running application for what cannot be carried.
    pub(super) fn examine(&mut self) -> Result<(), CheckpointError> {
        let scope = self.scope();
        let name = &self.target.header.name;
        if self.target.cgroup.holds(Event::Frozen)? {
            return Err(CheckpointError::Unstable(format!(
                "The cgroup of {name} is frozen already by somebody else"
            )));
        }
        let tasks = self.iterators.borrow_mut().tasks(scope)?;
        let Some(first) = tasks.processes.first() else {
            return Err(CheckpointError::NotRunning(name.clone()));
        };
        let ourselves = std::process::id();
        if tasks.processes.iter().any(|p| p.pid == ourselves) {
            return Err(CheckpointError::Ourselves(Pid(ourselves.cast_signed())));
        }
        self.offsets = Offsets::of(Pid(first.pid.cast_signed()));
        let mut iterators = self.iterators.borrow_mut();
        self.blockers = eligibility::survey(&mut iterators, &self.target.cgroup, &self.ours)?;
        Ok(())
    }

    /// Adds named files on these devices (major << 20 | minor) to what cannot be carried.
    ///
    /// # Errors
    /// The iterators cannot be read.
    pub fn refuse_devices(&mut self, devices: &BTreeSet<u32>) -> Result<(), CheckpointError> {
        let mut iterators = self.iterators.borrow_mut();
        let more = eligibility::on_devices(&mut iterators, &self.target.cgroup, devices)?;
        self.blockers.extend(more);
        Ok(())
    }

    /// Adds mounts of the application's own namespace to what cannot be carried: those that show
    /// what is not mounted yet where it is to be restored. `is_there` tells of a place, the way from
    /// there and a type.
    ///
    /// # Errors
    /// The namespace cannot be read.
    pub fn refuse_mounts_unless(
        &mut self,
        is_there: impl Fn(&[u8], &[u8], &str) -> bool,
    ) -> Result<(), CheckpointError> {
        let tasks = self.iterators.borrow_mut().tasks(self.scope())?;
        let more = namespaces::too_early(&tasks, &self.ours, is_there)?;
        self.blockers.extend(more);
        Ok(())
    }

    /// Adds io_uring instances to what cannot be carried, for this reason.
    ///
    /// # Errors
    /// The iterators cannot be read.
    pub fn refuse_rings(&mut self, reason: &str) -> Result<(), CheckpointError> {
        let (scope, mut iterators) = (self.scope(), self.iterators.borrow_mut());
        let processes = iterators.threads(scope)?.processes;
        let open = iterators.files_of(scope, &processes)?;
        self.blockers.extend(files::rings(&open, reason));
        Ok(())
    }

    /// Whether connections that nobody has accepted are carried, as far as whoever restores them
    /// is concerned: if not, for this reason. Unless this is called it is this kernel.
    pub fn set_accept_queues(&mut self, refusal: Option<String>) {
        self.accept_queues = OnceCell::from(refusal);
    }
}
