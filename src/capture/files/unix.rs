//! Unix domain sockets: what is queued is peeked at, descriptors in flight included.

use super::CollectError;
use super::borrow::Borrowed;
use crate::bpf::events::SockRec;
use crate::model::frozen::{UnixSocket, UnixState};
use crate::model::ids::OfdId;
use crate::sys::socket::{int_option, set_int_option};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use std::collections::HashMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

const LISTEN: u8 = 10;

/// A message with the descriptors it carries, as duplicates of our own.
pub struct Peeked {
    /// Bytes.
    pub data: Vec<u8>,
    /// Duplicates of the descriptors in flight.
    pub fds: Vec<OwnedFd>,
}

/// Where a Unix socket stands, by the sockets of the application; `Err` tells
/// why it is not carried.
pub fn state(rec: &SockRec, owners: &HashMap<u64, OfdId>) -> Result<UnixState, String> {
    if rec.state == LISTEN {
        return if rec.ack_backlog == 0 {
            Ok(UnixState::Listening {
                backlog: rec.max_ack_backlog,
            })
        } else {
            Err(format!(
                "{} connections wait to be accepted; try again",
                rec.ack_backlog
            ))
        };
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
        UnixState::Listening { .. } => Vec::new(),
        // Only datagrams come without a connection.
        UnixState::Unconnected if i32::from(rec.type_) != libc::SOCK_DGRAM => Vec::new(),
        _ => peek(from, i32::from(rec.type_))?,
    };
    let unix = UnixSocket {
        socktype: i32::from(rec.type_),
        address: super::socket::unix_name(from)?,
        state,
        queue: Vec::new(),
        shutdown: rec.shutdown,
    };
    Ok((unix, queue))
}

/// Peeks at everything queued; a stream is read up to each group of descriptors at a time.
fn peek(from: &Borrowed, kind: i32) -> Result<Vec<Peeked>, CollectError> {
    let set_offset = |offset| {
        set_int_option(from.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF, offset)
            .map_err(from.socket_failed())
    };
    let own = int_option(from.as_fd(), libc::SOL_SOCKET, libc::SO_PEEK_OFF)
        .map_err(from.socket_failed())?;
    set_offset(0)?;
    let mut messages = Vec::new();
    let result = loop {
        match peek_one(from, kind) {
            Ok(Some(message)) => messages.push(message),
            Ok(None) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    // The offset belongs to the socket, not to us.
    set_offset(own)?;
    result.map(|()| messages)
}

fn peek_one(from: &Borrowed, kind: i32) -> Result<Option<Peeked>, CollectError> {
    let mut data = vec![0; 256 * 1024];
    let mut control = nix::cmsg_space!([RawFd; 253], libc::ucred);
    let flags =
        ns::MsgFlags::MSG_PEEK | ns::MsgFlags::MSG_DONTWAIT | ns::MsgFlags::MSG_CMSG_CLOEXEC;
    let mut parts = [IoSliceMut::new(&mut data)];
    let received = ns::recvmsg::<()>(from.fd.as_raw_fd(), &mut parts, Some(&mut control), flags);
    let (len, fds) = match received {
        Ok(message) => {
            let mut fds = Vec::new();
            for part in message.cmsgs().map_err(from.failed("recvmsg"))? {
                if let ns::ControlMessageOwned::ScmRights(numbers) = part {
                    fds.extend(numbers.into_iter().map(crate::sys::fd::received));
                }
            }
            (message.bytes, fds)
        }
        Err(Errno::EAGAIN) => return Ok(None),
        Err(errno) => return Err(from.failed("recvmsg(MSG_PEEK)")(errno)),
    };
    // End of file of a stream; datagrams may be empty, but none of those is queued.
    if len == 0 && fds.is_empty() && kind != libc::SOCK_DGRAM {
        return Ok(None);
    }
    data.truncate(len);
    Ok(Some(Peeked { data, fds }))
}
