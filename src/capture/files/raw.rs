//! Raw and packet sockets: options and addresses. What waits in them is copies of what was sent to
//! others, and is lost as what passes by while nobody listens.

use super::CollectError;
use super::borrow::Borrowed;
use super::socket::{Read, is_v6, whole};
use crate::bpf::events::SockRec;
use crate::model::frozen::{SockOption, SocketState};
use crate::sys::socket::own_address;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use nix::errno::Errno;
use nix::libc;
use nix::net::if_::if_indextoname;
use serde_bytes::ByteBuf;

/// Whether sockets of this family and type are carried by what is here.
pub fn is_carried(family: i32, socktype: i32) -> bool {
    match family {
        libc::AF_INET | libc::AF_INET6 => socktype == libc::SOCK_RAW,
        libc::AF_PACKET => [libc::SOCK_RAW, libc::SOCK_DGRAM].contains(&socktype),
        _ => false,
    }
}

/// Reads one of them.
///
/// # Errors
/// A socket call fails, or the interface of a packet socket is gone.
pub fn read(
    from: &Borrowed,
    rec: &SockRec,
    options: Vec<SockOption>,
) -> Result<Read, CollectError> {
    let state = if i32::from(rec.family) == libc::AF_PACKET {
        packet(from, rec)?
    } else {
        raw(rec)
    };
    whole(from, rec, options, state)
}

fn raw(rec: &SockRec) -> SocketState {
    let v6 = is_v6(rec);
    let address = |bytes: &[u8; 16]| {
        let [a, b, c, d, ..] = *bytes;
        let address = match v6 {
            true => IpAddr::from(Ipv6Addr::from(*bytes)),
            false => Ipv4Addr::new(a, b, c, d).into(),
        };
        (!address.is_unspecified()).then_some(address)
    };
    SocketState::Raw {
        v6,
        protocol: rec.protocol.into(),
        // Its port is the protocol's number, whether it is bound or not.
        local: address(&rec.local_addr),
        remote: address(&rec.remote_addr).map(|ip| SocketAddr::new(ip, rec.remote_port)),
    }
}

fn packet(from: &Borrowed, rec: &SockRec) -> Result<SocketState, CollectError> {
    let address = own_address(from.as_fd()).map_err(from.socket_failed())?;
    let (protocol, index) =
        bound(&address).ok_or_else(|| from.failed("getsockname")(Errno::EINVAL))?;
    let name = |index: i32| {
        let name = if_indextoname(index.cast_unsigned()).map_err(from.failed("if_indextoname"))?;
        Ok::<_, CollectError>(ByteBuf::from(name.into_bytes()))
    };
    Ok(SocketState::Packet {
        socktype: rec.type_.into(),
        protocol,
        interface: (index != 0).then(|| name(index)).transpose()?,
    })
}

/// Protocol and interface of a `struct sockaddr_ll`.
fn bound(address: &[u8]) -> Option<(u16, i32)> {
    let protocol = address.get(2..)?.first_chunk()?;
    let index = address.get(4..)?.first_chunk()?;
    Some((u16::from_be_bytes(*protocol), i32::from_ne_bytes(*index)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_socket_has_no_port() {
        let mut rec = SockRec {
            family: 2,
            protocol: 1,
            local_port: 1,
            ..SockRec::default()
        };
        let state = |rec: &SockRec| match raw(rec) {
            SocketState::Raw { local, remote, .. } => (local, remote),
            _ => panic!("not raw"),
        };
        assert_eq!(state(&rec), (None, None));
        rec.local_addr[..4].copy_from_slice(&[127, 0, 0, 1]);
        rec.remote_addr[..4].copy_from_slice(&[127, 0, 0, 2]);
        rec.remote_port = 9;
        let (local, remote) = state(&rec);
        assert_eq!(local, Some([127, 0, 0, 1].into()));
        assert_eq!(remote, Some(([127, 0, 0, 2], 9).into()));
    }

    #[test]
    fn a_link_layer_address_is_in_two_byte_orders() {
        let mut address = vec![17, 0, 0x08, 0x06];
        address.extend(3_i32.to_ne_bytes());
        assert_eq!(bound(&address), Some((0x806, 3)));
        assert_eq!(bound(&address[..6]), None);
    }
}
