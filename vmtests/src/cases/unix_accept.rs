//! Unix connections that a listener has not accepted: in their order, with what was sent to them,
//! and what both ends are told of each other.

use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{
    self as ns, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag,
    SockType, UnixAddr, setsockopt, sockopt,
};

use super::child::Child;
use super::probe::{check_pattern, pattern};
use super::unix_peers::{become_nobody, expect, nobody, peer};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("unix_accept_queue", queue),
    Entry::carried("unix_accept_ended", ended),
    Entry::carried("unix_accept_much", much),
    Entry::carried("unix_accept_many", many),
    Entry::carried("unix_accept_seqpacket", seqpacket),
    Entry::carried("unix_accept_peers", peers),
    Entry::refused_frozen(
        "refused_unix_accept_rights",
        "descriptors are in flight to one",
        rights,
    ),
];

fn abstract_name(case: &Case) -> Result<SocketAddr> {
    Ok(SocketAddr::from_abstract_name(
        case.dir().as_os_str().as_encoded_bytes(),
    )?)
}

/// The next one that waits.
fn accept(listener: &UnixListener) -> Result<UnixStream> {
    listener.set_nonblocking(true)?;
    let (stream, _) = listener.accept().context("Accept")?;
    stream.set_nonblocking(true)?;
    Ok(stream)
}

fn nobody_waits(listener: &UnixListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    match listener.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        other => anyhow::bail!("Somebody else waits: {other:?}"),
    }
}

/// What can be read at once, to the end of file or not.
fn drain(stream: &mut UnixStream) -> Result<(Vec<u8>, bool)> {
    let mut bytes = Vec::new();
    match stream.read_to_end(&mut bytes) {
        Ok(_) => Ok((bytes, true)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok((bytes, false)),
        Err(error) => Err(error.into()),
    }
}

/// A word there and back.
fn talk(one: &mut UnixStream, two: &mut UnixStream) -> Result<()> {
    one.write_all(b"there").context("Write")?;
    two.write_all(b"back!").context("Write back")?;
    let mut word = [0; 5];
    two.read_exact(&mut word).context("Read")?;
    ensure!(word == *b"there", "Read {word:?}");
    one.read_exact(&mut word).context("Read back")?;
    ensure!(word == *b"back!", "Read back {word:?}");
    Ok(())
}

/// At a name in the file system: silent, with data, with data of several messages.
fn queue(case: &Case) -> Result<()> {
    let path = case.path("socket");
    let listener = UnixListener::bind(&path)?;
    let mut clients = [
        UnixStream::connect(&path)?,
        UnixStream::connect(&path)?,
        UnixStream::connect(&path)?,
    ];
    clients[1].write_all(b"data")?;
    for part in pattern(2, 900).chunks(300) {
        clients[2].write_all(part)?;
    }

    case.ready()?;

    let received = [Vec::new(), b"data".to_vec(), pattern(2, 900)];
    for (client, wanted) in clients.iter_mut().zip(received) {
        let mut server = accept(&listener)?;
        ensure!(
            drain(&mut server)? == (wanted, false),
            "What waited differs"
        );
        ensure!(
            server.local_addr()?.as_pathname() == Some(&path),
            "The accepted one has another name"
        );
        ensure!(
            client.peer_addr()?.as_pathname() == Some(&path),
            "The client has met another name"
        );
        talk(&mut server, client)?;
    }
    nobody_waits(&listener)?;
    let _late = UnixStream::connect(&path)?;
    accept(&listener).map(drop)
}

/// Clients that have half closed or closed what they sent by.
fn ended(case: &Case) -> Result<()> {
    let name = abstract_name(case)?;
    let listener = UnixListener::bind_addr(&name)?;
    let mut half = UnixStream::connect_addr(&name)?;
    half.write_all(b"half")?;
    half.shutdown(Shutdown::Write)?;
    let mut closed = UnixStream::connect_addr(&name)?;
    closed.write_all(b"closed")?;
    drop(closed);
    let both = UnixStream::connect_addr(&name)?;
    both.shutdown(Shutdown::Both)?;
    drop(UnixStream::connect_addr(&name)?);

    case.ready()?;

    let mut server = accept(&listener)?;
    ensure!(
        drain(&mut server)? == (b"half".to_vec(), true),
        "Half closed"
    );
    server.write_all(b"answer")?;
    let mut answer = [0; 6];
    half.read_exact(&mut answer)?;
    ensure!(answer == *b"answer", "The half closed one reads {answer:?}");
    let mut server = accept(&listener)?;
    ensure!(drain(&mut server)? == (b"closed".to_vec(), true), "Closed");
    let gone = server.write_all(b"answer").map_err(|error| error.kind());
    ensure!(gone == Err(ErrorKind::BrokenPipe), "It took {gone:?}");
    for what in ["Shut down", "Closed without a word"] {
        let mut server = accept(&listener)?;
        ensure!(drain(&mut server)? == (Vec::new(), true), "{what}");
    }
    nobody_waits(&listener)
}

/// As much as fits.
fn much(case: &Case) -> Result<()> {
    let name = abstract_name(case)?;
    let listener = UnixListener::bind_addr(&name)?;
    let mut client = UnixStream::connect_addr(&name)?;
    client.set_nonblocking(true)?;
    let bytes = pattern(7, 1 << 22);
    let mut sent = 0;
    while let Ok(count) = client.write(&bytes[sent..]) {
        sent += count;
    }
    ensure!(sent > 64 << 10, "Only {sent} bytes were taken");

    case.ready()?;

    let mut server = accept(&listener)?;
    let (received, ended) = drain(&mut server)?;
    ensure!(received.len() == sent && !ended, "{} bytes", received.len());
    check_pattern("what waited", 7, &received)?;
    talk(&mut server, &mut client)
}

/// More than one pass of the iterators brings; and the backlog was larger once.
fn many(case: &Case) -> Result<()> {
    const CLIENTS: u64 = 500;
    let name = abstract_name(case)?;
    let listener = UnixListener::bind_addr(&name)?;
    ns::listen(&listener, Backlog::new(600)?)?;
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let mut client = UnixStream::connect_addr(&name)?;
        for message in pattern(number, 8000).chunks(2000) {
            client.write_all(message)?;
        }
        clients.push(client);
    }
    ns::listen(&listener, Backlog::new(10)?)?;

    case.ready()?;

    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let late = ns::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    let to = UnixAddr::new_abstract(case.dir().as_os_str().as_encoded_bytes())?;
    let connected = ns::connect(late.as_raw_fd(), &to);
    ensure!(
        connected == Err(Errno::EAGAIN),
        "The backlog is another one"
    );
    for (number, client) in (0..CLIENTS).zip(&mut clients) {
        let mut server = accept(&listener)?;
        let received = drain(&mut server)?.0;
        ensure!(received == pattern(number, 8000), "What {number} had sent");
        server.set_nonblocking(false)?;
        talk(&mut server, client)?;
    }
    nobody_waits(&listener)
}

/// Whole messages, an empty one among them, of a client with a name.
fn seqpacket(case: &Case) -> Result<()> {
    let socket = || -> Result<OwnedFd> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let kind = SockType::SeqPacket;
        Ok(ns::socket(AddressFamily::Unix, kind, flags, None)?)
    };
    let (server, client) = (socket()?, socket()?);
    let name = UnixAddr::new(&case.path("server"))?;
    let own = UnixAddr::new(&case.path("client"))?;
    ns::bind(server.as_raw_fd(), &name)?;
    ns::listen(&server, Backlog::new(1)?)?;
    ns::bind(client.as_raw_fd(), &own)?;
    ns::connect(client.as_raw_fd(), &name)?;
    let messages = [&b"one"[..], b"", &pattern(3, 20_000)].map(<[u8]>::to_vec);
    for message in &messages {
        ns::send(client.as_raw_fd(), message, MsgFlags::empty())?;
    }

    case.ready()?;

    let accepted = ns::accept(server.as_raw_fd())?;
    // SAFETY: a new descriptor, owned by nobody else.
    let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
    let from: UnixAddr = ns::getpeername(accepted.as_raw_fd())?;
    ensure!(from == own, "The client's name is {from:?}");
    let mut bytes = vec![0; 30_000];
    for message in &messages {
        let length = ns::recv(accepted.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
        ensure!(bytes[..length] == message[..], "Received {length} bytes");
    }
    let more = ns::recv(accepted.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT);
    ensure!(more == Err(Errno::EAGAIN), "More: {more:?}");
    Ok(())
}

/// Clients that are somebody else, alive and ended, and who they are said to be.
fn peers(case: &Case) -> Result<()> {
    let name = abstract_name(case)?;
    let listener = UnixListener::bind_addr(&name)?;
    let mut own = UnixStream::connect_addr(&name)?;
    let we = peer(&own)?;
    let ended = Child::start(case.dir(), "ended", |_| {
        become_nobody()?;
        Ok(UnixStream::connect_addr(&name)?.write_all(b"ended")?)
    })?;
    let ended_pid = ended.pid.as_raw();
    ended.join()?;
    let alive = Child::start(case.dir(), "alive", |turn| {
        become_nobody()?;
        let mut client = UnixStream::connect_addr(&name)?;
        client.write_all(b"alive")?;
        turn.wait();
        expect("The client", &client, &we)?;
        let mut answer = [0; 6];
        client.read_exact(&mut answer)?;
        ensure!(answer == *b"answer", "The child reads {answer:?}");
        Ok(())
    })?;
    let alive_pid = alive.pid.as_raw();
    alive.waits()?;

    case.ready()?;

    let mut server = accept(&listener)?;
    expect("The first", &server, &we)?;
    talk(&mut server, &mut own)?;
    let server = accept(&listener)?;
    expect("The second", &server, &nobody(ended_pid))?;
    ensure!(sender(&server)? == (b"ended".to_vec(), ended_pid), "Ended");
    let mut server = accept(&listener)?;
    expect("The third", &server, &nobody(alive_pid))?;
    ensure!(sender(&server)? == (b"alive".to_vec(), alive_pid), "Alive");
    server.write_all(b"answer")?;
    alive.finish()
}

/// What is received, and from whom.
fn sender(from: &UnixStream) -> Result<(Vec<u8>, i32)> {
    setsockopt(from, sockopt::PassCred, &true)?;
    let mut bytes = [0; 16];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let mut space = nix::cmsg_space!(libc::ucred);
    let flags = MsgFlags::MSG_DONTWAIT;
    let message = ns::recvmsg::<UnixAddr>(from.as_raw_fd(), &mut parts, Some(&mut space), flags)?;
    let (length, mut said) = (message.bytes, 0);
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmCredentials(sender) = part {
            said = sender.pid();
        }
    }
    Ok((bytes[..length].to_vec(), said))
}

/// A descriptor that is in flight to nobody yet.
fn rights(case: &Case) -> Result<()> {
    let name = abstract_name(case)?;
    let listener = UnixListener::bind_addr(&name)?;
    let client = UnixStream::connect_addr(&name)?;
    let fds: [RawFd; 1] = [client.as_raw_fd()];
    let data = [IoSlice::new(b"x")];
    let control = [ControlMessage::ScmRights(&fds)];
    ns::sendmsg::<()>(client.as_raw_fd(), &data, &control, MsgFlags::empty(), None)?;

    case.ready()?;

    let mut server = accept(&listener)?;
    ensure!(drain(&mut server)?.0 == b"x", "What waited differs");
    Ok(())
}
