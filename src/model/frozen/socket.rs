//! Sockets.

use crate::model::ids::{OfdId, Pid};
use core::net::{IpAddr, Ipv4Addr, SocketAddr};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// One socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Socket {
    /// Inode number, which /proc/net shows.
    pub inode: u64,
    /// Options in the order setsockopt(2) replays them.
    pub options: Vec<SockOption>,
    /// Its classic filter.
    #[serde(default)]
    pub filter: Option<SocketFilter>,
    /// Interfaces that it names.
    #[serde(default)]
    pub interfaces: Interfaces,
    /// What kind it is and where it stands.
    pub state: SocketState,
}

/// What a socket has to do with network interfaces, which have other numbers in another kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interfaces {
    /// Multicast groups that it is a member of, the oldest membership first.
    pub joined: Vec<Membership>,
    /// Those that its datagrams leave by.
    pub outgoing: Vec<Outgoing>,
}

/// `IP_ADD_MEMBERSHIP`, or `IPV6_ADD_MEMBERSHIP`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// The group.
    pub group: IpAddr,
    /// Name of the interface.
    pub interface: ByteBuf,
}

/// `IP_MULTICAST_IF`, `IP_UNICAST_IF`, or those of IPv6.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outgoing {
    /// An option of IPv6 rather than IPv4.
    pub v6: bool,
    /// For multicast rather than all else.
    pub multicast: bool,
    /// Name of the interface.
    pub interface: ByteBuf,
    /// The address to send from; multicast over IPv4 only.
    pub address: Option<Ipv4Addr>,
}

/// A classic BPF program attached by `SO_ATTACH_FILTER`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketFilter {
    /// `struct sock_filter` after `struct sock_filter`, 8 bytes each.
    pub program: ByteBuf,
    /// `SO_LOCK_FILTER`: it can be neither changed nor detached.
    pub locked: bool,
}

/// One value of getsockopt(2), replayed as it is by setsockopt(2).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SockOption {
    /// `SOL_*`.
    pub level: i32,
    /// `SO_*`, `TCP_*`, `IP_*`, …
    pub name: i32,
    /// Value bytes.
    pub value: ByteBuf,
}

/// Socket families and their states.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum SocketState {
    /// TCP that is not connected and does not listen.
    TcpIdle {
        /// IPv6 rather than IPv4.
        v6: bool,
        /// Address it is bound to.
        local: Option<SocketAddr>,
    },
    /// A TCP listener.
    TcpListen {
        /// Address it listens on.
        local: SocketAddr,
        /// listen(2) argument.
        backlog: u32,
        /// IPv6 socket (which may carry IPv4 too).
        v6: bool,
        /// Its accept queue, in the order in which accept(2) gives them.
        #[serde(default)]
        waiting: Vec<WaitingConnection>,
    },
    /// A TCP connection.
    TcpConnection(Box<TcpConnection>),
    /// A TCP connection that is over, and that the application has not closed.
    TcpEnded(Box<TcpEnded>),
    /// Unix domain socket.
    Unix(UnixSocket),
    /// UDP over IPv4 or IPv6.
    Udp {
        /// IPv6 rather than IPv4.
        v6: bool,
        /// Bound address.
        local: Option<SocketAddr>,
        /// Connected address.
        remote: Option<SocketAddr>,
        /// Datagrams not read yet.
        queue: Vec<Datagram>,
    },
    /// Netlink.
    Netlink(NetlinkSocket),
    /// `SOCK_RAW` of the internet families, without what is queued.
    Raw {
        /// IPv6 rather than IPv4.
        v6: bool,
        /// `IPPROTO_*`.
        protocol: i32,
        /// Bound address.
        local: Option<IpAddr>,
        /// Connected address; the port means nothing.
        remote: Option<SocketAddr>,
    },
    /// `AF_PACKET` without what is queued.
    Packet {
        /// `SOCK_RAW` or `SOCK_DGRAM`.
        socktype: i32,
        /// `ETH_P_*`; 0 for none.
        protocol: u16,
        /// Name of the interface that it is bound to.
        interface: Option<ByteBuf>,
    },
}

/// A netlink socket without anything queued, netlink(7).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    /// `NETLINK_*`.
    pub protocol: i32,
    /// `SOCK_DGRAM` rather than `SOCK_RAW`, which only `SO_TYPE` tells from each other.
    #[serde(default)]
    pub datagram: bool,
    /// Port id that it is bound to; 0 for none.
    pub port: u32,
    /// Multicast groups 1 to 32 that it is a member of, a bit each.
    pub groups: u32,
    /// Numbers of those beyond.
    #[serde(default)]
    pub more_groups: Vec<u32>,
    /// Whom it is connected to: port id, and groups as above.
    #[serde(default)]
    pub remote: Option<(u32, u32)>,
}

/// A datagram that waits to be read, with what recvmsg(2) will tell of it besides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Who sent it.
    pub from: SocketAddr,
    /// The address it was sent to; known where the application asks for it (`IP_PKTINFO`).
    pub to: Option<IpAddr>,
    /// TTL or hop limit it arrived with; known where the application asks for it.
    pub ttl: Option<u8>,
    /// TOS or traffic class; known where the application asks for it.
    pub tos: Option<u8>,
    /// Bytes.
    pub data: ByteBuf,
}

/// A TCP connection as TCP_REPAIR shows it (tcp(7), Documentation on TCP_REPAIR).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TcpConnection {
    /// IPv6 socket.
    pub v6: bool,
    /// Our end.
    pub local: SocketAddr,
    /// Their end.
    pub remote: SocketAddr,
    /// Kernel state (`TCP_ESTABLISHED` = 1 …, include/net/tcp_states.h).
    pub state: u8,
    /// `sk_shutdown`: bit 0 receive, bit 1 send. What the state tells is here too, and more: a
    /// receiving side that was shut down, by the application or by an earlier restore in the
    /// place of the peer's FIN.
    #[serde(default)]
    pub shutdown: u8,
    /// `TCP_QUEUE_SEQ` of the send queue: sequence number behind the last byte in it.
    pub write_seq: u32,
    /// `TCP_QUEUE_SEQ` of the receive queue: next sequence number expected.
    pub rcv_nxt: u32,
    /// Bytes sent or to be sent and not acknowledged; they end at `write_seq`.
    pub send_queue: ByteBuf,
    /// How many bytes at the end of `send_queue` were never sent (`SIOCOUTQNSD`).
    pub unsent: u32,
    /// Bytes received and not read; they end at `rcv_nxt`.
    pub recv_queue: ByteBuf,
    /// `TCP_REPAIR_WINDOW`.
    pub window: TcpWindow,
    /// Negotiated options.
    pub negotiated: TcpOptions,
}

/// What is left of a TCP connection that is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpEnded {
    /// IPv6 socket.
    pub v6: bool,
    /// Our end was here.
    pub local: SocketAddr,
    /// Theirs was there.
    pub remote: SocketAddr,
    /// What was received and not read.
    pub received: ByteBuf,
    /// The peer had closed its side, so that reading comes to an end without an error.
    pub fin: bool,
    /// `ECONNRESET` or `EPIPE` if the application is still to be told, else 0.
    pub error: i32,
}

/// A TCP connection that nobody has accepted yet: it has received, and sent nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingConnection {
    /// Our end: the listener's port, at an address that is the listener's too, or one of many.
    pub local: SocketAddr,
    /// Their end.
    pub remote: SocketAddr,
    /// Sequence number of the first byte that we will send.
    pub write_seq: u32,
    /// Sequence number of the first byte that was received, or will be.
    pub received_seq: u32,
    /// What was received.
    pub received: ByteBuf,
    /// How it has ended.
    pub end: WaitingEnd,
    /// How many bytes the peer takes (`snd_wnd`).
    pub window: u32,
    /// Negotiated options.
    pub negotiated: TcpOptions,
    /// The peer's clock as last heard (`ts_recent`), where timestamps were agreed on.
    pub peer_timestamp: u32,
}

/// What came of a connection before it was accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitingEnd {
    /// Nothing: more may come.
    Open,
    /// The peer sends no more.
    Closed,
    /// The peer has reset it.
    Reset,
    /// The peer has closed its side, then reset it.
    ClosedAndReset,
}

/// `struct tcp_repair_window`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TcpWindow {
    pub snd_wl1: u32,
    pub snd_wnd: u32,
    pub max_window: u32,
    pub rcv_wnd: u32,
    pub rcv_wup: u32,
}

/// Options agreed in the handshake.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TcpOptions {
    /// Peer's MSS (`mss_clamp`).
    pub mss_clamp: u32,
    /// Window scale (theirs, ours); `None` when not negotiated.
    pub wscale: Option<(u8, u8)>,
    /// Selective acknowledgements.
    pub sack: bool,
    /// `TCP_TIMESTAMP` value at capture; `None` when not negotiated.
    pub timestamp: Option<u32>,
}

/// A Unix domain socket.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub socktype: i32,
    /// Name, if bound.
    pub address: Option<UnixAddress>,
    /// Where it stands.
    pub state: UnixState,
    /// Messages not read yet.
    pub queue: Vec<UnixMessage>,
    /// `shutdown(2)` done: bit 0 receive, bit 1 send.
    pub shutdown: u8,
    /// `SO_PEERCRED`: of a connected socket, who made its other end; of a listener, who listens,
    /// which those who connect to it will be told.
    #[serde(default)]
    pub peer: Option<PeerCredentials>,
    /// Of a listener: its accept queue, in the order in which accept(2) gives them.
    #[serde(default)]
    pub waiting: Vec<WaitingUnix>,
}

/// Who called socketpair(2), listen(2) or connect(2): unix(7), `SO_PEERCRED` and `SO_PEERGROUPS`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PeerCredentials {
    /// Process, which may have ended; 0 for one that has no number where it was asked for.
    pub pid: Pid,
    /// Effective user.
    pub uid: u32,
    /// Effective group.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// Name of a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixAddress {
    /// In the filesystem; bytes without the terminating NUL.
    Path(ByteBuf),
    /// In the abstract namespace; bytes after the leading NUL.
    Abstract(ByteBuf),
}

/// Where a Unix socket stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixState {
    /// Neither connected nor listening.
    Unconnected,
    /// listen(2) with this backlog.
    Listening {
        /// listen(2) argument.
        backlog: u32,
    },
    /// Connected to a socket of the same application.
    Connected {
        /// The other end.
        peer: OfdId,
    },
    /// Was connected; the other end is closed.
    PeerClosed,
    /// The same, and something that it had not read is lost: whoever finds nothing to read is told
    /// so once (`ECONNRESET`).
    PeerReset,
    /// Connected to a listener of the same application that has not accepted it; see
    /// [`UnixSocket::waiting`].
    Waiting {
        /// The listener.
        listener: OfdId,
    },
}

/// A connection in the accept queue of a Unix listener.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingUnix {
    /// The other end; none if it is closed.
    pub client: Option<OfdId>,
    /// Who connected it.
    pub peer: Option<PeerCredentials>,
    /// What was sent to it.
    pub queue: Vec<UnixMessage>,
}

/// One unit of a Unix socket's receive queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    /// Bytes.
    pub data: ByteBuf,
    /// Descriptors in flight (SCM_RIGHTS).
    pub fds: Vec<OfdId>,
    /// Name of the socket it was sent from; datagrams only.
    #[serde(default)]
    pub sender: Option<UnixAddress>,
    /// Who sent it (SCM_CREDENTIALS), without groups; known where the receiver asks for it.
    #[serde(default)]
    pub credentials: Option<PeerCredentials>,
}
