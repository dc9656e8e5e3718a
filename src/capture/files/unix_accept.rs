//! Connections that a Unix listener has not accepted, and the clients that wait for it.

use crate::bpf::events::{SockRec, TRK_WAITING_GROUPS, WaitingDataRec, WaitingFlag as Flag};
use crate::bpf::iter::{Detail, Files, Waiting};
use crate::model::frozen::{PeerCredentials, UnixMessage, WaitingUnix};
use crate::model::ids::{OfdId, Pid};
use crate::model::map::Map;
use crate::sys::tcp::state::LISTEN;
use nix::libc;
use serde_bytes::ByteBuf;

/// `SHUTDOWN_MASK`: of one whose other end is closed, see unix_release_sock().
const CLOSED: u8 = 3;

/// Where clients and servers of the application meet.
#[derive(Debug, Default)]
pub struct Meetings {
    /// Listeners, by what they share with those that connect to them: the kernel's name of them.
    listeners: Map<u64, OfdId>,
}

impl Meetings {
    pub(super) fn of(found: &Files) -> Self {
        let listeners = found.files.iter().filter_map(|file| match &file.detail {
            Detail::Socket(sock) if is_unix(sock) && sock.state == LISTEN => {
                Some((sock.name, OfdId(file.rec.file)))
            }
            _ => None,
        });
        Self {
            listeners: listeners.collect(),
        }
    }

    /// The listener that a socket waits for: its other end is none of anybody's yet.
    pub fn awaited(&self, sock: &SockRec) -> Option<OfdId> {
        let waits = sock.peer != 0 && sock.peer_ino == 0 && sock.shutdown != CLOSED;
        let listener = waits.then(|| self.listeners.get(&sock.peer_name));
        listener.flatten().copied()
    }
}

fn is_unix(sock: &SockRec) -> bool {
    i32::from(sock.family) == libc::AF_UNIX
}

/// What the image carries of an accept queue, by the sockets of the application; an error tells
/// why it is not carried.
pub fn carried(queue: &[Waiting], owners: &Map<u64, OfdId>) -> Result<Vec<WaitingUnix>, String> {
    let each = queue.iter().map(|waiting| connection(waiting, owners));
    each.collect()
}

fn connection(waiting: &Waiting, owners: &Map<u64, OfdId>) -> Result<WaitingUnix, String> {
    let rec = &waiting.rec;
    let client = owners.get(&rec.peer).copied();
    if client.is_none() && rec.shutdown != CLOSED {
        return Err(format!(
            "one is from outside the application, from PID {}",
            rec.peer_pid
        ));
    }
    if rec.ngroups > TRK_WAITING_GROUPS {
        return Err(format!("one is of somebody in {} groups", rec.ngroups));
    }
    let groups = rec
        .groups
        .iter()
        .take(usize::try_from(rec.ngroups).unwrap_or(0));
    Ok(WaitingUnix {
        client,
        peer: Some(PeerCredentials {
            pid: Pid(rec.peer_pid.cast_signed()),
            uid: rec.peer_uid,
            gid: rec.peer_gid,
            groups: groups.copied().collect(),
        }),
        queue: messages(&waiting.data)?,
    })
}

/// Puts messages together: parts of one have its number.
fn messages(data: &[WaitingDataRec]) -> Result<Vec<UnixMessage>, String> {
    let whole = data.chunk_by(|a, b| a.seq == b.seq);
    whole.map(message).collect()
}

fn message(parts: &[WaitingDataRec]) -> Result<UnixMessage, String> {
    let mut bytes = Vec::new();
    for part in parts {
        if part.flags & Flag::RIGHTS != 0 {
            return Err("descriptors are in flight to one".to_owned());
        }
        let length = usize::try_from(part.len).unwrap_or(usize::MAX);
        match part.data.get(..length) {
            Some(part_bytes) if part.flags & Flag::UNREADABLE == 0 => bytes.extend(part_bytes),
            _ => return Err("what one has received cannot be read".to_owned()),
        }
    }
    let sender = parts.first().filter(|part| part.pid != 0);
    Ok(UnixMessage {
        data: ByteBuf::from(bytes),
        fds: Vec::new(),
        sender: None,
        credentials: sender.map(|part| PeerCredentials {
            pid: Pid(part.pid.cast_signed()),
            uid: part.uid,
            gid: part.gid,
            groups: Vec::new(),
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::events::WaitingRec;

    fn part(seq: u32, bytes: &[u8]) -> WaitingDataRec {
        WaitingDataRec {
            pid: 7,
            ..WaitingDataRec::with(seq, bytes)
        }
    }

    fn waiting() -> Waiting {
        Waiting {
            rec: WaitingRec {
                peer: 0x10,
                peer_pid: 7,
                ngroups: 1,
                groups: [4; 32],
                ..WaitingRec::default()
            },
            data: vec![part(1, b"on"), part(1, b"e"), part(2, b""), part(3, b"two")],
        }
    }

    fn owners() -> Map<u64, OfdId> {
        Map::from_iter([(0x10, OfdId(1))])
    }

    #[test]
    fn parts_become_messages() {
        let carried = carried(&[waiting()], &owners()).unwrap().remove(0);
        assert_eq!(carried.client, Some(OfdId(1)));
        let groups = carried.peer.map(|peer| peer.groups);
        assert_eq!(groups, Some(vec![4]));
        let messages: Vec<_> = carried.queue.iter().map(|m| &m.data[..]).collect();
        assert_eq!(messages, [&b"one"[..], b"", b"two"]);
        let sender = carried.queue[0].credentials.as_ref();
        assert_eq!(sender.map(|sender| sender.pid), Some(Pid(7)));
    }

    #[test]
    fn one_from_outside_is_refused_and_one_that_is_closed_is_not() {
        let mut one = waiting();
        let nobody = Map::default();
        assert!(carried(std::slice::from_ref(&one), &nobody).is_err());
        one.rec.shutdown = CLOSED;
        assert_eq!(carried(&[one], &nobody).unwrap()[0].client, None);
    }

    #[test]
    fn nothing_is_carried_in_part() {
        let refused: [fn(&mut Waiting); 4] = [
            |one| one.data[1].flags = Flag::RIGHTS,
            |one| one.data[3].flags = Flag::UNREADABLE,
            |one| one.data[0].len = 2000,
            |one| one.rec.ngroups = 33,
        ];
        for (index, change) in refused.into_iter().enumerate() {
            let mut one = waiting();
            change(&mut one);
            assert!(carried(&[one], &owners()).is_err(), "{index}");
        }
    }

    #[test]
    fn a_client_waits_for_the_listener_that_its_other_end_is_named_like() {
        let meetings = Meetings {
            listeners: Map::from_iter([(0x20, OfdId(2))]),
        };
        let client = SockRec {
            peer: 0x30,
            peer_name: 0x20,
            ..SockRec::default()
        };
        assert_eq!(meetings.awaited(&client), Some(OfdId(2)));
        let not_waiting: [fn(&mut SockRec); 4] = [
            |sock| sock.peer = 0,
            |sock| sock.peer_ino = 5,
            |sock| sock.peer_name = 0x21,
            |sock| sock.shutdown = CLOSED,
        ];
        for (index, change) in not_waiting.into_iter().enumerate() {
            let mut other = client;
            change(&mut other);
            assert_eq!(meetings.awaited(&other), None, "{index}");
        }
    }
}
