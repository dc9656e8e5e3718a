//! Options of sockets, each on a socket of its own, so that none hides behind another.

use std::net::{Ipv4Addr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;

use super::probe::{option, set_option, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("options_sockets", sockets),
    Entry::carried("options_connections", connections),
    Entry::carried("options_together", together),
    Entry::refused("refused_ulp", "TCP_ULP", ulp),
    Entry::refused("refused_tcp_md5", "TCP keys", md5),
    Entry::refused("refused_udp_corked", "part of a datagram", corked),
];

/// Level, name and a value that no new socket has.
type Set = (i32, i32, &'static [u8]);

const SOL: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::IPPROTO_IP;
const IPV6: i32 = libc::IPPROTO_IPV6;
const TCP: i32 = libc::IPPROTO_TCP;
const UDP: i32 = libc::IPPROTO_UDP;

const ONE: &[u8] = &[1, 0, 0, 0];
const ZERO: &[u8] = &[0, 0, 0, 0];

/// Of any socket that may have a peer.
const ANY: &[Set] = &[
    (SOL, libc::SO_KEEPALIVE, ONE),
    (SOL, libc::SO_REUSEADDR, ONE),
    (SOL, libc::SO_TIMESTAMP, ONE),
    (SOL, libc::SO_TIMESTAMPNS, ONE),
    (SOL, 63, ONE),
    (SOL, 64, ONE),
    (SOL, libc::SO_MARK, &[77, 0, 0, 0]),
    (SOL, libc::SO_PRIORITY, &[4, 0, 0, 0]),
    (SOL, libc::SO_RCVLOWAT, &[5, 0, 0, 0]),
    (SOL, libc::SO_LINGER, &[1, 0, 0, 0, 7, 0, 0, 0]),
    (
        SOL,
        libc::SO_RCVTIMEO,
        &[30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ),
    (
        SOL,
        libc::SO_SNDTIMEO,
        &[40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ),
    (SOL, libc::SO_SNDBUF, &[0, 0x40, 0, 0]),
    (SOL, libc::SO_RCVBUF, &[0, 0x50, 0, 0]),
    (SOL, libc::SO_OOBINLINE, ONE),
    (SOL, libc::SO_DONTROUTE, ONE),
    (SOL, libc::SO_BINDTODEVICE, b"lo\0"),
    (SOL, libc::SO_TIMESTAMPING, &[8, 0, 0, 0, 0, 0, 0, 0]),
    (SOL, libc::SO_SELECT_ERR_QUEUE, ONE),
    (SOL, libc::SO_BUSY_POLL, &[50, 0, 0, 0]),
    (SOL, 69, ONE),
    (SOL, libc::SO_MAX_PACING_RATE, &[0, 0, 16, 0, 0, 0, 0, 0]),
    (SOL, libc::SO_ZEROCOPY, ONE),
    (SOL, libc::SO_TXTIME, &[1, 0, 0, 0, 0, 0, 0, 0]),
];

const INET: &[Set] = &[
    (IP, libc::IP_TOS, &[16, 0, 0, 0]),
    (IP, libc::IP_TTL, &[33, 0, 0, 0]),
    (IP, libc::IP_OPTIONS, &[1, 1, 1, 1]),
    (IP, libc::IP_MTU_DISCOVER, ZERO),
    (IP, libc::IP_RECVERR, ONE),
    (IP, libc::IP_MINTTL, &[5, 0, 0, 0]),
    (IP, libc::IP_BIND_ADDRESS_NO_PORT, ONE),
    (IP, 51, &[0x00, 0x80, 0x00, 0x90]),
    (IP, libc::IP_FREEBIND, ONE),
    (IP, libc::IP_TRANSPARENT, ONE),
];

const INET6: &[Set] = &[
    (IPV6, libc::IPV6_TCLASS, &[16, 0, 0, 0]),
    (IPV6, libc::IPV6_UNICAST_HOPS, &[33, 0, 0, 0]),
    (IPV6, libc::IPV6_MTU_DISCOVER, ZERO),
    (IPV6, libc::IPV6_RECVERR, ONE),
    (IPV6, libc::IPV6_DONTFRAG, ONE),
    (IPV6, 33, ONE),
    (IPV6, 70, ZERO),
    (IPV6, 72, &[1, 4, 0, 0]),
    (IPV6, 73, &[5, 0, 0, 0]),
];

const STREAM: &[Set] = &[
    (TCP, libc::TCP_NODELAY, ONE),
    (TCP, libc::TCP_CORK, ONE),
    (TCP, libc::TCP_KEEPIDLE, &[71, 0, 0, 0]),
    (TCP, libc::TCP_KEEPINTVL, &[13, 0, 0, 0]),
    (TCP, libc::TCP_KEEPCNT, &[4, 0, 0, 0]),
    (TCP, libc::TCP_USER_TIMEOUT, &[0, 0x20, 0, 0]),
    (TCP, libc::TCP_DEFER_ACCEPT, &[3, 0, 0, 0]),
    (TCP, libc::TCP_NOTSENT_LOWAT, &[0, 0x10, 0, 0]),
    (TCP, libc::TCP_CONGESTION, b"reno\0"),
    (SOL, 74, ZERO),
    (TCP, libc::TCP_SYNCNT, &[3, 0, 0, 0]),
    (TCP, libc::TCP_LINGER2, &[9, 0, 0, 0]),
    (TCP, libc::TCP_THIN_LINEAR_TIMEOUTS, ONE),
    (TCP, 36, ONE),
    (TCP, 37, &[20, 0, 0, 0]),
];

const STREAM_UNCONNECTED: &[Set] = &[
    (SOL, libc::SO_REUSEPORT, ONE),
    (TCP, libc::TCP_MAXSEG, &[0xbc, 2, 0, 0]),
    (TCP, libc::TCP_WINDOW_CLAMP, &[0, 0x70, 0, 0]),
    (TCP, libc::TCP_FASTOPEN, &[5, 0, 0, 0]),
    (TCP, 27, ONE),
    (TCP, 30, ONE),
    (TCP, 34, ONE),
];

const DATAGRAM: &[Set] = &[
    (SOL, libc::SO_REUSEPORT, ONE),
    (SOL, libc::SO_BROADCAST, ONE),
    (SOL, libc::SO_NO_CHECK, ONE),
    (SOL, libc::SO_RXQ_OVFL, ONE),
    (SOL, libc::SO_PEEK_OFF, &[3, 0, 0, 0]),
    (SOL, 75, ONE),
    (IP, libc::IP_PKTINFO, ONE),
    (IP, libc::IP_RECVOPTS, ONE),
    (IP, libc::IP_RETOPTS, ONE),
    (IP, libc::IP_RECVTTL, ONE),
    (IP, libc::IP_RECVTOS, ONE),
    (IP, libc::IP_PASSSEC, ONE),
    (IP, libc::IP_RECVORIGDSTADDR, ONE),
    (IP, 23, ONE),
    (IP, 25, ONE),
    (IP, 26, ONE),
    (IP, libc::IP_MULTICAST_TTL, &[9, 0, 0, 0]),
    (IP, libc::IP_MULTICAST_LOOP, ZERO),
    (IP, 49, ZERO),
    (UDP, 1, ONE),
    (UDP, 100, &[2, 0, 0, 0]),
    (UDP, 101, ONE),
    (UDP, 102, ONE),
    (UDP, 103, &[0, 2, 0, 0]),
    (UDP, 104, ONE),
];

const DATAGRAM6: &[Set] = &[
    (IPV6, libc::IPV6_RECVPKTINFO, ONE),
    (IPV6, libc::IPV6_MULTICAST_HOPS, &[9, 0, 0, 0]),
    (IPV6, libc::IPV6_MULTICAST_LOOP, ZERO),
    (IPV6, 29, ZERO),
    (IPV6, 31, ONE),
    (IPV6, 11, ONE),
    (IPV6, libc::IPV6_RECVHOPLIMIT, ONE),
    (IPV6, libc::IPV6_RECVHOPOPTS, ONE),
    (IPV6, libc::IPV6_RECVRTHDR, ONE),
    (IPV6, libc::IPV6_RECVDSTOPTS, ONE),
    (IPV6, libc::IPV6_RECVPATHMTU, ONE),
    (IPV6, libc::IPV6_RECVTCLASS, ONE),
    (IPV6, 74, ONE),
    (IPV6, 77, ONE),
];

const UNCONNECTED6: &[Set] = &[(IPV6, libc::IPV6_V6ONLY, ONE)];

const UNIX: &[Set] = &[
    (SOL, libc::SO_PASSCRED, ONE),
    (SOL, libc::SO_PASSSEC, ONE),
    (SOL, libc::SO_PEEK_OFF, &[3, 0, 0, 0]),
    (
        SOL,
        libc::SO_RCVTIMEO,
        &[30, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ),
    (SOL, libc::SO_SNDBUF, &[0, 0x40, 0, 0]),
    (SOL, 76, ONE),
];

const NETLINK: &[Set] = &[
    (libc::SOL_NETLINK, 3, ONE),
    (libc::SOL_NETLINK, 4, ONE),
    (libc::SOL_NETLINK, 5, ONE),
    (libc::SOL_NETLINK, 10, ONE),
    (libc::SOL_NETLINK, 11, ONE),
    (libc::SOL_NETLINK, 12, ONE),
];

fn socket(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: takes three integers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    let fd = i32::try_from(sys("socket", fd.into())?)?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn set(fd: &OwnedFd, (level, name, value): Set) -> nix::Result<()> {
    set_option(fd, level, name, value)
}

fn get(fd: &OwnedFd, (level, name, _): Set) -> Result<Vec<u8>> {
    option(fd, level, name).with_context(|| format!("Option {level}, {name}"))
}

/// A socket with one option set.
struct One {
    fd: OwnedFd,
    option: Set,
    value: Vec<u8>,
}

impl One {
    /// Sets the option; `None` if the kernel does not know it.
    fn new(fd: OwnedFd, option: Set) -> Result<Option<One>> {
        let (level, name, wanted) = option;
        match set(&fd, option) {
            // IP_LOCAL_PORT_RANGE and SO_PASSPIDFD are newer than 6.1.
            Err(Errno::ENOPROTOOPT) if matches!(name, 51 | 76) => return Ok(None),
            Err(errno) => bail!("Setting option {level}, {name}: {errno}"),
            Ok(()) => {}
        }
        let value = get(&fd, option)?;
        let doubled = [libc::SO_SNDBUF, libc::SO_RCVBUF].contains(&name) && level == SOL;
        ensure!(
            doubled || value.starts_with(wanted),
            "Option {level}, {name} is {value:?} after it was set to {wanted:?}"
        );
        Ok(Some(One { fd, option, value }))
    }

    /// What is wrong with it.
    fn complaint(&self) -> Result<Option<String>> {
        let (level, name, _) = self.option;
        let value = get(&self.fd, self.option)?;
        let was = &self.value;
        Ok((value != *was).then(|| format!("option {level}, {name} was {was:?} and is {value:?}")))
    }
}

/// Each option on a new socket of each kind that has it.
fn sockets(case: &Case) -> Result<()> {
    let tcp = [ANY, INET, STREAM, STREAM_UNCONNECTED].concat();
    let tcp6 = [&tcp[..], INET6, UNCONNECTED6].concat();
    let udp = [ANY, INET, DATAGRAM].concat();
    let udp6 = [&udp[..], INET6, DATAGRAM6, UNCONNECTED6].concat();
    let kinds = [
        (libc::AF_INET, libc::SOCK_STREAM, 0, &tcp[..]),
        (libc::AF_INET6, libc::SOCK_STREAM, 0, &tcp6),
        (libc::AF_INET, libc::SOCK_DGRAM, 0, &udp),
        (libc::AF_INET6, libc::SOCK_DGRAM, 0, &udp6),
        (libc::AF_UNIX, libc::SOCK_STREAM, 0, UNIX),
        (libc::AF_UNIX, libc::SOCK_DGRAM, 0, UNIX),
        (libc::AF_NETLINK, libc::SOCK_RAW, 0, NETLINK),
    ];
    let mut all = Vec::new();
    for (family, kind, protocol, options) in kinds {
        for option in options {
            let fd = socket(family, kind, protocol)?;
            let made = One::new(fd, *option).with_context(|| format!("Family {family}"))?;
            all.extend(made.map(|one| (family, kind, one)));
        }
    }
    case.ready()?;
    let mut wrong = Vec::new();
    for (family, kind, one) in &all {
        let complaint = one.complaint()?;
        wrong.extend(complaint.map(|text| format!("family {family}, type {kind}: {text}")));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// Each option on a connection of its own, accepted or not.
fn connections(case: &Case) -> Result<()> {
    let options = [ANY, INET, STREAM].concat();
    let options6 = [&options[..], INET6].concat();
    let mut all = Vec::new();
    for (listener, options) in [
        (TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?, options),
        (TcpListener::bind((Ipv6Addr::LOCALHOST, 0))?, options6),
    ] {
        for (number, option) in options.into_iter().enumerate() {
            let client = TcpStream::connect(listener.local_addr()?)?;
            let (server, _) = listener.accept()?;
            let (with, without) = if number % 2 == 0 {
                (client, server)
            } else {
                (server, client)
            };
            all.extend(One::new(with.into(), option)?.map(|one| (one, without)));
        }
    }
    case.ready()?;
    let mut wrong = Vec::new();
    for (one, _) in &all {
        wrong.extend(one.complaint()?);
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}

/// Options that change each other: a priority chosen after `IP_TOS`, which sets it, too.
fn together(case: &Case) -> Result<()> {
    const TOS: Set = (IP, libc::IP_TOS, &[16, 0, 0, 0]);
    const PRIORITY: Set = (SOL, libc::SO_PRIORITY, &[5, 0, 0, 0]);
    const NONE: Set = (SOL, libc::SO_PRIORITY, ZERO);
    let socket: OwnedFd = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.into();
    let without: OwnedFd = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.into();
    for (fd, option) in [
        (&socket, TOS),
        (&socket, PRIORITY),
        (&without, TOS),
        (&without, NONE),
    ] {
        set(fd, option)?;
    }
    case.ready()?;
    ensure!(get(&socket, TOS)?.starts_with(&[16]), "IP_TOS is lost");
    ensure!(
        get(&socket, PRIORITY)? == PRIORITY.2,
        "The priority is lost"
    );
    ensure!(get(&without, NONE)? == ZERO, "A priority of 0 is lost");
    Ok(())
}

/// Kernel TLS: its keys are the kernel's.
fn ulp(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let server: OwnedFd = listener.accept()?.0.into();
    let tls: Set = (TCP, libc::TCP_ULP, b"tls\0");
    set(&server, tls).context("TCP_ULP")?;
    case.ready()?;
    ensure!(get(&server, tls)?.starts_with(b"tls"), "TCP_ULP is lost");
    drop(client);
    Ok(())
}

/// `struct tcp_md5sig` (include/uapi/linux/tcp.h): no key can be read back.
fn md5(case: &Case) -> Result<()> {
    const ADDRESS: usize = 128;
    let mut wanted = vec![0_u8; ADDRESS + 8 + 80];
    wanted[..2].copy_from_slice(&2_u16.to_ne_bytes());
    wanted[4..8].copy_from_slice(&[127, 0, 0, 1]);
    wanted[ADDRESS + 2] = 3;
    wanted[ADDRESS + 8..ADDRESS + 11].copy_from_slice(b"key");
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM, 0)?;
    set_option(&socket, TCP, libc::TCP_MD5SIG, &wanted).context("TCP_MD5SIG")?;
    case.ready()?;
    drop(socket);
    Ok(())
}

/// A datagram of which the end has not come.
fn corked(case: &Case) -> Result<()> {
    let to = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let from = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    from.connect(to.local_addr()?)?;
    let send = |bytes: &[u8], flags| -> Result<()> {
        let fd = from.as_fd().as_raw_fd();
        // SAFETY: the kernel reads the bytes.
        let sent = unsafe { libc::send(fd, bytes.as_ptr().cast(), bytes.len(), flags) };
        sys("send", i64::try_from(sent)?).map(drop)
    };
    send(b"one ", libc::MSG_MORE)?;
    case.ready()?;
    send(b"datagram", 0)?;
    let mut bytes = [0; 32];
    let got = to.recv(&mut bytes)?;
    ensure!(&bytes[..got] == b"one datagram", "Received {bytes:?}");
    Ok(())
}
