//! Options of sockets: those that differ from what a new socket has.
//!
//! The iterators' record says of the common ones whether they were ever set, so that only those
//! and what no record tells cost a call each while applications stand still.

use super::CollectError;
use super::borrow::Borrowed;
use crate::bpf::events::{SockFlag, SockMore, SockOpts, SockRec, TRK_SK_FLAGS_SHIFT};
use crate::model::frozen::SockOption;
use crate::sys::socket::{SocketError, int_option, new, option};
use crate::sys::tcp::state::{CLOSE, LISTEN};
use nix::libc;
use serde_bytes::ByteBuf;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::os::fd::AsFd;

/// Not bound to a peer.
const UNCONNECTED: [u8; 2] = [CLOSE, LISTEN];

/// An option that setsockopt(2) takes as getsockopt(2) gives it.
struct Known {
    level: i32,
    name: i32,
    /// Bytes of the value, at most.
    len: usize,
    /// Whether the record says that it is what it is on every new socket.
    unset: fn(&SockOpts) -> bool,
}

/// One that the record tells of.
const fn told(level: i32, name: i32, len: usize, unset: fn(&SockOpts) -> bool) -> Known {
    Known {
        level,
        name,
        len,
        unset,
    }
}

/// One that only getsockopt(2) tells of.
const fn untold(level: i32, name: i32, len: usize) -> Known {
    told(level, name, len, |_| false)
}

/// By the number of a bit of the kernel's `sk_flags` (`enum sock_flags`, include/net/sock.h).
fn bit(options: &SockOpts, bit: u32) -> bool {
    options.flags & 1 << (TRK_SK_FLAGS_SHIFT + bit) != 0
}

/// `MAX_SCHEDULE_TIMEOUT`: no time-out.
const FOREVER: u64 = i64::MAX.cast_unsigned();

/// Of every socket. Numbers are from include/uapi/asm-generic/socket.h where libc has no name.
const SOCKET: &[Known] = &[
    told(libc::SOL_SOCKET, libc::SO_KEEPALIVE, 4, |o| !bit(o, 3)),
    told(libc::SOL_SOCKET, libc::SO_BROADCAST, 4, |o| !bit(o, 6)),
    told(libc::SOL_SOCKET, libc::SO_TIMESTAMP, 4, |o| !bit(o, 11)),
    told(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 4, |o| !bit(o, 12)),
    // SO_TIMESTAMP_NEW, SO_TIMESTAMPNS_NEW
    told(libc::SOL_SOCKET, 63, 4, |o| !bit(o, 11)),
    told(libc::SOL_SOCKET, 64, 4, |o| !bit(o, 12)),
    told(libc::SOL_SOCKET, libc::SO_MARK, 4, |o| o.mark == 0),
    told(libc::SOL_SOCKET, libc::SO_RCVLOWAT, 4, |o| o.rcvlowat == 1),
    told(libc::SOL_SOCKET, libc::SO_LINGER, 8, |o| !bit(o, 4)),
    told(libc::SOL_SOCKET, libc::SO_RCVTIMEO, 16, |o| {
        o.rcvtimeo == FOREVER
    }),
    told(libc::SOL_SOCKET, libc::SO_SNDTIMEO, 16, |o| {
        o.sndtimeo == FOREVER
    }),
    untold(libc::SOL_SOCKET, libc::SO_PEEK_OFF, 4),
];

/// Of sockets of the internet families. `SO_REUSEPORT` of others is refused since 6.13.
const INET: &[Known] = &[
    told(libc::SOL_SOCKET, libc::SO_REUSEADDR, 4, |o| {
        o.flags & SockFlag::REUSEADDR == 0
    }),
    told(libc::SOL_SOCKET, libc::SO_REUSEPORT, 4, |o| {
        o.flags & SockFlag::REUSEPORT == 0
    }),
    told(libc::SOL_SOCKET, libc::SO_OOBINLINE, 4, |o| !bit(o, 2)),
    told(libc::SOL_SOCKET, libc::SO_DONTROUTE, 4, |o| !bit(o, 13)),
    untold(libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 8),
    untold(libc::SOL_SOCKET, libc::SO_SELECT_ERR_QUEUE, 4),
    untold(libc::SOL_SOCKET, libc::SO_BUSY_POLL, 4),
    // SO_PREFER_BUSY_POLL
    untold(libc::SOL_SOCKET, 69, 4),
    untold(libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE, 8),
    untold(libc::SOL_SOCKET, libc::SO_ZEROCOPY, 4),
    untold(libc::SOL_SOCKET, libc::SO_TXTIME, 8),
    told(libc::IPPROTO_IP, libc::IP_TOS, 4, |o| o.tos == 0),
    untold(libc::IPPROTO_IP, libc::IP_TTL, 4),
    untold(libc::IPPROTO_IP, libc::IP_OPTIONS, 40),
    untold(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, 4),
    untold(libc::IPPROTO_IP, libc::IP_RECVERR, 4),
    untold(libc::IPPROTO_IP, libc::IP_MINTTL, 4),
    untold(libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 4),
    // IP_LOCAL_PORT_RANGE
    untold(libc::IPPROTO_IP, 51, 4),
    told(libc::IPPROTO_IP, libc::IP_FREEBIND, 4, |o| {
        u32::from(o.more) & SockMore::FREEBIND == 0
    }),
    told(libc::IPPROTO_IP, libc::IP_TRANSPARENT, 4, |o| {
        u32::from(o.more) & SockMore::TRANSPARENT == 0
    }),
];

/// Of internet sockets that receive datagrams: what comes with each, and multicast.
const DATAGRAM: &[Known] = &[
    untold(libc::SOL_SOCKET, libc::SO_NO_CHECK, 4),
    untold(libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 4),
    // SO_RCVMARK
    untold(libc::SOL_SOCKET, 75, 4),
    told(libc::IPPROTO_IP, libc::IP_PKTINFO, 4, |o| {
        u32::from(o.more) & SockMore::PKTINFO == 0
    }),
    untold(libc::IPPROTO_IP, libc::IP_RECVOPTS, 4),
    untold(libc::IPPROTO_IP, libc::IP_RETOPTS, 4),
    untold(libc::IPPROTO_IP, libc::IP_RECVTTL, 4),
    untold(libc::IPPROTO_IP, libc::IP_RECVTOS, 4),
    untold(libc::IPPROTO_IP, libc::IP_PASSSEC, 4),
    untold(libc::IPPROTO_IP, libc::IP_RECVORIGDSTADDR, 4),
    // IP_CHECKSUM
    untold(libc::IPPROTO_IP, 23, 4),
    // IP_RECVFRAGSIZE, IP_RECVERR_RFC4884
    untold(libc::IPPROTO_IP, 25, 4),
    untold(libc::IPPROTO_IP, 26, 4),
    untold(libc::IPPROTO_IP, libc::IP_MULTICAST_TTL, 4),
    untold(libc::IPPROTO_IP, libc::IP_MULTICAST_LOOP, 4),
    // IP_MULTICAST_ALL
    untold(libc::IPPROTO_IP, 49, 4),
];

/// Of IPv6 sockets. Numbers are from include/uapi/linux/in6.h.
const IPV6: &[Known] = &[
    told(libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 4, |o| o.tclass == 0),
    // Of one that never set it the route tells.
    told(libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 4, |o| {
        u32::from(o.more) & SockMore::V6_HOPS == 0
    }),
    untold(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_RECVERR, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG, 4),
    // IPV6_FLOWINFO_SEND, IPV6_AUTOFLOWLABEL, IPV6_ADDR_PREFERENCES, IPV6_MINHOPCOUNT
    untold(libc::IPPROTO_IPV6, 33, 4),
    untold(libc::IPPROTO_IPV6, 70, 4),
    untold(libc::IPPROTO_IPV6, 72, 4),
    untold(libc::IPPROTO_IPV6, 73, 4),
];

/// Of IPv6 sockets that receive datagrams.
const IPV6_DATAGRAM: &[Known] = &[
    told(libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 4, |o| {
        u32::from(o.more) & SockMore::V6_PKTINFO == 0
    }),
    untold(libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_HOPS, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_LOOP, 4),
    // IPV6_MULTICAST_ALL, IPV6_RECVERR_RFC4884
    untold(libc::IPPROTO_IPV6, 29, 4),
    untold(libc::IPPROTO_IPV6, 31, 4),
    // IPV6_FLOWINFO: the label with each datagram
    untold(libc::IPPROTO_IPV6, 11, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_RECVHOPOPTS, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_RECVRTHDR, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_RECVDSTOPTS, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_RECVPATHMTU, 4),
    untold(libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 4),
    // IPV6_RECVORIGDSTADDR, IPV6_RECVFRAGSIZE
    untold(libc::IPPROTO_IPV6, 74, 4),
    untold(libc::IPPROTO_IPV6, 77, 4),
];

/// Of IPv6 sockets without a peer: an address, too, makes it impossible to set, and a
/// connection has one.
const IPV6_UNCONNECTED: &[Known] = &[untold(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 4)];

/// Of TCP sockets. Numbers are from include/uapi/linux/tcp.h.
const TCP: &[Known] = &[
    told(libc::IPPROTO_TCP, libc::TCP_NODELAY, 4, |o| o.nonagle == 0),
    told(libc::IPPROTO_TCP, libc::TCP_CORK, 4, |o| o.nonagle == 0),
    told(libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 4, |o| {
        o.keepidle == 0
    }),
    told(libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 4, |o| {
        o.keepintvl == 0
    }),
    told(libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 4, |o| o.keepcnt == 0),
    told(libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 4, |o| {
        o.user_timeout == 0
    }),
    told(libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 4, |o| {
        o.defer_accept == 0
    }),
    told(libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 4, |o| {
        o.notsent_lowat == 0
    }),
    // SO_TXREHASH
    untold(libc::SOL_SOCKET, 74, 4),
    untold(libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16),
    untold(libc::IPPROTO_TCP, libc::TCP_SYNCNT, 4),
    untold(libc::IPPROTO_TCP, libc::TCP_LINGER2, 4),
    untold(libc::IPPROTO_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, 4),
    // TCP_INQ, TCP_TX_DELAY
    untold(libc::IPPROTO_TCP, 36, 4),
    untold(libc::IPPROTO_TCP, 37, 4),
];

/// Of TCP sockets without a peer: of a connection they say what was agreed or inherited.
const TCP_UNCONNECTED: &[Known] = &[
    untold(libc::IPPROTO_TCP, libc::TCP_MAXSEG, 4),
    untold(libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, 4),
    untold(libc::IPPROTO_TCP, libc::TCP_FASTOPEN, 4),
    // TCP_SAVE_SYN, TCP_FASTOPEN_CONNECT, TCP_FASTOPEN_NO_COOKIE
    untold(libc::IPPROTO_TCP, 27, 4),
    untold(libc::IPPROTO_TCP, 30, 4),
    untold(libc::IPPROTO_TCP, 34, 4),
];

/// Of UDP sockets: `UDP_CORK`, `UDP_ENCAP`, `UDP_NO_CHECK6_TX`, `UDP_NO_CHECK6_RX`,
/// `UDP_SEGMENT`, `UDP_GRO` of include/uapi/linux/udp.h.
const UDP: &[Known] = &[
    untold(libc::IPPROTO_UDP, 1, 4),
    untold(libc::IPPROTO_UDP, 100, 4),
    untold(libc::IPPROTO_UDP, 101, 4),
    untold(libc::IPPROTO_UDP, 102, 4),
    untold(libc::IPPROTO_UDP, 103, 4),
    untold(libc::IPPROTO_UDP, 104, 4),
];

/// Of raw sockets: `IP_HDRINCL`, `IP_NODEFRAG`, `ICMP_FILTER`, `IPV6_HDRINCL`, `ICMPV6_FILTER`,
/// `IPV6_CHECKSUM`.
const RAW: &[Known] = &[
    untold(libc::IPPROTO_IP, libc::IP_HDRINCL, 4),
    untold(libc::IPPROTO_IP, 22, 4),
    untold(SOL_RAW, 1, 4),
    untold(libc::IPPROTO_IPV6, 36, 4),
    untold(libc::IPPROTO_ICMPV6, 1, 32),
    untold(SOL_RAW, libc::IPV6_CHECKSUM, 4),
];

/// include/linux/socket.h
const SOL_RAW: i32 = 255;

/// Of packet sockets, in the order of include/uapi/linux/if_packet.h: `PACKET_AUXDATA`,
/// `PACKET_ORIGDEV`, `PACKET_VERSION`, `PACKET_RESERVE`, `PACKET_LOSS`, `PACKET_VNET_HDR`,
/// `PACKET_TIMESTAMP`, `PACKET_TX_HAS_OFF`, `PACKET_QDISC_BYPASS`, `PACKET_IGNORE_OUTGOING`,
/// `PACKET_VNET_HDR_SZ`.
const PACKET: &[Known] = &[
    untold(libc::SOL_PACKET, 8, 4),
    untold(libc::SOL_PACKET, 9, 4),
    untold(libc::SOL_PACKET, 10, 4),
    untold(libc::SOL_PACKET, 12, 4),
    untold(libc::SOL_PACKET, 14, 4),
    untold(libc::SOL_PACKET, 15, 4),
    untold(libc::SOL_PACKET, 17, 4),
    untold(libc::SOL_PACKET, 19, 4),
    untold(libc::SOL_PACKET, 20, 4),
    untold(libc::SOL_PACKET, 23, 4),
    untold(libc::SOL_PACKET, 24, 4),
];

/// Of sockets that messages with credentials come to; others refuse it since 6.16.
const CREDENTIALS: &[Known] = &[told(libc::SOL_SOCKET, libc::SO_PASSCRED, 4, |o| {
    u32::from(o.more) & SockMore::PASSCRED == 0
})];

/// Of Unix sockets; `SO_PASSPIDFD`.
const UNIX: &[Known] = &[
    untold(libc::SOL_SOCKET, libc::SO_PASSSEC, 4),
    untold(libc::SOL_SOCKET, 76, 4),
];

/// `NETLINK_PKTINFO`, `NETLINK_BROADCAST_ERROR`, `NETLINK_NO_ENOBUFS`,
/// `NETLINK_LISTEN_ALL_NSID`, `NETLINK_CAP_ACK`, `NETLINK_EXT_ACK`, `NETLINK_GET_STRICT_CHK`.
const NETLINK: &[Known] = &[
    untold(libc::SOL_NETLINK, 3, 4),
    untold(libc::SOL_NETLINK, 4, 4),
    untold(libc::SOL_NETLINK, 5, 4),
    untold(libc::SOL_NETLINK, 8, 4),
    untold(libc::SOL_NETLINK, 10, 4),
    untold(libc::SOL_NETLINK, 11, 4),
    untold(libc::SOL_NETLINK, 12, 4),
];

/// Sockets that have the same options, with the same values while new.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kind {
    family: i32,
    socktype: i32,
    protocol: i32,
    /// TCP with a peer.
    connected: bool,
}

impl Kind {
    /// That of a socket.
    pub fn of(rec: &SockRec) -> Self {
        let (family, socktype) = (i32::from(rec.family), i32::from(rec.type_));
        let stream = socktype == libc::SOCK_STREAM;
        // A new packet socket must not receive anything.
        let packet = family == libc::AF_PACKET;
        let protocol = if packet { 0 } else { rec.protocol.into() };
        let connected = protocol == libc::IPPROTO_TCP && stream;
        Self {
            family,
            socktype,
            protocol,
            connected: connected && !UNCONNECTED.contains(&rec.state),
        }
    }

    /// Its options, in the order they are to be set in.
    fn known(self) -> impl Iterator<Item = &'static Known> {
        let datagram = self.socktype != libc::SOCK_STREAM;
        let (v6, inet) = (
            self.family == libc::AF_INET6,
            matches!(self.family, libc::AF_INET | libc::AF_INET6),
        );
        let tcp = inet && !datagram && self.protocol == libc::IPPROTO_TCP;
        let raw = inet && self.socktype == libc::SOCK_RAW;
        [
            (SOCKET, true),
            (INET, inet),
            (DATAGRAM, inet && datagram),
            (IPV6, v6),
            (IPV6_DATAGRAM, v6 && datagram),
            (IPV6_UNCONNECTED, v6 && !self.connected),
            (TCP, tcp),
            (TCP_UNCONNECTED, tcp && !self.connected),
            (UDP, inet && !raw && self.protocol == libc::IPPROTO_UDP),
            (RAW, raw),
            (PACKET, self.family == libc::AF_PACKET),
            (CREDENTIALS, !inet),
            (UNIX, self.family == libc::AF_UNIX),
            (NETLINK, self.family == libc::AF_NETLINK),
        ]
        .into_iter()
        .filter(|(_, has)| *has)
        .flat_map(|(table, _)| table)
    }

    /// The values of a new socket; `None` for what the kernel does not know.
    fn defaults(self) -> Result<Vec<Option<Vec<u8>>>, SocketError> {
        let new = new(self.family, self.socktype, self.protocol)?;
        let value = |known: &Known| option(new.as_fd(), known.level, known.name, known.len).ok();
        Ok(self.known().map(value).collect())
    }
}

/// Level, name and bytes of each option of TCP sockets that is carried.
pub fn of_tcp(v6: bool, connected: bool) -> impl Iterator<Item = (i32, i32, usize)> {
    let kind = Kind {
        family: if v6 { libc::AF_INET6 } else { libc::AF_INET },
        socktype: libc::SOCK_STREAM,
        protocol: libc::IPPROTO_TCP,
        connected,
    };
    kind.known()
        .map(|known| (known.level, known.name, known.len))
}

/// What new sockets have, by kind, once it was looked at.
#[derive(Debug, Default)]
pub struct Defaults(HashMap<Kind, Vec<Option<Vec<u8>>>>);

impl Defaults {
    /// Looks at a new socket of the same kind, unless that was done or fails.
    pub fn prepare(&mut self, rec: &SockRec) {
        if let Entry::Vacant(place) = self.0.entry(Kind::of(rec))
            && let Ok(defaults) = place.key().defaults()
        {
            place.insert(defaults);
        }
    }

    /// Reads the options of a socket that are not those of a new one.
    ///
    /// # Errors
    /// A socket call fails.
    pub fn read(
        &mut self,
        from: &Borrowed,
        rec: &SockRec,
    ) -> Result<Vec<SockOption>, CollectError> {
        let kind = Kind::of(rec);
        let defaults = match self.0.entry(kind) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(place) => place.insert(kind.defaults().map_err(from.socket_failed())?),
        };
        let mut options = Vec::new();
        for (known, default) in kind.known().zip(defaults) {
            let Some(default) = default else { continue };
            if (known.unset)(&rec.opts) {
                continue;
            }
            let value = option(from.as_fd(), known.level, known.name, known.len)
                .map_err(from.socket_failed())?;
            if value != *default && !is_no_choice(known, &value) {
                options.push(SockOption {
                    level: known.level,
                    name: known.name,
                    value: ByteBuf::from(value),
                });
            }
        }
        // Setting IP_TOS sets it, too.
        if rec.opts.priority != 0 || rec.opts.tos != 0 {
            let value = rec.opts.priority.to_ne_bytes().to_vec();
            options.push(of_socket(libc::SO_PRIORITY, value));
        }
        buffers(from, rec, &mut options)?;
        if rec.opts.bound_ifindex != 0 {
            let name = option(from.as_fd(), libc::SOL_SOCKET, libc::SO_BINDTODEVICE, 16)
                .map_err(from.socket_failed())?;
            options.push(of_socket(libc::SO_BINDTODEVICE, name));
        }
        Ok(options)
    }
}

/// Whether a value is one that nobody can have set. Of a socket without a peer `TCP_MAXSEG` is
/// what was set, or else the size in use, which `IP_OPTIONS` makes tiny, and which is that of the
/// loopback interface in a connection over it that has ended.
fn is_no_choice(known: &Known, value: &[u8]) -> bool {
    /// `TCP_MIN_MSS` of include/net/tcp.h.
    const LEAST: i32 = 88;
    /// `MAX_TCP_WINDOW`.
    const MOST: i32 = 32767;
    let size = value.try_into().map(i32::from_ne_bytes);
    (known.level, known.name) == (libc::IPPROTO_TCP, libc::TCP_MAXSEG)
        && size.is_ok_and(|size| !(LEAST..=MOST).contains(&size))
}

fn of_socket(name: i32, value: Vec<u8>) -> SockOption {
    SockOption {
        level: libc::SOL_SOCKET,
        name,
        value: ByteBuf::from(value),
    }
}

/// A buffer size is the application's only if it has set it; else it follows autotuning.
fn buffers(
    from: &Borrowed,
    rec: &SockRec,
    options: &mut Vec<SockOption>,
) -> Result<(), CollectError> {
    for (told, get, set) in [
        (rec.opts.sndbuf, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE),
        (rec.opts.rcvbuf, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE),
    ] {
        if told != 0 {
            let value =
                int_option(from.as_fd(), libc::SOL_SOCKET, get).map_err(from.socket_failed())?;
            // The kernel stores twice what it is told (socket(7)).
            options.push(of_socket(set, (value / 2).to_ne_bytes().to_vec()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(family: i32, socktype: i32, protocol: i32) -> Kind {
        Kind {
            family,
            socktype,
            protocol,
            connected: false,
        }
    }

    /// Names that a kernel does not know are left out in silence, so that a wrong one would be.
    #[test]
    fn kernels_know_the_options_of_the_kinds() {
        let newer = |known: &Known| match (known.level, known.name) {
            // Since 6.9 of TCP; not of netlink.
            (libc::SOL_SOCKET, libc::SO_PEEK_OFF) => true,
            // SO_PASSPIDFD since 6.5, IP_LOCAL_PORT_RANGE since 6.3.
            (libc::SOL_SOCKET, 76) | (libc::IPPROTO_IP, 51) => true,
            // NETLINK_LISTEN_ALL_NSID can be set long before it can be read.
            (libc::SOL_NETLINK, 8) => true,
            _ => false,
        };
        for kind in [
            kind(libc::AF_INET, libc::SOCK_STREAM, libc::IPPROTO_TCP),
            kind(libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP),
            kind(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_UDP),
            kind(libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP),
            kind(libc::AF_UNIX, libc::SOCK_STREAM, 0),
            kind(libc::AF_UNIX, libc::SOCK_DGRAM, 0),
            kind(libc::AF_NETLINK, libc::SOCK_RAW, 0),
        ] {
            for (known, value) in kind.known().zip(kind.defaults().unwrap()) {
                let (level, name) = (known.level, known.name);
                assert!(
                    value.is_some() || newer(known),
                    "{kind:?} has no {level}, {name}"
                );
            }
        }
    }

    #[test]
    fn no_option_is_listed_twice() {
        for family in [
            libc::AF_INET,
            libc::AF_INET6,
            libc::AF_UNIX,
            libc::AF_NETLINK,
        ] {
            for (socktype, protocol) in [
                (libc::SOCK_STREAM, libc::IPPROTO_TCP),
                (libc::SOCK_DGRAM, libc::IPPROTO_UDP),
            ] {
                let mut all: Vec<_> = kind(family, socktype, protocol)
                    .known()
                    .map(|known| (known.level, known.name))
                    .collect();
                all.sort_unstable();
                let count = all.len();
                all.dedup();
                assert_eq!(all.len(), count, "family {family}");
            }
        }
    }
}
