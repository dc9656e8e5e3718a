//! Reading a TCP connection through a borrowed descriptor.

use crate::model::frozen::TcpConnection;
use crate::sys::socket::{Count, SocketError, peek_exact, queued};
use crate::sys::tcp::state::CONNECTED;
use crate::sys::tcp::{self, Queue};
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
