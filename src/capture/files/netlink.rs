//! Netlink sockets, netlink(7).

use super::CollectError;
use super::borrow::Borrowed;
use super::socket::{Read, whole};
use crate::bpf::events::SockRec;
use crate::model::frozen::{NetlinkSocket, SockOption, SocketState};
use crate::sys::socket::option;
use nix::libc;
use nix::sys::socket as ns;
use std::os::fd::{AsFd, AsRawFd};

/// Families without state beyond what [`NetlinkSocket`] has.
const PROTOCOLS: &[i32] = &[
    libc::NETLINK_ROUTE,
    libc::NETLINK_SOCK_DIAG,
    libc::NETLINK_KOBJECT_UEVENT,
];

/// `NETLINK_CONNECTED` of net/netlink/af_netlink.c.
const CONNECTED: u8 = 1;

/// Groups that `struct sockaddr_nl` has bits for.
const ADDRESS_GROUPS: u32 = 32;

/// Bytes for what `NETLINK_LIST_MEMBERSHIPS` tells: a bit for each group, of which the families
/// that are carried have less than a hundred.
const MEMBERSHIPS: usize = 1024 / 8;

/// Why a netlink socket is not carried.
pub fn refusal(rec: &SockRec) -> Option<String> {
    match i32::from(rec.protocol) {
        libc::NETLINK_GENERIC => Some(
            "the next kernel numbers generic netlink's families and groups anew, and the \
             application has looked them up; close it before the update"
                .into(),
        ),
        protocol if !PROTOCOLS.contains(&protocol) => Some(format!(
            "netlink sockets of protocol {protocol} are not carried yet; close it before the update"
        )),
        _ if rec.rcv_qlen > 0 => Some(format!(
            "{} messages that it has not read yet are not carried; try again",
            rec.rcv_qlen
        )),
        _ => None,
    }
}

/// Reads one.
///
/// # Errors
/// A socket call fails.
pub fn read(
    from: &Borrowed,
    rec: &SockRec,
    options: Vec<SockOption>,
) -> Result<Read, CollectError> {
    let fd = from.fd.as_raw_fd();
    let local: ns::NetlinkAddr = ns::getsockname(fd).map_err(from.failed("getsockname"))?;
    let remote = if rec.state == CONNECTED {
        let remote: ns::NetlinkAddr = ns::getpeername(fd).map_err(from.failed("getpeername"))?;
        Some((remote.pid(), remote.groups()))
    } else {
        None
    };
    let memberships = option(
        from.fd.as_fd(),
        libc::SOL_NETLINK,
        libc::NETLINK_LIST_MEMBERSHIPS,
        MEMBERSHIPS,
    )
    .map_err(from.socket_failed())?;
    let socket = NetlinkSocket {
        protocol: rec.protocol.into(),
        datagram: i32::from(rec.type_) == libc::SOCK_DGRAM,
        port: local.pid(),
        groups: local.groups(),
        more_groups: groups(&memberships)
            .filter(|group| *group > ADDRESS_GROUPS)
            .collect(),
        remote,
    };
    whole(from, rec, options, SocketState::Netlink(socket))
}

/// The numbers of the groups in an array of bits in native words of 32, the first for group 1.
fn groups(memberships: &[u8]) -> impl Iterator<Item = u32> {
    let (words, _) = memberships.as_chunks();
    let words = (0..).zip(words.iter().map(|word| u32::from_ne_bytes(*word)));
    words.flat_map(|(index, word)| {
        let bits = (0..u32::BITS).filter(move |bit| word >> bit & 1 != 0);
        bits.map(move |bit| index * u32::BITS + bit + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_numbered_from_one() {
        let words = [0x8000_0001_u32, 0, 0b100].map(u32::to_ne_bytes);
        let found: Vec<u32> = groups(words.as_flattened()).collect();
        assert_eq!(found, [1, 32, 67]);
    }
}
