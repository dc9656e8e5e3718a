//! TCP connections that are over: made in repair mode, filled, and reset by a packet.

use super::error::{FilesError, call, socket};
use super::ip::{Sender, until};
use super::segment::{ACK, CLOSE, CLOSE_WAIT, FIN, Peer, RST};
use super::tcp;
use crate::model::frozen::{
    Application, FileKind, SockOption, SocketState, TcpConnection, TcpEnded, TcpOptions, TcpWindow,
    WaitingConnection, WaitingEnd,
};
use crate::sys::socket::{int_option, set_int_option};
use crate::sys::tcp as repair;
use nix::libc;
use nix::sys::socket::Shutdown;
use serde_bytes::ByteBuf;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

/// `TCP_ESTABLISHED`.
const ESTABLISHED: u8 = 1;

/// Any sequence number: nobody will ever see it.
const FIRST: u32 = 1;

/// As much of a window as there is without scaling.
const WINDOW: u32 = u16::MAX as u32;

/// Both ends of all that are over, the application's first.
pub(super) fn all(app: &Application) -> impl Iterator<Item = (SocketAddr, SocketAddr)> {
    app.ofds.values().filter_map(|file| match &file.kind {
        FileKind::Socket(socket) => match &socket.state {
            SocketState::TcpEnded(ended) => Some((ended.local, ended.remote)),
            _ => None,
        },
        _ => None,
    })
}

/// Makes one. To be called while it is silenced: it acknowledges the FIN.
///
/// # Errors
/// The kernel refuses a step, or the packets do not arrive.
pub(super) fn make(ended: &TcpEnded, options: &[SockOption]) -> Result<OwnedFd, FilesError> {
    let object = format!(
        "TCP connection {} - {}, which has ended",
        ended.local, ended.remote
    );
    let failed = || socket(&object);
    let connection = connection(ended);
    // The packets come over the loopback interface, whatever it was bound to.
    let is_device = |o: &SockOption| (o.level, o.name) == (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
    let before: Vec<_> = options.iter().filter(|o| !is_device(o)).cloned().collect();
    let owned = tcp::connect(&connection, &before)?;
    let fd = owned.as_fd();
    let is_in =
        |state| move || Ok(repair::info(fd).map_err(socket("TCP connection"))?.state == state);

    let last = waiting(&connection);
    let peer = Peer::of(&last);
    let mut sender = Sender::default();
    let mut send = |offset, flags| {
        let packet = peer.packet(offset, flags, &[]);
        let packet = packet.ok_or_else(|| FilesError::Unsupported(object.clone()))?;
        let sent = sender.send(&object, peer.local.ip(), &packet)?;
        sent.map_err(call(&object, "sendto"))
    };
    if ended.fin {
        send(0, ACK | FIN)?;
        until(&object, "end", is_in(CLOSE_WAIT))?;
        if ended.error == libc::ECONNRESET {
            // Of one that was not shut by the application, too, it would be EPIPE.
            tcp::shut(&object, fd, Shutdown::Write)?;
        }
    }
    send(ended.fin.into(), ACK | RST)?;
    until(&object, "reset", is_in(CLOSE))?;
    if ended.error == 0 {
        // It was told: to read the option takes the error.
        int_option(fd, libc::SOL_SOCKET, libc::SO_ERROR).map_err(failed())?;
    }
    repair::leave_repair(fd).map_err(failed())?;
    set_int_option(fd, libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0).map_err(failed())?;
    tcp::replay(&object, fd, options, |o| {
        is_device(o) || !tcp::acts_at_bind(o)
    })?;
    Ok(owned)
}

/// What it was before its end.
fn connection(ended: &TcpEnded) -> TcpConnection {
    let len = u32::try_from(ended.received.len()).unwrap_or(u32::MAX);
    let rcv_nxt = FIRST.wrapping_add(len);
    TcpConnection {
        v6: ended.v6,
        local: ended.local,
        remote: ended.remote,
        state: ESTABLISHED,
        shutdown: 0,
        write_seq: FIRST,
        rcv_nxt,
        send_queue: ByteBuf::new(),
        unsent: 0,
        recv_queue: ended.received.clone(),
        window: TcpWindow {
            snd_wl1: rcv_nxt,
            snd_wnd: WINDOW,
            max_window: WINDOW,
            rcv_wnd: WINDOW,
            rcv_wup: rcv_nxt,
        },
        negotiated: TcpOptions {
            mss_clamp: 536,
            wscale: None,
            sack: false,
            timestamp: None,
        },
    }
}

/// The same as its peer sees it, from behind all that it has sent.
fn waiting(connection: &TcpConnection) -> WaitingConnection {
    WaitingConnection {
        local: connection.local,
        remote: connection.remote,
        write_seq: connection.write_seq,
        received_seq: connection.rcv_nxt,
        received: ByteBuf::new(),
        end: WaitingEnd::Open,
        window: WINDOW,
        negotiated: connection.negotiated,
        peer_timestamp: 0,
    }
}
