//! TCP connections that are over: made in repair mode, filled, and reset by a packet.

use super::error::{FilesError, call, socket};
use super::ip::{Sender, until};
use super::segment::{ACK, FIN, Peer, RST};
use super::tcp;
use crate::model::frozen::{
    Application, FileKind, SockOption, SocketState, TcpConnection, TcpEnded, TcpOptions, TcpWindow,
};
use crate::sys::socket::{int_option, local_address, set_int_option};
use crate::sys::tcp as repair;
use crate::sys::tcp::state::{CLOSE, CLOSE_WAIT, ESTABLISHED};
use nix::libc;
use nix::sys::socket::Shutdown;
use serde_bytes::ByteBuf;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};

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
    // The packets come over the loopback interface, whatever it was bound to.
    let is_device = |o: &SockOption| (o.level, o.name) == (libc::SOL_SOCKET, libc::SO_BINDTODEVICE);
    let before: Vec<_> = options.iter().filter(|o| !is_device(o)).cloned().collect();
    let (owned, connection) = connect(&object, ended, &before)?;
    let fd = owned.as_fd();
    let state = || repair::info(fd).map(|info| info.state).map_err(failed());

    let peer = Peer::of(&connection);
    let mut sender = Sender::default();
    let mut send = |offset, flags| {
        let packet = peer.packet(offset, flags, &[]);
        let packet = packet.ok_or_else(|| FilesError::Unsupported(object.clone()))?;
        let sent = sender.send(&object, peer.local.ip(), &packet)?;
        sent.map_err(call(&object, "sendto"))
    };
    if ended.fin {
        send(0, ACK | FIN)?;
        until(&object, "end", || {
            Ok([CLOSE_WAIT, CLOSE].contains(&state()?))
        })?;
        if ended.error == libc::ECONNRESET {
            // Without a FIN of its own it would be EPIPE.
            tcp::shut(&object, fd, Shutdown::Write)?;
        }
    }
    send(ended.fin.into(), ACK | RST)?;
    until(&object, "reset", || Ok(state()? == CLOSE))?;
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

/// Makes the connection that it was. Where its addresses cannot be had any more (a new connection
/// has them, or it waits in `TIME_WAIT`), others do: its own is all that is ever told of them.
fn connect(
    object: &str,
    ended: &TcpEnded,
    options: &[SockOption],
) -> Result<(OwnedFd, TcpConnection), FilesError> {
    let first = connection(ended, ended.local, ended.remote);
    match tcp::connect(&first, options) {
        Ok(fd) => return Ok((fd, first)),
        Err(error) => tracing::warn!("{object}, gets another address: {error}"),
    }
    let loopback: IpAddr = match ended.local {
        SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    let remote = SocketAddr::new(loopback, ended.remote.port());
    let mut second = connection(ended, SocketAddr::new(loopback, 0), remote);
    let fd = tcp::connect(&second, options)?;
    second.local = local_address(fd.as_fd()).map_err(call(object, "getsockname"))?;
    Ok((fd, second))
}

/// What it was before its end.
fn connection(ended: &TcpEnded, local: SocketAddr, remote: SocketAddr) -> TcpConnection {
    let len = u32::try_from(ended.received.len()).unwrap_or(u32::MAX);
    let rcv_nxt = FIRST.wrapping_add(len);
    TcpConnection {
        v6: ended.v6,
        local,
        remote,
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
