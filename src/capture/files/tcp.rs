//! Reading a TCP connection: from its record, or through a borrowed descriptor.

use super::{accept, socket};
use crate::bpf::events::{WaitingFlag as Flag, WaitingRec};
use crate::model::frozen::{TcpConnection, TcpWindow};
use crate::sys::socket::{Count, SocketError, peek_exact, queued};
use crate::sys::tcp::state::{CLOSE_WAIT, CONNECTED};
use crate::sys::tcp::{self, Queue};
use nix::libc;
use serde_bytes::ByteBuf;
use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;

/// Why a connection could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TcpReadError {
    /// A socket call failed.
    #[error(transparent)]
    Call(#[from] SocketError),
    /// A queue could not be read whole.
    #[error("The {0} queue cannot be read: {1}")]
    Queue(&'static str, io::Error),
}

/// States in which a FIN of ours is in the send queue: `FIN_WAIT1`, `LAST_ACK`, `CLOSING`.
const FIN_QUEUED: &[u8] = &[4, 9, 11];

/// Whether a record tells all of a connection but its unread bytes: the peer has acknowledged what
/// was sent, and nothing happened while the record was made. What is sent and not acknowledged can
/// be read in repair mode only.
pub fn is_told(rec: &WaitingRec) -> bool {
    let is_before = |a: u32, b: u32| a.wrapping_sub(b).cast_signed() <= 0;
    CONNECTED.contains(&rec.state)
        && rec.flags & (Flag::MOVING | Flag::USEC | Flag::URGENT) == 0
        && rec.snd_una == rec.write_seq
        && rec.snd_nxt == rec.write_seq
        // Else a restore could not set the window (tcp_repair_set_window()).
        && is_before(rec.rcv_wup, rec.rcv_nxt)
        && is_before(rec.snd_wl1, rec.rcv_nxt.wrapping_add(rec.rcv_wnd))
}

/// Whether nothing has happened to a connection between two records, and while they were made.
pub fn is_still(before: &WaitingRec, now: &WaitingRec) -> bool {
    // Our clock goes on whatever happens.
    let told = |rec: &WaitingRec| WaitingRec {
        timestamp: 0,
        ..*rec
    };
    (before.flags | now.flags) & Flag::MOVING == 0 && told(before) == told(now)
}

/// Bytes that wait to be read, as `SIOCINQ` tells.
pub fn unread(rec: &WaitingRec) -> usize {
    let waiting = rec.rcv_nxt.wrapping_sub(rec.copied_seq);
    // A FIN that was not read counts as a byte, and is none.
    let fin = u32::from(rec.state == CLOSE_WAIT);
    usize::try_from(waiting.saturating_sub(fin)).unwrap_or(usize::MAX)
}

/// What a record tells of a connection, with nothing in its queues.
pub fn told(rec: &WaitingRec) -> TcpConnection {
    TcpConnection {
        v6: i32::from(rec.family) == libc::AF_INET6,
        local: socket::address(rec.family, &rec.local_addr, rec.local_port),
        remote: socket::address(rec.family, &rec.remote_addr, rec.remote_port),
        state: rec.state,
        shutdown: rec.shutdown,
        write_seq: rec.write_seq,
        rcv_nxt: rec.rcv_nxt,
        send_queue: ByteBuf::new(),
        unsent: 0,
        recv_queue: ByteBuf::new(),
        window: TcpWindow {
            snd_wl1: rec.snd_wl1,
            snd_wnd: rec.snd_wnd,
            max_window: rec.max_window,
            rcv_wnd: rec.rcv_wnd,
            rcv_wup: rec.rcv_wup,
        },
        negotiated: accept::negotiated(rec),
    }
}

/// Reads a connection in repair mode, which it is left in; `shutdown` is its `sk_shutdown`.
/// `None` if it is not connected any more.
///
/// # Errors
/// See [`TcpReadError`].
pub fn read(
    fd: BorrowedFd<'_>,
    local: SocketAddr,
    remote: SocketAddr,
    v6: bool,
    shutdown: u8,
) -> Result<Option<TcpConnection>, TcpReadError> {
    let info = tcp::info(fd)?;
    let state = info.state;
    if !CONNECTED.contains(&state) {
        return Ok(None);
    }
    let negotiated = tcp::negotiated(fd, &info)?;
    let window = tcp::window(fd)?;

    tcp::select_queue(fd, Queue::Receive)?;
    let rcv_nxt = tcp::sequence(fd)?;
    let unread = queued(fd, Count::Unread)?;
    let recv_queue = peek_exact(fd, unread).map_err(|e| TcpReadError::Queue("receive", e))?;

    // It stays chosen, which means nothing once repair mode ends.
    tcp::select_queue(fd, Queue::Send)?;
    let write_seq = tcp::sequence(fd)?;
    // A FIN of ours that is not acknowledged counts as a byte, and is none.
    let fin = usize::from(FIN_QUEUED.contains(&state));
    let unacknowledged = queued(fd, Count::Unacknowledged)?.saturating_sub(fin);
    let unsent = queued(fd, Count::Unsent)?.saturating_sub(fin);
    let unsent = u32::try_from(unsent).unwrap_or(u32::MAX);
    let send_queue = peek_exact(fd, unacknowledged).map_err(|e| TcpReadError::Queue("send", e))?;

    Ok(Some(TcpConnection {
        v6,
        local,
        remote,
        state,
        shutdown,
        write_seq,
        rcv_nxt,
        send_queue: ByteBuf::from(send_queue),
        unsent,
        recv_queue: ByteBuf::from(recv_queue),
        window,
        negotiated,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One with three unread bytes, the first with the largest sequence number.
    fn idle() -> WaitingRec {
        WaitingRec {
            family: 2,
            state: 1,
            local_port: 80,
            remote_port: 1024,
            copied_seq: u32::MAX,
            rcv_nxt: 2,
            rcv_wup: u32::MAX,
            rcv_wnd: 100,
            snd_wl1: 90,
            snd_una: 7,
            snd_nxt: 7,
            write_seq: 7,
            ..WaitingRec::default()
        }
    }

    #[test]
    fn a_fin_is_not_unread() {
        let mut rec = idle();
        assert_eq!(unread(&rec), 3);
        rec.state = CLOSE_WAIT;
        assert_eq!(unread(&rec), 2);
        rec.copied_seq = rec.rcv_nxt;
        assert_eq!(unread(&rec), 0);
    }

    #[test]
    fn what_stays_as_it_was_is_still() {
        let before = idle();
        let later = WaitingRec {
            timestamp: before.timestamp + 5,
            ..before
        };
        assert!(is_still(&before, &later));
        let changes: [fn(&mut WaitingRec); 5] = [
            |rec| rec.flags |= Flag::MOVING,
            |rec| rec.rcv_nxt += 1,
            |rec| rec.snd_una += 1,
            |rec| rec.snd_wnd += 1,
            |rec| rec.state = CLOSE_WAIT,
        ];
        for change in changes {
            let mut other = later;
            change(&mut other);
            assert!(!is_still(&before, &other));
            assert!(!is_still(&other, &later));
        }
    }

    #[test]
    fn what_moves_or_is_not_acknowledged_is_not_told() {
        assert!(is_told(&idle()));
        let untold: [fn(&mut WaitingRec); 8] = [
            |rec| rec.state = 7,
            |rec| rec.flags = Flag::MOVING,
            |rec| rec.flags = Flag::USEC,
            |rec| rec.flags = Flag::URGENT,
            |rec| rec.snd_una -= 1,
            |rec| rec.snd_nxt -= 1,
            |rec| rec.rcv_wup = 3,
            |rec| rec.snd_wl1 = 103,
        ];
        for (index, change) in untold.into_iter().enumerate() {
            let mut rec = idle();
            change(&mut rec);
            assert!(!is_told(&rec), "{index}");
        }
    }
}
