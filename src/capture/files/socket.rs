//! Sockets: options and addresses through a borrowed descriptor, the rest from the iterators.

use super::alike::Alike;
use super::borrow::Borrowed;
use super::tcp::{self, TcpReadError};
use super::{CollectError, ended, filter, interfaces, netlink, raw, udp, unix};
use crate::bpf::events::{MemberRec, SockFlag, SockRec, WaitingRec};
use crate::model::frozen::{Interfaces, SockOption, Socket, SocketState, TcpConnection};
use crate::sys::socket::{peek_exact, set_int_option};
use crate::sys::tcp as repair;
use crate::sys::tcp::state::{CLOSE, CONNECTED, LISTEN};
use nix::errno::Errno;
use nix::libc;
use serde_bytes::ByteBuf;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::AsRawFd;

/// A socket that was borrowed and, when it is a connection, put in repair mode.
pub struct Read {
    /// What the image carries.
    pub socket: Socket,
    /// The connection, which must leave repair mode if the application goes on.
    pub repaired: Option<Connection>,
    /// A connection that has ended since its record was made, which does not tell how; `socket`
    /// does not either.
    pub ended: Option<Borrowed>,
}

/// A connection in repair mode.
#[derive(Debug)]
pub struct Connection {
    /// Our duplicate of its descriptor.
    pub from: Borrowed,
    /// Address of the socket.
    pub sock: u64,
    /// `SO_REUSEADDR`, which leaving repair mode resets (tcp_repair_set()).
    reuse: bool,
}

/// Local and remote address of an internet socket; `None` where it has none.
pub fn addresses(rec: &SockRec) -> (Option<SocketAddr>, Option<SocketAddr>) {
    let known = |bytes: &[u8; 16], port: u16| (port != 0).then(|| address(rec.family, bytes, port));
    (
        known(&rec.local_addr, rec.local_port),
        known(&rec.remote_addr, rec.remote_port),
    )
}

/// One end as a record has it.
pub(super) fn address(family: u16, bytes: &[u8; 16], port: u16) -> SocketAddr {
    let ip: IpAddr = if i32::from(family) == libc::AF_INET6 {
        Ipv6Addr::from(*bytes).into()
    } else {
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    };
    SocketAddr::new(ip, port)
}

/// What no socket option tells, or not whole, and what to do about it.
const UNTOLD: &[(u32, &str)] = &[
    (
        SockFlag::EBPF,
        "the eBPF or reuseport program attached to it is not carried; detach it before the update",
    ),
    (
        SockFlag::SOURCES,
        "a multicast membership for some senders only is not carried; leave the group before the \
         update",
    ),
    (
        SockFlag::ULP,
        "the protocol on top of its TCP (TCP_ULP, as kernel TLS) is not carried; close it before \
         the update",
    ),
    (
        SockFlag::TCP_AUTH,
        "its TCP keys (TCP_MD5SIG, TCP_AO_ADD_KEY) cannot be read; close it before the update",
    ),
    (
        SockFlag::IPSEC,
        "its IPsec policy (IP_XFRM_POLICY) cannot be read; close it before the update",
    ),
    (
        SockFlag::V6_STICKY,
        "the IPv6 extension headers, flow label or IPV6_MTU set for all it sends are not carried; \
         close it before the update",
    ),
    (
        SockFlag::ROUTER,
        "it routes multicast or gets packets with Router Alert (MRT_INIT, IP_ROUTER_ALERT), which \
         is not carried; close it before the update",
    ),
    (
        SockFlag::PACKETS,
        "its ring, fanout group or memberships (PACKET_RX_RING, PACKET_FANOUT, \
         PACKET_ADD_MEMBERSHIP) are not carried; close it before the update",
    ),
    (
        SockFlag::URGENT,
        "urgent data (MSG_OOB) that is on its way or was not read past is not carried; try again",
    ),
    (
        SockFlag::ZEROCOPY,
        "the count of what it has sent with MSG_ZEROCOPY, by which the kernel tells that buffers \
         are free, cannot be set; close it before the update",
    ),
    (
        SockFlag::ERRORS,
        "what it has not read yet of its error queue (MSG_ERRQUEUE) is not carried; try again",
    ),
    (
        SockFlag::CORKED,
        "it holds part of a datagram (MSG_MORE, UDP_CORK); try again",
    ),
];

fn is_tcp(rec: &SockRec) -> bool {
    matches!(rec.family.into(), libc::AF_INET | libc::AF_INET6)
        && i32::from(rec.type_) == libc::SOCK_STREAM
        && i32::from(rec.protocol) == libc::IPPROTO_TCP
}

/// Whether it was a TCP connection when its record was made.
pub fn is_connection(rec: &SockRec) -> bool {
    is_tcp(rec) && CONNECTED.contains(&rec.state)
}

/// What a call would be told of next, once, and is not carried: that of an ICMP message, or of
/// something that did not fit into its queue. To look into the queue would take it away.
fn untold_error(rec: &SockRec) -> Option<Errno> {
    let carried = match i32::from(rec.family) {
        libc::AF_UNIX => unix::is_reset(rec),
        // `ended` tells these.
        _ => is_tcp(rec) && rec.state == CLOSE,
    };
    (rec.err != 0 && !carried).then(|| Errno::from_raw(rec.err.cast_signed()))
}

fn untold(errno: Errno) -> String {
    format!(
        "an error that it was not told yet ({}) is not carried; try again",
        errno.desc()
    )
}

/// Why a connection is not carried by now, though it was when its descriptor was looked at.
pub fn new_error(now: &WaitingRec) -> Option<String> {
    let connected = CONNECTED.contains(&now.state);
    (connected && now.err != 0).then(|| untold(Errno::from_raw(now.err.cast_signed())))
}

/// Why a socket is not carried; `None` when it is.
pub fn refusal(rec: &SockRec) -> Option<String> {
    if let Some((_, reason)) = UNTOLD.iter().find(|(flag, _)| rec.flags & flag != 0) {
        return Some((*reason).into());
    }
    if let Some(errno) = untold_error(rec) {
        return Some(untold(errno));
    }
    let (family, kind) = (i32::from(rec.family), i32::from(rec.type_));
    if is_tcp(rec) {
        return match rec.state {
            CLOSE | LISTEN => None,
            state if CONNECTED.contains(&state) => None,
            state => Some(format!(
                "TCP state {state} is not carried yet; wait for the connection to close"
            )),
        };
    }
    if family == libc::AF_UNIX || raw::is_carried(family, kind) {
        return None;
    }
    let udp = matches!(family, libc::AF_INET | libc::AF_INET6)
        && kind == libc::SOCK_DGRAM
        && i32::from(rec.protocol) == libc::IPPROTO_UDP;
    if udp {
        return None;
    }
    if family == libc::AF_NETLINK {
        return netlink::refusal(rec);
    }
    Some(format!(
        "sockets of family {family}, type {kind} are not carried yet"
    ))
}

/// Reads a socket of any family but Unix; of a connection, `now` is its record of after the network
/// was silent, if there is one.
///
/// # Errors
/// A socket call fails.
pub fn read(
    from: Borrowed,
    rec: &SockRec,
    now: Option<&WaitingRec>,
    alike: &mut Alike,
    members: &[&MemberRec],
) -> Result<Read, CollectError> {
    let options = alike.read(&from, rec)?;
    let interfaces = interfaces::read(&from, rec, members)?;
    let mut read = read_state(from, rec, now, options)?;
    read.socket.interfaces = interfaces;
    Ok(read)
}

fn read_state(
    from: Borrowed,
    rec: &SockRec,
    now: Option<&WaitingRec>,
    options: Vec<SockOption>,
) -> Result<Read, CollectError> {
    if i32::from(rec.family) == libc::AF_NETLINK {
        return netlink::read(&from, rec, options);
    }
    if raw::is_carried(rec.family.into(), rec.type_.into()) {
        return raw::read(&from, rec, options);
    }
    if i32::from(rec.type_) == libc::SOCK_STREAM {
        return read_tcp(from, rec, now, options);
    }
    let (local, remote) = addresses(rec);
    let state = SocketState::Udp {
        v6: is_v6(rec),
        local,
        remote,
        queue: if local.is_some() {
            udp::queue(&from, rec)?
        } else {
            Vec::new()
        },
    };
    whole(&from, rec, options, state)
}

/// A socket in this state that reading has not put into repair mode.
pub(super) fn whole(
    from: &Borrowed,
    rec: &SockRec,
    options: Vec<SockOption>,
    state: SocketState,
) -> Result<Read, CollectError> {
    Ok(Read {
        socket: Socket {
            inode: rec.ino,
            options,
            filter: filter::read(from, rec)?,
            interfaces: Interfaces::default(),
            state,
        },
        repaired: None,
        ended: None,
    })
}

/// Reads a TCP socket, of a listener without its accept queue.
///
/// # Errors
/// A socket call fails.
fn read_tcp(
    from: Borrowed,
    rec: &SockRec,
    now: Option<&WaitingRec>,
    options: Vec<SockOption>,
) -> Result<Read, CollectError> {
    if let Some(now) = now.filter(|now| tcp::is_told(now)) {
        let state = read_told(&from, rec, now)?;
        return whole(&from, rec, options, state);
    }
    match addresses(rec) {
        (Some(local), Some(remote)) if is_connection(rec) => {
            read_connection(from, rec, options, local, remote)
        }
        (local, _) => {
            let state = read_unconnected(&from, rec, local)?;
            whole(&from, rec, options, state)
        }
    }
}

pub(super) fn is_v6(rec: &SockRec) -> bool {
    i32::from(rec.family) == libc::AF_INET6
}

/// Runs `look` while `MSG_PEEK` begins with the first byte, which it may not do by itself
/// (`SO_PEEK_OFF`, of TCP since Linux 6.9).
fn from_the_first<T>(
    from: &Borrowed,
    rec: &SockRec,
    look: impl FnOnce() -> Result<T, CollectError>,
) -> Result<T, CollectError> {
    if rec.choices.known != 0 && rec.choices.peek_off >= 0 {
        from.peeking(look)
    } else {
        look()
    }
}

/// A connection whose record tells all but what is unread.
fn read_told(
    from: &Borrowed,
    rec: &SockRec,
    now: &WaitingRec,
) -> Result<SocketState, CollectError> {
    let unread = tcp::unread(now);
    let peek = || peek_exact(from.as_fd(), unread).map_err(from.failed("recv"));
    let recv_queue = match unread {
        0 => Vec::new(),
        _ => from_the_first(from, rec, peek)?,
    };
    Ok(SocketState::TcpConnection(Box::new(TcpConnection {
        recv_queue: ByteBuf::from(recv_queue),
        ..tcp::told(now)
    })))
}

fn read_connection(
    from: Borrowed,
    rec: &SockRec,
    options: Vec<SockOption>,
    local: SocketAddr,
    remote: SocketAddr,
) -> Result<Read, CollectError> {
    let v6 = is_v6(rec);
    let idle = SocketState::TcpIdle { v6, local: None };
    let mut read = whole(&from, rec, options, idle)?;
    let connection = silence(from, rec)?;
    let from = &connection.from;
    let failed = |error| match error {
        TcpReadError::Call(source) => from.socket_failed()(source),
        TcpReadError::Queue(_, source) => from.failed("recv")(source),
    };
    let look = || tcp::read(from.as_fd(), local, remote, v6, rec.shutdown).map_err(failed);
    match from_the_first(from, rec, look) {
        Ok(Some(state)) => {
            read.socket.state = SocketState::TcpConnection(Box::new(state));
            read.repaired = Some(connection);
            Ok(read)
        }
        // It was reset after its record was made.
        Ok(None) => {
            undo(&connection);
            read.ended = Some(connection.from);
            Ok(read)
        }
        Err(error) => {
            undo(&connection);
            Err(error)
        }
    }
}

/// The state of a TCP socket that was no connection, of a listener without its accept queue.
fn read_unconnected(
    from: &Borrowed,
    rec: &SockRec,
    local: Option<SocketAddr>,
) -> Result<SocketState, CollectError> {
    let v6 = is_v6(rec);
    let info = repair::info(from.as_fd()).map_err(from.socket_failed())?;
    Ok(match local {
        Some(local) if info.state == LISTEN => SocketState::TcpListen {
            local,
            backlog: info.sacked,
            v6,
            waiting: Vec::new(),
        },
        local => match ended::read(from, rec)? {
            Some(ended) => SocketState::TcpEnded(Box::new(ended)),
            None => SocketState::TcpIdle { v6, local },
        },
    })
}

/// Puts a connection into repair mode.
///
/// # Errors
/// The socket call fails.
pub fn silence(from: Borrowed, rec: &SockRec) -> Result<Connection, CollectError> {
    repair::enter_repair(from.as_fd()).map_err(from.socket_failed())?;
    Ok(Connection {
        from,
        sock: rec.sock,
        reuse: rec.opts.flags & SockFlag::REUSEADDR != 0,
    })
}

/// A TCP socket whose options are known, from records alone and without an accept queue; `None` if
/// they do not tell all.
pub fn told(rec: &SockRec, now: Option<&WaitingRec>, options: &[SockOption]) -> Option<Socket> {
    let state = if rec.state == LISTEN {
        let (local, _) = addresses(rec);
        SocketState::TcpListen {
            local: local?,
            backlog: rec.max_ack_backlog,
            v6: is_v6(rec),
            waiting: Vec::new(),
        }
    } else {
        let now = now.filter(|now| tcp::is_told(now) && tcp::unread(now) == 0)?;
        SocketState::TcpConnection(Box::new(tcp::told(now)))
    };
    Some(Socket {
        inode: rec.ino,
        options: options.to_vec(),
        filter: None,
        interfaces: Interfaces::default(),
        state,
    })
}

/// Ends a connection's repair mode without a packet; errors are those of a socket that is gone.
pub fn undo(connection: &Connection) {
    let fd = connection.from.as_fd();
    let mut result = repair::leave_repair(fd);
    if connection.reuse {
        result = result.and_then(|()| set_int_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1));
    }
    if let Err(error) = result {
        tracing::error!("fd {}: leaving repair mode: {error}", fd.as_raw_fd());
    }
}
