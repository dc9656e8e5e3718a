//! UDP datagrams as packets, for a raw socket that may say who sent them.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What stands in a packet's header where nothing else is known (`IPDEFTTL`).
const TTL: u8 = 64;
const UDP_HEADER: usize = 8;

/// A datagram on its way to a port.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// Sender; of the same family as `to`.
    pub from: SocketAddr,
    /// Receiver.
    pub to: SocketAddr,
    /// TTL or hop limit.
    pub ttl: Option<u8>,
    /// TOS or traffic class.
    pub tos: Option<u8>,
    /// Bytes.
    pub data: &'a [u8],
}

impl Packet<'_> {
    /// The packet with all its headers; `None` if it is too long for one, or goes from one
    /// family to the other. The kernel fills in what raw(7) says.
    #[must_use]
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let length = u16::try_from(UDP_HEADER + self.data.len()).ok()?;
        let mut udp = Vec::with_capacity(usize::from(length));
        for word in [self.from.port(), self.to.port(), length, 0] {
            udp.extend(word.to_be_bytes());
        }
        udp.extend(self.data);
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => self.v4(from, to, &udp),
            (IpAddr::V6(from), IpAddr::V6(to)) => Some(self.v6(from, to, length, udp)),
            _ => None,
        }
    }

    /// RFC 791; a UDP checksum of 0 is none.
    fn v4(&self, from: Ipv4Addr, to: Ipv4Addr, udp: &[u8]) -> Option<Vec<u8>> {
        const HEADER: u16 = 20;
        let total = HEADER.checked_add(u16::try_from(udp.len()).ok()?)?;
        let mut packet = vec![0x45, self.tos.unwrap_or(0)];
        packet.extend(total.to_be_bytes());
        // No number, no fragment.
        packet.extend([0, 0, 0, 0]);
        packet.extend([self.ttl.unwrap_or(TTL), PROTOCOL, 0, 0]);
        packet.extend(from.octets());
        packet.extend(to.octets());
        packet.extend(udp);
        Some(packet)
    }

    /// RFC 8200, whose datagrams must have a checksum.
    fn v6(&self, from: Ipv6Addr, to: Ipv6Addr, length: u16, mut udp: Vec<u8>) -> Vec<u8> {
        let pseudo = [
            &from.octets()[..],
            &to.octets(),
            &u32::from(length).to_be_bytes(),
            &[0, 0, 0, PROTOCOL],
        ]
        .concat();
        let sum = checksum(&[&pseudo, &udp]);
        udp[6..UDP_HEADER].copy_from_slice(&sum.to_be_bytes());
        let class = self.tos.unwrap_or(0);
        let mut packet = vec![0x60 | class >> 4, class << 4, 0, 0];
        packet.extend(length.to_be_bytes());
        packet.extend([PROTOCOL, self.ttl.unwrap_or(TTL)]);
        packet.extend(from.octets());
        packet.extend(to.octets());
        packet.extend(udp);
        packet
    }
}

/// `IPPROTO_UDP`.
const PROTOCOL: u8 = 17;

/// RFC 1071 over parts of even length but the last; 0 is sent as all ones (RFC 768).
fn checksum(parts: &[&[u8]]) -> u16 {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn packet<'a>(from: &str, to: &str, data: &'a [u8]) -> Packet<'a> {
        Packet {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            ttl: Some(9),
            tos: Some(0xb8),
            data,
        }
    }

    #[test]
    fn a_datagram_over_ipv4() {
        let bytes = packet("192.0.2.1:1", "127.0.0.1:2", b"abc")
            .bytes()
            .unwrap();
        let header = [
            0x45, 0xb8, 0, 31, 0, 0, 0, 0, 9, 17, 0, 0, 192, 0, 2, 1, 127, 0, 0, 1,
        ];
        assert_eq!(bytes[..20], header);
        assert_eq!(bytes[20..], [0, 1, 0, 2, 0, 11, 0, 0, b'a', b'b', b'c']);
    }

    /// All words of the pseudo header and the datagram add up to all ones (RFC 1071).
    #[test]
    fn a_datagram_over_ipv6_adds_up() {
        for data in [&b""[..], b"odd", b"even", &[0xff; 999]] {
            let bytes = packet("[2001:db8::1]:1", "[::1]:2", data).bytes().unwrap();
            assert_eq!(bytes[..8], [0x6b, 0x80, 0, 0, bytes[4], bytes[5], 17, 9]);
            let length = &bytes[4..6];
            let parts = [&bytes[8..40], &[0, 0], length, &[0, 0, 0, 17], &bytes[40..]];
            // 0 and all ones are the same number, and a sum is told as all ones.
            assert_eq!(checksum(&parts), 0xffff, "{data:?}");
        }
    }

    #[test]
    fn too_long_or_of_two_families() {
        let long = vec![0; 65_508];
        assert!(
            packet("192.0.2.1:1", "127.0.0.1:2", &long)
                .bytes()
                .is_none()
        );
        assert!(
            packet("192.0.2.1:1", "127.0.0.1:2", &long[1..])
                .bytes()
                .is_some()
        );
        assert!(packet("192.0.2.1:1", "[::1]:2", b"").bytes().is_none());
    }
}
