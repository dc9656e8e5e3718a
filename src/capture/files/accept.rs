//! Connections that a listener has not accepted. No descriptor leads to them: the iterators read
//! them out of the kernel's memory. [`super::unix_accept`] has those of Unix listeners.

use super::CollectError;
use super::borrow::place;
use super::socket;
use super::unix_accept;
use crate::bpf::accept::{Handshakes, LOOPBACK};
use crate::bpf::events::{SockFlag, SockRec, WaitingDataRec, WaitingFlag as Flag, WaitingRec};
use crate::bpf::iter::{Detail, File, Files, Iterators, ReadError, Scope, Tasks, Waiting};
use crate::model::frozen::{Blocker, TcpOptions, WaitingConnection, WaitingEnd, WaitingUnix};
use crate::model::ids::OfdId;
use crate::model::map::Map;
use crate::sys::tcp::milliseconds;
use crate::sys::tcp::state::{CLOSE, CLOSE_WAIT, ESTABLISHED, LISTEN};
use nix::libc;
use serde_bytes::ByteBuf;
use std::net::IpAddr;

/// As long as a receive queue can be: net.ipv4.tcp_rmem is limited by an i32.
const LONGEST: u32 = i32::MAX.cast_unsigned();

/// Accept queues.
#[derive(Debug, Default)]
pub struct Queues {
    /// By the address of the listener's socket.
    waiting: Map<u64, Vec<Waiting>>,
    /// Which listener a Unix socket waits for.
    clients: Map<u64, u64>,
}

impl Queues {
    /// Reads those of the listeners among the descriptors, if there may be anything in them.
    ///
    /// # Errors
    /// The iterators cannot be read.
    pub fn read(
        found: &Files,
        tasks: &Tasks,
        scope: Scope,
        iterators: &mut Iterators,
    ) -> Result<Self, ReadError> {
        let mut queues = Self::default();
        // A handshake may have ended since the descriptors were read.
        if is_any(found) || super::handshakes(found) {
            for waiting in iterators.waiting(scope, &tasks.processes)? {
                let listener = waiting.rec.listener;
                queues.clients.insert(waiting.rec.peer, listener);
                queues.waiting.entry(listener).or_default().push(waiting);
            }
        }
        Ok(queues)
    }

    /// What waits at a TCP listener.
    ///
    /// # Errors
    /// Something of it is not carried.
    pub fn tcp(
        &self,
        file: &File,
        listener: &SockRec,
    ) -> Result<Vec<WaitingConnection>, CollectError> {
        self.take(file, listener, |queue| carried(listener, queue))
    }

    /// What waits at a Unix listener, by the sockets of the application.
    ///
    /// # Errors
    /// Something of it is not carried.
    pub fn unix(
        &self,
        file: &File,
        listener: &SockRec,
        owners: &Map<u64, OfdId>,
    ) -> Result<Vec<WaitingUnix>, CollectError> {
        self.take(file, listener, |queue| unix_accept::carried(queue, owners))
    }

    /// The listener that a Unix socket waits for, by the sockets of the application.
    pub fn awaited(&self, client: &SockRec, owners: &Map<u64, OfdId>) -> Option<OfdId> {
        let listener = self.clients.get(&client.sock)?;
        owners.get(listener).copied()
    }

    fn take<T>(
        &self,
        file: &File,
        listener: &SockRec,
        carry: impl FnOnce(&[Waiting]) -> Result<Vec<T>, String>,
    ) -> Result<Vec<T>, CollectError> {
        let queue = self
            .waiting
            .get(&listener.sock)
            .map_or(&[][..], Vec::as_slice);
        carry(queue).map_err(|reason| {
            let (pid, fd) = place(file);
            CollectError::Blocked(Blocker {
                pid,
                fd: Some(fd),
                object: object(listener).to_owned(),
                reason: format!(
                    "of {} connections that were not accepted, {reason}; try again when the \
                     application keeps up",
                    queue.len()
                ),
            })
        })
    }
}

fn object(listener: &SockRec) -> &'static str {
    if i32::from(listener.family) == libc::AF_UNIX {
        "Unix listener"
    } else {
        "TCP listener"
    }
}

/// What the image carries of a TCP accept queue; an error tells why it is not carried.
fn carried(listener: &SockRec, queue: &[Waiting]) -> Result<Vec<WaitingConnection>, String> {
    if !queue.is_empty() {
        for (wrong, reason) in [
            (
                // What comes over any other is not for it.
                ![0, LOOPBACK].contains(&listener.bound_ifindex),
                "bound to an interface",
            ),
            (listener.flags & SockFlag::HAS_FILTER != 0, "with a filter"),
        ] {
            if wrong {
                return Err(format!("those of a listener {reason} are not carried"));
            }
        }
    }
    let each = queue.iter().map(|waiting| connection(listener, waiting));
    each.collect()
}

/// Why this kernel cannot make connections again that nobody has accepted, if it cannot.
#[must_use]
pub fn refusal() -> Option<String> {
    (!Handshakes::are_supported()).then(|| {
        "this kernel cannot make them again (Linux 6.9 can); try again when the application keeps up"
            .to_owned()
    })
}

/// Whether any connection waits to be accepted.
#[must_use]
pub fn is_any(found: &Files) -> bool {
    let waits = |sock: &SockRec| match i32::from(sock.family) {
        // The kernel keeps them as if they were messages.
        libc::AF_UNIX => sock.rcv_qlen > 0,
        _ => sock.ack_backlog > 0,
    };
    found
        .files
        .iter()
        .any(|file| listener(file).is_some_and(waits))
}

/// The TCP listener that a descriptor is and that has connections nobody has accepted.
pub fn unaccepted(file: &File) -> Option<&SockRec> {
    let tcp = |sock: &&SockRec| i32::from(sock.protocol) == libc::IPPROTO_TCP;
    let sock = listener(file).filter(tcp)?;
    (sock.ack_backlog > 0).then_some(sock)
}

fn listener(file: &File) -> Option<&SockRec> {
    match &file.detail {
        Detail::Socket(sock) if sock.state == LISTEN => Some(sock),
        _ => None,
    }
}

/// What the image carries of a connection; an error tells why it is not carried.
///
/// # Errors
/// It has sent something, is half open, or what it has received cannot be read.
fn connection(listener: &SockRec, waiting: &Waiting) -> Result<WaitingConnection, String> {
    let rec = &waiting.rec;
    let remote = socket::address(rec.family, &rec.remote_addr, rec.remote_port);
    let refuse = |what: &str| Err(format!("the one from {remote} {what}"));
    // A connection that was reset has lost its own port.
    let local = socket::address(rec.family, &rec.local_addr, listener.local_port);
    let end = match (rec.state, rec.err.cast_signed()) {
        (ESTABLISHED, _) => WaitingEnd::Open,
        (CLOSE_WAIT, _) => WaitingEnd::Closed,
        (CLOSE, libc::ECONNRESET) => WaitingEnd::Reset,
        (CLOSE, libc::EPIPE) => WaitingEnd::ClosedAndReset,
        (state, _) => return refuse(&format!("is in state {state}")),
    };
    if rec.snd_una != rec.write_seq {
        return refuse("has sent something");
    }
    if rec.flags & Flag::URGENT != 0 {
        return refuse("has received urgent data");
    }
    if rec.flags & Flag::USEC != 0 {
        return refuse("tells the time in microseconds");
    }
    if [local, remote].iter().any(|end| is_link_local(end.ip())) {
        return refuse("has an address of one link");
    }
    let Some(received) = received(rec, end, &waiting.data) else {
        return refuse("has received what cannot be read");
    };
    Ok(WaitingConnection {
        local,
        remote,
        write_seq: rec.write_seq,
        received_seq: rec.copied_seq,
        received: ByteBuf::from(received),
        end,
        window: rec.snd_wnd,
        negotiated: negotiated(rec),
        peer_timestamp: rec.ts_recent,
    })
}

/// The options that were agreed on.
pub(super) fn negotiated(rec: &WaitingRec) -> TcpOptions {
    let has = |flag| rec.flags & flag != 0;
    TcpOptions {
        mss_clamp: rec.mss_clamp,
        wscale: has(Flag::WSCALE).then_some((rec.snd_wscale, rec.rcv_wscale)),
        sack: has(Flag::SACK),
        timestamp: has(Flag::TSTAMP).then(|| milliseconds(rec.timestamp)),
    }
}

pub(super) fn is_link_local(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
        IpAddr::V4(_) => false,
    }
}

/// The bytes of a receive queue, whose segments may overlap; `None` unless all are there.
fn received(rec: &WaitingRec, end: WaitingEnd, data: &[WaitingDataRec]) -> Option<Vec<u8>> {
    let fin = matches!(end, WaitingEnd::Closed | WaitingEnd::ClosedAndReset);
    // A FIN has a sequence number, and is no byte.
    let upto = rec.rcv_nxt.wrapping_sub(u32::from(fin));
    in_order(rec.copied_seq, upto, data)
}

/// The bytes from one sequence number up to another; `None` unless all of them are there.
pub(super) fn in_order(first: u32, upto: u32, data: &[WaitingDataRec]) -> Option<Vec<u8>> {
    let length = upto.wrapping_sub(first);
    let mut bytes = Vec::new();
    for part in data {
        if part.flags & Flag::UNREADABLE != 0 {
            return None;
        }
        let at = usize::try_from(part.seq.wrapping_sub(first)).ok()?;
        let part = part.data.get(..usize::try_from(part.len).ok()?)?;
        // What comes twice comes in order.
        let known = bytes.len().checked_sub(at)?;
        bytes.extend(part.get(known..).unwrap_or_default());
    }
    (length <= LONGEST && bytes.len() == usize::try_from(length).ok()?).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One that has received three bytes, the first with the largest sequence number.
    fn waiting() -> Waiting {
        Waiting {
            rec: WaitingRec {
                family: 2,
                state: ESTABLISHED,
                local_port: 80,
                remote_port: 1024,
                copied_seq: u32::MAX,
                rcv_nxt: 2,
                snd_una: 7,
                write_seq: 7,
                flags: Flag::TSTAMP | Flag::WSCALE,
                snd_wscale: 3,
                timestamp: 9,
                ..WaitingRec::default()
            },
            data: vec![
                WaitingDataRec::with(u32::MAX, b"ab"),
                WaitingDataRec::with(0, b"bc"),
            ],
        }
    }

    fn carry(change: impl FnOnce(&mut Waiting)) -> Result<WaitingConnection, String> {
        let mut waiting = waiting();
        change(&mut waiting);
        let listener = SockRec {
            local_port: 80,
            ..SockRec::default()
        };
        carried(&listener, &[waiting]).map(|mut carried| carried.remove(0))
    }

    #[test]
    fn what_was_received_twice_is_one() {
        let connection = carry(|_| ()).unwrap();
        assert_eq!(connection.received[..], *b"abc");
        assert_eq!(connection.end, WaitingEnd::Open);
        assert_eq!(connection.negotiated.timestamp, Some(10));
        assert_eq!(connection.negotiated.wscale, Some((3, 0)));
        assert!(!connection.negotiated.sack);
    }

    #[test]
    fn ends_are_told_apart_and_a_fin_is_no_byte() {
        let end = |state, err: i32, rcv_nxt| {
            let ended = carry(|waiting| {
                waiting.rec.state = state;
                waiting.rec.err = err.cast_unsigned();
                waiting.rec.rcv_nxt = rcv_nxt;
                // Whoever was reset has no port of its own.
                waiting.rec.local_port = 0;
            });
            ended.map(|connection| (connection.end, connection.local.port()))
        };
        assert_eq!(end(CLOSE_WAIT, 0, 3), Ok((WaitingEnd::Closed, 80)));
        let reset = libc::ECONNRESET;
        assert_eq!(end(CLOSE, reset, 2), Ok((WaitingEnd::Reset, 80)));
        let both = end(CLOSE, libc::EPIPE, 3);
        assert_eq!(both, Ok((WaitingEnd::ClosedAndReset, 80)));
        assert!(end(CLOSE, libc::ETIMEDOUT, 2).is_err());
        assert!(end(3, 0, 2).is_err(), "SYN_RECV");
    }

    #[test]
    fn nothing_is_carried_in_part() {
        let refused: [fn(&mut Waiting); 7] = [
            |waiting| waiting.data.truncate(1),
            |waiting| waiting.data.reverse(),
            |waiting| waiting.rec.rcv_nxt += 1,
            |waiting| waiting.data[1].flags = Flag::UNREADABLE,
            |waiting| waiting.rec.write_seq += 1,
            |waiting| waiting.rec.flags |= Flag::URGENT,
            |waiting| waiting.rec.flags |= Flag::USEC,
        ];
        for (index, change) in refused.into_iter().enumerate() {
            assert!(carry(change).is_err(), "{index}");
        }
    }

    #[test]
    fn of_a_listener_of_another_interface_none_is_carried() {
        let listener = SockRec {
            bound_ifindex: 2,
            ..SockRec::default()
        };
        assert!(carried(&listener, &[waiting()]).is_err());
        assert_eq!(carried(&listener, &[]), Ok(Vec::new()));
    }
}
