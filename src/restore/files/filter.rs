//! Classic socket filters. They are attached when all queues are filled: what is queued has
//! passed them already. Raw and packet sockets, whose queues are empty, get theirs before anything
//! arrives.

use super::error::{FilesError, missing_part, socket};
use super::raw;
use crate::model::frozen::{Application, FileKind, Socket};
use crate::model::ids::OfdId;
use crate::sys::socket::{attach_filter, set_int_option};
use nix::libc;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Attaches every filter of the application.
///
/// # Errors
/// The kernel does not take a program.
pub fn attach_all(app: &Application, opened: &BTreeMap<OfdId, OwnedFd>) -> Result<(), FilesError> {
    for (id, file) in &app.ofds {
        let FileKind::Socket(described) = &file.kind else {
            continue;
        };
        if described.filter.is_none() || raw::is_filtered(described) {
            continue;
        }
        let fd = opened.get(id);
        let fd = fd.ok_or_else(|| missing_part(&object(described), "socket"))?;
        attach(fd.as_fd(), described)?;
    }
    Ok(())
}

fn object(described: &Socket) -> String {
    format!("filter of socket {}", described.inode)
}

/// Attaches the filter of a socket, if it has one.
///
/// # Errors
/// The kernel does not take the program.
pub(super) fn attach(fd: BorrowedFd<'_>, described: &Socket) -> Result<(), FilesError> {
    let Some(filter) = &described.filter else {
        return Ok(());
    };
    let failed = || socket(object(described));
    attach_filter(fd, &filter.program).map_err(failed())?;
    if filter.locked {
        set_int_option(fd, libc::SOL_SOCKET, libc::SO_LOCK_FILTER, 1).map_err(failed())?;
    }
    Ok(())
}
