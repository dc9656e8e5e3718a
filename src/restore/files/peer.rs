//! What a Unix socket remembers of who made it: `SO_PEERCRED` and `SO_PEERGROUPS` of unix(7).
//!
//! The kernel notes who calls socketpair(2), listen(2) and connect(2), and says so to the other
//! end for as long as that lives. None of the processes of the application is born when its
//! sockets are made, and many a caller has ended long ago, so a short-lived process with the
//! number and the ids of the caller makes the call, on the restorer's descriptor table.

use super::error::{FilesError, call};
use crate::model::frozen::PeerCredentials;
use crate::model::ids::Pid;
use crate::model::plan::Shares;
use crate::sys::identity::assume;
use crate::sys::process::{CallError, Fork, fork_sharing};
use crate::sys::task::exit_now;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{pipe2, read, write};
use std::os::fd::{OwnedFd, RawFd};

const OBJECT: &str = "Unix socket";

/// Descriptors that one call of [`act_as`] may make: what tells of them must fit a pipe.
pub const MOST: usize = 1024;

/// Makes the calls of `act` as `who` would; gives the descriptors they made. Without anybody to
/// be, the caller makes them.
///
/// # Errors
/// What `act` fails with, as an error of `what`.
pub fn act_as(
    who: Option<&PeerCredentials>,
    what: &'static str,
    act: impl FnOnce() -> Result<Vec<RawFd>, Errno>,
) -> Result<Vec<RawFd>, FilesError> {
    let Some(who) = who else {
        return act().map_err(call(OBJECT, what));
    };
    let (answer, tell) =
        pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(call(OBJECT, "pipe2"))?;
    match stand_in(who)? {
        Fork::Child => {
            let done = assume(who.uid, who.gid, &who.groups).and_then(|()| act());
            // The exit says whether it was written.
            let told = write(&tell, &encode(&done));
            exit_now(i32::from(told.is_err()));
        }
        Fork::Parent(child) => {
            let child = nix::unistd::Pid::from_raw(child.0);
            waitpid(child, Some(WaitPidFlag::__WALL)).map_err(call(OBJECT, "waitpid"))?;
            decode(&answer).map_err(call(OBJECT, what))
        }
    }
}

/// Forks with the number, if nobody has it. Else it is only the ids that are right.
fn stand_in(who: &PeerCredentials) -> Result<Fork, FilesError> {
    let shares = Shares {
        files: true,
        ..Shares::default()
    };
    let fork = |pid| fork_sharing(pid, libc::SIGCHLD, shares);
    // 0: of another PID namespace than the one it was read in.
    let born = match fork((who.pid.0 > 0).then_some(who.pid)) {
        Err(CallError {
            errno: Errno::EEXIST,
            ..
        }) => {
            tracing::warn!(
                "SO_PEERCRED of a Unix socket named PID {}, which another process has now",
                who.pid
            );
            fork(None::<Pid>)
        }
        born => born,
    };
    born.map_err(|error| call(OBJECT, "clone3")(error.errno))
}

/// An errno or 0, then the descriptors, four bytes each.
fn encode(done: &Result<Vec<RawFd>, Errno>) -> Vec<u8> {
    let (errno, fds) = match done {
        Ok(fds) => (0, fds.as_slice()),
        Err(errno) => (*errno as i32, &[][..]),
    };
    let words = std::iter::once(errno).chain(fds.iter().copied());
    words.flat_map(i32::to_ne_bytes).collect()
}

fn decode(answer: &OwnedFd) -> Result<Vec<RawFd>, Errno> {
    let mut bytes = [0; (MOST + 1) * 4];
    let length = read(answer, &mut bytes)?;
    let (words, _) = bytes[..length].as_chunks();
    let mut words = words.iter().copied().map(i32::from_ne_bytes);
    match words.next() {
        Some(0) => Ok(words.collect()),
        Some(errno) => Err(Errno::from_raw(errno)),
        // It was killed.
        None => Err(Errno::ECHILD),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::pipe;

    #[test]
    fn what_was_done_is_told() {
        for done in [
            Ok(Vec::new()),
            Ok(vec![3, 77]),
            Ok((0..1024).collect()),
            Err(Errno::ECONNREFUSED),
        ] {
            let (from, to) = pipe().unwrap();
            write(&to, &encode(&done)).unwrap();
            assert_eq!(decode(&from.into()), done);
        }
    }

    #[test]
    fn silence_is_an_error() {
        let (from, to) = pipe().unwrap();
        drop(to);
        assert_eq!(decode(&from.into()), Err(Errno::ECHILD));
    }
}
