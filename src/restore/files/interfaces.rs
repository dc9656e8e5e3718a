//! What a socket has to do with network interfaces.

use super::error::{FilesError, call, socket};
use crate::model::frozen::{Interfaces, Membership, Outgoing};
use crate::sys::socket::set_option;
use core::net::{IpAddr, Ipv4Addr};
use nix::libc;
use nix::net::if_::if_nametoindex;
use std::os::fd::BorrowedFd;

/// Joins the groups again, in their order, and sets by which interfaces datagrams leave.
///
/// # Errors
/// There is no interface of that name, or the kernel refuses.
pub fn restore(fd: BorrowedFd<'_>, interfaces: &Interfaces) -> Result<(), FilesError> {
    for membership in &interfaces.joined {
        join(fd, membership)?;
    }
    for outgoing in &interfaces.outgoing {
        leave_by(fd, outgoing)?;
    }
    Ok(())
}

fn join(fd: BorrowedFd<'_>, membership: &Membership) -> Result<(), FilesError> {
    let index = index(&membership.interface)?;
    let (level, name, value) = match membership.group {
        IpAddr::V4(group) => {
            let value = mreqn(group, Ipv4Addr::UNSPECIFIED, index);
            (libc::IPPROTO_IP, libc::IP_ADD_MEMBERSHIP, value)
        }
        // struct ipv6_mreq
        IpAddr::V6(group) => {
            let value = [&group.octets()[..], &index.to_ne_bytes()].concat();
            (libc::IPPROTO_IPV6, libc::IPV6_ADD_MEMBERSHIP, value)
        }
    };
    let object = format!("Membership in {}", membership.group);
    set_option(fd, level, name, &value).map_err(socket(object))
}

fn leave_by(fd: BorrowedFd<'_>, outgoing: &Outgoing) -> Result<(), FilesError> {
    let index = index(&outgoing.interface)?;
    let v4 = libc::IPPROTO_IP;
    let v6 = libc::IPPROTO_IPV6;
    let (level, name, value) = match (outgoing.v6, outgoing.multicast) {
        (false, true) => {
            let address = outgoing.address.unwrap_or(Ipv4Addr::UNSPECIFIED);
            let value = mreqn(Ipv4Addr::UNSPECIFIED, address, index);
            (v4, libc::IP_MULTICAST_IF, value)
        }
        (true, true) => (v6, libc::IPV6_MULTICAST_IF, index.to_ne_bytes().to_vec()),
        // In network order, unlike the others.
        (false, false) => (v4, libc::IP_UNICAST_IF, index.to_be_bytes().to_vec()),
        (true, false) => (v6, IPV6_UNICAST_IF, index.to_be_bytes().to_vec()),
    };
    let object = "Interface that datagrams leave by";
    set_option(fd, level, name, &value).map_err(socket(object))
}

/// include/uapi/linux/in6.h
const IPV6_UNICAST_IF: i32 = 76;

/// `struct ip_mreqn` (ip(7)).
fn mreqn(group: Ipv4Addr, address: Ipv4Addr, index: u32) -> Vec<u8> {
    [group.octets(), address.octets(), index.to_ne_bytes()].concat()
}

fn index(name: &[u8]) -> Result<u32, FilesError> {
    let object = format!("Interface {}", String::from_utf8_lossy(name));
    if_nametoindex(name).map_err(call(object, "if_nametoindex"))
}
