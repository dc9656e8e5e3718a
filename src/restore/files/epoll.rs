//! epoll sets. An item is kept under the number its file was added by, so
//! the process that has the file under that number adds it.

use super::error::{FilesError, call};
use crate::model::frozen::{Application, BusyPoll, EpollItem, FileKind, FilesTable, Process};
use crate::model::ids::OfdId;
use crate::sys::{eventfile, fd};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};

/// Makes an empty set. A kernel before 6.9 polls devices as it always does, whatever was asked
/// for; that is said.
///
/// # Errors
/// The kernel refuses.
pub fn create(busy_poll: Option<&BusyPoll>) -> Result<OwnedFd, FilesError> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC);
    let epoll = epoll.map_err(call("epoll", "epoll_create1"))?;
    if let Some(params) = busy_poll {
        match eventfile::set_busy_poll(epoll.0.as_fd(), params) {
            Ok(()) => {}
            Err(errno @ (Errno::ENOTTY | Errno::EINVAL)) => {
                tracing::warn!("ioctl(EPIOCSPARAMS) on epoll: {errno}; it polls as usual");
            }
            Err(errno) => return Err(call("epoll", "ioctl(EPIOCSPARAMS)")(errno)),
        }
    }
    Ok(epoll.0)
}

/// Adds the items of every set that `process` is the first to have open.
///
/// # Errors
/// The image lacks a watched file, or the kernel refuses.
pub fn fill_of(
    app: &Application,
    process: &Process,
    opened: &BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    let Some(table) = app.files.get(&process.files) else {
        return Ok(());
    };
    for (&id, file) in &app.ofds {
        let FileKind::Epoll { items, .. } = &file.kind else {
            continue;
        };
        if first_with(app, id) != Some(process.pid) {
            continue;
        }
        let epoll = opened
            .get(&id)
            .ok_or_else(|| FilesError::Missing(format!("epoll {id}")))?;
        for item in items {
            add(epoll, item, table, opened)?;
        }
    }
    Ok(())
}

fn first_with(app: &Application, id: OfdId) -> Option<crate::model::ids::Pid> {
    let holds = |process: &&Process| {
        app.files
            .get(&process.files)
            .is_some_and(|table| table.fds.iter().any(|entry| entry.ofd == id))
    };
    app.processes.iter().find(holds).map(|process| process.pid)
}

fn add(
    epoll: &OwnedFd,
    item: &EpollItem,
    table: &FilesTable,
    opened: &BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    let object = format_args!("epoll item of descriptor {}", item.fd);
    let at = table.fds.binary_search_by_key(&item.fd, |entry| entry.fd);
    let there = at.ok().map(|at| table.fds[at]);
    let target = opened.get(&item.ofd).ok_or_else(|| {
        FilesError::Missing(format!("{} watched as descriptor {}", item.ofd, item.fd))
    })?;
    let elsewhere = there.is_none_or(|entry| entry.ofd != item.ofd);
    if elsewhere {
        fd::duplicate_to(target.as_fd(), item.fd.0, true).map_err(call(object, "dup3"))?;
    }
    eventfile::epoll_add(epoll.as_fd(), item.fd.0, item.events, item.data)
        .map_err(call(object, "epoll_ctl"))?;
    // The number may belong to another file by now; a free one is closed by the caller.
    if elsewhere && let Some(entry) = there {
        let owner = opened
            .get(&entry.ofd)
            .ok_or_else(|| super::error::missing(entry.fd, entry.ofd))?;
        fd::duplicate_to(owner.as_fd(), entry.fd.0, entry.cloexec).map_err(call(object, "dup3"))?;
    }
    Ok(())
}
