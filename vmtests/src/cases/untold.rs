//! What a socket has yet to tell: that its peer is gone with something unread, an ICMP error, what
//! is in its error queue. Whoever looks for it takes it away.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixStream};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, recv, send, setsockopt, socketpair, sockopt,
};

use super::probe::PATIENCE;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("unix_reset", unix_reset),
    Entry::refused(
        "refused_unix_reset",
        "it was not told yet",
        unix_reset_packets,
    ),
    Entry::carried("unix_seqpacket_empty", empty_packets),
    Entry::refused_frozen("refused_unix_empty", "an empty message", empty_seen),
    Entry::refused("refused_udp_error", "it was not told yet", udp_error),
    Entry::refused("refused_error_queue", "error queue", error_queue),
];

fn packets() -> nix::Result<(OwnedFd, OwnedFd)> {
    let flags = SockFlag::SOCK_CLOEXEC;
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)
}

/// The other end had not read everything: what it sent is there, then comes an error, then the end.
fn unix_reset(case: &Case) -> Result<()> {
    let (mut stream, mut gone) = UnixStream::pair()?;
    stream.write_all(b"unread")?;
    gone.write_all(b"left behind")?;
    drop(gone);
    let (mut silent, gone) = UnixStream::pair()?;
    silent.write_all(b"unread")?;
    drop(gone);
    let (packet, gone) = packets()?;
    let none = MsgFlags::empty();
    send(packet.as_raw_fd(), b"unread", none)?;
    drop(gone);

    case.ready()?;

    let mut bytes = [0; 64];
    let length = stream.read(&mut bytes)?;
    ensure!(&bytes[..length] == b"left behind", "Read {length} bytes");
    for stream in [&mut stream, &mut silent] {
        let told = stream.read(&mut bytes);
        ensure!(
            told.as_ref()
                .is_err_and(|e| e.kind() == ErrorKind::ConnectionReset),
            "It is told {told:?}"
        );
        ensure!(stream.read(&mut bytes)? == 0, "It is told again");
    }
    let told = recv(packet.as_raw_fd(), &mut bytes, none);
    ensure!(told == Err(Errno::ECONNRESET), "It is told {told:?}");
    Ok(())
}

/// With packets the error comes before what was left behind.
fn unix_reset_packets(case: &Case) -> Result<()> {
    let (packet, gone) = packets()?;
    let none = MsgFlags::empty();
    send(packet.as_raw_fd(), b"unread", none)?;
    send(gone.as_raw_fd(), b"left behind", none)?;
    drop(gone);
    case.ready()?;
    let mut bytes = [0; 64];
    let told = recv(packet.as_raw_fd(), &mut bytes, none);
    ensure!(told == Err(Errno::ECONNRESET), "It is told {told:?}");
    let length = recv(packet.as_raw_fd(), &mut bytes, none)?;
    ensure!(&bytes[..length] == b"left behind", "Read {length} bytes");
    Ok(())
}

/// An empty packet is no end.
fn empty_packets(case: &Case) -> Result<()> {
    let (from, to) = packets()?;
    let none = MsgFlags::empty();
    for packet in [&b"first"[..], b"", b"last", b""] {
        send(from.as_raw_fd(), packet, none)?;
    }
    case.ready()?;
    let mut bytes = [0; 64];
    for expected in [&b"first"[..], b"", b"last", b""] {
        let length = recv(to.as_raw_fd(), &mut bytes, MsgFlags::MSG_DONTWAIT)?;
        ensure!(&bytes[..length] == expected, "A packet of {length} bytes");
    }
    Ok(())
}

/// The kernel passes over an empty message that was looked at, when the next one is looked for.
fn empty_seen(case: &Case) -> Result<()> {
    let (from, to) = UnixDatagram::pair()?;
    from.send(b"")?;
    from.send(b"behind")?;
    let mut bytes = [0; 64];
    ensure!(recv(to.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK)? == 0);
    case.ready()?;
    ensure!(to.recv(&mut bytes)? == 0, "The empty message is gone");
    ensure!(to.recv(&mut bytes)? == 6, "The message behind it is gone");
    Ok(())
}

/// A socket whose datagram nobody has taken, which it was told by now.
fn refused_by_peer(prepare: impl Fn(&UdpSocket) -> Result<()>) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    let nobody = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
    prepare(&socket)?;
    socket.connect(nobody)?;
    socket.send(b"is anybody there?")?;
    let mut waits = [PollFd::new(socket.as_fd(), PollFlags::empty())];
    poll(&mut waits, PollTimeout::try_from(PATIENCE)?)?;
    let told = waits[0]
        .revents()
        .is_some_and(|e| e.contains(PollFlags::POLLERR));
    ensure!(told, "No error comes");
    Ok(socket)
}

fn udp_error(case: &Case) -> Result<()> {
    let socket = refused_by_peer(|_| Ok(()))?;
    case.ready()?;
    let told = socket.take_error()?.map(|error| error.kind());
    ensure!(
        told == Some(ErrorKind::ConnectionRefused),
        "It is told {told:?}"
    );
    Ok(())
}

fn error_queue(case: &Case) -> Result<()> {
    let socket = refused_by_peer(|socket| {
        setsockopt(socket, sockopt::Ipv4RecvErr, &true).context("IP_RECVERR")
    })?;
    ensure!(socket.take_error()?.is_some(), "No error");
    case.ready()?;
    let mut bytes = [0; 64];
    let length = recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_ERRQUEUE)?;
    ensure!(
        &bytes[..length] == b"is anybody there?",
        "{length} bytes failed"
    );
    Ok(())
}
