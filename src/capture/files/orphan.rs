//! TCP connections that an application has closed. The kernel goes on with them until the peer has
//! acknowledged everything; the next kernel would reset them.

use super::accept::{in_order, is_link_local};
use super::tcp;
use crate::bpf::events::WaitingFlag as Flag;
use crate::bpf::iter::{Iterators, ReadError, Scope, Waiting};
use crate::model::frozen::TcpConnection;
use serde_bytes::ByteBuf;
use std::fs;

/// Bytes that all of them together may have; they travel with the metadata.
const ROOM: usize = 8 << 20;

/// Both directions of `sk_shutdown`.
const SHUT: u8 = 3;

/// Reads those of a scope, and says how many are lost: what of them cannot be read, or has no
/// room. To be called while no packet comes.
///
/// # Errors
/// The iterators cannot be read.
pub fn read(
    iterators: &mut Iterators,
    scope: Scope,
) -> Result<(Vec<TcpConnection>, usize), ReadError> {
    // All connections of the machine would be looked at.
    if !is_any(&fs::read_to_string("/proc/net/sockstat").unwrap_or_default()) {
        return Ok((Vec::new(), 0));
    }
    let found = iterators.orphans(scope)?;
    let mut left = ROOM;
    let carried: Vec<_> = found
        .iter()
        .filter_map(connection)
        .filter(|connection| {
            let fits = left.checked_sub(connection.send_queue.len());
            left = fits.unwrap_or(left);
            fits.is_some()
        })
        .collect();
    let lost = found.len() - carried.len();
    Ok((carried, lost))
}

/// Whether the kernel counts any, in /proc/net/sockstat.
fn is_any(sockstat: &str) -> bool {
    let words = sockstat.lines().find_map(|line| line.strip_prefix("TCP: "));
    let mut words = words.unwrap_or("").split_ascii_whitespace();
    words.find(|word| *word == "orphan");
    words.next().is_none_or(|count| count != "0")
}

/// What the image carries of one; `None` if it cannot be read.
fn connection(orphan: &Waiting) -> Option<TcpConnection> {
    let rec = &orphan.rec;
    let told = tcp::told(rec);
    let of_one_link = [told.local, told.remote]
        .iter()
        .any(|end| is_link_local(end.ip()));
    if of_one_link || rec.flags & Flag::USEC != 0 {
        return None;
    }
    // Our FIN has a sequence number, and is no byte.
    let fin = rec.write_seq.wrapping_sub(1);
    let send_queue = in_order(rec.snd_una, fin, &orphan.data)?;
    let unsent = fin.wrapping_sub(rec.snd_nxt).cast_signed().max(0);
    Some(TcpConnection {
        shutdown: SHUT,
        send_queue: ByteBuf::from(send_queue),
        unsent: unsent.cast_unsigned(),
        ..told
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::events::{WaitingDataRec, WaitingRec};

    fn orphan() -> Waiting {
        Waiting {
            rec: WaitingRec {
                family: 2,
                state: 4,
                local_port: 80,
                remote_port: 1024,
                snd_una: u32::MAX,
                snd_nxt: 1,
                write_seq: 4,
                ..WaitingRec::default()
            },
            data: vec![
                WaitingDataRec::with(u32::MAX, b"ab"),
                WaitingDataRec::with(1, b"cd"),
                WaitingDataRec::with(3, b""),
            ],
        }
    }

    #[test]
    fn a_fin_is_no_byte() {
        let found = connection(&orphan()).unwrap();
        assert_eq!(found.send_queue[..], *b"abcd");
        assert_eq!((found.unsent, found.write_seq), (2, 4));
        let mut sent = orphan();
        sent.rec.snd_nxt = 4;
        assert_eq!(connection(&sent).unwrap().unsent, 0);
    }

    #[test]
    fn nothing_is_carried_in_part() {
        let lost: [fn(&mut Waiting); 4] = [
            |orphan| orphan.data.truncate(1),
            |orphan| orphan.rec.write_seq += 1,
            |orphan| orphan.rec.flags |= Flag::USEC,
            |orphan| orphan.data[0].flags = Flag::UNREADABLE,
        ];
        for (index, change) in lost.into_iter().enumerate() {
            let mut orphan = orphan();
            change(&mut orphan);
            assert_eq!(connection(&orphan), None, "{index}");
        }
    }

    #[test]
    fn the_kernel_says_whether_there_are_any() {
        let text = |count| format!("sockets: used 1\nTCP: inuse 3 orphan {count} tw 0 alloc 4\n");
        assert!(!is_any(&text(0)));
        assert!(is_any(&text(2)));
        assert!(is_any(""), "unknown");
    }
}
