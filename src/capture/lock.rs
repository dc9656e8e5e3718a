//! The network lock over all sockets of an application.

use super::Capture;
use super::error::CheckpointError;
use super::files::Alike;
use crate::bpf::events::SockRec;
use crate::bpf::iter::{Detail, File};
use crate::bpf::netlock::{LockError, NetLock};
use crate::fault::Fault;
use crate::sys::tcp::state::{CLOSE, LISTEN};
use nix::libc;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

impl Capture {
    /// Adds all sockets of the running application to a network lock; returns how many there are.
    ///
    /// # Errors
    /// The lock takes no more entries.
    pub fn add_to_lock(&mut self, lock: &mut NetLock) -> Result<usize, CheckpointError> {
        let scope = self.scope();
        let mut iterators = self.iterators.borrow_mut();
        let processes = iterators.threads(scope)?.processes;
        let count = add_sockets(lock, &iterators.descriptors_of(scope, &processes)?)?;
        lock.add_cgroup(self.target.cgroup.id())?;
        Ok(count)
    }

    /// Adds the sockets that it has now that it is frozen.
    ///
    /// # Errors
    /// The lock takes no more entries.
    pub fn add_frozen_to_lock(&self, lock: &mut NetLock) -> Result<(), CheckpointError> {
        if let Some(frozen) = &self.frozen {
            add_sockets(lock, &frozen.open.files)?;
        }
        Ok(())
    }

    /// Looks at the sockets of the running application. Returns how many it has that a lock is
    /// about.
    ///
    /// # Errors
    /// The iterators cannot be read.
    pub fn prepare_sockets(&mut self) -> Result<usize, CheckpointError> {
        let scope = self.scope();
        let mut iterators = self.iterators.borrow_mut();
        let processes = iterators.threads(scope)?.processes;
        let files = iterators.descriptors_of(scope, &processes)?;
        self.alike = Alike::prepare(&files);
        Ok(entries(&files).count())
    }

    /// Loads a network lock and attaches it without anything to hold off yet, if the application
    /// has any sockets: both take their time, and what the application writes meanwhile is to be
    /// copied.
    ///
    /// # Errors
    /// The lock cannot be loaded or attached.
    pub fn load_lock(&mut self) -> Result<(), CheckpointError> {
        let sockets = self.prepare_sockets()?;
        self.load_lock_for(sockets)
    }

    fn load_lock_for(&mut self, sockets: usize) -> Result<(), CheckpointError> {
        if sockets > 0 {
            let mut lock = NetLock::load(sockets)?;
            self.timeline.done("load lock");
            // Before there are any entries, which it would silence.
            lock.hold_new()?;
            lock.engage()?;
            self.lock = Some(lock);
            self.timeline.done("attach lock");
        }
        Ok(())
    }

    /// Holds off new connections to the application, if it has any sockets.
    ///
    /// # Errors
    /// The lock cannot be loaded or attached, or takes no more entries.
    pub fn lock_network(&mut self) -> Result<(), CheckpointError> {
        if self.lock.is_none() {
            // It may have made its first ones since.
            self.load_lock()?;
        }
        if let Some(mut lock) = self.lock.take()
            && self.add_to_lock(&mut lock)? > 0
        {
            lock.engage()?;
            self.lock = Some(lock);
        }
        self.timeline.done("lock");
        Fault::Lock.point()?;
        Ok(())
    }

    /// From here on nothing of the frozen application sends or receives.
    ///
    /// # Errors
    /// The lock takes no more entries, or cannot be loaded or attached.
    pub fn silence(&mut self) -> Result<(), CheckpointError> {
        if self.lock.is_none()
            && let Some(frozen) = &self.frozen
        {
            // It has made its first ones just before it stopped.
            self.load_lock_for(entries(&frozen.open.files).count())?;
        }
        if let Some(mut lock) = self.lock.take() {
            let silenced = self
                .add_frozen_to_lock(&mut lock)
                .and_then(|()| Ok(lock.silence()?));
            self.lock = Some(lock);
            self.silenced = true;
            silenced?;
        }
        Fault::Silence.point()?;
        self.may_go_on()
    }

    /// Whether packets of the application's connections have been dropped.
    #[must_use]
    pub fn was_silenced(&self) -> bool {
        self.silenced
    }

    /// Whether packets are being dropped, by this capture or by the lock it left behind.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.lock.is_some() || self.lock_left
    }
}

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
fn add_sockets(lock: &mut NetLock, files: &[File]) -> Result<usize, LockError> {
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

fn entries(files: &[File]) -> impl Iterator<Item = Entry> {
    files.iter().filter_map(|file| match &file.detail {
        Detail::Socket(sock) => entry(sock),
        _ => None,
    })
}

fn entry(sock: &SockRec) -> Option<Entry> {
    // One of any protocol gets copies of what others are sent.
    if i32::from(sock.type_) == libc::SOCK_RAW {
        return None;
    }
    let v6 = match i32::from(sock.family) {
        libc::AF_INET => false,
        libc::AF_INET6 => true,
        _ => return None,
    };
    let local = SocketAddr::new(address(v6, &sock.local_addr), sock.local_port);
    match i32::from(sock.protocol) {
        libc::IPPROTO_TCP => match sock.state {
            LISTEN => Some(Entry::Listener(local)),
            CLOSE => None,
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
            state: LISTEN,
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
