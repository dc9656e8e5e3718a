//! What is queued in Unix domain sockets.

use super::Departed;
use super::error::{FilesError, call};
use super::peer::act_as;
use super::room::{Buffer, with_room};
use super::unix::{Sockets, encode, is_mutual, new_socket, socket_type, sockets, title, with_name};
use crate::model::frozen::{Application, UnixAddress, UnixMessage, UnixSocket, UnixState};
use crate::model::ids::OfdId;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

/// Queues what was not read: each message is sent by the other end.
///
/// # Errors
/// The image refers to a description it does not hold, or the kernel refuses.
pub fn fill_all(
    app: &Application,
    opened: &BTreeMap<OfdId, OwnedFd>,
    departed: Departed,
) -> Result<(), FilesError> {
    let all = sockets(app);
    for (&id, (_, unix)) in &all {
        if unix.queue.is_empty() {
            continue;
        }
        let missing = || FilesError::Missing(format!("peer of Unix socket {id}"));
        let (sender, to) = match unix.state {
            UnixState::Connected { peer } => {
                let to = (!is_mutual(&all, id, peer)).then_some(unix.address.as_ref());
                (opened.get(&peer).ok_or_else(missing)?, to.flatten())
            }
            UnixState::PeerClosed | UnixState::PeerReset => {
                (departed.ends.get(&id).ok_or_else(missing)?, None)
            }
            _ => {
                fill_from_many(&all, unix, opened)?;
                continue;
            }
        };
        send_all(sender, to, &unix.queue, opened)?;
    }
    for (id, (_, listener)) in &all {
        for (index, waiting) in listener.waiting.iter().enumerate() {
            let client = match waiting.client {
                Some(client) => opened.get(&client),
                None => departed.clients.get(&(*id, index)),
            };
            let missing = || FilesError::Missing(format!("client of Unix listener {id}"));
            send_all(client.ok_or_else(missing)?, None, &waiting.queue, opened)?;
        }
    }
    for (id, (_, unix)) in &all {
        if unix.state == UnixState::PeerReset {
            let flags = ns::MsgFlags::MSG_DONTWAIT | ns::MsgFlags::MSG_NOSIGNAL;
            ns::send(opened[id].as_raw_fd(), b"lost", flags)
                .map_err(call("Unix socket", "send"))?;
        }
    }
    drop(departed);
    for (id, (_, unix)) in &all {
        let how = match unix.shutdown & 3 {
            1 => ns::Shutdown::Read,
            2 => ns::Shutdown::Write,
            3 => ns::Shutdown::Both,
            _ => continue,
        };
        if matches!(
            unix.state,
            UnixState::Connected { .. } | UnixState::Waiting { .. }
        ) {
            ns::shutdown(opened[id].as_raw_fd(), how).map_err(call("Unix socket", "shutdown"))?;
        }
    }
    Ok(())
}

fn send_all(
    sender: &OwnedFd,
    to: Option<&UnixAddress>,
    queue: &[UnixMessage],
    opened: &BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    with_all(sender.as_fd(), queue, || {
        queue
            .iter()
            .try_for_each(|message| send(sender.as_fd(), to, message, opened))
    })
}

/// Queues datagrams at a socket that anybody may send to.
fn fill_from_many(
    all: &Sockets<'_>,
    unix: &UnixSocket,
    opened: &BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    let Some(address) = &unix.address else {
        let what = "A Unix socket with unread data and neither a name nor a peer".to_owned();
        return Err(FilesError::Unsupported(what));
    };
    let by_name = |name: &UnixAddress| {
        let mut named = all
            .iter()
            .filter(|(_, (_, one))| one.address.as_ref() == Some(name));
        named.find_map(|(id, _)| opened.get(id))
    };
    let kind = socket_type(unix.socktype)?;
    for message in &unix.queue {
        let put = |from: &OwnedFd| {
            with_all(from.as_fd(), &unix.queue, || {
                send(from.as_fd(), Some(address), message, opened)
            })
        };
        match &message.sender {
            None => put(&new_socket(kind)?)?,
            Some(name) => match by_name(name) {
                Some(from) => put(from)?,
                None => put_as(name, kind, put)?,
            },
        }
    }
    Ok(())
}

/// Sends by a new socket with the name of one that is gone, or is not the application's.
fn put_as(
    name: &UnixAddress,
    kind: ns::SockType,
    put: impl Fn(&OwnedFd) -> Result<(), FilesError>,
) -> Result<(), FilesError> {
    let from = new_socket(kind)?;
    let mut had_name = false;
    let named = with_name(&from, name, || {
        had_name = true;
        put(&from)
    });
    if had_name {
        return named;
    }
    tracing::warn!(
        "{} sent what is not read yet, and its name is taken",
        title(name)
    );
    put(&from)
}

/// Runs `fill` while the sender's buffer holds all of the queue.
fn with_all(
    sender: BorrowedFd<'_>,
    queue: &[UnixMessage],
    fill: impl FnOnce() -> Result<(), FilesError>,
) -> Result<(), FilesError> {
    // With what the kernel needs for each of its pieces.
    const MORE: usize = 128 << 10;
    let total: usize = queue.iter().map(|m| m.data.len() + 1024).sum();
    with_room("Unix socket", sender, Buffer::SEND, MORE + 4 * total, fill)
}

fn send(
    sender: BorrowedFd<'_>,
    to: Option<&UnixAddress>,
    message: &UnixMessage,
    opened: &BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    let fds = message
        .fds
        .iter()
        .map(|id| {
            opened
                .get(id)
                .map(AsRawFd::as_raw_fd)
                .ok_or_else(|| FilesError::Missing(format!("{id} in flight over a Unix socket")))
        })
        .collect::<Result<Vec<RawFd>, _>>()?;
    let to = to.map(encode).transpose()?;
    // 0: nobody asked for it when the message was sent.
    let who = message.credentials.as_ref().filter(|who| who.pid.0 != 0);
    let credentials = who.map(|who| {
        ns::UnixCredentials::from(libc::ucred {
            pid: who.pid.0,
            uid: who.uid,
            gid: who.gid,
        })
    });
    let put = || {
        let rights = (!fds.is_empty()).then_some(ns::ControlMessage::ScmRights(&fds));
        let named = credentials.as_ref().map(ns::ControlMessage::ScmCredentials);
        let control: Vec<_> = rights.into_iter().chain(named).collect();
        let data = [IoSlice::new(&message.data)];
        let flags = ns::MsgFlags::MSG_DONTWAIT;
        let sent = ns::sendmsg(sender.as_raw_fd(), &data, &control, flags, to.as_ref())?;
        if sent == message.data.len() {
            Ok(Vec::new())
        } else {
            Err(Errno::EMSGSIZE)
        }
    };
    match put() {
        // The process has ended, and there must be one.
        Err(Errno::ESRCH) if who.is_some() => act_as(who, "sendmsg", put).map(drop),
        sent => sent.map(drop).map_err(call("Unix socket", "sendmsg")),
    }
}
