//! Who gets the signals of an open file description.

use super::error::{FilesError, call};
use crate::model::frozen::{Application, FdEntry, OpenFile};
use crate::model::ids::{Fd, FilesId, OfdId};
use crate::sys::fd;
use nix::libc;

/// `F_OWNER_PGRP`.
const GROUP: i32 = 2;

/// Whether a descriptor refers to a description, rather than a message in flight alone.
pub(super) fn is_held(app: &Application, id: OfdId) -> bool {
    let entries = app.files.values().flat_map(|table| &table.fds);
    entries.into_iter().any(|entry| entry.ofd == id)
}

/// Sets the owner of what `entry` of a table refers to. To be called by a process that has the
/// table, with all owners there. `O_ASYNC` is set through the descriptor by whose number the
/// kernel is to tell of readiness (`si_fd` of sigaction(2)).
///
/// # Errors
/// The kernel refuses it.
pub(super) fn set(
    app: &Application,
    files: FilesId,
    entry: &FdEntry,
    file: &OpenFile,
) -> Result<(), FilesError> {
    let object = || format!("Descriptor {}", entry.fd);
    let number = entry.fd.0;
    if let Some(owner) = &file.owner {
        fd::set_owner(number, owner).map_err(call(object(), "fcntl(F_SETOWN_EX)"))?;
    }
    let flags = file.flags.cast_signed();
    if flags & libc::O_ASYNC != 0 && told_of(app, entry.ofd, file) == Some((files, entry.fd)) {
        fd::set_status(number, flags).map_err(call(object(), "fcntl(F_SETFL)"))?;
    }
    Ok(())
}

/// The descriptor that is named in signals: which one the application had set them through is
/// not known, but whoever gets them knows his own numbers.
fn told_of(app: &Application, id: OfdId, file: &OpenFile) -> Option<(FilesId, Fd)> {
    let owner = file.owner.filter(|owner| owner.kind != GROUP);
    let owner = owner.and_then(|owner| {
        let has = |id: i32| {
            app.processes
                .iter()
                .find(|process| process.threads.iter().any(|thread| thread.tid.0 == id))
        };
        has(owner.id).map(|process| process.files)
    });
    let lowest = |files: FilesId| {
        let entries = app.files.get(&files)?.fds.iter();
        let own = entries.filter(|entry| entry.ofd == id);
        Some((files, own.map(|entry| entry.fd).min()?))
    };
    let owners = owner.and_then(lowest);
    owners.or_else(|| app.files.keys().find_map(|files| lowest(*files)))
}
