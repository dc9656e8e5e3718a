//! What is queued in a UDP socket: it arrives once more.
//!
//! A raw socket can say who sent a packet, and the loopback interface brings it to whatever
//! socket has the port. So that this is the right one, among many that share an address, or in
//! spite of the peer it is connected to, the socket has a port of its own meanwhile, which it
//! loses by disconnecting from nobody: udp_disconnect() gives back what bind(2) has chosen.

use super::error::{FilesError, call, socket};
use super::ip::{Sender, has_arrived};
use super::packet::Packet;
use super::room::{Buffer, with_room};
use crate::model::frozen::{Datagram, SockOption};
use crate::sys::socket::{disconnect, local_address, option};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use nix::libc;
use nix::sys::socket as ns;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Whether an option is to be set before anything arrives: it says what is to be kept of a
/// packet. The others are about addresses, or about what is sent; one changes what arrives.
pub fn acts_on_arrival(option: &SockOption) -> bool {
    match option.level {
        libc::SOL_SOCKET => {
            [libc::SO_TIMESTAMP, libc::SO_TIMESTAMPNS, 63, 64].contains(&option.name)
        }
        libc::IPPROTO_IP => {
            [libc::IP_PKTINFO, libc::IP_RECVTTL, libc::IP_RECVTOS].contains(&option.name)
        }
        libc::IPPROTO_IPV6 => [
            libc::IPV6_V6ONLY,
            libc::IPV6_RECVPKTINFO,
            libc::IPV6_RECVHOPLIMIT,
            libc::IPV6_RECVTCLASS,
        ]
        .contains(&option.name),
        _ => false,
    }
}

/// Fills the queue of a new socket, which has no address then as before. A datagram that does
/// not arrive is lost, as datagrams may be, and named in the log.
///
/// # Errors
/// The kernel refuses a step.
pub fn fill(
    object: &str,
    fd: BorrowedFd<'_>,
    v6: bool,
    queue: &[Datagram],
) -> Result<(), FilesError> {
    let any: IpAddr = if v6 {
        Ipv6Addr::UNSPECIFIED.into()
    } else {
        Ipv4Addr::UNSPECIFIED.into()
    };
    let address = ns::SockaddrStorage::from(SocketAddr::new(any, 0));
    ns::bind(fd.as_raw_fd(), &address).map_err(call(object, "bind"))?;
    let bound = local_address(fd).map_err(call(object, "getsockname"))?;
    let bytes: usize = queue.iter().map(|one| one.data.len() + 4096).sum();
    with_room(object, fd, Buffer::RECEIVE, 4 * bytes, || {
        let mut way = Way::new(object, fd, bound.port());
        for datagram in queue {
            if !way.bring(datagram)? {
                tracing::warn!("{object}: a datagram from {} is lost", datagram.from);
            }
        }
        Ok(())
    })?;
    disconnect(fd).map_err(socket(object))
}

/// The way to a socket.
struct Way<'a> {
    object: &'a str,
    to: BorrowedFd<'a>,
    port: u16,
    sender: Sender,
}

impl<'a> Way<'a> {
    fn new(object: &'a str, to: BorrowedFd<'a>, port: u16) -> Self {
        Self {
            object,
            to,
            port,
            sender: Sender::default(),
        }
    }

    /// Sends a datagram and waits for it; says whether it is there.
    fn bring(&mut self, datagram: &Datagram) -> Result<bool, FilesError> {
        // A sender of IPv4 that an IPv6 socket has heard.
        let from = SocketAddr::new(datagram.from.ip().to_canonical(), datagram.from.port());
        let loopback: IpAddr = if from.is_ipv6() {
            Ipv6Addr::LOCALHOST.into()
        } else {
            Ipv4Addr::LOCALHOST.into()
        };
        let to = datagram.to.map(|to| to.to_canonical());
        let to = to.filter(|to| to.is_ipv6() == from.is_ipv6() && is_ours(*to));
        let packet = Packet {
            from,
            to: SocketAddr::new(to.unwrap_or(loopback), self.port),
            ttl: datagram.ttl,
            tos: datagram.tos,
            data: &datagram.data,
        };
        let Some(bytes) = packet.bytes() else {
            return Ok(false);
        };
        let before = self.queued()?;
        match self.sender.send(self.object, packet.to.ip(), &bytes)? {
            Ok(()) => self.arrived(before),
            Err(errno) => {
                tracing::warn!("{}: sendto {}: {errno}", self.object, packet.to.ip());
                Ok(false)
            }
        }
    }

    /// Whether more is queued than before. It is there as soon as it is sent, unless another CPU
    /// is to take it in. Nobody looks at the queue itself: of an empty datagram the kernel tells
    /// only once where it is (`skb->peeked`), which the next checkpoint has to know.
    fn arrived(&self, before: u32) -> Result<bool, FilesError> {
        has_arrived(|| Ok(self.queued()? > before))
    }

    /// Memory that is charged to the queue.
    fn queued(&self) -> Result<u32, FilesError> {
        let (level, name) = (libc::SOL_SOCKET, libc::SO_MEMINFO);
        // SK_MEMINFO_RMEM_ALLOC is the first of several words (include/uapi/linux/sock_diag.h).
        let words = option(self.to, level, name, 4).map_err(socket(self.object))?;
        Ok(words
            .first_chunk()
            .map_or(0, |word| u32::from_ne_bytes(*word)))
    }
}

/// Whether an address is this machine's.
fn is_ours(ip: IpAddr) -> bool {
    std::net::UdpSocket::bind((ip, 0)).is_ok()
}
