//! Duplicates of descriptors of other processes, by one pidfd a process.

use super::process::{CallError, pidfd_getfd, pidfd_open};
use crate::model::ids::{Fd, Pid};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::os::fd::{AsFd, OwnedFd};

/// The processes that were asked so far.
#[derive(Debug, Default)]
pub struct Pidfds(BTreeMap<Pid, OwnedFd>);

impl Pidfds {
    /// Duplicates a descriptor of a process; it has `FD_CLOEXEC`.
    ///
    /// # Errors
    /// As pidfd_open(2) and pidfd_getfd(2).
    pub fn duplicate(&mut self, pid: Pid, fd: Fd) -> Result<OwnedFd, CallError> {
        let pidfd = match self.0.entry(pid) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => unknown.insert(pidfd_open(pid)?),
        };
        pidfd_getfd(pidfd.as_fd(), pid, fd.0)
    }
}
