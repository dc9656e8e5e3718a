//! Raw and packet sockets.

use std::io::IoSliceMut;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{
    MsgFlags, SockaddrStorage, bind, connect, getpeername, getsockname, recv, recvmsg, sendto,
};
use nix::sys::time::TimeVal;

use super::filter;
use super::probe::{PATIENCE, option, set_option, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("raw_icmp", icmp),
    Entry::carried("raw_icmp6", icmp6),
    Entry::carried("raw_protocols", protocols),
    Entry::carried("packet", packet),
    Entry::refused("refused_raw_alert", "Router Alert", alert),
    Entry::refused("refused_raw_alert6", "Router Alert", alert6),
    Entry::refused("refused_raw_mroute", "it routes multicast", mroute),
    Entry::refused("refused_raw_mroute6", "it routes multicast", mroute6),
    Entry::refused("refused_packet_ring", "its ring", ring),
    Entry::refused("refused_packet_fanout", "fanout group", fanout),
    Entry::refused("refused_packet_member", "memberships", member),
];

/// include/linux/socket.h
const SOL_RAW: i32 = 255;

fn open(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: takes integers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    sys("socket", fd.into())?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(socket: &OwnedFd, level: i32, name: i32, value: i32) -> Result<()> {
    set_option(socket, level, name, &value.to_ne_bytes())
        .with_context(|| format!("Option {level}, {name}"))
}

fn has(socket: &OwnedFd, level: i32, name: i32, value: i32) -> Result<()> {
    let found = option(socket, level, name)?;
    ensure!(
        found == value.to_ne_bytes(),
        "Option {level}, {name} is {found:?}, not {value}"
    );
    Ok(())
}

/// No call waits for ever.
fn patient(socket: &OwnedFd) -> Result<()> {
    let limit = TimeVal::new(i64::try_from(PATIENCE.as_secs())?, 0);
    let option = nix::sys::socket::sockopt::ReceiveTimeout;
    Ok(nix::sys::socket::setsockopt(socket, option, &limit)?)
}

fn name(ip: IpAddr, port: u16) -> SockaddrStorage {
    SocketAddr::new(ip, port).into()
}

/// The sum of RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let words = bytes.chunks(2);
    let words = words.map(|w| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or(0)));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    let sum = u16::try_from(sum).unwrap_or(0);
    (!sum).to_be_bytes()
}

/// An echo request with an id and a payload.
fn request(kind: u8, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut request = vec![kind, 0, 0, 0];
    request.extend(id.to_be_bytes());
    request.extend([0, 1]);
    request.extend(payload);
    if kind == 8 {
        let sum = checksum(&request);
        request[2..4].copy_from_slice(&sum);
    }
    request
}

/// Whether there is nothing to read.
fn is_empty(socket: &OwnedFd) -> bool {
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_PEEK;
    recv(socket.as_raw_fd(), &mut [0; 64], flags) == Err(Errno::EAGAIN)
}

/// A bound and connected socket that lets echo replies through only, and of these those whose
/// payload a filter likes.
fn icmp(case: &Case) -> Result<()> {
    let (local, remote) = (Ipv4Addr::new(127, 0, 0, 7), Ipv4Addr::new(127, 0, 0, 8));
    let socket = open(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)?;
    let passes_replies = !1_i32;
    number(&socket, SOL_RAW, 1, passes_replies)?;
    number(&socket, libc::IPPROTO_IP, libc::IP_TTL, 7)?;
    number(&socket, libc::IPPROTO_IP, libc::IP_RECVTTL, 1)?;
    number(&socket, libc::SOL_SOCKET, libc::SO_MARK, 77)?;
    number(&socket, libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
    patient(&socket)?;
    // Behind the headers of IP and ICMP.
    filter::attach(&socket, 28)?;
    bind(socket.as_raw_fd(), &name(local.into(), 0))?;
    connect(socket.as_raw_fd(), &name(remote.into(), 9))?;

    case.ready()?;

    has(&socket, SOL_RAW, 1, passes_replies)?;
    has(&socket, libc::IPPROTO_IP, libc::IP_TTL, 7)?;
    has(&socket, libc::IPPROTO_IP, libc::IP_RECVTTL, 1)?;
    has(&socket, libc::IPPROTO_IP, libc::IP_HDRINCL, 0)?;
    has(&socket, libc::SOL_SOCKET, libc::SO_MARK, 77)?;
    has(&socket, libc::SOL_SOCKET, libc::SO_BROADCAST, 1)?;
    let own: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    let peer: SockaddrStorage = getpeername(socket.as_raw_fd())?;
    let ends = [own, peer].map(|end| end.as_sockaddr_in().map(|end| (end.ip(), end.port())));
    ensure!(
        ends == [Some((local, 1)), Some((remote, 9))],
        "Its ends are {ends:?}"
    );
    ensure!(is_empty(&socket), "Something is queued");
    let write = |payload: &[u8], id| nix::unistd::write(&socket, &request(8, id, payload));
    write(b"no", 1)?;
    write(b"yes", 2)?;
    let mut packet = [0; 128];
    let got = recv(socket.as_raw_fd(), &mut packet, MsgFlags::empty())?;
    let text = &packet[20..got];
    ensure!(
        text[0] == 0 && text[4..6] == [0, 2] && text.ends_with(b"yes"),
        "Received {text:?}"
    );
    ensure!(is_empty(&socket), "The filter is gone");
    Ok(())
}

/// The same of IPv6, whose filter is another one.
fn icmp6(case: &Case) -> Result<()> {
    const ECHO_REPLY: usize = 129;
    let lo = Ipv6Addr::LOCALHOST;
    let socket = open(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)?;
    // A set bit blocks.
    let mut blocked = [0xff_u8; 32];
    blocked[ECHO_REPLY / 8] &= !(1 << (ECHO_REPLY % 8));
    set_option(&socket, libc::IPPROTO_ICMPV6, 1, &blocked)?;
    number(&socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 9)?;
    patient(&socket)?;
    bind(socket.as_raw_fd(), &name(lo.into(), 0))?;
    let summed = open(libc::AF_INET6, libc::SOCK_RAW, 253)?;
    number(&summed, SOL_RAW, libc::IPV6_CHECKSUM, 4)?;
    let plain = open(libc::AF_INET6, libc::SOCK_RAW, 254)?;

    case.ready()?;

    let found = option(&socket, libc::IPPROTO_ICMPV6, 1)?;
    ensure!(found == blocked, "It blocks {found:?}");
    has(&socket, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 9)?;
    has(&socket, SOL_RAW, libc::IPV6_CHECKSUM, 2)?;
    has(&summed, SOL_RAW, libc::IPV6_CHECKSUM, 4)?;
    has(&plain, SOL_RAW, libc::IPV6_CHECKSUM, -1)?;
    let own: SockaddrStorage = getsockname(socket.as_raw_fd())?;
    ensure!(
        own.as_sockaddr_in6().map(|own| own.ip()) == Some(lo),
        "It is bound to {own}"
    );
    let request = request(128, 5, b"to myself");
    let to = name(lo.into(), 0);
    sendto(socket.as_raw_fd(), &request, &to, MsgFlags::empty())?;
    let mut text = [0; 128];
    let got = recv(socket.as_raw_fd(), &mut text, MsgFlags::empty())?;
    let text = &text[..got];
    ensure!(
        usize::from(text[0]) == ECHO_REPLY && text.ends_with(b"to myself"),
        "Received {text:?}"
    );
    ensure!(is_empty(&socket), "It does not block requests");
    Ok(())
}

/// Headers of one's own, and protocols that other sockets have ports in.
fn protocols(case: &Case) -> Result<()> {
    let sender = open(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    let own_header = open(libc::AF_INET, libc::SOCK_RAW, 253)?;
    number(&own_header, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
    let tcp = open(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP)?;
    let udp = open(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_UDP)?;
    patient(&udp)?;
    bind(
        udp.as_raw_fd(),
        &name(Ipv4Addr::new(127, 0, 0, 9).into(), 0),
    )?;
    connect(
        tcp.as_raw_fd(),
        &name(Ipv4Addr::new(127, 0, 0, 6).into(), 9),
    )?;
    let v6 = open(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_RAW)?;

    case.ready()?;

    has(&sender, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
    has(&own_header, libc::IPPROTO_IP, libc::IP_HDRINCL, 1)?;
    for other in [&tcp, &udp] {
        has(other, libc::IPPROTO_IP, libc::IP_HDRINCL, 0)?;
    }
    for (socket, protocol) in [
        (&sender, 255),
        (&own_header, 253),
        (&tcp, 6),
        (&udp, 17),
        (&v6, 255),
    ] {
        has(socket, libc::SOL_SOCKET, libc::SO_PROTOCOL, protocol)?;
        has(socket, libc::SOL_SOCKET, libc::SO_TYPE, libc::SOCK_RAW)?;
    }
    let peer: SockaddrStorage = getpeername(tcp.as_raw_fd())?;
    ensure!(
        peer.as_sockaddr_in().map(|peer| peer.ip()) == Some(Ipv4Addr::new(127, 0, 0, 6)),
        "The peer is {peer}"
    );
    // The port is its own: others may send to this address as well.
    let receiver = UdpSocket::bind("127.0.0.9:0")?;
    let other = UdpSocket::bind("127.0.0.1:0")?;
    other.send_to(b"overheard", receiver.local_addr()?)?;
    let mut packet = [0; 128];
    let wanted = receiver.local_addr()?.port().to_be_bytes();
    loop {
        let got = recv(udp.as_raw_fd(), &mut packet, MsgFlags::empty())?;
        if packet[22..24] == wanted {
            ensure!(
                packet[..got].ends_with(b"overheard"),
                "{:?}",
                &packet[..got]
            );
            return Ok(());
        }
    }
}

/// Bound to an interface with a filter, unbound, and for one protocol on all interfaces.
fn packet(case: &Case) -> Result<()> {
    const ALL: u16 = 3;
    const ARP: u16 = 0x806;
    let (auxdata, version, ignore_outgoing) = (8, 10, 23);
    let index = if_nametoindex("lo")?;
    let on_lo = open(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    number(&on_lo, libc::SOL_PACKET, auxdata, 1)?;
    number(&on_lo, libc::SOL_PACKET, ignore_outgoing, 1)?;
    number(&on_lo, libc::SOL_PACKET, version, 2)?;
    patient(&on_lo)?;
    // Behind the headers of Ethernet, IP and UDP.
    filter::attach(&on_lo, 42)?;
    bind_packet(&on_lo, ALL, index)?;
    let arp = open(libc::AF_PACKET, libc::SOCK_DGRAM, i32::from(ARP.to_be()))?;
    let unbound = open(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
    let receiver = UdpSocket::bind("127.0.0.1:0")?;

    case.ready()?;

    let bound = |socket: &OwnedFd| -> Result<(u16, usize)> {
        // A `LinkAddr` would not be had: the kernel's is shorter than the structure.
        let address: SockaddrStorage = getsockname(socket.as_raw_fd())?;
        let address = address.as_link_addr().context("No link-layer address")?;
        Ok((u16::from_be(address.protocol()), address.ifindex()))
    };
    let index = usize::try_from(if_nametoindex("lo")?)?;
    let found = (bound(&on_lo)?, bound(&arp)?, bound(&unbound)?);
    ensure!(
        found == ((ALL, index), (ARP, 0), (0, 0)),
        "They are bound to {found:?}"
    );
    for (name, value) in [(auxdata, 1), (ignore_outgoing, 1), (version, 2)] {
        has(&on_lo, libc::SOL_PACKET, name, value)?;
        has(&unbound, libc::SOL_PACKET, name, 0)?;
    }
    for (socket, kind) in [(&on_lo, libc::SOCK_RAW), (&arp, libc::SOCK_DGRAM)] {
        has(socket, libc::SOL_SOCKET, libc::SO_TYPE, kind)?;
    }
    // The filter lets some of what others send pass: too much of it leaves no room.
    let mut old = [0; 2048];
    while recv(on_lo.as_raw_fd(), &mut old, MsgFlags::MSG_DONTWAIT).is_ok() {}
    let port = receiver.local_addr()?.port().to_be_bytes();
    for text in [&b"not this"[..], b"yes, this"] {
        UdpSocket::bind("127.0.0.1:0")?.send_to(text, receiver.local_addr()?)?;
    }
    loop {
        let mut packet = [0; 2048];
        let mut space = nix::cmsg_space!([u32; 8]);
        let mut parts = [IoSliceMut::new(&mut packet)];
        let flags = MsgFlags::empty();
        let got = recvmsg::<()>(on_lo.as_raw_fd(), &mut parts, Some(&mut space), flags)?.bytes;
        let packet = &packet[..got];
        // What others send with such a byte is not ours.
        if packet.len() > 42 && packet[36..38] == port {
            ensure!(packet.ends_with(b"yes, this"), "Received {packet:?}");
            return Ok(());
        }
    }
}

fn bind_packet(socket: &OwnedFd, protocol: u16, index: u32) -> Result<()> {
    // SAFETY: plain data for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET)?;
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = i32::try_from(index)?;
    let length = libc::socklen_t::try_from(size_of_val(&address))?;
    let (fd, at) = (socket.as_fd().as_raw_fd(), (&raw const address).cast());
    // SAFETY: the kernel reads so many bytes.
    sys("bind", unsafe { libc::bind(fd, at, length) }.into()).map(|_| ())
}

/// `IP_ROUTER_ALERT`.
fn alert(case: &Case) -> Result<()> {
    let socket = open(libc::AF_INET, libc::SOCK_RAW, 46)?;
    number(&socket, libc::IPPROTO_IP, 5, 1)?;
    case.ready()?;
    // It is there no more after this, and must have been.
    number(&socket, libc::IPPROTO_IP, 5, 0)?;
    let again = set_option(&socket, libc::IPPROTO_IP, 5, &0_i32.to_ne_bytes());
    ensure!(again.is_err(), "It is still there");
    Ok(())
}

/// `IPV6_ROUTER_ALERT`.
fn alert6(case: &Case) -> Result<()> {
    let socket = open(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    number(&socket, libc::IPPROTO_IPV6, 22, 1)?;
    case.ready()?;
    number(&socket, libc::IPPROTO_IPV6, 22, -1)
}

/// `MRT_INIT` and `MRT_DONE`.
fn mroute(case: &Case) -> Result<()> {
    let socket = open(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_IGMP)?;
    number(&socket, libc::IPPROTO_IP, 200, 1)?;
    case.ready()?;
    number(&socket, libc::IPPROTO_IP, 201, 0)
}

/// `MRT6_INIT` and `MRT6_DONE`.
fn mroute6(case: &Case) -> Result<()> {
    let socket = open(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)?;
    number(&socket, libc::IPPROTO_IPV6, 200, 1)?;
    case.ready()?;
    number(&socket, libc::IPPROTO_IPV6, 201, 0)
}

/// `PACKET_RX_RING` of one block of a page with one frame.
fn ring(case: &Case) -> Result<()> {
    let socket = open(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    let request = [4096_u32, 1, 4096, 1].map(u32::to_ne_bytes).concat();
    set_option(&socket, libc::SOL_PACKET, 5, &request)?;
    case.ready()?;
    set_option(&socket, libc::SOL_PACKET, 5, &[0; 16])?;
    Ok(())
}

/// `PACKET_FANOUT`.
fn fanout(case: &Case) -> Result<()> {
    let socket = open(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
    bind_packet(&socket, 3, if_nametoindex("lo")?)?;
    number(&socket, libc::SOL_PACKET, 18, 77)?;
    case.ready()?;
    has(&socket, libc::SOL_PACKET, 18, 77)
}

/// `PACKET_ADD_MEMBERSHIP` of `PACKET_MR_PROMISC`, and `PACKET_DROP_MEMBERSHIP`.
fn member(case: &Case) -> Result<()> {
    let socket = open(libc::AF_PACKET, libc::SOCK_DGRAM, 0)?;
    let mut request = if_nametoindex("lo")?.to_ne_bytes().to_vec();
    request.extend(1_u16.to_ne_bytes());
    request.extend([0; 10]);
    set_option(&socket, libc::SOL_PACKET, 1, &request)?;
    case.ready()?;
    set_option(&socket, libc::SOL_PACKET, 2, &request)?;
    Ok(())
}
