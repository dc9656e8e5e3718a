//! TCP segments of the peer of a connection that waits to be accepted, or is to end.

use super::ip::Header;
use crate::model::frozen::{TcpConnection, TcpOptions, WaitingConnection};
use core::net::SocketAddr;

/// `IPPROTO_TCP`.
const PROTOCOL: u8 = 6;

/// Flags of RFC 9293.
pub const FIN: u8 = 1;
/// Reset.
pub const RST: u8 = 4;
/// The bytes are to be given to the receiver.
pub const PSH: u8 = 8;
/// The acknowledgement number means something.
pub const ACK: u8 = 16;

/// The peer of a connection, which sends; both ends are of one family.
#[derive(Clone, Copy, Debug)]
pub struct Peer {
    /// Our end.
    pub local: SocketAddr,
    /// Theirs.
    pub remote: SocketAddr,
    /// Sequence number of the first byte that it sends.
    first: u32,
    /// What it acknowledges.
    acknowledged: u32,
    /// How many bytes it takes.
    window: u32,
    negotiated: TcpOptions,
    /// Its clock, where timestamps were agreed on.
    clock: u32,
}

impl Peer {
    /// That of a connection which has received nothing yet.
    #[must_use]
    pub fn of_waiting(connection: &WaitingConnection) -> Self {
        Self {
            local: canonical(connection.local),
            remote: canonical(connection.remote),
            first: connection.received_seq,
            acknowledged: connection.write_seq,
            window: connection.window,
            negotiated: connection.negotiated,
            clock: connection.peer_timestamp,
        }
    }

    /// That of a connection which has received all of its queue, and has not agreed on timestamps.
    #[must_use]
    pub fn of(connection: &TcpConnection) -> Self {
        Self {
            local: canonical(connection.local),
            remote: canonical(connection.remote),
            first: connection.rcv_nxt,
            acknowledged: connection.write_seq,
            window: connection.window.snd_wnd,
            negotiated: connection.negotiated,
            clock: 0,
        }
    }

    /// The packet with these bytes, at `offset` in all that it has sent; `None` if it is too long.
    #[must_use]
    pub fn packet(&self, offset: u32, flags: u8, data: &[u8]) -> Option<Vec<u8>> {
        let header = Header {
            from: self.remote.ip(),
            to: self.local.ip(),
            protocol: PROTOCOL,
            ttl: None,
            tos: None,
        };
        let mut segment = self.segment(offset, flags);
        segment.extend(data);
        let sum = header.checksum(&segment);
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        header.packet(&segment)
    }

    fn segment(&self, offset: u32, flags: u8) -> Vec<u8> {
        let mut options = Vec::new();
        if let Some(ours) = self.negotiated.timestamp {
            // RFC 7323; two times nothing aligns the numbers.
            options.extend([1, 1, 8, 10]);
            options.extend(self.clock.to_be_bytes());
            options.extend(ours.to_be_bytes());
        }
        let scale = self.negotiated.wscale.map_or(0, |(theirs, _)| theirs);
        let window = self.window.checked_shr(scale.into()).unwrap_or(0);
        let window = u16::try_from(window).unwrap_or(u16::MAX);
        let words = u8::try_from((20 + options.len()) / 4).unwrap_or(u8::MAX);
        let mut segment = Vec::with_capacity(20 + options.len());
        segment.extend(self.remote.port().to_be_bytes());
        segment.extend(self.local.port().to_be_bytes());
        segment.extend(self.first.wrapping_add(offset).to_be_bytes());
        segment.extend(self.acknowledged.to_be_bytes());
        segment.extend([words << 4, flags]);
        segment.extend(window.to_be_bytes());
        // Checksum, and no urgent data.
        segment.extend([0; 4]);
        segment.extend(options);
        segment
    }
}

/// An IPv6 socket may have been connected to over IPv4.
fn canonical(end: SocketAddr) -> SocketAddr {
    SocketAddr::new(end.ip().to_canonical(), end.port())
}

#[cfg(test)]
mod tests {
    use super::super::ip::checksum;
    use super::*;
    use crate::model::frozen::WaitingEnd;
    use serde_bytes::ByteBuf;

    fn connection(timestamp: Option<u32>) -> WaitingConnection {
        WaitingConnection {
            local: "[::ffff:192.0.2.1]:80".parse().unwrap(),
            remote: "[::ffff:192.0.2.9]:1024".parse().unwrap(),
            write_seq: 0x0102_0304,
            received_seq: u32::MAX,
            received: ByteBuf::new(),
            end: WaitingEnd::Open,
            window: 0x10_0000,
            negotiated: TcpOptions {
                mss_clamp: 1460,
                wscale: Some((7, 8)),
                sack: true,
                timestamp,
            },
            peer_timestamp: 7,
        }
    }

    #[test]
    fn a_segment_over_ipv4_says_what_its_connection_is() {
        let connection = connection(None);
        let bytes = Peer::of_waiting(&connection)
            .packet(3, ACK | PSH, b"abc")
            .unwrap();
        assert_eq!(bytes.len(), 43);
        assert_eq!(bytes[9], PROTOCOL);
        assert_eq!(bytes[12..20], [192, 0, 2, 9, 192, 0, 2, 1]);
        let numbers = [4, 0, 0, 80, 0, 0, 0, 2, 1, 2, 3, 4, 0x50, 24, 0x20, 0];
        assert_eq!(bytes[20..36], numbers);
        assert_eq!(bytes[40..], *b"abc");
    }

    /// All words of the pseudo header and the segment add up to all ones (RFC 1071).
    #[test]
    fn a_segment_with_timestamps_adds_up() {
        let connection = connection(Some(9));
        let bytes = Peer::of_waiting(&connection).packet(0, ACK, b"").unwrap();
        assert_eq!(bytes[40..], [1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9]);
        let pseudo = [&bytes[12..20], &[0, PROTOCOL, 0, 32]].concat();
        assert_eq!(checksum(&[&pseudo, &bytes[20..]]), 0xffff);
    }
}
