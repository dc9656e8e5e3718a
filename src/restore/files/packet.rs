//! UDP datagrams as packets, for a raw socket that may say who sent them.

use super::ip::Header;
use core::net::SocketAddr;

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
    /// family to the other.
    #[must_use]
    pub fn bytes(&self) -> Option<Vec<u8>> {
        let length = u16::try_from(UDP_HEADER + self.data.len()).ok()?;
        let mut udp = Vec::with_capacity(usize::from(length));
        for word in [self.from.port(), self.to.port(), length, 0] {
            udp.extend(word.to_be_bytes());
        }
        udp.extend(self.data);
        let header = Header {
            from: self.from.ip(),
            to: self.to.ip(),
            protocol: PROTOCOL,
            ttl: self.ttl,
            tos: self.tos,
        };
        // Over IPv4 a checksum of 0 is none; over IPv6 there must be one.
        if header.to.is_ipv6() {
            let sum = header.checksum(&udp);
            udp[6..UDP_HEADER].copy_from_slice(&sum.to_be_bytes());
        }
        header.packet(&udp)
    }
}

/// `IPPROTO_UDP`.
const PROTOCOL: u8 = 17;

#[cfg(test)]
mod tests {
    use super::super::ip::checksum;
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
