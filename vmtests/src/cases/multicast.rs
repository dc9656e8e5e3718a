//! Multicast groups that sockets are members of, and the interfaces that datagrams leave by.

use std::net::{Ipv4Addr, Ipv6Addr, UdpSocket};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;

use super::probe::{PATIENCE, option, set_option};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("multicast_v4", v4),
    Entry::carried("multicast_v6", v6),
    Entry::carried("multicast_unicast_if", unicast),
    Entry::refused("refused_multicast_source", "some senders only", source),
];

fn receives(socket: &UdpSocket, text: &[u8]) -> Result<()> {
    socket.set_read_timeout(Some(PATIENCE))?;
    let mut bytes = [0; 64];
    let length = socket.recv(&mut bytes).context("Nothing came")?;
    ensure!(&bytes[..length] == text, "Received {bytes:?}");
    Ok(())
}

/// Two groups; a sender whose datagrams leave by the loopback interface.
fn v4(case: &Case) -> Result<()> {
    let groups = [Ipv4Addr::new(239, 1, 2, 3), Ipv4Addr::new(239, 1, 2, 4)];
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    for group in &groups {
        socket.join_multicast_v4(group, &Ipv4Addr::LOCALHOST)?;
    }
    let port = socket.local_addr()?.port();
    let sender = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let lo = if_nametoindex("lo")?.to_ne_bytes();
    let by = [[0; 4], [127, 0, 0, 1], lo].concat();
    set_option(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF, &by)?;
    sender.send_to(b"before", (groups[0], port))?;
    case.ready()?;
    receives(&socket, b"before")?;
    for group in &groups {
        sender.send_to(b"after", (*group, port))?;
        receives(&socket, b"after")?;
    }
    let address = option(&sender, libc::IPPROTO_IP, libc::IP_MULTICAST_IF)?;
    ensure!(address == [127, 0, 0, 1], "It sends from {address:?}");
    for group in &groups {
        let twice = socket.join_multicast_v4(group, &Ipv4Addr::LOCALHOST);
        let errno = twice.err().and_then(|error| error.raw_os_error());
        ensure!(
            errno == Some(Errno::EADDRINUSE as i32),
            "To join again gives {errno:?}"
        );
        socket.leave_multicast_v4(group, &Ipv4Addr::LOCALHOST)?;
    }
    Ok(())
}

/// A group of the link, over IPv6; nothing routes to groups over the loopback interface.
fn v6(case: &Case) -> Result<()> {
    let group = Ipv6Addr::new(0xff12, 0, 0, 0, 0, 0, 0, 0x77);
    let lo = if_nametoindex("lo")?;
    let listed = || -> Result<bool> {
        let all = std::fs::read_to_string("/proc/net/igmp6")?;
        let mut of_lo = all.lines().filter(|line| line.contains(" lo "));
        Ok(of_lo.any(|line| line.contains("ff120000000000000000000000000077")))
    };
    let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    socket.join_multicast_v6(&group, lo)?;
    ensure!(listed()?, "The group is not listed");
    let sender = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let (level, name) = (libc::IPPROTO_IPV6, libc::IPV6_MULTICAST_IF);
    set_option(&sender, level, name, &lo.to_ne_bytes())?;
    case.ready()?;
    ensure!(option(&sender, level, name)? == lo.to_ne_bytes(), "Not lo");
    ensure!(listed()?, "The group is lost");
    socket.leave_multicast_v6(&group, lo)?;
    ensure!(!listed()?, "Somebody else is a member, too");
    Ok(())
}

/// `IP_UNICAST_IF` and `IPV6_UNICAST_IF`, which take the number in network order.
fn unicast(case: &Case) -> Result<()> {
    const IPV6_UNICAST_IF: i32 = 76;
    let lo = if_nametoindex("lo")?.to_be_bytes();
    let four = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let six = UdpSocket::bind((Ipv6Addr::LOCALHOST, 0))?;
    let options = [
        (&four, libc::IPPROTO_IP, libc::IP_UNICAST_IF),
        (&six, libc::IPPROTO_IPV6, IPV6_UNICAST_IF),
    ];
    for (socket, level, name) in options {
        set_option(socket, level, name, &lo)?;
    }
    case.ready()?;
    for (socket, level, name) in options {
        let now = option(socket, level, name)?;
        ensure!(now == lo, "Option {level}, {name} is {now:?}");
    }
    four.send_to(b"on", four.local_addr()?)?;
    receives(&four, b"on")
}

/// `struct ip_mreq_source`: one sender of a group.
fn source(case: &Case) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let one = [[239, 1, 2, 5], [127, 0, 0, 1], [127, 0, 0, 9]].concat();
    let (level, join) = (libc::IPPROTO_IP, libc::IP_ADD_SOURCE_MEMBERSHIP);
    set_option(&socket, level, join, &one)?;
    case.ready()?;
    Ok(set_option(
        &socket,
        level,
        libc::IP_DROP_SOURCE_MEMBERSHIP,
        &one,
    )?)
}
