//! The network lock over all sockets of an application.

use crate::bpf::events::SockRec;
use crate::bpf::iter::{Detail, File};
use crate::bpf::netlock::{LockError, NetLock};
use nix::libc;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const TCP_LISTEN: u8 = 10;
const TCP_CLOSE: u8 = 7;

/// What a socket asks of the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Entry {
    Connection(SocketAddr, SocketAddr),
    Listener(SocketAddr),
    Udp(SocketAddr),
}

/// Adds every TCP and UDP socket among `files`; returns how many there were.
///
/// # Errors
/// The lock takes no more entries.
pub fn add_sockets(lock: &mut NetLock, files: &[File]) -> Result<usize, LockError> {
    let mut count = 0;
    for entry in entries(files) {
        match entry {
            Entry::Connection(local, remote) => lock.add_connection(local, remote)?,
            Entry::Listener(local) => lock.add_listener(local)?,
            Entry::Udp(local) => lock.add_udp(local)?,
        }
        count += 1;
    }
    Ok(count)
}

/// Whether there are any such sockets.
pub fn has_sockets(files: &[File]) -> bool {
    entries(files).next().is_some()
}

fn entries(files: &[File]) -> impl Iterator<Item = Entry> {
    files.iter().filter_map(|file| match &file.detail {
        Detail::Socket(sock) => entry(sock),
        _ => None,
    })
}

fn entry(sock: &SockRec) -> Option<Entry> {
    let v6 = match i32::from(sock.family) {
        libc::AF_INET => false,
        libc::AF_INET6 => true,
        _ => return None,
    };
    let local = SocketAddr::new(address(v6, &sock.local_addr), sock.local_port);
    match i32::from(sock.protocol) {
        libc::IPPROTO_TCP => match sock.state {
            TCP_LISTEN => Some(Entry::Listener(local)),
            TCP_CLOSE => None,
            _ => {
                let remote = SocketAddr::new(address(v6, &sock.remote_addr), sock.remote_port);
                Some(Entry::Connection(local, remote))
            }
        },
        libc::IPPROTO_UDP if sock.local_port != 0 => Some(Entry::Udp(local)),
        _ => None,
    }
}

fn address(v6: bool, bytes: &[u8; 16]) -> IpAddr {
    if v6 {
        Ipv6Addr::from(*bytes).into()
    } else {
        Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_told_apart() {
        let mut sock = SockRec {
            family: 2,
            protocol: 6,
            state: TCP_LISTEN,
            local_port: 80,
            ..SockRec::default()
        };
        let any = "0.0.0.0:80".parse().unwrap();
        assert_eq!(entry(&sock), Some(Entry::Listener(any)));
        sock.state = 1;
        sock.remote_port = 9;
        sock.remote_addr[..4].copy_from_slice(&[10, 0, 0, 1]);
        let remote = "10.0.0.1:9".parse().unwrap();
        assert_eq!(entry(&sock), Some(Entry::Connection(any, remote)));
        sock.protocol = 17;
        assert_eq!(entry(&sock), Some(Entry::Udp(any)));
        sock.family = 1;
        assert_eq!(entry(&sock), None);
    }
}
