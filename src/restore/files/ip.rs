//! Packets that come from whoever they say, over the loopback interface: what sockets had been
//! sent arrives once more.

use super::error::{FilesError, socket};
use crate::bpf::events::TRK_FILL_MARK;
use crate::sys::socket::{new, set_int_option, set_option};
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// What stands in a packet's header where nothing else is known (`IPDEFTTL`).
const TTL: u8 = 64;

/// What a packet's header says.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Sender; of the same family as `to`.
    pub from: IpAddr,
    /// Receiver.
    pub to: IpAddr,
    /// `IPPROTO_*`.
    pub protocol: u8,
    /// TTL or hop limit.
    pub ttl: Option<u8>,
    /// TOS or traffic class.
    pub tos: Option<u8>,
}

impl Header {
    /// The packet with this payload; `None` if it is too long for one, or goes from one family to
    /// the other. The kernel fills in what raw(7) says.
    #[must_use]
    pub fn packet(&self, payload: &[u8]) -> Option<Vec<u8>> {
        let length = u16::try_from(payload.len()).ok()?;
        let mut packet = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => self.v4(from, to, length)?,
            (IpAddr::V6(from), IpAddr::V6(to)) => self.v6(from, to, length),
            _ => return None,
        };
        packet.extend(payload);
        Some(packet)
    }

    /// RFC 791.
    fn v4(&self, from: Ipv4Addr, to: Ipv4Addr, length: u16) -> Option<Vec<u8>> {
        const HEADER: u16 = 20;
        let total = HEADER.checked_add(length)?;
        let mut packet = vec![0x45, self.tos.unwrap_or(0)];
        packet.extend(total.to_be_bytes());
        // No number, no fragment.
        packet.extend([0, 0, 0, 0]);
        packet.extend([self.ttl.unwrap_or(TTL), self.protocol, 0, 0]);
        packet.extend(from.octets());
        packet.extend(to.octets());
        Some(packet)
    }

    /// RFC 8200.
    fn v6(&self, from: Ipv6Addr, to: Ipv6Addr, length: u16) -> Vec<u8> {
        let class = self.tos.unwrap_or(0);
        let mut packet = vec![0x60 | class >> 4, class << 4, 0, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([self.protocol, self.ttl.unwrap_or(TTL)]);
        packet.extend(from.octets());
        packet.extend(to.octets());
        packet
    }

    /// The checksum of a payload that has 0 in its place: RFC 9293, RFC 768, RFC 8200.
    #[must_use]
    pub fn checksum(&self, payload: &[u8]) -> u16 {
        let octets = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let pseudo = [
            &octets(self.from)[..],
            &octets(self.to),
            &length.to_be_bytes(),
            &[0, 0, 0, self.protocol],
        ];
        checksum(&[&pseudo.concat(), payload])
    }
}

/// RFC 1071 over parts of even length but the last; 0 is sent as all ones (RFC 768), which is the
/// same number.
pub(super) fn checksum(parts: &[&[u8]]) -> u16 {
    let pairs = parts.iter().flat_map(|part| part.chunks(2));
    let words = pairs.map(|pair| {
        let low = pair.get(1).copied().unwrap_or(0);
        u32::from(u16::from_be_bytes([pair[0], low]))
    });
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    match u16::try_from(sum).map(|sum| !sum) {
        Ok(0) | Err(_) => u16::MAX,
        Ok(sum) => sum,
    }
}

/// Waits for a packet to do what it is for; says whether it has.
///
/// # Errors
/// Those of `done`.
pub fn has_arrived(mut done: impl FnMut() -> Result<bool, FilesError>) -> Result<bool, FilesError> {
    /// How long one may take over the loopback interface.
    const PATIENCE: Duration = Duration::from_secs(2);
    let begun = Instant::now();
    while !done()? {
        if begun.elapsed() >= PATIENCE {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_micros(100));
    }
    Ok(true)
}

/// As [`has_arrived`], where it has to.
///
/// # Errors
/// Those of `done`, and that it has not.
pub fn until(
    object: &str,
    what: &str,
    done: impl FnMut() -> Result<bool, FilesError>,
) -> Result<(), FilesError> {
    if has_arrived(done)? {
        return Ok(());
    }
    Err(FilesError::NotReceived {
        object: object.to_owned(),
        what: what.to_owned(),
    })
}

/// Sends packets to this machine, past the network lock.
#[derive(Debug, Default)]
pub struct Sender([Option<OwnedFd>; 2]);

impl Sender {
    /// Sends one; the inner error is that of sendto(2).
    ///
    /// # Errors
    /// There can be no raw socket.
    pub fn send(
        &mut self,
        object: &str,
        to: IpAddr,
        packet: &[u8],
    ) -> Result<Result<(), Errno>, FilesError> {
        let raw = self.raw(object, to.is_ipv6())?.as_raw_fd();
        // The port is in the packet; of a raw socket's address it means something else.
        let address = ns::SockaddrStorage::from(SocketAddr::new(to, 0));
        Ok(ns::sendto(raw, packet, &address, ns::MsgFlags::empty()).map(drop))
    }

    fn raw(&mut self, object: &str, v6: bool) -> Result<&OwnedFd, FilesError> {
        let family = if v6 { libc::AF_INET6 } else { libc::AF_INET };
        let place = &mut self.0[usize::from(v6)];
        if let Some(raw) = place {
            return Ok(raw);
        }
        let failed = || socket(object);
        let raw = new(family, libc::SOCK_RAW, libc::IPPROTO_RAW).map_err(failed())?;
        // Whatever an address leads to, nothing leaves the machine.
        let device = (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
        set_option(raw.as_fd(), device.0, device.1, b"lo\0").map_err(failed())?;
        // Past the network lock, which is still there.
        let mark = TRK_FILL_MARK.cast_signed();
        set_int_option(raw.as_fd(), libc::SOL_SOCKET, libc::SO_MARK, mark).map_err(failed())?;
        Ok(place.insert(raw))
    }
}
