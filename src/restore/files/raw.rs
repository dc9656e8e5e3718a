//! Raw and packet sockets, whose queues are empty.

use super::datagram::bind;
use super::error::{FilesError, call, socket};
use super::filter;
use super::tcp::replay;
use crate::model::frozen::{Socket, SocketState};
use crate::sys::socket::{bind_packet, new};
use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket as ns;
use std::ffi::OsStr;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

/// Whether the socket is one of these, which have their filters from the start.
pub(super) fn is_filtered(described: &Socket) -> bool {
    matches!(
        described.state,
        SocketState::Raw { .. } | SocketState::Packet { .. }
    )
}

/// Makes a raw socket.
///
/// # Errors
/// There is no such address, or the kernel refuses a step.
pub fn raw(described: &Socket) -> Result<OwnedFd, FilesError> {
    let SocketState::Raw {
        v6,
        protocol,
        local,
        remote,
    } = &described.state
    else {
        return Err(FilesError::Missing("A raw socket".into()));
    };
    let object = format!("raw socket of protocol {protocol}");
    let family = if *v6 { libc::AF_INET6 } else { libc::AF_INET };
    let owned = new(family, libc::SOCK_RAW, *protocol).map_err(socket(&object))?;
    let fd = owned.as_fd();
    replay(&object, fd, &described.options, |_| true)?;
    filter::attach(fd, described)?;
    if let Some(local) = local {
        bind(&object, fd, SocketAddr::new(*local, 0))?;
    }
    if let Some(remote) = remote {
        ns::connect(fd.as_raw_fd(), &ns::SockaddrStorage::from(*remote))
            .map_err(call(&object, "connect"))?;
    }
    drain(fd);
    Ok(owned)
}

/// Takes out what has arrived before the filter and the address were there.
fn drain(fd: BorrowedFd<'_>) {
    /// More than a queue holds; a flood must not keep the application waiting.
    const MOST: usize = 1 << 16;
    let mut nothing = [];
    let flags = ns::MsgFlags::MSG_DONTWAIT | ns::MsgFlags::MSG_TRUNC;
    for _ in 0..MOST {
        if ns::recv(fd.as_raw_fd(), &mut nothing, flags).is_err() {
            break;
        }
    }
}

/// Makes a packet socket, which receives nothing until it is bound.
///
/// # Errors
/// There is no such interface, or the kernel refuses a step.
pub fn packet(described: &Socket) -> Result<OwnedFd, FilesError> {
    let SocketState::Packet {
        socktype,
        protocol,
        interface,
    } = &described.state
    else {
        return Err(FilesError::Missing("A packet socket".into()));
    };
    let object = format!("packet socket of protocol {protocol:#06x}");
    let owned = new(libc::AF_PACKET, *socktype, 0).map_err(socket(&object))?;
    let fd = owned.as_fd();
    replay(&object, fd, &described.options, |_| true)?;
    filter::attach(fd, described)?;
    let index = match interface {
        None => 0,
        Some(name) => {
            let name = OsStr::from_bytes(name);
            let object = format!("Interface {}", name.display());
            if_nametoindex(name).map_err(call(object, "if_nametoindex"))?
        }
    };
    if (*protocol, index) != (0, 0) {
        bind_packet(fd, *protocol, index).map_err(socket(&object))?;
    }
    Ok(owned)
}
