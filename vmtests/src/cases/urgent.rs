//! What a socket has beside its stream: urgent data, and the count of what was sent without a copy.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};

use super::probe::{eventually, set_option};
use super::tcp::pair;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::refused("refused_tcp_urgent", "urgent data", tcp_unread),
    Entry::refused("refused_tcp_urgent_mark", "urgent data", tcp_mark),
    Entry::refused("refused_unix_urgent", "urgent data", unix_unread),
    Entry::carried("tcp_urgent_passed", tcp_passed),
    Entry::refused("refused_zerocopy", "MSG_ZEROCOPY", zerocopy),
];

/// The accepted and the connecting end.
fn connection() -> Result<(TcpStream, TcpStream)> {
    pair(&TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?)
}

/// Sends what is urgent in the middle of a stream, and waits until it is there.
fn talk(client: &mut TcpStream, server: &TcpStream) -> Result<()> {
    client.write_all(b"before")?;
    send(client.as_raw_fd(), b"!", MsgFlags::MSG_OOB).context("Send urgent data")?;
    client.write_all(b"behind")?;
    let mut urgent = [0];
    let flags = MsgFlags::MSG_OOB | MsgFlags::MSG_PEEK;
    eventually("urgent data comes", || {
        match recv(server.as_raw_fd(), &mut urgent, flags) {
            Ok(count) => Ok(count == 1),
            Err(Errno::EAGAIN | Errno::EINVAL) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    })
}

fn read_urgent(server: &TcpStream) -> Result<()> {
    let mut urgent = [0];
    recv(server.as_raw_fd(), &mut urgent, MsgFlags::MSG_OOB).context("Receive urgent data")?;
    ensure!(&urgent == b"!", "The urgent data is {urgent:?}");
    Ok(())
}

/// A read ends before the urgent data, and the next one begins behind it.
fn read_stream(server: &mut TcpStream) -> Result<()> {
    for part in [b"before", b"behind"] {
        let mut bytes = [0; 6];
        server.read_exact(&mut bytes)?;
        ensure!(&bytes == part, "Read {bytes:?}");
    }
    Ok(())
}

fn tcp_unread(case: &Case) -> Result<()> {
    let (mut server, mut client) = connection()?;
    talk(&mut client, &server)?;
    case.ready()?;
    read_urgent(&server)?;
    read_stream(&mut server)
}

/// It was read, but the stream around it was not: there is a gap.
fn tcp_mark(case: &Case) -> Result<()> {
    let (mut server, mut client) = connection()?;
    talk(&mut client, &server)?;
    read_urgent(&server)?;
    case.ready()?;
    read_stream(&mut server)
}

/// Once it is read past, nothing is left of it.
fn tcp_passed(case: &Case) -> Result<()> {
    let (mut server, mut client) = connection()?;
    talk(&mut client, &server)?;
    read_urgent(&server)?;
    read_stream(&mut server)?;
    case.ready()?;
    talk(&mut client, &server)?;
    read_urgent(&server)?;
    read_stream(&mut server)
}

fn unix_unread(case: &Case) -> Result<()> {
    let (mut one, mut other) = UnixStream::pair()?;
    one.write_all(b"before")?;
    send(one.as_raw_fd(), b"!", MsgFlags::MSG_OOB).context("Send urgent data")?;
    case.ready()?;
    let mut bytes = [0; 6];
    other.read_exact(&mut bytes)?;
    ensure!(&bytes == b"before", "Read {bytes:?}");
    let mut urgent = [0];
    recv(other.as_raw_fd(), &mut urgent, MsgFlags::MSG_OOB).context("Receive urgent data")?;
    ensure!(&urgent == b"!", "The urgent data is {urgent:?}");
    Ok(())
}

/// Numbers of sends, in the order they were made in, say which buffers are free.
fn zerocopy(case: &Case) -> Result<()> {
    let (mut server, client) = connection()?;
    let one = 1_i32.to_ne_bytes();
    set_option(&client, libc::SOL_SOCKET, libc::SO_ZEROCOPY, &one).context("SO_ZEROCOPY")?;
    let flags = MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY);
    send(client.as_raw_fd(), b"uncopied", flags).context("MSG_ZEROCOPY")?;
    case.ready()?;
    let mut bytes = [0; 8];
    server.read_exact(&mut bytes)?;
    ensure!(&bytes == b"uncopied", "Read {bytes:?}");
    Ok(())
}
