//! Sockets: options and addresses through a borrowed descriptor, the rest from the iterators.

use super::borrow::{Borrowed, place};
use super::{CollectError, filter};
use crate::bpf::events::{SockFlag, SockRec};
use crate::bpf::iter::File;
use crate::model::frozen::{SockOption, Socket, SocketState};
use crate::sys::socket::{int_option, option, set_int_option};
use crate::sys::tcp as repair;
use nix::libc;
use nix::sys::socket as ns;
use serde_bytes::ByteBuf;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// `TCP_ESTABLISHED` of include/net/tcp_states.h.
const ESTABLISHED: u8 = 1;
const CLOSE: u8 = 7;
/// `TCP_LISTEN`, which Unix sockets use too.
pub(super) const LISTEN: u8 = 10;

/// Connections: established, or with one or both directions closed: `FIN_WAIT1`,
/// `FIN_WAIT2`, `CLOSE_WAIT`, `LAST_ACK`, `CLOSING`.
const CONNECTED: &[u8] = &[ESTABLISHED, 4, 5, 8, 9, 11];

/// Options that are read with their size in bytes and replayed as they are.
/// Those that hold nothing but their default on a new socket are left out.
const OPTIONS: &[(i32, i32, usize)] = &[
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 4),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, 4),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 4),
    (libc::SOL_SOCKET, libc::SO_BROADCAST, 4),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE, 4),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE, 4),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP, 4),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 4),
    (libc::SOL_SOCKET, libc::SO_PASSCRED, 4),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, 4),
    (libc::SOL_SOCKET, libc::SO_MARK, 4),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 4),
    (libc::SOL_SOCKET, libc::SO_LINGER, 8),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO, 16),
];

const TCP_OPTIONS: &[(i32, i32, usize)] = &[
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 4),
    (libc::IPPROTO_TCP, libc::TCP_CORK, 4),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 4),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 4),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 4),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 4),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 4),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 4),
    (libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16),
];

const IP_OPTIONS: &[(i32, i32, usize)] = &[
    (libc::IPPROTO_IP, libc::IP_TOS, 4),
    (libc::IPPROTO_IP, libc::IP_TTL, 4),
    (libc::IPPROTO_IP, libc::IP_FREEBIND, 4),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT, 4),
    (libc::IPPROTO_IP, libc::IP_PKTINFO, 4),
];

const IPV6_OPTIONS: &[(i32, i32, usize)] = &[
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 4),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 4),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 4),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 4),
];

/// `NETLINK_PKTINFO`, `NETLINK_NO_ENOBUFS`, `NETLINK_CAP_ACK`, `NETLINK_EXT_ACK`,
/// `NETLINK_GET_STRICT_CHK`.
const NETLINK_OPTIONS: &[(i32, i32, usize)] = &[
    (libc::SOL_NETLINK, 3, 4),
    (libc::SOL_NETLINK, 5, 4),
    (libc::SOL_NETLINK, 10, 4),
    (libc::SOL_NETLINK, 11, 4),
    (libc::SOL_NETLINK, 12, 4),
];

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
    let ip = |bytes: &[u8; 16]| -> IpAddr {
        if i32::from(rec.family) == libc::AF_INET6 {
            Ipv6Addr::from(*bytes).into()
        } else {
            Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
        }
    };
    let address =
        |bytes: &[u8; 16], port: u16| (port != 0).then(|| SocketAddr::new(ip(bytes), port));
    (
        address(&rec.local_addr, rec.local_port),
        address(&rec.remote_addr, rec.remote_port),
    )
}

/// Why a socket is not carried; `None` when it is.
pub fn refusal(rec: &SockRec) -> Option<String> {
    if rec.flags & SockFlag::EBPF != 0 {
        return Some(
            "the eBPF or reuseport program attached to it is not carried; detach it before the \
             update"
                .into(),
        );
    }
    if rec.flags & SockFlag::MULTICAST != 0 {
        return Some(
            "its multicast memberships are not carried yet; leave the groups before the update"
                .into(),
        );
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
    if family == libc::AF_UNIX {
        return None;
    }
    let udp = matches!(family, libc::AF_INET | libc::AF_INET6)
        && kind == libc::SOCK_DGRAM
        && i32::from(rec.protocol) == libc::IPPROTO_UDP;
    let netlink = family == libc::AF_NETLINK && NETLINK_PROTOCOLS.contains(&rec.protocol);
    if udp || netlink {
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
/// A socket call fails, or a listener's accept queue is not empty.
pub fn read(from: Borrowed, rec: &SockRec) -> Result<Read, CollectError> {
    if i32::from(rec.family) == libc::AF_NETLINK {
        return read_netlink(&from, rec);
    }
    if i32::from(rec.type_) == libc::SOCK_STREAM {
        return read_tcp(from, rec);
    }
    let v6 = i32::from(rec.family) == libc::AF_INET6;
    let (local, remote) = addresses(rec);
    let state = SocketState::Udp {
        v6,
        local,
        remote,
        queue: Vec::new(),
    };
    Ok(Read {
        socket: Socket {
            inode: rec.ino,
            options: read_options(&from, &[OPTIONS, ip_options(v6)].concat())?,
            filter: filter::read(&from, rec)?,
            state,
        },
        repaired: None,
    })
}

fn read_netlink(from: &Borrowed, rec: &SockRec) -> Result<Read, CollectError> {
    let address: ns::NetlinkAddr =
        ns::getsockname(from.fd.as_raw_fd()).map_err(from.failed("getsockname"))?;
    let state = SocketState::Netlink {
        protocol: i32::from(rec.protocol),
        port: address.pid(),
        groups: address.groups(),
    };
    Ok(Read {
        socket: Socket {
            inode: rec.ino,
            options: read_options(from, &[OPTIONS, NETLINK_OPTIONS].concat())?,
            filter: filter::read(from, rec)?,
            state,
        },
        repaired: None,
    })
}

/// Reads a TCP socket.
///
/// # Errors
/// A socket call fails, or a listener's accept queue is not empty.
fn read_tcp(from: Borrowed, rec: &SockRec) -> Result<Read, CollectError> {
    let v6 = i32::from(rec.family) == libc::AF_INET6;
    let (local, remote) = addresses(rec);
    let failed = || from.socket_failed();
    let info = repair::info(from.as_fd()).map_err(failed())?;
    let connected = CONNECTED.contains(&info.state);
    let options = read_tcp_options(&from, rec, connected)?;
    let filter = filter::read(&from, rec)?;
    let mut repaired = None;
    let state = match (info.state, local, remote) {
        (LISTEN, Some(local), _) => {
            if info.unacked > 0 {
                return Err(CollectError::AcceptQueue {
                    pid: from.pid,
                    fd: from.number,
                    address: local.to_string(),
                    connections: info.unacked,
                });
            }
            SocketState::TcpListen {
                local,
                backlog: info.sacked,
                v6,
            }
        }
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
            state,
        },
        repaired,
    })
}

/// Options of a TCP socket.
///
/// # Errors
/// A socket call fails.
pub fn read_tcp_options(
    from: &Borrowed,
    rec: &SockRec,
    connected: bool,
) -> Result<Vec<SockOption>, CollectError> {
    let v6 = i32::from(rec.family) == libc::AF_INET6;
    let mut wanted = [OPTIONS, TCP_OPTIONS, ip_options(v6)].concat();
    // A connection has an address, after which this one cannot be set and says nothing more.
    wanted.retain(|(_, name, _)| !connected || !v6 || *name != libc::IPV6_V6ONLY);
    read_options(from, &wanted)
}

/// A listener whose options are known, from its record alone; `None` if it has no address.
///
/// # Errors
/// Its accept queue is not empty.
pub fn listener(
    file: &File,
    rec: &SockRec,
    options: Vec<SockOption>,
) -> Result<Option<Socket>, CollectError> {
    let (Some(local), _) = addresses(rec) else {
        return Ok(None);
    };
    if rec.ack_backlog > 0 {
        let (pid, fd) = place(file);
        return Err(CollectError::AcceptQueue {
            pid,
            fd,
            address: local.to_string(),
            connections: rec.ack_backlog,
        });
    }
    Ok(Some(Socket {
        inode: rec.ino,
        options,
        filter: None,
        state: SocketState::TcpListen {
            local,
            backlog: rec.max_ack_backlog,
            v6: i32::from(rec.family) == libc::AF_INET6,
        },
    }))
}

fn ip_options(v6: bool) -> &'static [(i32, i32, usize)] {
    if v6 { IPV6_OPTIONS } else { IP_OPTIONS }
}

/// Options of a Unix socket.
///
/// # Errors
/// A socket call fails.
pub fn read_unix_options(from: &Borrowed) -> Result<Vec<SockOption>, CollectError> {
    let wanted: Vec<_> = OPTIONS
        .iter()
        .copied()
        .filter(|(_, name, _)| {
            // The others mean nothing on a Unix socket.
            [
                libc::SO_PASSCRED,
                libc::SO_LINGER,
                libc::SO_RCVTIMEO,
                libc::SO_SNDTIMEO,
            ]
            .contains(name)
        })
        .collect();
    read_options(from, &wanted)
}

/// Reads options; those that are all zero are the default and left out.
fn read_options(
    from: &Borrowed,
    wanted: &[(i32, i32, usize)],
) -> Result<Vec<SockOption>, CollectError> {
    let mut options = Vec::new();
    let mut add = |level, name, value: Vec<u8>| {
        if value.iter().any(|byte| *byte != 0) {
            options.push(SockOption {
                level,
                name,
                value: ByteBuf::from(value),
            });
        }
    };
    for &(level, name, len) in wanted {
        let value = option(from.as_fd(), level, name, len).map_err(from.socket_failed())?;
        add(level, name, value);
    }
    // A buffer size is the application's only if it has set it; else it follows autotuning.
    let locked = int_option(from.as_fd(), libc::SOL_SOCKET, libc::SO_BUF_LOCK)
        .map_err(from.socket_failed())?;
    for (bit, get, set) in [
        (1, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
        (2, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
    ] {
        if locked & bit != 0 {
            let value =
                int_option(from.as_fd(), libc::SOL_SOCKET, get).map_err(from.socket_failed())?;
            // The kernel stores twice what it is told (socket(7)).
            add(libc::SOL_SOCKET, set, (value / 2).to_ne_bytes().to_vec());
        }
    }
    if let Some(device) = bound_device(from)? {
        add(libc::SOL_SOCKET, libc::SO_BINDTODEVICE, device);
    }
    Ok(options)
}

fn bound_device(from: &Borrowed) -> Result<Option<Vec<u8>>, CollectError> {
    let name = option(from.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16)
        .map_err(from.socket_failed())?;
    Ok((!name.is_empty()).then_some(name))
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

/// The name a Unix socket is bound to.
///
/// # Errors
/// getsockname(2) fails.
pub fn unix_name(
    from: &Borrowed,
) -> Result<Option<crate::model::frozen::UnixAddress>, CollectError> {
    use crate::model::frozen::UnixAddress;
    let address: ns::UnixAddr =
        ns::getsockname(from.fd.as_raw_fd()).map_err(from.failed("getsockname"))?;
    if let Some(name) = address.as_abstract() {
        return Ok(Some(UnixAddress::Abstract(ByteBuf::from(name))));
    }
    Ok(address.path().map(|path| {
        use std::os::unix::ffi::OsStrExt;
        UnixAddress::Path(ByteBuf::from(path.as_os_str().as_bytes()))
    }))
}
