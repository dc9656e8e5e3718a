//! What waits in UDP sockets: who sent it and what else is told of it, in its order.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, bind, setsockopt, socket, sockopt};

use super::probe::{PATIENCE, eventually, option, pattern, set_option, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("udp_queue", queue),
    Entry::carried("udp_queue_peeked", peeked),
    Entry::carried("udp_queue_connected", connected),
    Entry::carried("udp_queue_reuseport", reuseport),
    Entry::carried("udp_queue_told", told),
    Entry::carried("udp_queue_v6", v6),
    Entry::carried("udp_queue_gro", gro),
];

fn set(socket: &UdpSocket, level: i32, name: i32, value: i32) -> Result<()> {
    Ok(set_option(socket, level, name, &value.to_ne_bytes())?)
}

/// Sends a datagram and waits until it is queued: the next one may overtake it where the kernel
/// leaves the one to another CPU.
fn put(to: &UdpSocket, from: &UdpSocket, data: &[u8], address: SocketAddr) -> Result<()> {
    // Memory that is charged to the queue: SK_MEMINFO_RMEM_ALLOC.
    let queued = || -> Result<u32> {
        let words = option(to, libc::SOL_SOCKET, libc::SO_MEMINFO)?;
        let word = words.first_chunk().context("SO_MEMINFO is short")?;
        Ok(u32::from_ne_bytes(*word))
    };
    let before = queued()?;
    from.send_to(data, address)?;
    eventually("the datagram is queued", || Ok(queued()? > before))
}

fn expect(socket: &UdpSocket, data: &[u8], from: SocketAddr) -> Result<()> {
    let mut buffer = vec![0; 65536];
    let (length, found) = socket.recv_from(&mut buffer)?;
    ensure!(
        &buffer[..length] == data && found == from,
        "Received {length} bytes from {found}, not {} from {from}",
        data.len()
    );
    Ok(())
}

/// That nothing more is there, and that what is sent now comes.
fn goes_on(socket: &UdpSocket, sender: &UdpSocket, to: SocketAddr) -> Result<()> {
    socket.set_nonblocking(true)?;
    ensure!(
        socket.recv(&mut [0; 8]).is_err(),
        "There is more than was sent"
    );
    socket.set_nonblocking(false)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    sender.send_to(b"new", to)?;
    expect(socket, b"new", sender.local_addr()?)
}

fn loopback() -> Result<UdpSocket> {
    Ok(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?)
}

/// Datagrams of two senders, one of them closed, empty ones and a long one.
fn queue(case: &Case) -> Result<()> {
    let to = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let port = to.local_addr()?.port();
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let (open, closed) = (loopback()?, loopback()?);
    let names = [open.local_addr()?, closed.local_addr()?];
    let long = pattern(5, 60_000);
    let sent: [(&UdpSocket, &[u8]); 6] = [
        (&open, b"one"),
        (&closed, b""),
        (&closed, &long),
        (&open, b""),
        (&open, b"one"),
        (&closed, b"last"),
    ];
    let mut wanted = Vec::new();
    for (sender, data) in sent {
        put(&to, sender, data, address)?;
        wanted.push((sender.local_addr()?, data));
    }
    drop(closed);
    case.ready()?;
    ensure!(to.local_addr()?.port() == port, "The port is another one");
    for (from, data) in wanted {
        expect(&to, data, from)?;
    }
    ensure!(open.local_addr()? == names[0], "The sender moved");
    goes_on(&to, &open, address)
}

/// What was looked at waits apart (`reader_queue`), and comes before what was not.
fn peeked(case: &Case) -> Result<()> {
    let (to, from) = (loopback()?, loopback()?);
    let (address, name) = (to.local_addr()?, from.local_addr()?);
    put(&to, &from, b"first", address)?;
    let mut buffer = [0; 8];
    ensure!(to.peek(&mut buffer)? == 5 && buffer.starts_with(b"first"));
    put(&to, &from, b"second", address)?;
    case.ready()?;
    expect(&to, b"first", name)?;
    expect(&to, b"second", name)?;
    goes_on(&to, &from, address)
}

/// A connected socket has what came before it was, from others too.
fn connected(case: &Case) -> Result<()> {
    let (to, peer, other) = (loopback()?, loopback()?, loopback()?);
    let address = to.local_addr()?;
    put(&to, &other, b"before", address)?;
    to.connect(peer.local_addr()?)?;
    put(&to, &peer, b"from the peer", address)?;
    case.ready()?;
    expect(&to, b"before", other.local_addr()?)?;
    expect(&to, b"from the peer", peer.local_addr()?)?;
    ensure!(to.peer_addr()? == peer.local_addr()?, "Another peer");
    other.send_to(b"not for you", address)?;
    goes_on(&to, &peer, address)
}

/// Each of several sockets at one address has what the kernel chose it for.
fn reuseport(case: &Case) -> Result<()> {
    const COUNT: usize = 24;
    let new = |port: u16| -> Result<UdpSocket> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, flags, None)?;
        setsockopt(&fd, sockopt::ReusePort, &true)?;
        let address = nix::sys::socket::SockaddrIn::new(127, 0, 0, 1, port);
        bind(fd.as_raw_fd(), &address)?;
        Ok(fd.into())
    };
    let first = new(0)?;
    let address = first.local_addr()?;
    let second = new(address.port())?;
    for number in 0..COUNT {
        loopback()?.send_to(&[u8::try_from(number)?], address)?;
    }
    let look = |socket: &UdpSocket| -> Result<Option<(SocketAddr, u8)>> {
        socket.set_nonblocking(true)?;
        let mut byte = [0];
        match socket.peek_from(&mut byte) {
            Ok((_, from)) => Ok(Some((from, byte[0]))),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error.into()),
        }
    };
    let before = (look(&first)?, look(&second)?);
    case.ready()?;
    let after = (look(&first)?, look(&second)?);
    ensure!(after == before, "First are {after:?}, were {before:?}");
    let mut seen = Vec::new();
    for socket in [&first, &second] {
        let mut last = None;
        while let Some((_, number)) = look(socket)? {
            socket.recv(&mut [0])?;
            ensure!(last < Some(number), "{number} after {last:?}");
            last = Some(number);
            seen.push(usize::from(number));
        }
    }
    seen.sort_unstable();
    ensure!(seen == (0..COUNT).collect::<Vec<_>>(), "There are {seen:?}");
    Ok(())
}

/// Level, type and bytes of what comes with the next datagram.
fn receive(socket: &UdpSocket) -> Result<Vec<(i32, i32, Vec<u8>)>> {
    let mut room = [0_u8; 64];
    let mut control = [0_u64; 64];
    let mut part = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: room.len(),
    };
    // SAFETY: plain data, for which zero is nothing.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut part;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr().cast();
    header.msg_controllen = size_of_val(&control);
    // SAFETY: everything the header points at outlives the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    sys("recvmsg", i64::try_from(got)?)?;
    let mut found = Vec::new();
    // SAFETY: the kernel has filled in the header and what it points at.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while let Some(message) = at.as_ref() {
            let length = message.cmsg_len - libc::CMSG_LEN(0) as usize;
            let bytes = std::slice::from_raw_parts(libc::CMSG_DATA(at), length).to_vec();
            found.push((message.cmsg_level, message.cmsg_type, bytes));
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Ok(found)
}

fn tells(found: &[(i32, i32, Vec<u8>)], level: i32, name: i32, tail: &[u8]) -> Result<()> {
    let one = found.iter().find(|(l, n, _)| (*l, *n) == (level, name));
    let (_, _, bytes) = one.with_context(|| format!("No {level}, {name} in {found:?}"))?;
    ensure!(
        bytes.starts_with(tail) || bytes.ends_with(tail),
        "{level}, {name} is {bytes:?}, not {tail:?}"
    );
    Ok(())
}

/// The address a datagram was sent to, its TTL and TOS, and when it came.
fn told(case: &Case) -> Result<()> {
    let to = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    for name in [libc::IP_PKTINFO, libc::IP_RECVTTL, libc::IP_RECVTOS] {
        set(&to, libc::IPPROTO_IP, name, 1)?;
    }
    set(&to, libc::SOL_SOCKET, libc::SO_TIMESTAMP, 1)?;
    let from = loopback()?;
    set(&from, libc::IPPROTO_IP, libc::IP_TTL, 9)?;
    set(&from, libc::IPPROTO_IP, libc::IP_TOS, 0x10)?;
    from.send_to(b"x", (Ipv4Addr::new(127, 0, 0, 2), to.local_addr()?.port()))?;
    case.ready()?;
    let found = receive(&to)?;
    tells(&found, libc::IPPROTO_IP, libc::IP_PKTINFO, &[127, 0, 0, 2])?;
    tells(&found, libc::IPPROTO_IP, libc::IP_TTL, &[9, 0, 0, 0])?;
    tells(&found, libc::IPPROTO_IP, libc::IP_TOS, &[0x10])?;
    tells(&found, libc::SOL_SOCKET, libc::SO_TIMESTAMP, &[])
}

/// IPv6, and IPv4 that came to an IPv6 socket.
fn v6(case: &Case) -> Result<()> {
    let to = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let port = to.local_addr()?.port();
    let from = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
    let mapped = loopback()?;
    let address = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let address4 = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    put(&to, &from, b"over IPv6", address)?;
    put(&to, &mapped, b"over IPv4", address4)?;
    put(&to, &from, b"", address)?;
    let asks = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
    for name in [
        libc::IPV6_RECVPKTINFO,
        libc::IPV6_RECVHOPLIMIT,
        libc::IPV6_RECVTCLASS,
    ] {
        set(&asks, libc::IPPROTO_IPV6, name, 1)?;
    }
    set(&from, libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 9)?;
    set(&from, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 0x20)?;
    from.send_to(b"x", asks.local_addr()?)?;
    case.ready()?;
    let v4 = mapped.local_addr()?;
    let v4 = SocketAddr::from((Ipv4Addr::LOCALHOST.to_ipv6_mapped(), v4.port()));
    expect(&to, b"over IPv6", from.local_addr()?)?;
    expect(&to, b"over IPv4", v4)?;
    expect(&to, b"", from.local_addr()?)?;
    let found = receive(&asks)?;
    let info = Ipv6Addr::LOCALHOST.octets();
    tells(&found, libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info)?;
    tells(
        &found,
        libc::IPPROTO_IPV6,
        libc::IPV6_HOPLIMIT,
        &[9, 0, 0, 0],
    )?;
    tells(
        &found,
        libc::IPPROTO_IPV6,
        libc::IPV6_TCLASS,
        &[0x20, 0, 0, 0],
    )?;
    goes_on(&to, &from, address)
}

/// Several datagrams that came in one; `UDP_SEGMENT` and `UDP_GRO`.
fn gro(case: &Case) -> Result<()> {
    let (to, from) = (loopback()?, loopback()?);
    set(&to, libc::IPPROTO_UDP, 104, 1)?;
    set(&from, libc::IPPROTO_UDP, 103, 500)?;
    let sent = pattern(3, 1_700);
    from.send_to(&sent, to.local_addr()?)?;
    case.ready()?;
    to.set_nonblocking(true)?;
    let (mut found, mut buffer) = (Vec::<u8>::new(), [0; 4096]);
    while let Ok(length) = to.recv(&mut buffer) {
        found.extend(&buffer[..length]);
    }
    ensure!(found == sent, "Received {} bytes", found.len());
    Ok(())
}
