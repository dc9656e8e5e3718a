//! Classic socket filters. They are attached when all queues are filled: what is queued has
//! passed them already.

use super::error::{FilesError, missing_part, socket};
use crate::model::frozen::{Application, FileKind};
use crate::model::ids::OfdId;
use crate::sys::socket::{attach_filter, set_int_option};
use nix::libc;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

/// Attaches every filter of the application.
///
/// # Errors
/// The kernel does not take a program.
pub fn attach_all(app: &Application, opened: &BTreeMap<OfdId, OwnedFd>) -> Result<(), FilesError> {
    for (id, file) in &app.ofds {
        let FileKind::Socket(described) = &file.kind else {
            continue;
        };
        let Some(filter) = &described.filter else {
            continue;
        };
        let object = format!("filter of socket {}", described.inode);
        let fd = opened.get(id);
        let fd = fd.ok_or_else(|| missing_part(&object, "socket"))?.as_fd();
        attach_filter(fd, &filter.program).map_err(socket(&object))?;
        if filter.locked {
            set_int_option(fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1)
                .map_err(socket(&object))?;
        }
    }
    Ok(())
}
