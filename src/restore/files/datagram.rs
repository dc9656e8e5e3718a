//! UDP sockets, whose queues `udp_queue` fills.

use super::error::{FilesError, call, socket};
use super::tcp::replay;
use super::udp_queue;
use crate::model::frozen::{Socket, SocketState};
use crate::sys::socket::set_int_option;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

/// Makes a UDP socket.
///
/// # Errors
/// The address is in use, or the kernel refuses a step.
pub fn udp(described: &Socket) -> Result<OwnedFd, FilesError> {
    let SocketState::Udp {
        v6,
        local,
        remote,
        queue,
    } = &described.state
    else {
        return Err(FilesError::Missing("A UDP socket".into()));
    };
    let object = match local {
        Some(local) => format!("UDP socket {local}"),
        None => "UDP socket".to_owned(),
    };
    let family = if *v6 {
        ns::AddressFamily::Inet6
    } else {
        ns::AddressFamily::Inet
    };
    let flags = ns::SockFlag::SOCK_CLOEXEC;
    let owned =
        ns::socket(family, ns::SockType::Datagram, flags, None).map_err(call(&object, "socket"))?;
    let fd = owned.as_fd();
    replay(&object, fd, &described.options, udp_queue::acts_on_arrival)?;
    if !queue.is_empty() {
        udp_queue::fill(&object, fd, *v6, queue)?;
    }
    replay(&object, fd, &described.options, |option| {
        !udp_queue::acts_on_arrival(option)
    })?;
    if let Some(local) = local {
        bind(&object, fd, *local)?;
    }
    if let Some(remote) = remote {
        ns::connect(fd.as_raw_fd(), &ns::SockaddrStorage::from(*remote))
            .map_err(call(&object, "connect"))?;
    }
    Ok(owned)
}

/// Binds, if need be to an address that no interface has yet.
pub(super) fn bind(object: &str, fd: BorrowedFd<'_>, local: SocketAddr) -> Result<(), FilesError> {
    let address = ns::SockaddrStorage::from(local);
    // A raw socket of IPv6 has only the one of its own.
    let (level, name) = match local {
        SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_FREEBIND),
        SocketAddr::V6(_) => (libc::IPPROTO_IPV6, libc::IPV6_FREEBIND),
    };
    let freebind = |on| set_int_option(fd, level, name, on).map_err(socket(object));
    match ns::bind(fd.as_raw_fd(), &address) {
        Err(Errno::EADDRNOTAVAIL) => {
            freebind(1)?;
            ns::bind(fd.as_raw_fd(), &address).map_err(call(object, "bind"))?;
            freebind(0)
        }
        result => result.map_err(call(object, "bind")),
    }
}
