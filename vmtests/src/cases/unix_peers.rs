//! What Unix sockets remember of who made them, and their messages of who sent them.

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    Backlog, ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, getsockopt, listen, recvmsg,
    sendmsg, setsockopt, sockopt,
};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};

use super::child::Child;
use super::probe::option;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("unix_peer_pairs", pairs),
    Entry::carried("unix_peer_listeners", listeners),
    Entry::carried("unix_peer_none", none),
    Entry::carried("unix_senders", senders),
    Entry::carried("unix_credentials", credentials),
];

const NOBODY: u32 = 65534;
const GROUPS: [u32; 3] = [7, 8, 1234];

/// `SO_PEERCRED` and `SO_PEERGROUPS`.
#[derive(Debug, PartialEq)]
pub(super) struct Peer {
    pid: i32,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

pub(super) fn peer(socket: &impl AsFd) -> Result<Peer> {
    let told = getsockopt(&socket.as_fd(), sockopt::PeerCredentials)?;
    // Nobody has none.
    let groups = option(socket, libc::SOL_SOCKET, libc::SO_PEERGROUPS).unwrap_or_default();
    let (groups, _) = groups.as_chunks();
    Ok(Peer {
        pid: told.pid(),
        uid: told.uid(),
        gid: told.gid(),
        groups: groups.iter().copied().map(u32::from_ne_bytes).collect(),
    })
}

pub(super) fn expect(what: &str, socket: &impl AsFd, wanted: &Peer) -> Result<()> {
    let found = peer(socket)?;
    ensure!(
        found == *wanted,
        "{what} is told of {found:?}, not {wanted:?}"
    );
    Ok(())
}

pub(super) fn nobody(pid: i32) -> Peer {
    Peer {
        pid,
        uid: NOBODY,
        gid: NOBODY,
        groups: GROUPS.to_vec(),
    }
}

pub(super) fn become_nobody() -> Result<()> {
    setgroups(&GROUPS.map(Gid::from_raw))?;
    let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
    setresgid(gid, gid, gid)?;
    Ok(setresuid(uid, uid, uid)?)
}

fn send_fds(to: &UnixStream, fds: &[RawFd]) -> Result<()> {
    let rights = [ControlMessage::ScmRights(fds)];
    let data = [IoSlice::new(b"x")];
    sendmsg::<()>(to.as_raw_fd(), &data, &rights, MsgFlags::empty(), None)?;
    Ok(())
}

fn receive_fds(from: &UnixStream) -> Result<Vec<UnixStream>> {
    let mut byte = [0];
    let mut parts = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 8]);
    let flags = MsgFlags::empty();
    let message = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let mut sockets = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part {
            // SAFETY: new descriptors, owned by nobody else.
            sockets.extend(
                fds.into_iter()
                    .map(|fd| unsafe { UnixStream::from_raw_fd(fd) }),
            );
        }
    }
    Ok(sockets)
}

/// Pairs of our own, and of a child that is somebody else and has ended.
fn pairs(case: &Case) -> Result<()> {
    let (own, other) = UnixStream::pair()?;
    let (to, from) = UnixStream::pair()?;
    let child = Child::start(case.dir(), "maker", |_| {
        become_nobody()?;
        let (one, two) = UnixStream::pair()?;
        let (mut gone, left) = UnixStream::pair()?;
        gone.write_all(b"left behind")?;
        send_fds(&to, &[one.as_raw_fd(), two.as_raw_fd(), left.as_raw_fd()])
    })?;
    let pid = child.pid.as_raw();
    child.join()?;
    let theirs = receive_fds(&from)?;
    ensure!(theirs.len() == 3, "Received {} sockets", theirs.len());
    let we = peer(&own)?;
    let check = || -> Result<()> {
        for socket in [&own, &other] {
            expect("An end of our pair", socket, &we)?;
        }
        for socket in &theirs {
            expect("An end of the child's pair", socket, &nobody(pid))?;
        }
        Ok(())
    };
    check().context("Before")?;
    case.ready()?;
    check()?;
    (&theirs[0]).write_all(b"on")?;
    let mut bytes = [0; 2];
    (&theirs[1]).read_exact(&mut bytes)?;
    ensure!(&bytes == b"on", "The child's pair is broken");
    let mut text = String::new();
    (&theirs[2]).read_to_string(&mut text)?;
    ensure!(text == "left behind", "Received {text:?}");
    Ok(())
}

fn abstract_name(case: &Case, what: &str) -> Result<SocketAddr> {
    let name = format!("{}-{what}", case.dir().display());
    Ok(SocketAddr::from_abstract_name(name)?)
}

/// Those who connect are told who listens, or did then; those who accept, who connected.
fn listeners(case: &Case) -> Result<()> {
    let (ours, theirs) = (abstract_name(case, "ours")?, abstract_name(case, "theirs")?);
    let listener = UnixListener::bind_addr(&ours)?;
    let second = UnixListener::bind_addr(&theirs)?;
    let former = UnixListener::bind_addr(&abstract_name(case, "former")?)?;

    let before = UnixStream::connect_addr(&theirs)?;
    let before = (second.accept()?.0, before);
    let listens = Child::start(case.dir(), "listens", |_| {
        become_nobody()?;
        Ok(listen(&second, Backlog::new(5)?)?)
    })?;
    let other = listens.pid.as_raw();
    listens.join()?;
    let after = UnixStream::connect_addr(&theirs)?;
    let after = (second.accept()?.0, after);

    let we = peer(&before.1)?;
    let connects = Child::start(case.dir(), "connects", |turn| {
        become_nobody()?;
        let client = UnixStream::connect_addr(&ours)?;
        turn.wait();
        expect("The child", &client, &we)
    })?;
    let child = connects.pid.as_raw();
    let accepted = listener.accept()?.0;
    let last = UnixStream::connect_addr(&former.local_addr()?)?;
    let last = (former.accept()?.0, last);
    drop(former);
    connects.waits()?;

    let check = || -> Result<()> {
        expect("Who accepted the child", &accepted, &nobody(child))?;
        expect("Who connected before", &before.1, &we)?;
        expect("Who connected after", &after.1, &nobody(other))?;
        for socket in [&before.0, &after.0, &last.0, &last.1] {
            expect("One of our own", socket, &we)?;
        }
        let new = UnixStream::connect_addr(&ours)?;
        expect("Who connects now", &new, &we)?;
        let new = UnixStream::connect_addr(&theirs)?;
        expect("Who connects to the child's now", &new, &nobody(other))?;
        listener.accept()?;
        second.accept()?;
        Ok(())
    };
    check().context("Before")?;
    case.ready()?;
    check()?;
    connects.finish()
}

/// Datagram sockets that connected to each other were not made by anybody in particular.
fn none(case: &Case) -> Result<()> {
    let names = [abstract_name(case, "one")?, abstract_name(case, "two")?];
    let one = UnixDatagram::bind_addr(&names[0])?;
    let two = UnixDatagram::bind_addr(&names[1])?;
    one.connect_addr(&names[1])?;
    two.connect_addr(&names[0])?;
    let before = peer(&one)?;
    ensure!(before.uid == u32::MAX, "They know {before:?} already");
    case.ready()?;
    for socket in [&one, &two] {
        expect("One of two datagram sockets", socket, &before)?;
    }
    one.send(b"there")?;
    let mut bytes = [0; 8];
    let (length, from) = two.recv_from(&mut bytes)?;
    ensure!(&bytes[..length] == b"there", "Received {bytes:?}");
    let name = from.as_abstract_name().map(<[u8]>::to_vec);
    ensure!(
        name.as_deref() == names[0].as_abstract_name(),
        "It came from {name:?}"
    );
    two.send(b"back")?;
    ensure!(one.recv(&mut bytes)? == 4, "It does not lead back");
    Ok(())
}

/// Datagrams from several sockets, with names and without, some of them closed.
fn senders(case: &Case) -> Result<()> {
    let path = case.dir().join("receiver");
    let receiver = UnixDatagram::bind(&path)?;
    let open = UnixDatagram::bind_addr(&abstract_name(case, "open")?)?;
    let closed = UnixDatagram::bind_addr(&abstract_name(case, "closed")?)?;
    let in_file = case.dir().join("sender");
    let deleted = UnixDatagram::bind(&in_file)?;
    let unnamed = UnixDatagram::unbound()?;
    let all = [&open, &closed, &unnamed, &deleted, &open, &unnamed, &closed];
    let name = |address: &SocketAddr| {
        let path = address.as_pathname().map(|p| p.display().to_string());
        let bytes = address.as_abstract_name().map(<[u8]>::to_vec);
        (path, bytes)
    };
    let mut wanted = Vec::new();
    for (number, sender) in all.iter().enumerate() {
        sender.send_to(&[u8::try_from(number)?], &path)?;
        wanted.push(name(&sender.local_addr()?));
    }
    drop((closed, deleted));
    std::fs::remove_file(&in_file)?;
    case.ready()?;
    for (number, wanted) in wanted.iter().enumerate() {
        let mut bytes = [0; 8];
        let (length, from) = receiver.recv_from(&mut bytes)?;
        ensure!(
            length == 1 && usize::from(bytes[0]) == number,
            "Datagram {number} is {bytes:?}"
        );
        ensure!(
            name(&from) == *wanted,
            "Datagram {number} is from {from:?}, not {wanted:?}"
        );
    }
    ensure!(!in_file.exists(), "The sender's file is there again");
    ensure!(
        UnixDatagram::bind_addr(&abstract_name(case, "closed")?).is_ok(),
        "The closed sender's name is taken"
    );
    Ok(())
}

/// The credentials of a message, which its receiver asks for.
fn credentials(case: &Case) -> Result<()> {
    let (to, from) = UnixStream::pair()?;
    let (datagrams, receiver) = UnixDatagram::pair()?;
    for socket in [from.as_fd(), receiver.as_fd()] {
        setsockopt(&socket, sockopt::PassCred, &true)?;
    }
    (&to).write_all(b"ours")?;
    let ended = Child::start(case.dir(), "ended", |_| {
        become_nobody()?;
        (&to).write_all(b"ended")?;
        datagrams.send(b"ended").map(drop).map_err(Into::into)
    })?;
    let ended_pid = ended.pid.as_raw();
    ended.join()?;
    let alive = Child::start(case.dir(), "alive", |turn| {
        become_nobody()?;
        (&to).write_all(b"alive")?;
        turn.wait();
        Ok(())
    })?;
    let alive_pid = alive.pid.as_raw();
    alive.waits()?;
    case.ready()?;
    let we = (i32::try_from(std::process::id())?, 0);
    for (socket, text, who) in [
        (from.as_fd(), "ours", we),
        (from.as_fd(), "ended", (ended_pid, NOBODY)),
        (from.as_fd(), "alive", (alive_pid, NOBODY)),
        (receiver.as_fd(), "ended", (ended_pid, NOBODY)),
    ] {
        let mut bytes = [0; 16];
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let mut space = nix::cmsg_space!(libc::ucred);
        let flags = MsgFlags::MSG_DONTWAIT;
        let raw = socket.as_raw_fd();
        let message = recvmsg::<UnixAddr>(raw, &mut parts, Some(&mut space), flags)?;
        let (length, mut said) = (message.bytes, None);
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmCredentials(sender) = part {
                said = Some((sender.pid(), sender.uid()));
            }
        }
        ensure!(&bytes[..length] == text.as_bytes(), "Received {bytes:?}");
        ensure!(said == Some(who), "{text} is from {said:?}, not {who:?}");
    }
    alive.finish()
}
