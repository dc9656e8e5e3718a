//! TCP sockets. A connection is filled in repair mode, in which it sends
//! nothing, and stays there until [`go_live`].

use super::ended;
use super::error::{FilesError, call, socket};
use crate::model::frozen::{SockOption, Socket, SocketState, TcpConnection};
use crate::sys::socket::{set_int_option, set_option};
use crate::sys::tcp::state::{CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK};
use crate::sys::tcp::{self, Queue};
use nix::errno::Errno;
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

/// Whether an option acts at bind(2) or connect(2) and can or should not be set after it:
/// `IPV6_V6ONLY` of a bound socket is `EINVAL`.
pub(super) fn acts_at_bind(option: &SockOption) -> bool {
    [
        (libc::SOL_SOCKET, libc::SO_BINDTODEVICE),
        (libc::SOL_SOCKET, libc::SO_MARK),
        (libc::IPPROTO_IP, libc::IP_FREEBIND),
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
    ]
    .contains(&(option.level, option.name))
}

/// Sets those of the options again that `which` chooses, in their order.
pub(super) fn replay(
    object: &str,
    fd: BorrowedFd<'_>,
    options: &[SockOption],
    which: impl Fn(&SockOption) -> bool,
) -> Result<(), FilesError> {
    for option in options.iter().filter(|option| which(option)) {
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
            replay(&object, fd.as_fd(), &described.options, |_| true)?;
            if let Some(local) = local {
                bind(&format!("TCP socket bound to {local}"), fd.as_fd(), *local)?;
            }
            Ok(fd)
        }
        SocketState::TcpListen {
            local, backlog, v6, ..
        } => {
            let object = format!("TCP listener {local}");
            let fd = new_socket(&object, *v6)?;
            replay(&object, fd.as_fd(), &described.options, |_| true)?;
            // The interface may get its address later than this.
            set_int_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, 1)
                .map_err(socket(&object))?;
            bind(&object, fd.as_fd(), *local)?;
            if !described.options.iter().any(is_freebind) {
                set_int_option(fd.as_fd(), libc::IPPROTO_IP, libc::IP_FREEBIND, 0)
                    .map_err(socket(&object))?;
            }
            let backlog = i32::try_from(*backlog).unwrap_or(i32::MAX);
            let backlog = ns::Backlog::new(backlog).map_err(call(&object, "listen"))?;
            ns::listen(&fd, backlog).map_err(call(&object, "listen"))?;
            Ok(fd)
        }
        SocketState::TcpConnection(connection) => connect(connection, &described.options),
        SocketState::TcpEnded(ended) => ended::make(ended, &described.options),
        _ => Err(FilesError::Missing("A TCP socket".into())),
    }
}

fn is_freebind(option: &SockOption) -> bool {
    option.level == libc::IPPROTO_IP && option.name == libc::IP_FREEBIND
}

fn name(connection: &TcpConnection) -> String {
    format!(
        "TCP connection {} - {}",
        connection.local, connection.remote
    )
}

/// Of `sk_shutdown` (include/net/sock.h).
const RCV_SHUTDOWN: u8 = 1;

/// Which directions are closed, by kernel state (include/net/tcp_states.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Closed {
    /// We have sent a FIN, or have one queued.
    ours: bool,
    /// Their FIN has been received.
    theirs: bool,
}

/// `None` for a state that is no connection.
fn closed(state: u8) -> Option<Closed> {
    let (ours, theirs) = match state {
        ESTABLISHED => (false, false),
        FIN_WAIT1 | FIN_WAIT2 => (true, false),
        CLOSE_WAIT => (false, true),
        LAST_ACK | CLOSING => (true, true),
        _ => return None,
    };
    Some(Closed { ours, theirs })
}

/// Makes a connection in repair mode.
///
/// Repair mode knows established connections only, so closed directions are made
/// by what the application did: our FIN, which has a sequence number of its own, is
/// sent when the connection goes live, as a retransmission if the peer has it.
/// Their FIN was acknowledged and never comes again; that reading ends is a
/// shutdown(2) of our receiving side. The receive queue then counts one too
/// high, which nobody sees, so that `rcv_nxt` is behind their FIN.
pub(super) fn connect(
    connection: &TcpConnection,
    options: &[SockOption],
) -> Result<OwnedFd, FilesError> {
    let object = name(connection);
    let Some(closed) = closed(connection.state) else {
        return Err(FilesError::Unsupported(format!(
            "{object} in state {}",
            connection.state
        )));
    };
    let owned = new_socket(&object, connection.v6)?;
    let fd = owned.as_fd();
    let failed = || socket(&object);
    replay(&object, fd, options, acts_at_bind)?;
    tcp::enter_repair(fd).map_err(failed())?;
    let len = |bytes: &[u8]| u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    tcp::select_queue(fd, Queue::Send).map_err(failed())?;
    let first = connection
        .write_seq
        .wrapping_sub(len(&connection.send_queue))
        .wrapping_sub(u32::from(closed.ours));
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

    make_room(&object, fd, connection)?;
    tcp::select_queue(fd, Queue::Receive).map_err(failed())?;
    fill(&object, fd, &connection.recv_queue)?;
    tcp::select_queue(fd, Queue::Send).map_err(failed())?;
    let (sent, _) = split(connection);
    fill(&object, fd, sent)?;
    tcp::select_queue(fd, Queue::None).map_err(failed())?;
    tcp::set_window(fd, &connection.window).map_err(failed())?;
    tcp::sync_mss(fd).map_err(failed())?;
    Ok(owned)
}

/// Buffers large enough for what was queued: autotuning had let them grow, and a
/// new socket's are small. [`settle`] gives them back to autotuning.
fn make_room(
    object: &str,
    fd: BorrowedFd<'_>,
    connection: &TcpConnection,
) -> Result<(), FilesError> {
    // Bookkeeping of small buffers counts too (socket(7): the kernel doubles what it is told).
    const LEAST: usize = 256 << 10;
    for (queue, option) in [
        (&connection.send_queue, libc::SO_SNDBUFFORCE),
        (&connection.recv_queue, libc::SO_RCVBUFFORCE),
    ] {
        if !queue.is_empty() {
            let size = i32::try_from(LEAST + 2 * queue.len()).unwrap_or(i32::MAX / 2);
            set_int_option(fd, libc::SOL_SOCKET, option, size).map_err(socket(object))?;
        }
    }
    Ok(())
}

/// The send queue in two: what the peer may have, and what was never sent.
fn split(connection: &TcpConnection) -> (&[u8], &[u8]) {
    let unsent = usize::try_from(connection.unsent).unwrap_or(usize::MAX);
    let at = connection.send_queue.len().saturating_sub(unsent);
    connection.send_queue.split_at(at)
}

fn fill(object: &str, fd: BorrowedFd<'_>, mut bytes: &[u8]) -> Result<(), FilesError> {
    let flags = ns::MsgFlags::MSG_DONTWAIT | ns::MsgFlags::MSG_NOSIGNAL;
    while !bytes.is_empty() {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        let sent = ns::send(fd.as_raw_fd(), chunk, flags).map_err(call(object, "send"))?;
        bytes = &bytes[sent..];
    }
    Ok(())
}

/// Lets a connection talk again: repair mode ends. [`settle`] follows once all have.
///
/// # Errors
/// The kernel refuses.
pub fn go_live(fd: BorrowedFd<'_>, described: &Socket) -> Result<(), FilesError> {
    let SocketState::TcpConnection(connection) = &described.state else {
        return Ok(());
    };
    // The time-out of what was sent runs, and doubles, since it was put back; that of what the
    // peer has need not come.
    let (sent, _) = split(connection);
    let left = if sent.is_empty() {
        tcp::leave_repair(fd)
    } else {
        tcp::leave_repair_and_ask(fd)
    };
    left.map_err(socket(name(connection)))
}

/// Sends what was never sent, closes the directions that were closed, sets the options.
///
/// # Errors
/// The kernel refuses a step.
pub fn settle(fd: BorrowedFd<'_>, described: &Socket) -> Result<(), FilesError> {
    let SocketState::TcpConnection(connection) = &described.state else {
        return Ok(());
    };
    let object = name(connection);
    let (_, unsent) = split(connection);
    fill(&object, fd, unsent)?;
    // The sizes stay; whether they are fixed is up to the options that follow.
    set_int_option(fd, libc::SOL_SOCKET, libc::SO_BUF_LOCK, 0).map_err(socket(&object))?;
    // Leaving repair mode resets SO_REUSEADDR, so options come last.
    replay(&object, fd, &described.options, |option| {
        !acts_at_bind(option)
    })?;
    let closed = closed(connection.state);
    if closed.is_some_and(|closed| closed.ours) {
        shut(&object, fd, ns::Shutdown::Write)?;
    }
    if closed.is_some_and(|closed| closed.theirs) || connection.shutdown & RCV_SHUTDOWN != 0 {
        shut(&object, fd, ns::Shutdown::Read)?;
    }
    Ok(())
}

pub(super) fn shut(object: &str, fd: BorrowedFd<'_>, how: ns::Shutdown) -> Result<(), FilesError> {
    match ns::shutdown(fd.as_raw_fd(), how) {
        // The peer has closed or reset it meanwhile: that is the application's to see.
        Ok(()) | Err(Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(call(object, "shutdown")(errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::{acts_at_bind, closed};
    use crate::model::frozen::SockOption;
    use nix::libc;

    #[test]
    fn every_connected_state_is_known_by_its_closed_directions() {
        let directions = |state| closed(state).map(|closed| (closed.ours, closed.theirs));
        assert_eq!(directions(1), Some((false, false)));
        for fin_wait in [4, 5] {
            assert_eq!(directions(fin_wait), Some((true, false)));
        }
        assert_eq!(directions(8), Some((false, true)));
        for both in [9, 11] {
            assert_eq!(directions(both), Some((true, true)));
        }
        // SYN_SENT, SYN_RECV, TIME_WAIT, CLOSE, LISTEN, NEW_SYN_RECV
        for other in [0, 2, 3, 6, 7, 10, 12] {
            assert_eq!(directions(other), None);
        }
    }

    #[test]
    fn reuse_is_not_set_before_repair_mode_overwrites_it() {
        let option = |level, name| SockOption {
            level,
            name,
            value: vec![1, 0, 0, 0].into(),
        };
        assert!(!acts_at_bind(&option(libc::SOL_SOCKET, libc::SO_REUSEADDR)));
        assert!(acts_at_bind(&option(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY)));
    }
}
