//! pidfds. Processes exist only after everything else is open, so numbers are reserved for them
//! in the restorer, which every process knows from its birth.

use super::error::{FilesError, call};
use crate::model::frozen::{Application, FileKind};
use crate::model::ids::{OfdId, Pid};
use crate::sys::area::exit_now;
use crate::sys::fd;
use crate::sys::process::{CallError, Fork, fork_with_pid, pidfd_getfd, pidfd_open};
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitPidFlag, waitpid};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

fn all(app: &Application) -> impl Iterator<Item = (OfdId, Pid, u32)> {
    app.ofds.iter().filter_map(|(id, file)| match file.kind {
        FileKind::Pidfd { pid } => Some((*id, pid, file.flags)),
        _ => None,
    })
}

fn object(pid: Pid) -> String {
    format!("pidfd of PID {pid}")
}

fn refused(pid: Pid) -> impl FnOnce(CallError) -> FilesError {
    move |error| call(object(pid), error.call)(error.errno)
}

fn of(opened: &BTreeMap<OfdId, OwnedFd>, id: OfdId, pid: Pid) -> Result<&OwnedFd, FilesError> {
    let found = opened.get(&id);
    found.ok_or_else(|| FilesError::Missing(object(pid)))
}

/// Something that holds a number until the process exists.
///
/// # Errors
/// `/dev/null` cannot be opened.
pub fn reserve() -> Result<OwnedFd, FilesError> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    open("/dev/null", flags, Mode::empty()).map_err(call("pidfd", "open /dev/null"))
}

/// Opens every pidfd at the number reserved for it.
///
/// # Errors
/// The process was not born, or the kernel refuses a step.
pub fn open_all(app: &Application, opened: &BTreeMap<OfdId, OwnedFd>) -> Result<(), FilesError> {
    for (id, pid, flags) in all(app) {
        let new = match pid {
            Pid(0) => reaped()?,
            pid => pidfd_open(pid).map_err(refused(pid))?,
        };
        if flags & libc::O_NONBLOCK.cast_unsigned() != 0 {
            nix::fcntl::fcntl(&new, nix::fcntl::FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
                .map_err(call(object(pid), "fcntl(F_SETFL)"))?;
        }
        let number = of(opened, id, pid)?.as_raw_fd();
        fd::duplicate_to(new.as_fd(), number, true).map_err(call(object(pid), "dup3"))?;
    }
    Ok(())
}

/// A pidfd of a process that is gone and was waited for.
fn reaped() -> Result<OwnedFd, FilesError> {
    let gone = Pid(0);
    match fork_with_pid(None, libc::SIGCHLD).map_err(refused(gone))? {
        Fork::Child => exit_now(0),
        Fork::Parent(pid) => {
            let new = pidfd_open(pid).map_err(refused(gone));
            let raw = nix::unistd::Pid::from_raw(pid.0);
            waitpid(raw, Some(WaitPidFlag::__WALL)).map_err(call(object(gone), "waitpid"))?;
            new
        }
    }
}

/// Puts the restorer's pidfds at the same numbers of the caller's own table.
///
/// # Errors
/// The restorer is gone, or the kernel refuses a step.
pub fn fetch(
    app: &Application,
    opened: &BTreeMap<OfdId, OwnedFd>,
    restorer: Pid,
) -> Result<(), FilesError> {
    if all(app).next().is_none() {
        return Ok(());
    }
    let lender = pidfd_open(restorer).map_err(refused(restorer))?;
    for (id, pid, _) in all(app) {
        let number = of(opened, id, pid)?.as_raw_fd();
        let theirs = pidfd_getfd(lender.as_fd(), restorer, number).map_err(refused(pid))?;
        fd::duplicate_to(theirs.as_fd(), number, true).map_err(call(object(pid), "dup3"))?;
    }
    Ok(())
}
