//! Connections that a listener has not accepted: as they come, with what they have received, in
//! their order, however they have ended. Both ends are in the program.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{self as ns, AddressFamily, SockFlag, SockType, setsockopt, sockopt};
use std::os::fd::{AsRawFd, OwnedFd};

use super::probe::{check_pattern, eventually, pattern};
use super::tcp::{exchange, info, patient};
use crate::guest::case::{Case, Entry};

/// Why the older kernel cannot make them again.
const OLD: &str = "cannot make them again";

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried_by_newer("accept_queue", OLD, |case| {
        queue(case, Ipv4Addr::LOCALHOST.into())
    }),
    Entry::carried_by_newer("accept_queue_ipv6", OLD, |case| {
        queue(case, Ipv6Addr::LOCALHOST.into())
    }),
    Entry::carried_by_newer("accept_queue_both", OLD, both_families),
    Entry::carried_by_newer("accept_queue_ended", OLD, ended),
    Entry::carried_by_newer("accept_queue_much", OLD, much),
    Entry::carried_by_newer("accept_queue_many", OLD, many),
    Entry::carried_by_newer("accept_queue_reuseport", OLD, reuseport),
    Entry::carried_by_newer("accept_queue_options", OLD, options),
    Entry::carried_by_newer("accept_queue_device", OLD, device),
];

/// A client that waits at this listener, behind those that came before.
fn connect(listener: &TcpListener, to: SocketAddr) -> Result<TcpStream> {
    let before = waiting(listener)?;
    let stream = TcpStream::connect(to).context("Connect")?;
    // It is connected before its last acknowledgement is looked at, which the next client's may
    // overtake where the kernel leaves them to another CPU.
    eventually("the client waits to be accepted", || {
        Ok(waiting(listener)? > before)
    })?;
    patient(&stream)?;
    Ok(stream)
}

/// How many wait at a listener, which is what `tcpi_unacked` tells of one (`tcp_get_info()`).
fn waiting(listener: &TcpListener) -> Result<u32> {
    Ok(info(listener)?.tcpi_unacked)
}

/// The next one that waits, which must be that of this client.
fn accept(listener: &TcpListener, client: SocketAddr) -> Result<TcpStream> {
    listener.set_nonblocking(true)?;
    let (stream, peer) = listener.accept().context("Accept")?;
    ensure!(peer == client, "Accepted {peer}, not {client}");
    stream.set_nonblocking(false)?;
    patient(&stream)?;
    Ok(stream)
}

fn nobody_waits(listener: &TcpListener) -> Result<()> {
    listener.set_nonblocking(true)?;
    match listener.accept() {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(()),
        other => anyhow::bail!("Somebody else waits: {other:?}"),
    }
}

/// Bytes there and back, more than any buffer holds.
fn talk(one: &mut TcpStream, two: &mut TcpStream, seed: u64) -> Result<()> {
    const LENGTH: usize = 300_000;
    exchange(one, two, seed, LENGTH).context("Afterwards")?;
    exchange(two, one, seed, LENGTH).context("Afterwards, the other way")
}

/// Three that wait: silent, with data, with data in several segments.
fn queue(case: &Case, address: IpAddr) -> Result<()> {
    let listener = TcpListener::bind((address, 0))?;
    let to = listener.local_addr()?;
    let mut clients = [
        connect(&listener, to)?,
        connect(&listener, to)?,
        connect(&listener, to)?,
    ];
    clients[1].write_all(&pattern(1, 10))?;
    for part in pattern(2, 9000).chunks(3000) {
        clients[2].write_all(part)?;
        std::thread::sleep(Duration::from_millis(5));
    }

    case.ready()?;

    for (client, (seed, length)) in clients.iter_mut().zip([(0, 0), (1, 10), (2, 9000)]) {
        let mut server = accept(&listener, client.local_addr()?)?;
        ensure!(server.local_addr()? == to, "Its own address is another one");
        let mut received = vec![0; length];
        server.read_exact(&mut received).context("What waited")?;
        check_pattern("bytes that waited", seed, &received)?;
        server.set_nonblocking(true)?;
        let more = server.read(&mut [0; 1]).map_err(|error| error.kind());
        ensure!(more == Err(ErrorKind::WouldBlock), "More waited: {more:?}");
        server.set_nonblocking(false)?;
        talk(&mut server, client, 3)?;
    }
    nobody_waits(&listener)?;
    let late = connect(&listener, to)?;
    accept(&listener, late.local_addr()?).map(drop)
}

/// Clients of both families at one listener.
fn both_families(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    let port = listener.local_addr()?.port();
    let mut four = connect(&listener, (Ipv4Addr::LOCALHOST, port).into())?;
    let mut six = connect(&listener, (Ipv6Addr::LOCALHOST, port).into())?;
    four.write_all(b"four")?;
    six.write_all(b"six!")?;

    case.ready()?;

    let from = four.local_addr()?;
    let IpAddr::V4(ip) = from.ip() else {
        anyhow::bail!("No IPv4 client: {from}");
    };
    let mapped = (ip.to_ipv6_mapped(), from.port()).into();
    let mut server = accept(&listener, mapped).context("IPv4")?;
    let mut word = [0; 4];
    server.read_exact(&mut word)?;
    ensure!(word == *b"four", "IPv4: {word:?}");
    talk(&mut server, &mut four, 1)?;
    let mut server = accept(&listener, six.local_addr()?).context("IPv6")?;
    server.read_exact(&mut word)?;
    ensure!(word == *b"six!", "IPv6: {word:?}");
    talk(&mut server, &mut six, 2)
}

/// Clients that sent something and then half closed, closed, or reset their connections.
fn ended(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = listener.local_addr()?;
    let mut clients = Vec::new();
    for seed in 0..5 {
        let mut client = connect(&listener, to)?;
        client.write_all(&pattern(seed, 100))?;
        clients.push(client);
    }
    let from = clients
        .iter()
        .map(TcpStream::local_addr)
        .collect::<Result<Vec<_>, _>>()?;
    let now = ns::sockopt::Linger;
    let at_once = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    let last = clients.pop().context("Four")?;
    last.shutdown(Shutdown::Write)?;
    std::thread::sleep(Duration::from_millis(5));
    setsockopt(&last, now, &at_once)?;
    drop(last);
    let reset = clients.pop().context("Three")?;
    setsockopt(&reset, now, &at_once)?;
    drop(reset);
    drop(clients.pop());
    clients[1].shutdown(Shutdown::Write)?;

    case.ready()?;

    // Open, half closed, closed, reset, half closed and reset.
    let ends = [
        None,
        Some(Ok(0)),
        Some(Ok(0)),
        Some(Err(libc::ECONNRESET)),
        None,
    ];
    for (index, (from, end)) in from.into_iter().zip(ends).enumerate() {
        let seed = u64::try_from(index)?;
        let context = || format!("Client {index}");
        let mut server = accept(&listener, from).with_context(context)?;
        let mut received = [0; 100];
        server.read_exact(&mut received).with_context(context)?;
        check_pattern("bytes that waited", seed, &received)?;
        let mut more = [0; 1];
        if let Some(end) = end {
            let read = server.read(&mut more);
            let read = read.map_err(|error| error.raw_os_error().unwrap_or(0));
            ensure!(read == end, "Client {index}: {read:?}");
        }
        match index {
            0 => talk(&mut server, &mut clients[0], seed)?,
            1 => {
                server.write_all(b"answer")?;
                let mut answer = [0; 6];
                clients[1].read_exact(&mut answer)?;
                ensure!(answer == *b"answer", "The half closed one: {answer:?}");
            }
            4 => {
                let error = server.take_error()?.and_then(|error| error.raw_os_error());
                ensure!(error == Some(libc::EPIPE), "Reset: {error:?}");
            }
            _ => {}
        }
    }
    nobody_waits(&listener)
}

/// As much as is taken from a client before anybody reads.
fn much(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut client = connect(&listener, listener.local_addr()?)?;
    client.set_nonblocking(true)?;
    let bytes = pattern(7, 1 << 22);
    let mut sent = 0;
    let mut idle = 0;
    while idle < 20 {
        match client.write(&bytes[sent..]) {
            Ok(count) => {
                sent += count;
                idle = 0;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                idle += 1;
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(error) => return Err(error.into()),
        }
    }
    ensure!(sent > 64 << 10, "Only {sent} bytes were taken");
    client.set_nonblocking(false)?;

    case.ready()?;

    let mut server = accept(&listener, client.local_addr()?)?;
    let mut received = vec![0; sent];
    server.read_exact(&mut received).context("What waited")?;
    ensure!(received == bytes[..sent], "What waited differs");
    talk(&mut server, &mut client, 8)
}

/// More than one pass of the iterators brings, in the order in which they came.
fn many(case: &Case) -> Result<()> {
    const CLIENTS: u64 = 400;
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let to = listener.local_addr()?;
    ns::listen(&listener, ns::Backlog::new(600)?)?;
    let mut clients = Vec::new();
    for seed in 0..CLIENTS {
        let mut client = connect(&listener, to)?;
        client.write_all(&pattern(seed, 11_000))?;
        clients.push(client);
    }

    case.ready()?;

    for (seed, client) in (0..CLIENTS).zip(&mut clients) {
        let mut server = accept(&listener, client.local_addr()?)?;
        exchange(&mut server, client, seed, 100)?;
        let mut received = [0; 11_000];
        server.read_exact(&mut received)?;
        check_pattern("bytes that waited", seed, &received)?;
        exchange(client, &mut server, seed, 100)?;
    }
    nobody_waits(&listener)
}

fn shared_port(port: u16) -> Result<TcpListener> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let fd: OwnedFd = ns::socket(AddressFamily::Inet, SockType::Stream, flags, None)?;
    setsockopt(&fd, sockopt::ReusePort, &true)?;
    let address = ns::SockaddrIn::new(127, 0, 0, 1, port);
    ns::bind(fd.as_raw_fd(), &address)?;
    ns::listen(&fd, ns::Backlog::new(64)?)?;
    Ok(fd.into())
}

/// Each of two listeners of one port has its own clients, whatever the kernel would choose now.
fn reuseport(case: &Case) -> Result<()> {
    const CLIENTS: usize = 24;
    let one = shared_port(0)?;
    let to = one.local_addr()?;
    // Those that come while there is one only are all its own.
    let mut early = Vec::new();
    for _ in 0..CLIENTS {
        early.push(connect(&one, to)?);
    }
    let two = shared_port(to.port())?;

    case.ready()?;

    for client in &mut early {
        let mut server = accept(&one, client.local_addr()?)?;
        talk(&mut server, client, 4)?;
    }
    nobody_waits(&one)?;
    nobody_waits(&two)
}

/// Those that are accepted have the options of their listener.
fn options(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    setsockopt(&listener, sockopt::KeepAlive, &true)?;
    setsockopt(&listener, sockopt::TcpKeepIdle, &1234)?;
    setsockopt(&listener, sockopt::RcvBuf, &100_000)?;
    let size = ns::getsockopt(&listener, sockopt::RcvBuf)?;
    let mut client = connect(&listener, listener.local_addr()?)?;
    setsockopt(&client, sockopt::TcpNoDelay, &true)?;
    client.write_all(b"data")?;

    case.ready()?;

    let mut server = accept(&listener, client.local_addr()?)?;
    let idle = ns::getsockopt(&server, sockopt::TcpKeepIdle)?;
    ensure!(idle == 1234, "TCP_KEEPIDLE is {idle}");
    ensure!(
        ns::getsockopt(&server, sockopt::KeepAlive)?,
        "SO_KEEPALIVE is not set"
    );
    let now = ns::getsockopt(&server, sockopt::RcvBuf)?;
    ensure!(now == size, "SO_RCVBUF is {now}, was {size}");
    let mark = ns::getsockopt(&server, sockopt::Mark)?;
    ensure!(mark == 0, "SO_MARK is {mark}");
    let mut word = [0; 4];
    server.read_exact(&mut word)?;
    ensure!(word == *b"data", "What waited: {word:?}");
    talk(&mut server, &mut client, 5)
}

/// A listener of one interface, as are those that it accepts.
fn device(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    setsockopt(&listener, sockopt::BindToDevice, &"lo".into())?;
    let mut client = connect(&listener, listener.local_addr()?)?;
    client.write_all(b"data")?;

    case.ready()?;

    let mut server = accept(&listener, client.local_addr()?)?;
    let bound = ns::getsockopt(&server, sockopt::BindToDevice)?;
    ensure!(bound == "lo", "It is bound to {bound:?}");
    let mut word = [0; 4];
    server.read_exact(&mut word)?;
    ensure!(word == *b"data", "What waited: {word:?}");
    talk(&mut server, &mut client, 6)
}
