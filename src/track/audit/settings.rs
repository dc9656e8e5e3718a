//! What a duplicate of a descriptor tells: who gets its signals, and what a socket is set to.

use super::Audit;
use crate::model::event::Owner;
use crate::model::ids::{Fd, Pid};
use crate::model::state::Ofd;
use crate::sys::fd::signal_owner;
use nix::libc;
use nix::sys::stat::fstat;
use std::os::fd::{AsFd, BorrowedFd};

impl Audit<'_> {
    /// Compares what a duplicate tells. Whoever is gone meanwhile, or has another file at that
    /// number, is left to the next look.
    pub(super) fn settings(&mut self, (pid, fd): (Pid, Fd), ofd: &Ofd) {
        let signals =
            ofd.owner != Owner::default() || ofd.flags & libc::O_ASYNC.cast_unsigned() != 0;
        // Of a socket its inode tells whether it is the same.
        if ofd.sock.is_none() && !(self.reachable && signals) {
            return;
        }
        let Ok(duplicate) = self.pidfds.duplicate(pid, fd) else {
            return;
        };
        if !fstat(&duplicate).is_ok_and(|found| found.st_ino == ofd.inode.ino) {
            return;
        }
        self.owner((pid, fd), ofd, duplicate.as_fd());
        if let Some(socket) = ofd.sock.and_then(|sock| self.state.sockets.get(&sock)) {
            self.options((pid, fd), &socket.info, duplicate.as_fd());
        }
    }

    fn owner(&mut self, (pid, fd): (Pid, Fd), ofd: &Ofd, duplicate: BorrowedFd<'_>) {
        let Ok(found) = signal_owner(duplicate) else {
            return;
        };
        // The kernel forgets one that has ended, and of nobody it keeps what kind he was.
        let nobody = found.pid == 0;
        let text = |owner: Owner| {
            let Owner { pid, kind, signal } = owner;
            let whom = if nobody {
                String::new()
            } else {
                format!("{kind} {pid} ")
            };
            format!("{whom}signal {signal}")
        };
        let object = format!("owner of fd {fd}");
        self.differ(pid, object, text(ofd.owner), text(found));
    }
}
