//! Unix domain sockets: what is queued is peeked at, descriptors in flight included.

use super::CollectError;
use super::borrow::Borrowed;
use super::unix_accept::Meetings;
use crate::bpf::events::SockRec;
use crate::model::frozen::{PeerCredentials, UnixAddress, UnixMessage, UnixSocket, UnixState};
use crate::model::ids::{OfdId, Pid};
use crate::model::map::Map;
use crate::sys::message::Room;
use crate::sys::socket::{Count, option, own_address, queued};
use crate::sys::tcp::state::LISTEN;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use serde_bytes::ByteBuf;
use std::os::fd::OwnedFd;

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

impl Peeked {
    fn is_empty(&self) -> bool {
        self.message.data.is_empty() && self.fds.is_empty()
    }
}

/// Whether the other end was closed with something unread (unix_release_sock()), of which a call is
/// told that finds nothing to read. Where packets wait the first call is told, and ours would be.
pub fn is_reset(rec: &SockRec) -> bool {
    let told_last = match i32::from(rec.type_) {
        libc::SOCK_STREAM => true,
        libc::SOCK_SEQPACKET => rec.rcv_qlen == 0,
        _ => false,
    };
    told_last && rec.shutdown == 3 && rec.err.cast_signed() == libc::ECONNRESET
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
        (_, None) if is_reset(rec) => Ok(UnixState::PeerReset),
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
        _ => peek(from, rec)?,
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

/// Peeks at everything queued; a stream is read up to each group of descriptors at a time. Who
/// looks beyond the end is told of an error, of which the application is not told any more.
fn peek(from: &Borrowed, rec: &SockRec) -> Result<Vec<Peeked>, CollectError> {
    let (kind, count) = (i32::from(rec.type_), rec.rcv_qlen as usize);
    let is_dgram = kind == libc::SOCK_DGRAM;
    // Datagrams may come from elsewhere, but both ends of a connection stand still.
    if count == 0 && !is_dgram {
        return Ok(Vec::new());
    }
    let mut unread = usize::MAX;
    if kind == libc::SOCK_STREAM {
        unread = queued(from.as_fd(), Count::Unread).map_err(from.socket_failed())?;
    }
    let messages = from.peeking(|| {
        let (mut messages, mut room) = (Vec::new(), Room::new(LONGEST));
        while unread > 0 && (kind != libc::SOCK_SEQPACKET || messages.len() < count) {
            let Some(next) = peek_one(from, &mut room)? else {
                break;
            };
            // The end of a sequence of packets looks like an empty one.
            if kind == libc::SOCK_SEQPACKET && rec.shutdown & 1 != 0 && next.is_empty() {
                break;
            }
            unread = unread.saturating_sub(next.message.data.len());
            messages.push(next);
        }
        Ok(messages)
    })?;
    if kind != libc::SOCK_STREAM && messages.len() < count {
        return Err(from.blocked("Unix socket", EMPTY));
    }
    Ok(messages)
}

/// __skb_try_recv_from_queue() passes over it.
const EMPTY: &str = "an empty message waits at the end of a connection, or was looked at before \
                     (MSG_PEEK, or an earlier checkpoint), which the kernel does not show again; \
                     try again";

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

fn peek_one(from: &Borrowed, room: &mut Room) -> Result<Option<Peeked>, CollectError> {
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
