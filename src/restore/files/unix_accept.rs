//! Clients of Unix listeners that have not accepted them: they connect once more.

use super::error::{FilesError, missing_part};
use super::peer::act_as;
use super::unix::{
    Sockets, UnixSockets, bind_name, encode, listen, new_socket, set_options, socket_type, title,
};
use crate::model::frozen::{UnixAddress, UnixSocket, UnixState, WaitingUnix};
use crate::model::ids::OfdId;
use nix::sys::socket as ns;
use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

/// Clients that the application has closed, by the listener and their place in its queue.
pub type Closed = BTreeMap<(OfdId, usize), OwnedFd>;

/// Makes every client that waits and has it connect, in the order in which it had. To be called
/// when nobody else is to be accepted by these listeners any more.
///
/// # Errors
/// The kernel refuses a step, or the listener cannot be told from another one.
pub fn connect_all(all: &Sockets<'_>, made: &mut UnixSockets) -> Result<(), FilesError> {
    for (&id, &(_, listener)) in all {
        let UnixState::Listening { backlog } = listener.state else {
            continue;
        };
        if listener.waiting.is_empty() {
            continue;
        }
        let address = listener.address.as_ref();
        let address = address.ok_or_else(|| missing_part("Unix listener", "name"))?;
        check_alone(all, address)?;
        // The number may have been larger once.
        let room = u32::try_from(listener.waiting.len()).unwrap_or(u32::MAX);
        let who = listener.peer.as_ref();
        if room > backlog {
            listen(&made.opened[&id], room, who)?;
        }
        let clients = listener.waiting.iter();
        let clients = clients.map(|waiting| client(all, listener, waiting));
        let clients = clients.collect::<Result<Vec<_>, _>>()?;
        let to = encode(address)?;
        let pairs: Vec<_> = listener.waiting.iter().zip(&clients).collect();
        for same in pairs.chunk_by(|(one, _), (other, _)| one.peer == other.peer) {
            act_as(same[0].0.peer.as_ref(), "connect", || {
                for (_, client) in same {
                    ns::connect(client.as_raw_fd(), &to)?;
                }
                Ok(Vec::new())
            })?;
        }
        for ((index, waiting), fd) in listener.waiting.iter().enumerate().zip(clients) {
            match waiting.client {
                Some(client) => drop(made.opened.insert(client, fd)),
                None => drop(made.closed.insert((id, index), fd)),
            }
        }
        if room > backlog {
            listen(&made.opened[&id], backlog, who)?;
        }
    }
    Ok(())
}

/// A client before it connects.
fn client(
    all: &Sockets<'_>,
    listener: &UnixSocket,
    waiting: &WaitingUnix,
) -> Result<OwnedFd, FilesError> {
    let fd = new_socket(socket_type(listener.socktype)?)?;
    if let Some(id) = waiting.client {
        let missing = || FilesError::Missing(format!("client {id} of a Unix listener"));
        let (described, unix) = all.get(&id).ok_or_else(missing)?;
        set_options(&fd, described)?;
        if let Some(name) = &unix.address {
            bind_name(&fd, name)?;
        }
    }
    Ok(fd)
}

/// Of several listeners that had the same name, one after the other, only the last is reached.
fn check_alone(all: &Sockets<'_>, address: &UnixAddress) -> Result<(), FilesError> {
    let same = |unix: &UnixSocket| {
        matches!(unix.state, UnixState::Listening { .. }) && unix.address.as_ref() == Some(address)
    };
    if all.values().filter(|(_, unix)| same(unix)).count() > 1 {
        let what = format!(
            "{}, connected to one of several of that name",
            title(address)
        );
        return Err(FilesError::Unsupported(what));
    }
    Ok(())
}
