//! Unix domain sockets: what is queued is peeked at, descriptors in flight included.

use super::CollectError;
use super::borrow::Borrowed;
use super::unix_accept::Meetings;
use crate::bpf::events::SockRec;
use crate::model::frozen::{PeerCredentials, UnixAddress, UnixMessage, UnixSocket, UnixState};
use crate::model::ids::{OfdId, Pid};
use crate::model::map::Map;
use crate::sys::message::Room;
use crate::sys::socket::{option, own_address};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use serde_bytes::ByteBuf;
use std::os::fd::OwnedFd;

const LISTEN: u8 = 10;

/// Bytes that are read at once; datagrams are shorter (`net.core.wmem_max`).
const LONGEST: usize = 256 << 10;

/// What `SO_PASSPIDFD` brings (include/linux/socket.h).
const SCM_PIDFD: i32 = 4;

/// A message with the descriptors it carries, as duplicates of our own.
pub struct Peeked {
    /// All but the descriptors.
    pub message: UnixMessage,
    /// Duplicates of the descriptors in flight.
    pub fds: Vec<OwnedFd>,
}

/// Where a Unix socket stands, by the sockets of the application and where they have met; `Err`
/// tells why it is not carried.
pub fn state(
    rec: &SockRec,
    owners: &Map<u64, OfdId>,
    meetings: &Meetings,
) -> Result<UnixState, String> {
    if rec.state == LISTEN {
        return Ok(UnixState::Listening {
            backlog: rec.max_ack_backlog,
        });
    }
    if let Some(listener) = meetings.awaited(rec) {
        return Ok(UnixState::Waiting { listener });
    }
    match (rec.peer, owners.get(&rec.peer)) {
        (0, _) => Ok(UnixState::Unconnected),
        (_, Some(peer)) => Ok(UnixState::Connected { peer: *peer }),
        // unix_release_sock() leaves the survivor shut down for both directions.
        (_, None) if rec.shutdown == 3 => Ok(UnixState::PeerClosed),
        (_, None) => Err(
            "its other end is outside the application; close it, or checkpoint both together"
                .into(),
        ),
    }
}

/// Reads the parts of a Unix socket that need a descriptor.
///
/// # Errors
/// A socket call fails.
pub fn read(
    from: &Borrowed,
    rec: &SockRec,
    state: UnixState,
) -> Result<(UnixSocket, Vec<Peeked>), CollectError> {
    let queue = match state {
        // Nobody has answered yet.
        UnixState::Listening { .. } | UnixState::Waiting { .. } => Vec::new(),
        // Only datagrams come without a connection.
        UnixState::Unconnected if i32::from(rec.type_) != libc::SOCK_DGRAM => Vec::new(),
        _ => peek(from, i32::from(rec.type_))?,
    };
    let unix = UnixSocket {
        socktype: i32::from(rec.type_),
        address: own_name(from)?,
        state,
        queue: Vec::new(),
        shutdown: rec.shutdown,
        peer: peer(from)?,
        waiting: Vec::new(),
    };
    Ok((unix, queue))
}

/// Peeks at everything queued; a stream is read up to each group of descriptors at a time.
fn peek(from: &Borrowed, kind: i32) -> Result<Vec<Peeked>, CollectError> {
    from.peeking(|| {
        let (mut messages, mut room) = (Vec::new(), Room::new(LONGEST));
        while let Some(message) = peek_one(from, &mut room, kind)? {
            messages.push(message);
        }
        Ok(messages)
    })
}

/// `SO_PEERCRED` and `SO_PEERGROUPS`, if anybody was noted.
fn peer(from: &Borrowed) -> Result<Option<PeerCredentials>, CollectError> {
    let noted = ns::getsockopt(&from.fd, ns::sockopt::PeerCredentials)
        .map_err(from.failed("getsockopt(SO_PEERCRED)"))?;
    // sk_peer_cred of a socket that nobody has connected.
    if noted.uid() == u32::MAX {
        return Ok(None);
    }
    let groups = |most: usize| {
        option(
            from.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERGROUPS,
            most * 4,
        )
    };
    let groups = match groups(32) {
        Err(error) if error.errno == Errno::ERANGE => groups(NGROUPS_MAX),
        groups => groups,
    }
    .map_err(from.socket_failed())?;
    let (groups, _) = groups.as_chunks();
    Ok(Some(PeerCredentials {
        pid: Pid(noted.pid()),
        uid: noted.uid(),
        gid: noted.gid(),
        groups: groups.iter().copied().map(u32::from_ne_bytes).collect(),
    }))
}

/// Supplementary groups that a process can have (include/uapi/linux/limits.h).
const NGROUPS_MAX: usize = 65536;

fn peek_one(from: &Borrowed, room: &mut Room, kind: i32) -> Result<Option<Peeked>, CollectError> {
    let received = match room.peek(from.as_fd()) {
        Ok(received) => received,
        Err(Errno::EAGAIN) => return Ok(None),
        Err(errno) => return Err(from.failed("recvmsg(MSG_PEEK)")(errno)),
    };
    if received.flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(from.failed("recvmsg(MSG_PEEK)")(Errno::EMSGSIZE));
    }
    let (mut fds, mut credentials) = (Vec::new(), None);
    for (level, name, bytes) in &received.control {
        match (*level, *name) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                fds.extend(words(bytes).map(crate::sys::fd::received));
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => credentials = sender(bytes),
            (libc::SOL_SOCKET, SCM_PIDFD) => {
                drop(
                    words(bytes)
                        .map(crate::sys::fd::received)
                        .collect::<Vec<_>>(),
                );
            }
            _ => {}
        }
    }
    // End of file of a stream; datagrams may be empty, but none of those is queued.
    if received.data.is_empty() && fds.is_empty() && kind != libc::SOCK_DGRAM {
        return Ok(None);
    }
    let message = UnixMessage {
        data: ByteBuf::from(received.data),
        fds: Vec::new(),
        sender: name(&received.name),
        credentials,
    };
    Ok(Some(Peeked { message, fds }))
}

fn words(bytes: &[u8]) -> impl Iterator<Item = i32> {
    let (words, _) = bytes.as_chunks();
    words.iter().copied().map(i32::from_ne_bytes)
}

/// `struct ucred`.
fn sender(bytes: &[u8]) -> Option<PeerCredentials> {
    let mut words = words(bytes);
    let mut next = || words.next();
    Some(PeerCredentials {
        pid: Pid(next()?),
        uid: next()?.cast_unsigned(),
        gid: next()?.cast_unsigned(),
        groups: Vec::new(),
    })
}

/// The name a Unix socket is bound to.
///
/// # Errors
/// getsockname(2) fails.
fn own_name(from: &Borrowed) -> Result<Option<UnixAddress>, CollectError> {
    let address = own_address(from.as_fd()).map_err(from.socket_failed())?;
    Ok(name(&address))
}

/// The name in a `struct sockaddr_un`, if there is one (unix(7)).
fn name(address: &[u8]) -> Option<UnixAddress> {
    let name = address.get(size_of::<libc::sa_family_t>()..)?;
    match name.split_first()? {
        (0, name) => Some(UnixAddress::Abstract(ByteBuf::from(name))),
        _ => {
            let path = name.split(|byte| *byte == 0).next()?;
            Some(UnixAddress::Path(ByteBuf::from(path)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_told_apart() {
        let path = |bytes: &[u8]| Some(UnixAddress::Path(ByteBuf::from(bytes)));
        assert_eq!(name(b""), None);
        assert_eq!(name(b"\x01\x00"), None);
        assert_eq!(name(b"\x01\x00/run/x\x00"), path(b"/run/x"));
        assert_eq!(name(b"\x01\x00/run/x"), path(b"/run/x"));
        assert_eq!(
            name(b"\x01\x00\x00a\x00b"),
            Some(UnixAddress::Abstract(ByteBuf::from(b"a\x00b")))
        );
    }
}
