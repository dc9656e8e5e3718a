//! What is queued in a UDP socket: peeked at, one datagram after the other.

use super::CollectError;
use super::borrow::Borrowed;
use crate::bpf::events::SockRec;
use crate::model::frozen::Datagram;
use crate::sys::message::{Received, Room};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use nix::errno::Errno;
use nix::libc;
use serde_bytes::ByteBuf;

/// `UDP_GRO` of include/uapi/linux/udp.h: the size of the parts of what came in one.
const UDP_GRO: i32 = 104;

/// Bytes of the longest datagram, several in one included.
const LONGEST: usize = 64 << 10;

/// Reads all that is queued and leaves it where it is.
///
/// # Errors
/// A socket call fails, something is told of a datagram's way that cannot be had again, or an
/// ICMP message has arrived since the pass over the descriptors.
pub fn queue(from: &Borrowed, rec: &SockRec) -> Result<Vec<Datagram>, CollectError> {
    if from.has_error()? {
        return Err(from.blocked(OBJECT, ERROR));
    }
    let (mut queue, mut seen) = (Vec::new(), 0);
    from.peeking(|| {
        let mut room = Room::new(LONGEST);
        loop {
            match room.peek(from.as_fd()).and_then(|found| datagrams(&found)) {
                Ok(found) => {
                    queue.extend(found);
                    seen += 1;
                }
                Err(Errno::EAGAIN) => return Ok(()),
                Err(Errno::ENOTSUP) => return Err(from.blocked(OBJECT, UNTOLD)),
                Err(errno) => return Err(from.failed("recvmsg(MSG_PEEK)")(errno)),
            }
        }
    })?;
    if seen < rec.rcv_qlen {
        return Err(from.blocked(OBJECT, EMPTY));
    }
    Ok(queue)
}

const OBJECT: &str = "UDP socket";

/// To look into the queue would take it away from the application.
const ERROR: &str = "an error that it was not told yet is not carried; try again";

/// Why a datagram is not carried.
const UNTOLD: &str = "a datagram that it has not read yet is from a link-local address, or tells \
                      more of its way (IP_RECVORIGDSTADDR and the like) than is carried; try again";

/// __skb_try_recv_from_queue() passes over it.
const EMPTY: &str = "an empty datagram waits that was looked at before (MSG_PEEK, or an earlier \
                     checkpoint), which the kernel does not show again; try again";

/// One datagram, or those that came in one (`UDP_GRO`). `ENOTSUP`: see [`UNTOLD`].
fn datagrams(found: &Received<'_>) -> Result<Vec<Datagram>, Errno> {
    if found.flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
        return Err(Errno::EMSGSIZE);
    }
    let mut one = Datagram {
        from: address(&found.name).ok_or(Errno::ENOTSUP)?,
        to: None,
        ttl: None,
        tos: None,
        data: ByteBuf::new(),
    };
    let mut size = found.data.len();
    for (level, name, bytes) in &found.control {
        match (*level, *name) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) => one.to = tail::<4>(bytes).map(IpAddr::from),
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                one.to = bytes.first_chunk::<16>().copied().map(IpAddr::from);
            }
            (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT) => {
                one.ttl = bytes.first().copied();
            }
            (libc::IPPROTO_IP, libc::IP_TOS) | (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                one.tos = bytes.first().copied();
            }
            (libc::IPPROTO_UDP, UDP_GRO) => {
                let parts = bytes.first_chunk().map(|size| i32::from_ne_bytes(*size));
                size = parts
                    .and_then(|parts| usize::try_from(parts).ok())
                    .filter(|parts| *parts > 0)
                    .unwrap_or(size);
            }
            // What arrives again has another port in its header, and other options.
            (libc::IPPROTO_IP | libc::IPPROTO_IPV6, _) => return Err(Errno::ENOTSUP),
            // When it arrived, and how many were dropped before it.
            _ => {}
        }
    }
    let data = |bytes: &[u8]| Datagram {
        data: ByteBuf::from(bytes),
        ..one.clone()
    };
    if found.data.is_empty() {
        return Ok(vec![data(&[])]);
    }
    Ok(found.data.chunks(size).map(data).collect())
}

/// The last bytes: `ipi_addr` is the last member of `struct in_pktinfo`.
fn tail<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.last_chunk().copied()
}

/// `struct sockaddr_in` or `sockaddr_in6` without a scope, which may be another one's later.
fn address(name: &[u8]) -> Option<SocketAddr> {
    let (family, rest) = name.split_first_chunk()?;
    let (port, rest) = rest.split_first_chunk()?;
    let port = u16::from_be_bytes(*port);
    match i32::from(u16::from_ne_bytes(*family)) {
        libc::AF_INET => {
            let ip = rest.first_chunk::<4>().copied().map(Ipv4Addr::from)?;
            Some(SocketAddr::new(ip.into(), port))
        }
        libc::AF_INET6 => {
            let (_flow, rest) = rest.split_first_chunk::<4>()?;
            let (ip, rest) = rest.split_first_chunk::<16>()?;
            let scope = u32::from_ne_bytes(*rest.first_chunk()?);
            let ip = Ipv6Addr::from(*ip);
            (scope == 0).then(|| SocketAddrV6::new(ip, port, 0, 0).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received<'a>(data: &'a [u8], control: Vec<(i32, i32, Vec<u8>)>) -> Received<'a> {
        Received {
            data,
            name: [&2_u16.to_ne_bytes()[..], &[0, 53, 192, 0, 2, 7], &[0; 8]].concat(),
            control,
            flags: 0,
        }
    }

    #[test]
    fn what_came_in_one_was_several() {
        let size = (libc::IPPROTO_UDP, UDP_GRO, 3_i32.to_ne_bytes().to_vec());
        let found = datagrams(&received(b"onetwo3", vec![size])).unwrap();
        let data: Vec<_> = found.iter().map(|one| &one.data[..]).collect();
        assert_eq!(data, [&b"one"[..], b"two", b"3"]);
        assert_eq!(found[0].from, "192.0.2.7:53".parse().unwrap());
    }

    #[test]
    fn nothing_is_a_datagram_too() {
        let found = datagrams(&received(b"", Vec::new())).unwrap();
        assert_eq!(found.len(), 1);
        assert!(found[0].data.is_empty() && found[0].to.is_none());
    }

    #[test]
    fn what_is_told_of_the_way_is_kept() {
        let info = [&[0; 8][..], &[192, 0, 2, 1]].concat();
        let control = vec![
            (libc::IPPROTO_IP, libc::IP_PKTINFO, info),
            (libc::IPPROTO_IP, libc::IP_TTL, vec![61, 0, 0, 0]),
            (libc::IPPROTO_IP, libc::IP_TOS, vec![2]),
        ];
        let found = datagrams(&received(b"x", control)).unwrap();
        assert_eq!(found[0].to, Some("192.0.2.1".parse().unwrap()));
        assert_eq!((found[0].ttl, found[0].tos), (Some(61), Some(2)));
    }

    #[test]
    fn a_link_of_its_own_and_the_port_it_was_sent_to_are_refused() {
        let mut link = received(b"x", Vec::new());
        link.name = [
            &10_u16.to_ne_bytes()[..],
            &[0, 53],
            &[0; 4],
            &Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1).octets(),
            &2_u32.to_ne_bytes(),
        ]
        .concat();
        assert_eq!(datagrams(&link).unwrap_err(), Errno::ENOTSUP);
        let port = (libc::IPPROTO_IP, libc::IP_ORIGDSTADDR, vec![0; 16]);
        let found = datagrams(&received(b"x", vec![port]));
        assert_eq!(found.unwrap_err(), Errno::ENOTSUP);
    }
}
