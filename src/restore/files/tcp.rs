//! TCP sockets. A connection is filled in repair mode, in which it sends
//! nothing, and stays there until [`go_live`].

use super::error::{FilesError, call, socket};
use crate::model::frozen::{SockOption, Socket, SocketState, TcpConnection};
use crate::sys::socket::{set_int_option, set_option};
use crate::sys::tcp::{self, Queue};
use nix::libc;
use nix::sys::socket as ns;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Bytes written into a queue at once; larger writes may fail for lack of memory.
const CHUNK: usize = 32 * 1024;

fn new_socket(object: &str, v6: bool) -> Result<OwnedFd, FilesError> {
    let family = if v6 {
        ns::AddressFamily::Inet6
    } else {
        ns::AddressFamily::Inet
    };
    let flags = ns::SockFlag::SOCK_CLOEXEC | ns::SockFlag::SOCK_NONBLOCK;
    ns::socket(family, ns::SockType::Stream, flags, ns::SockProtocol::Tcp)
        .map_err(call(object, "socket"))
}

fn bind(object: &str, fd: BorrowedFd<'_>, address: SocketAddr) -> Result<(), FilesError> {
    ns::bind(fd.as_raw_fd(), &ns::SockaddrStorage::from(address)).map_err(call(object, "bind"))
}

fn replay(object: &str, fd: BorrowedFd<'_>, options: &[SockOption]) -> Result<(), FilesError> {
    for option in options {
        set_option(fd, option.level, option.name, &option.value).map_err(socket(object))?;
    }
    Ok(())
}

/// Makes a TCP socket of `described`.
///
/// # Errors
/// The address is in use, or the kernel refuses a step.
pub fn open(described: &Socket) -> Result<OwnedFd, FilesError> {
    match &described.state {
        SocketState::TcpIdle { v6, local } => {
            let object = "TCP socket".to_owned();
            let fd = new_socket(&object, *v6)?;
            replay(&object, fd.as_fd(), &described.options)?;
            if let Some(local) = local {
                bind(&format!("TCP socket bound to {local}"), fd.as_fd(), *local)?;
            }
            Ok(fd)
        }
        SocketState::TcpListen { local, backlog, v6 } => {
            let object = format!("TCP listener {local}");
            let fd = new_socket(&object, *v6)?;
            replay(&object, fd.as_fd(), &described.options)?;
            // The interface may get its address later than this.
            set_int_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, 1)
                .map_err(socket(&object))?;
            bind(&object, fd.as_fd(), *local)?;
            set_int_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, 0)
                .map_err(socket(&object))?;
            let backlog = i32::try_from(*backlog).unwrap_or(i32::MAX);
            let backlog = ns::Backlog::new(backlog).map_err(call(&object, "listen"))?;
            ns::listen(&fd, backlog).map_err(call(&object, "listen"))?;
            Ok(fd)
        }
        SocketState::TcpConnection(connection) => connect(connection),
        _ => Err(FilesError::Missing("A TCP socket".into())),
    }
}

fn name(connection: &TcpConnection) -> String {
    format!(
        "TCP connection {} - {}",
        connection.local, connection.remote
    )
}

fn connect(connection: &TcpConnection) -> Result<OwnedFd, FilesError> {
    let object = name(connection);
    if connection.state != 1 {
        return Err(FilesError::Unsupported(format!(
            "{object} in state {}",
            connection.state
        )));
    }
    let owned = new_socket(&object, connection.v6)?;
    let fd = owned.as_fd();
    let failed = || socket(&object);
    tcp::enter_repair(fd).map_err(failed())?;
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    tcp::select_queue(fd, Queue::Send).map_err(failed())?;
    let first = connection
        .write_seq
        .wrapping_sub(len(&connection.send_queue));
    tcp::set_sequence(fd, first).map_err(failed())?;
    tcp::select_queue(fd, Queue::Receive).map_err(failed())?;
    let first = connection.rcv_nxt.wrapping_sub(len(&connection.recv_queue));
    tcp::set_sequence(fd, first).map_err(failed())?;
    bind(&object, fd, connection.local)?;
    ns::connect(
        fd.as_raw_fd(),
        &ns::SockaddrStorage::from(connection.remote),
    )
    .map_err(call(&object, "connect"))?;
    tcp::set_negotiated(fd, &connection.negotiated).map_err(failed())?;

    fill(&object, fd, &connection.recv_queue)?;
    tcp::select_queue(fd, Queue::Send).map_err(failed())?;
    let (sent, _) = split(connection);
    fill(&object, fd, sent)?;
    tcp::select_queue(fd, Queue::None).map_err(failed())?;
    tcp::set_window(fd, &connection.window).map_err(failed())?;
    Ok(owned)
}

/// The send queue in two: what the peer may have, and what was never sent.
fn split(connection: &TcpConnection) -> (&[u8], &[u8]) {
    let unsent = usize::try_from(connection.unsent).unwrap_or(usize::MAX);
    let at = connection.send_queue.len().saturating_sub(unsent);
    connection.send_queue.split_at(at)
}

fn fill(object: &str, fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), FilesError> {
    while !bytes.is_empty() {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        let sent = ns::send(fd.as_raw_fd(), chunk, ns::MsgFlags::MSG_DONTWAIT)
            .map_err(call(object, "send"))?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Lets a connection talk again: repair mode ends, and what was never sent is sent.
///
/// # Errors
/// The kernel refuses a step.
pub fn go_live(fd: BorrowedFd<'_>, described: &Socket) -> Result<(), FilesError> {
    let SocketState::TcpConnection(connection) = &described.state else {
        return Ok(());
    };
    let object = name(connection);
    tcp::leave_repair(fd).map_err(socket(&object))?;
    let (_, unsent) = split(connection);
    if !unsent.is_empty() {
        // A queue of this length fitted before; autotuning has forgotten how long it let it grow.
        let wanted = i32::try_from(unsent.len() * 2).unwrap_or(i32::MAX);
        set_int_option(fd, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, wanted)
            .map_err(socket(&object))?;
        fill(&object, fd, unsent)?;
    }
    // Leaving repair mode resets SO_REUSEADDR, so options come last.
    replay(&object, fd, &described.options)
}
