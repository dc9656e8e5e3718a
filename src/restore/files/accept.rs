//! Connections that a listener has not accepted: each is made of the packets that its peer had
//! sent, the last of the handshake first (see [`Handshakes`]).

use super::error::{FilesError, call, socket};
use super::ip::{Sender, until};
use super::room::{Buffer, with_room};
use super::segment::{ACK, FIN, PSH, Peer, RST};
use crate::bpf::accept::{Handshake, Handshakes};
use crate::model::frozen::{Application, FileKind, SocketState, WaitingConnection, WaitingEnd};
use crate::model::ids::OfdId;
use crate::sys::tcp;
use crate::sys::tcp::state::CLOSE_WAIT;
use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// Listeners with connections that they have not accepted.
fn listeners(app: &Application) -> impl Iterator<Item = (OfdId, SocketAddr, &[WaitingConnection])> {
    app.ofds.iter().filter_map(|(id, file)| match &file.kind {
        FileKind::Socket(socket) => match &socket.state {
            SocketState::TcpListen { local, waiting, .. } if !waiting.is_empty() => {
                Some((*id, *local, &waiting[..]))
            }
            _ => None,
        },
        _ => None,
    })
}

/// Both ends of all connections that nobody has accepted, the application's first.
pub(super) fn unaccepted(app: &Application) -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
    let all = listeners(app).flat_map(|(_, _, waiting)| waiting);
    all.map(|one| (one.local, one.remote))
}

/// Fills the accept queues of all listeners. To be called while their connections are silenced.
///
/// # Errors
/// The kernel cannot make such connections, or one of them is not what it was.
pub fn fill_all(app: &Application, ofds: &BTreeMap<OfdId, OwnedFd>) -> Result<(), FilesError> {
    let mut way = None;
    for (id, local, waiting) in listeners(app) {
        let object = format!("TCP listener {local}");
        let fd = ofds
            .get(&id)
            .ok_or_else(|| FilesError::Missing(object.clone()))?;
        let way = match &mut way {
            Some(way) => way,
            None => way.insert(Way::open(&object)?),
        };
        for connection in waiting {
            way.make(fd.as_fd(), connection)?;
        }
    }
    Ok(())
}

/// The way to the listeners.
struct Way {
    handshakes: Handshakes,
    sender: Sender,
}

impl Way {
    fn open(object: &str) -> Result<Self, FilesError> {
        let unsupported = |what: &str| {
            Err(FilesError::Unsupported(format!(
                "{object}: connections that were not accepted, with {what}"
            )))
        };
        if is_set("tcp_fwmark_accept") == Some(true) {
            return unsupported("net.ipv4.tcp_fwmark_accept set");
        }
        // The program's word counts as a SYN cookie does.
        if is_set("tcp_syncookies") == Some(false) {
            return unsupported("net.ipv4.tcp_syncookies not set");
        }
        Ok(Self {
            handshakes: Handshakes::attach()?,
            sender: Sender::default(),
        })
    }

    /// Makes a connection, and sees to it that it has received all it had.
    fn make(
        &mut self,
        listener: BorrowedFd<'_>,
        connection: &WaitingConnection,
    ) -> Result<(), FilesError> {
        let peer = Peer::of_waiting(connection);
        let object = format!(
            "TCP connection {} - {}, which was not accepted",
            peer.local, peer.remote
        );
        let queued = || tcp::info(listener).map(|info| info.unacked);
        let before = queued().map_err(socket(&object))?;
        let Self { handshakes, sender } = self;
        let mut send = |offset, flags, data: &[u8]| {
            let packet = peer.packet(offset, flags, data);
            let packet = packet.ok_or_else(|| FilesError::Unsupported(object.clone()))?;
            let sent = sender.send(&object, peer.local.ip(), &packet)?;
            sent.map_err(call(&object, "sendto"))
        };
        // They came in larger pieces, or the buffer had grown by itself; what it gets now stays its
        // own. The kernel gives half of a buffer to bytes (tcp_win_from_space()).
        let room = 4 * connection.received.len();
        with_room(&object, listener, Buffer::RECEIVE, room, || {
            handshakes.end(
                listener,
                (peer.local, peer.remote),
                agreed(connection),
                || {
                    send(0, ACK, &[])?;
                    until(&object, "accept queue", || {
                        Ok(queued().map_err(socket(&object))? > before)
                    })
                },
            )
        })?;
        let mut seen =
            || -> Result<_, FilesError> { Ok(handshakes.look(peer.local, peer.remote)?) };
        let received = &connection.received;
        // As long as they are between machines; the kernel puts them together.
        let longest = usize::try_from(connection.negotiated.mss_clamp).unwrap_or(usize::MAX);
        let mut offset = 0;
        for part in received.chunks(longest.clamp(LEAST_SEGMENT, MOST_SEGMENT)) {
            send(offset, ACK | PSH, part)?;
            offset += u32::try_from(part.len()).unwrap_or(u32::MAX);
            // One that comes before the last is taken in might be thrown away.
            until(&object, "receive queue", || {
                Ok(seen()?.is_some_and(|seen| seen.unread >= offset))
            })?;
        }
        let closed = matches!(
            connection.end,
            WaitingEnd::Closed | WaitingEnd::ClosedAndReset
        );
        if closed {
            send(offset, ACK | FIN, &[])?;
            offset += 1;
            until(&object, "end", || {
                Ok(seen()?.is_some_and(|seen| seen.state == CLOSE_WAIT))
            })?;
        }
        if matches!(
            connection.end,
            WaitingEnd::Reset | WaitingEnd::ClosedAndReset
        ) {
            send(offset, ACK | RST, &[])?;
            until(&object, "reset", || Ok(seen()?.is_none()))?;
        }
        Ok(())
    }
}

/// Bytes in a segment: not fewer, whatever the peer's largest one is, and not more than what leaves
/// little unused of the memory that the kernel takes for a packet, since that counts.
const LEAST_SEGMENT: usize = 512;
const MOST_SEGMENT: usize = 15_000;

fn agreed(connection: &WaitingConnection) -> Handshake {
    let negotiated = &connection.negotiated;
    let (theirs, ours) = negotiated.wscale.unwrap_or((0, 0));
    Handshake {
        rcv_tsval: connection.peer_timestamp,
        rcv_tsecr: negotiated.timestamp.unwrap_or(0),
        mss: u16::try_from(negotiated.mss_clamp).unwrap_or(u16::MAX),
        rcv_wscale: ours,
        snd_wscale: theirs,
        wscale_ok: u8::from(negotiated.wscale.is_some()),
        sack_ok: u8::from(negotiated.sack),
        tstamp_ok: u8::from(negotiated.timestamp.is_some()),
        ..Handshake::default()
    }
}

/// Whether a number of net.ipv4 is not 0.
fn is_set(name: &str) -> Option<bool> {
    let text = fs::read_to_string(format!("/proc/sys/net/ipv4/{name}")).ok()?;
    Some(text.trim() != "0")
}
