//! Unix sockets: pairs of each type with queued messages, listeners, and
//! descriptors in flight; UDP beside them.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, IoSliceMut, Read, Seek, SeekFrom, Write};
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, Shutdown, SockFlag, SockType,
    getsockopt, recv, recvmsg, send, sendmsg, setsockopt, shutdown, socketpair, sockopt,
};

use super::child::Child;
use super::probe::{PATIENCE, check_pattern, pattern};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("unix_stream", stream),
    Entry::carried("unix_stream_small", small_buffer),
    Entry::carried("unix_datagram", datagram),
    Entry::carried("unix_seqpacket", seqpacket),
    Entry::carried("unix_listener", listener),
    Entry::carried("unix_abstract", abstract_name),
    Entry::carried("unix_descriptors", descriptors),
    Entry::carried("unix_child", child),
    Entry::carried("udp", udp),
];

/// A stream pair with bytes both ways; then half-closed.
fn stream(case: &Case) -> Result<()> {
    let (mut left, mut right) = UnixStream::pair()?;
    left.write_all(&pattern(1, 30_000))?;
    right.write_all(&pattern(2, 500))?;
    let mut head = [0; 700];
    right.read_exact(&mut head)?;
    let (mut last, closed) = UnixStream::pair()?;
    last.shutdown(std::net::Shutdown::Write)?;
    (&closed).write_all(b"still open this way")?;
    let (mut orphan, gone) = UnixStream::pair()?;
    (&gone).write_all(b"left behind")?;
    drop(gone);
    right.set_nonblocking(true)?;

    case.ready()?;

    let mut rest = vec![0; 29_300];
    right.read_exact(&mut rest)?;
    ensure!(rest == pattern(1, 30_000)[700..], "The queued bytes differ");
    ensure!(
        right
            .read(&mut head)
            .is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
        "O_NONBLOCK is lost, or more came"
    );
    let mut bytes = [0; 500];
    left.read_exact(&mut bytes)?;
    check_pattern("the other direction", 2, &bytes)?;
    left.write_all(b"new")?;
    right.read_exact(&mut bytes[..3])?;
    ensure!(&bytes[..3] == b"new", "New bytes are wrong");
    let mut text = [0; 19];
    last.read_exact(&mut text)?;
    ensure!(&text == b"still open this way", "Received {text:?}");
    ensure!(
        (&closed).read(&mut text)? == 0,
        "The closed direction is open"
    );
    let mut text = String::new();
    orphan.read_to_string(&mut text)?;
    ensure!(text == "left behind", "Received {text:?}");
    ensure!(
        orphan
            .write(b"x")
            .is_err_and(|e| e.kind() == ErrorKind::BrokenPipe),
        "The closed peer is back"
    );
    Ok(())
}

/// Datagrams keep their boundaries: a pair, and named ones.
fn datagram(case: &Case) -> Result<()> {
    let (left, right) = UnixDatagram::pair()?;
    for length in [10, 0, 2000] {
        left.send(&pattern(length, usize::try_from(length)?))?;
    }
    let path = case.dir().join("datagrams");
    let named = UnixDatagram::bind(&path)?;
    named.set_read_timeout(Some(PATIENCE))?;
    let sender = UnixDatagram::unbound()?;
    sender.connect(&path)?;
    sender.send(b"by connection")?;

    case.ready()?;

    let mut buffer = [0; 4096];
    for length in [10, 0, 2000] {
        let got = right.recv(&mut buffer)?;
        ensure!(got == length, "A datagram of {length} bytes has {got}");
        check_pattern("datagram", length as u64, &buffer[..got])?;
    }
    right.send(b"back")?;
    ensure!(left.recv(&mut buffer)? == 4, "The pair is broken");
    let got = named.recv(&mut buffer)?;
    ensure!(
        &buffer[..got] == b"by connection",
        "Received {:?}",
        &buffer[..got]
    );
    sender.send(b"again")?;
    let got = named.recv(&mut buffer)?;
    ensure!(&buffer[..got] == b"again", "The connection leads elsewhere");
    UnixDatagram::unbound()?.send_to(b"by path", &path)?;
    let got = named.recv(&mut buffer)?;
    ensure!(&buffer[..got] == b"by path", "The path leads elsewhere");
    ensure!(
        named.local_addr()?.as_pathname() == Some(&path),
        "The name is {:?}",
        named.local_addr()?
    );
    Ok(())
}

/// What was sent before the sender's buffer was made smaller.
fn small_buffer(case: &Case) -> Result<()> {
    let (mut from, mut to) = UnixStream::pair()?;
    from.write_all(&pattern(3, 40_000))?;
    setsockopt(&from, sockopt::SndBuf, &2304)?;
    let size = getsockopt(&from, sockopt::SndBuf)?;
    case.ready()?;
    let mut bytes = vec![0; 40_000];
    to.read_exact(&mut bytes)?;
    check_pattern("queue", 3, &bytes)?;
    let now = getsockopt(&from, sockopt::SndBuf)?;
    ensure!(now == size, "The buffer has {now} bytes instead of {size}");
    Ok(())
}

/// Packets in order with their boundaries.
fn seqpacket(case: &Case) -> Result<()> {
    let (left, right) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let lengths = [1usize, 500, 33];
    for length in lengths {
        send(
            left.as_raw_fd(),
            &pattern(length as u64, length),
            MsgFlags::empty(),
        )?;
    }
    shutdown(right.as_raw_fd(), Shutdown::Write)?;

    case.ready()?;

    ensure!(
        getsockopt(&left, sockopt::SockType)? == SockType::SeqPacket,
        "It is of another type"
    );
    let mut buffer = [0; 4096];
    for length in lengths {
        let got = recv(right.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        ensure!(got == length, "A packet of {length} bytes has {got}");
        check_pattern("packet", length as u64, &buffer[..got])?;
    }
    send(left.as_raw_fd(), b"new", MsgFlags::empty())?;
    ensure!(
        recv(right.as_raw_fd(), &mut buffer, MsgFlags::empty())? == 3,
        "A new packet does not arrive whole"
    );
    ensure!(
        recv(left.as_raw_fd(), &mut buffer, MsgFlags::empty())? == 0,
        "The closed direction is open"
    );
    Ok(())
}

/// A named listener and a connection through it.
fn listener(case: &Case) -> Result<()> {
    let path = case.dir().join("listener");
    let listener = UnixListener::bind(&path)?;
    serve(case, &listener, || Ok(UnixStream::connect(&path)?))?;
    ensure!(
        listener.local_addr()?.as_pathname() == Some(&path),
        "The name is {:?}",
        listener.local_addr()?
    );
    Ok(())
}

/// The same with an abstract name.
fn abstract_name(case: &Case) -> Result<()> {
    let name = format!("tracker-case-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name.as_bytes())?;
    let listener = UnixListener::bind_addr(&address)?;
    serve(case, &listener, || Ok(UnixStream::connect_addr(&address)?))?;
    ensure!(
        listener.local_addr()?.as_abstract_name() == Some(name.as_bytes()),
        "The name is lost"
    );
    Ok(())
}

fn serve(
    case: &Case,
    listener: &UnixListener,
    connect: impl Fn() -> Result<UnixStream>,
) -> Result<()> {
    let mut client = connect()?;
    let (mut server, _) = listener.accept()?;
    client.write_all(b"before")?;
    let name = server.local_addr()?;

    case.ready()?;

    let mut text = [0; 6];
    server.read_exact(&mut text)?;
    ensure!(&text == b"before", "Received {text:?}");
    server.write_all(b"answer")?;
    client.read_exact(&mut text)?;
    ensure!(&text == b"answer", "Received {text:?}");
    let same = server.local_addr()?;
    ensure!(
        format!("{same:?}") == format!("{name:?}"),
        "The accepted end's name was {name:?}, is {same:?}"
    );
    let mut another = connect().context("Connect again")?;
    another.write_all(b"later.")?;
    listener.accept()?.0.read_exact(&mut text)?;
    ensure!(&text == b"later.", "Received {text:?}");
    Ok(())
}

/// Receives one message with descriptors.
fn receive(socket: &UnixStream) -> Result<(Vec<u8>, Vec<OwnedFd>)> {
    let mut data = [0; 64];
    let mut space = nix::cmsg_space!([RawFd; 4]);
    let mut fds = Vec::new();
    let length = {
        let mut parts = [IoSliceMut::new(&mut data)];
        let message = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        for control in message.cmsgs()? {
            let ControlMessageOwned::ScmRights(numbers) = control else {
                bail!("Another kind of control message");
            };
            // SAFETY: just received, owned by nobody else.
            fds.extend(
                numbers
                    .into_iter()
                    .map(|number| unsafe { OwnedFd::from_raw_fd(number) }),
            );
        }
        message.bytes
    };
    Ok((data[..length].to_vec(), fds))
}

/// Descriptors that are in a socket's queue and nowhere else.
fn descriptors(case: &Case) -> Result<()> {
    let (left, right) = UnixStream::pair()?;
    let path = case.dir().join("passed");
    std::fs::write(&path, pattern(1, 1000))?;
    let mut file = File::open(&path)?;
    file.seek(SeekFrom::Start(123))?;
    let (from, mut to) = std::io::pipe()?;
    to.write_all(b"in the pipe")?;
    let pass = |text: &[u8], fds: &[RawFd]| {
        sendmsg::<()>(
            left.as_raw_fd(),
            &[IoSlice::new(text)],
            &[ControlMessage::ScmRights(fds)],
            MsgFlags::empty(),
            None,
        )
    };
    pass(b"file", &[file.as_raw_fd()])?;
    pass(b"both", &[from.as_raw_fd(), file.as_raw_fd()])?;
    drop(from);

    case.ready()?;

    let (text, mut fds) = receive(&right)?;
    ensure!(
        text == b"file" && fds.len() == 1,
        "First {text:?} with {} descriptors",
        fds.len()
    );
    let mut passed = File::from(fds.remove(0));
    ensure!(
        passed.stream_position()? == 123,
        "The file's offset is {}",
        passed.stream_position()?
    );
    passed.seek(SeekFrom::Current(10))?;
    ensure!(
        file.stream_position()? == 133,
        "The passed descriptor is another open file"
    );
    let (text, mut fds) = receive(&right)?;
    ensure!(
        text == b"both" && fds.len() == 2,
        "Second {text:?} with {} descriptors",
        fds.len()
    );
    drop(to);
    let mut text = String::new();
    File::from(fds.remove(0)).read_to_string(&mut text)?;
    ensure!(text == "in the pipe", "The passed pipe held {text:?}");
    Ok(())
}

/// A stream pair between parent and child.
fn child(case: &Case) -> Result<()> {
    let (mut mine, mut theirs) = UnixStream::pair()?;
    mine.set_read_timeout(Some(PATIENCE))?;
    mine.write_all(b"ab")?;
    let own = mine.as_raw_fd();
    let dir = case.dir().to_owned();
    let child = Child::start(&dir, "echo", move |_| {
        // SAFETY: the child does not use the parent's end.
        unsafe { libc::close(own) };
        let mut byte = [0];
        while theirs.read(&mut byte)? == 1 {
            theirs.write_all(&[byte[0].to_ascii_uppercase()])?;
        }
        Ok(())
    })?;
    child.sleeps_in(libc::SYS_recvfrom)?;
    case.ready()?;
    mine.write_all(b"c")?;
    let mut text = [0; 3];
    mine.read_exact(&mut text)?;
    ensure!(&text == b"ABC", "The child answered {text:?}");
    drop(mine);
    child.join()
}

/// UDP: bound and connected, with nothing in the queue.
fn udp(case: &Case) -> Result<()> {
    let server = UdpSocket::bind("127.0.0.1:0")?;
    server.set_read_timeout(Some(PATIENCE))?;
    server.set_broadcast(true)?;
    let client = UdpSocket::bind("127.0.0.1:0")?;
    client.connect(server.local_addr()?)?;
    client.set_read_timeout(Some(PATIENCE))?;
    let six = UdpSocket::bind("[::1]:0")?;
    let addresses = (
        server.local_addr()?,
        client.local_addr()?,
        client.peer_addr()?,
        six.local_addr()?,
    );

    case.ready()?;

    let now = (
        server.local_addr()?,
        client.local_addr()?,
        client.peer_addr()?,
        six.local_addr()?,
    );
    ensure!(
        now == addresses,
        "Addresses were {addresses:?}, are {now:?}"
    );
    ensure!(server.broadcast()?, "SO_BROADCAST is lost");
    let mut buffer = [0; 100];
    client.send(b"question")?;
    let (length, from) = server.recv_from(&mut buffer)?;
    ensure!(
        &buffer[..length] == b"question" && from == addresses.1,
        "Received {length} bytes from {from}"
    );
    server.send_to(b"answer", from)?;
    let length = client.recv(&mut buffer)?;
    ensure!(
        &buffer[..length] == b"answer",
        "Received {:?}",
        &buffer[..length]
    );
    let stranger = UdpSocket::bind("127.0.0.1:0")?;
    stranger.send_to(b"not for you", addresses.1)?;
    client.set_nonblocking(true)?;
    ensure!(
        client.recv(&mut buffer).is_err(),
        "A connected socket takes a stranger's datagram"
    );
    Ok(())
}
