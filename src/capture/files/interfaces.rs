//! What a socket has to do with network interfaces, by their names.

use super::CollectError;
use super::borrow::Borrowed;
use crate::bpf::events::{MemberRec, SockRec};
use crate::model::frozen::{Interfaces, Membership, Outgoing};
use crate::sys::socket::option;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use nix::libc;
use nix::net::if_::if_indextoname;
use serde_bytes::ByteBuf;

/// Reads the groups of a socket and the interfaces its datagrams leave by; `members` are its own,
/// the newest first.
///
/// # Errors
/// There is no such interface any more, or a socket call fails.
pub fn read(
    from: &Borrowed,
    rec: &SockRec,
    members: &[&MemberRec],
) -> Result<Interfaces, CollectError> {
    let joined = members.iter().rev().map(|member| {
        Ok(Membership {
            group: group(member),
            interface: name(from, member.ifindex)?,
        })
    });
    let joined = joined.collect::<Result<_, CollectError>>()?;
    let mut outgoing = Vec::new();
    for (index, v6, multicast) in [
        (rec.out_multicast, false, true),
        (rec.out_unicast, false, false),
        (rec.out_multicast6, true, true),
        (rec.out_unicast6, true, false),
    ] {
        if index != 0 {
            let address = (multicast && !v6).then(|| address(from)).transpose()?;
            outgoing.push(Outgoing {
                v6,
                multicast,
                interface: name(from, index)?,
                address,
            });
        }
    }
    Ok(Interfaces { joined, outgoing })
}

fn group(member: &MemberRec) -> IpAddr {
    let [a, b, c, d, ..] = member.group;
    if i32::from(member.family) == libc::AF_INET {
        Ipv4Addr::new(a, b, c, d).into()
    } else {
        Ipv6Addr::from(member.group).into()
    }
}

fn name(from: &Borrowed, index: i32) -> Result<ByteBuf, CollectError> {
    let name = if_indextoname(index.cast_unsigned()).map_err(from.failed("if_indextoname"))?;
    Ok(ByteBuf::from(name.into_bytes()))
}

fn address(from: &Borrowed) -> Result<Ipv4Addr, CollectError> {
    let (level, name) = (libc::IPPROTO_IP, libc::IP_MULTICAST_IF);
    let address = option(from.as_fd(), level, name, 4).map_err(from.socket_failed())?;
    let address = address.first_chunk::<4>().copied();
    Ok(address.map_or(Ipv4Addr::UNSPECIFIED, Ipv4Addr::from))
}
