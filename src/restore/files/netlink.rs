//! Netlink sockets, whose queues were empty.

use super::error::{FilesError, call, socket};
use super::tcp::replay;
use crate::model::frozen::{NetlinkSocket, SockOption};
use crate::sys::socket::{new, set_option};
use nix::libc;
use nix::sys::socket as ns;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

/// Makes one.
///
/// # Errors
/// The port is in use, or the kernel refuses a step.
pub fn make(described: &NetlinkSocket, options: &[SockOption]) -> Result<OwnedFd, FilesError> {
    let object = format!("netlink socket of protocol {}", described.protocol);
    let kind = if described.datagram {
        libc::SOCK_DGRAM
    } else {
        libc::SOCK_RAW
    };
    let owned = new(libc::AF_NETLINK, kind, described.protocol).map_err(socket(&object))?;
    let fd = owned.as_fd();
    replay(&object, fd, options, |_| true)?;
    if described.port != 0 {
        let address = ns::NetlinkAddr::new(described.port, 0);
        ns::bind(fd.as_raw_fd(), &address).map_err(call(&object, "bind"))?;
    }
    // Without a port it may be a member all the same.
    let low = (1..=u32::BITS).filter(|group| described.groups >> (group - 1) & 1 != 0);
    for group in low.chain(described.more_groups.iter().copied()) {
        let (level, name) = (libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP);
        set_option(fd, level, name, &group.to_ne_bytes()).map_err(socket(&object))?;
    }
    if let Some((port, groups)) = described.remote {
        let address = ns::NetlinkAddr::new(port, groups);
        ns::connect(fd.as_raw_fd(), &address).map_err(call(&object, "connect"))?;
    }
    Ok(owned)
}
