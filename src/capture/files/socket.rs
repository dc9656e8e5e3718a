//! Sockets: options and addresses through a borrowed descriptor, the rest from the iterators.

use super::borrow::Borrowed;
use super::options::Defaults;
use super::{CollectError, filter, interfaces, raw, udp};
use crate::bpf::events::{MemberRec, SockFlag, SockRec};
use crate::model::frozen::{Interfaces, SockOption, Socket, SocketState};
use crate::sys::socket::{int_option, set_int_option};
use crate::sys::tcp as repair;
use nix::libc;
use nix::sys::socket as ns;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// `TCP_ESTABLISHED` of include/net/tcp_states.h.
pub(super) const ESTABLISHED: u8 = 1;
pub(super) const CLOSE: u8 = 7;
pub(super) const CLOSE_WAIT: u8 = 8;
/// `TCP_LISTEN`, which Unix sockets use too.
pub(super) const LISTEN: u8 = 10;

/// Connections: established, or with one or both directions closed: `FIN_WAIT1`,
/// `FIN_WAIT2`, `CLOSE_WAIT`, `LAST_ACK`, `CLOSING`.
const CONNECTED: &[u8] = &[ESTABLISHED, 4, 5, CLOSE_WAIT, 9, 11];

/// A socket that was borrowed and, when it is a connection, put in repair mode.
pub struct Read {
    /// What the image carries.
    pub socket: Socket,
    /// The connection, which must leave repair mode if the application goes on.
    pub repaired: Option<Connection>,
}

/// A connection in repair mode.
#[derive(Debug)]
pub struct Connection {
    /// Our duplicate of its descriptor.
    pub fd: OwnedFd,
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
        SockFlag::CORKED,
        "it holds part of a datagram (MSG_MORE, UDP_CORK); try again",
    ),
];

/// Why a socket is not carried; `None` when it is.
pub fn refusal(rec: &SockRec) -> Option<String> {
    if let Some((_, reason)) = UNTOLD.iter().find(|(flag, _)| rec.flags & flag != 0) {
        return Some((*reason).into());
    }
    let (family, kind) = (i32::from(rec.family), i32::from(rec.type_));
    let tcp = matches!(family, libc::AF_INET | libc::AF_INET6)
        && kind == libc::SOCK_STREAM
        && i32::from(rec.protocol) == libc::IPPROTO_TCP;
    if tcp {
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
    let netlink = family == libc::AF_NETLINK && NETLINK_PROTOCOLS.contains(&rec.protocol);
    if udp {
        return None;
    }
    if netlink {
        return (rec.rcv_qlen > 0).then(|| {
            format!(
                "{} messages that it has not read yet are not carried; try again",
                rec.rcv_qlen
            )
        });
    }
    Some(format!(
        "sockets of family {family}, type {kind} are not carried yet"
    ))
}

/// Netlink families without state beyond port and groups: route, uevent, generic.
const NETLINK_PROTOCOLS: &[u16] = &[0, 15, 16];

/// Reads a socket of any family but Unix.
///
/// # Errors
/// A socket call fails.
pub fn read(
    from: Borrowed,
    rec: &SockRec,
    defaults: &mut Defaults,
    members: &[&MemberRec],
) -> Result<Read, CollectError> {
    let options = defaults.read(&from, rec)?;
    let interfaces = interfaces::read(&from, rec, members)?;
    let mut read = read_state(from, rec, options)?;
    read.socket.interfaces = interfaces;
    Ok(read)
}

fn read_state(
    from: Borrowed,
    rec: &SockRec,
    options: Vec<SockOption>,
) -> Result<Read, CollectError> {
    if i32::from(rec.family) == libc::AF_NETLINK {
        return read_netlink(&from, rec, options);
    }
    if raw::is_carried(rec.family.into(), rec.type_.into()) {
        return raw::read(&from, rec, options);
    }
    if i32::from(rec.type_) == libc::SOCK_STREAM {
        return read_tcp(from, rec, options);
    }
    let v6 = i32::from(rec.family) == libc::AF_INET6;
    let (local, remote) = addresses(rec);
    let state = SocketState::Udp {
        v6,
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
    })
}

fn read_netlink(
    from: &Borrowed,
    rec: &SockRec,
    options: Vec<SockOption>,
) -> Result<Read, CollectError> {
    let address: ns::NetlinkAddr =
        ns::getsockname(from.fd.as_raw_fd()).map_err(from.failed("getsockname"))?;
    let state = SocketState::Netlink {
        protocol: i32::from(rec.protocol),
        port: address.pid(),
        groups: address.groups(),
    };
    whole(from, rec, options, state)
}

/// Reads a TCP socket, of a listener without its accept queue.
///
/// # Errors
/// A socket call fails.
fn read_tcp(from: Borrowed, rec: &SockRec, options: Vec<SockOption>) -> Result<Read, CollectError> {
    let v6 = i32::from(rec.family) == libc::AF_INET6;
    let (local, remote) = addresses(rec);
    let failed = || from.socket_failed();
    let info = repair::info(from.as_fd()).map_err(failed())?;
    let connected = CONNECTED.contains(&info.state);
    let filter = filter::read(&from, rec)?;
    let mut repaired = None;
    let state = match (info.state, local, remote) {
        (LISTEN, Some(local), _) => SocketState::TcpListen {
            local,
            backlog: info.sacked,
            v6,
            waiting: Vec::new(),
        },
        (_, Some(local), Some(remote)) if connected => {
            let reuse = int_option(from.as_fd(), libc::SOL_SOCKET, libc::SO_REUSEADDR)
                .map_err(failed())?
                != 0;
            repair::enter_repair(from.as_fd()).map_err(failed())?;
            let connection = super::tcp::read(from.as_fd(), local, remote, v6, rec.shutdown);
            let connection = connection.map_err(|error| {
                // The caller knows nothing of this socket yet.
                let _ = repair::leave_repair(from.as_fd());
                match error {
                    super::tcp::TcpReadError::Call(source) => failed()(source),
                    super::tcp::TcpReadError::Queue(_, source) => from.failed("recv")(source),
                }
            })?;
            repaired = Some(Connection { fd: from.fd, reuse });
            SocketState::TcpConnection(Box::new(connection))
        }
        _ => SocketState::TcpIdle { v6, local },
    };
    Ok(Read {
        socket: Socket {
            inode: rec.ino,
            options,
            filter,
            interfaces: Interfaces::default(),
            state,
        },
        repaired,
    })
}

/// A listener whose options are known, from its record alone, without its accept queue; `None` if
/// it has no address.
pub fn listener(rec: &SockRec, options: Vec<SockOption>) -> Option<Socket> {
    let (local, _) = addresses(rec);
    Some(Socket {
        inode: rec.ino,
        options,
        filter: None,
        interfaces: Interfaces::default(),
        state: SocketState::TcpListen {
            local: local?,
            backlog: rec.max_ack_backlog,
            v6: i32::from(rec.family) == libc::AF_INET6,
            waiting: Vec::new(),
        },
    })
}

/// Ends a connection's repair mode without a packet; errors are those of a socket that is gone.
pub fn undo(connection: &Connection) {
    let fd = connection.fd.as_fd();
    let reuse = i32::from(connection.reuse);
    let result = repair::leave_repair(fd)
        .and_then(|()| set_int_option(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, reuse));
    if let Err(error) = result {
        tracing::error!("fd {}: leaving repair mode: {error}", fd.as_raw_fd());
    }
}
