//! TCP: listeners, connections with data both ways, half-closed ones, options.
//! Both ends are in the program; bytes stay queued across whatever happens.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{getsockopt, setsockopt, sockopt};

use super::probe::{PATIENCE, blocked_thread, check_pattern, join, option, pattern, set_option};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("tcp_loopback", |case| {
        loopback(case, Ipv4Addr::LOCALHOST.into())
    }),
    Entry::carried("tcp_ipv6", |case| {
        loopback(case, Ipv6Addr::LOCALHOST.into())
    }),
    Entry::carried("tcp_listener", listener),
    Entry::carried("tcp_listener_changing", listener_changing),
    Entry::carried("tcp_connection_changing", connection_changing),
    Entry::carried("tcp_half_closed", half_closed),
    Entry::carried_once("tcp_orphans", orphans),
    Entry::carried("tcp_options", options),
    Entry::carried("tcp_blocked", blocked),
    Entry::carried("tcp_many", many),
    Entry::carried("tcp_peek_off", peek_off),
];

/// Nothing here may hang for ever.
pub(super) fn patient(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream
        .set_write_timeout(Some(PATIENCE))
        .context("Set the timeouts")
}

/// A connection: the accepted and the connecting end.
pub(super) fn pair(listener: &TcpListener) -> Result<(TcpStream, TcpStream)> {
    let client = TcpStream::connect(listener.local_addr()?).context("Connect")?;
    let (server, peer) = listener.accept().context("Accept")?;
    ensure!(peer == client.local_addr()?, "Somebody else has connected");
    patient(&client)?;
    patient(&server)?;
    Ok((server, client))
}

/// A connection that our end has closed, with more sent than the other takes at once.
struct Orphaned {
    reader: TcpStream,
    sent: usize,
    received: Vec<u8>,
}

impl Orphaned {
    const SEED: u64 = 23;

    /// `shut`: the other end has sent a FIN before.
    fn make(address: IpAddr, shut: bool) -> Result<Self> {
        let listener = TcpListener::bind((address, 0))?;
        // Before the connection: a queue that is smaller than the window told before
        // would drop segments, and these are sent again only after up to two minutes.
        setsockopt(&listener, sockopt::RcvBuf, &(16 << 10))?;
        let (reader, mut ours) = pair(&listener)?;
        setsockopt(&ours, sockopt::SndBuf, &(512 << 10))?;
        if shut {
            reader.shutdown(Shutdown::Write)?;
            ensure!(ours.read(&mut [0])? == 0, "No end of file");
        }
        ours.set_nonblocking(true)?;
        reader.set_nonblocking(true)?;
        let bytes = pattern(Self::SEED, 8 << 20);
        let mut sent = 0;
        loop {
            match ours.write(&bytes[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => return Err(error).context("Fill the send queue"),
            }
        }
        Ok(Self {
            reader,
            sent,
            received: Vec::new(),
        })
    }

    /// Takes a little, without which the kernel would give up after three minutes.
    fn take_some(&mut self) -> Result<()> {
        let mut bytes = [0; 2048];
        match self.reader.read(&mut bytes) {
            Ok(count) => self.received.extend(&bytes[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("Read a little"),
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        self.reader.set_nonblocking(false)?;
        self.reader.read_to_end(&mut self.received)?;
        ensure!(
            self.received == pattern(Self::SEED, self.sent),
            "Of {} bytes sent before the close came {}, or others",
            self.sent,
            self.received.len()
        );
        Ok(())
    }
}

/// Connections that were closed and still send: the other end gets all of it, and the end.
fn orphans(case: &Case) -> Result<()> {
    let mut all = [
        Orphaned::make(Ipv4Addr::LOCALHOST.into(), false)?,
        Orphaned::make(Ipv4Addr::LOCALHOST.into(), true)?,
        Orphaned::make(Ipv6Addr::LOCALHOST.into(), false)?,
    ];
    let mut failure = Ok(());
    case.ready_polling(Duration::from_secs(3), || {
        for one in &mut all {
            if failure.is_ok() {
                failure = one.take_some();
            }
        }
    })?;
    failure?;
    all.into_iter().try_for_each(Orphaned::finish)
}

/// What `TCP_INFO` says of a socket.
pub(super) fn info(socket: &impl AsFd) -> Result<libc::tcp_info> {
    // SAFETY: plain numbers, filled by the call.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut length = libc::socklen_t::try_from(size_of_val(&info))?;
    // SAFETY: the buffer is as long as said.
    let got = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    super::probe::sys("TCP_INFO", got.into())?;
    Ok(info)
}

/// Sends a pattern one way and checks it.
pub(super) fn exchange(
    from: &mut TcpStream,
    to: &mut TcpStream,
    seed: u64,
    length: usize,
) -> Result<()> {
    let mut received = vec![0; length];
    let sender = {
        let mut from = from.try_clone()?;
        std::thread::spawn(move || Ok(from.write_all(&pattern(seed, length))?))
    };
    to.read_exact(&mut received).context("Receive")?;
    join("send", sender)?;
    check_pattern("received bytes", seed, &received)
}

/// Unread data in both directions, the same ports, and traffic afterwards.
fn loopback(case: &Case, address: IpAddr) -> Result<()> {
    let listener = TcpListener::bind((address, 0))?;
    let (mut server, mut client) = pair(&listener)?;
    exchange(&mut client, &mut server, 9, 5000)?;
    client.write_all(&pattern(1, 20_000))?;
    server.write_all(&pattern(2, 3000))?;
    let mut head = [0; 100];
    server.read_exact(&mut head)?;
    let ends = (
        server.local_addr()?,
        server.peer_addr()?,
        client.local_addr()?,
        client.peer_addr()?,
    );

    case.ready()?;

    let now = (
        server.local_addr()?,
        server.peer_addr()?,
        client.local_addr()?,
        client.peer_addr()?,
    );
    ensure!(now == ends, "Addresses were {ends:?}, are {now:?}");
    let mut rest = vec![0; 19_900];
    server
        .read_exact(&mut rest)
        .context("Read what was queued")?;
    ensure!(rest == pattern(1, 20_000)[100..], "The queued bytes differ");
    let mut answer = vec![0; 3000];
    client.read_exact(&mut answer)?;
    check_pattern("the other direction's bytes", 2, &answer)?;
    exchange(&mut client, &mut server, 3, 1 << 20)?;
    exchange(&mut server, &mut client, 4, 1 << 20)?;
    let (mut another, mut caller) = pair(&listener).context("After it all")?;
    exchange(&mut caller, &mut another, 5, 1000)?;
    drop(client);
    ensure!(
        server.read(&mut head)? == 0,
        "No end of file after the close"
    );
    Ok(())
}

/// A socket whose options change all the time has those that it had last.
fn changing(case: &Case, busy: &impl AsFd) -> Result<()> {
    let (mut idle, mut changes, mut error) = (100_u32, 0_u64, None);
    setsockopt(busy, sockopt::TcpKeepIdle, &idle)?;
    case.ready_polling(Duration::from_millis(1), || {
        let found = getsockopt(busy, sockopt::TcpKeepIdle);
        if found != Ok(idle) && error.is_none() {
            error = Some(format!("{found:?} after {changes} changes, not {idle}"));
        }
        idle = 100 + (idle + 1) % 1000;
        match setsockopt(busy, sockopt::TcpKeepIdle, &idle) {
            Ok(()) => changes += 1,
            Err(errno) => error = Some(format!("setsockopt: {errno}")),
        }
    })?;
    ensure!(error.is_none(), "TCP_KEEPIDLE: {error:?}");
    ensure!(changes > 0, "It never changed");
    Ok(())
}

/// Listeners, one whose options change and one that is left alone.
fn listener_changing(case: &Case) -> Result<()> {
    let quiet = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    setsockopt(&quiet, sockopt::TcpKeepIdle, &77)?;
    let busy = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    changing(case, &busy)?;
    ensure!(getsockopt(&quiet, sockopt::TcpKeepIdle)? == 77, "The other");
    pair(&busy).context("Afterwards")?;
    pair(&quiet).context("Afterwards, the other")?;
    Ok(())
}

/// Connections over which nothing goes, one whose options change and one that is left alone.
fn connection_changing(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut quiet, mut quiet_client) = pair(&listener)?;
    setsockopt(&quiet, sockopt::Ipv4Ttl, &77)?;
    let (mut busy, mut busy_client) = pair(&listener)?;
    changing(case, &busy)?;
    ensure!(getsockopt(&quiet, sockopt::Ipv4Ttl)? == 77, "The other");
    exchange(&mut busy, &mut busy_client, 1, 100_000).context("Afterwards")?;
    exchange(&mut quiet_client, &mut quiet, 2, 100_000).context("Afterwards, the other")
}

/// A listener without connections: address, backlog, options, and it accepts.
fn listener(case: &Case) -> Result<()> {
    let every = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let both = TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0))?;
    both.set_nonblocking(true)?;
    let addresses = (every.local_addr()?, both.local_addr()?);
    let backlog = |listener: &TcpListener| -> Result<u32> {
        // For a listener the kernel reports its backlog as tcpi_sacked.
        Ok(info(listener)?.tcpi_sacked)
    };
    let before = backlog(&every)?;

    case.ready()?;

    ensure!(
        (every.local_addr()?, both.local_addr()?) == addresses,
        "An address has changed"
    );
    ensure!(
        getsockopt(&every, sockopt::AcceptConn)?,
        "It does not listen"
    );
    ensure!(
        backlog(&every)? == before,
        "The backlog was {before}, is {}",
        backlog(&every)?
    );
    ensure!(
        getsockopt(&every, sockopt::ReuseAddr)?,
        "SO_REUSEADDR is lost"
    );
    ensure!(
        both.accept()
            .is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
        "O_NONBLOCK is lost"
    );
    for address in [addresses.0, addresses.1] {
        let mut client =
            TcpStream::connect((Ipv4Addr::LOCALHOST, address.port())).context("Connect by IPv4")?;
        client.write_all(b"hello")?;
    }
    let mut text = String::new();
    every.accept()?.0.read_to_string(&mut text)?;
    ensure!(text == "hello", "Received {text:?}");
    ensure!(
        TcpListener::bind(addresses.0).is_err(),
        "The port is free for others"
    );
    Ok(())
}

/// Connections of which one direction is closed, either way round.
fn half_closed(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut server, mut client) = pair(&listener)?;
    client.write_all(b"all I have")?;
    client.shutdown(Shutdown::Write)?;
    let (mut second_server, mut second_client) = pair(&listener)?;
    second_client.write_all(b"question")?;
    second_server.shutdown(Shutdown::Write)?;
    let (mut third_server, mut third_client) = pair(&listener)?;
    third_client.shutdown(Shutdown::Read)?;

    case.ready()?;

    ensure!(
        client
            .write(b"x")
            .is_err_and(|e| e.kind() == ErrorKind::BrokenPipe),
        "The closed direction is open"
    );
    let mut text = String::new();
    server.read_to_string(&mut text)?;
    ensure!(text == "all I have", "Received {text:?}");
    exchange(&mut server, &mut client, 1, 100_000)?;
    drop(server);
    ensure!(client.read(&mut [0; 10])? == 0, "No end of file");
    ensure!(
        second_client.read(&mut [0; 10])? == 0,
        "No end of file on the second"
    );
    let mut question = [0; 8];
    second_server.read_exact(&mut question)?;
    ensure!(&question == b"question", "Received {question:?}");
    exchange(&mut second_client, &mut second_server, 2, 100_000)?;
    ensure!(
        third_client.read(&mut [0; 10])? == 0,
        "A receiving side that was shut down is open"
    );
    exchange(&mut third_client, &mut third_server, 3, 100_000)
}

/// Socket options.
fn options(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut server, mut client) = pair(&listener)?;
    client.set_nodelay(true)?;
    client.set_ttl(55)?;
    client.set_nonblocking(true)?;
    setsockopt(&client, sockopt::KeepAlive, &true)?;
    setsockopt(&client, sockopt::TcpKeepIdle, &1234)?;
    setsockopt(&client, sockopt::TcpKeepInterval, &77)?;
    setsockopt(&client, sockopt::TcpKeepCount, &5)?;
    setsockopt(&client, sockopt::TcpUserTimeout, &90_000)?;
    setsockopt(&client, sockopt::Priority, &3)?;
    setsockopt(&client, sockopt::Mark, &0x42)?;
    setsockopt(&client, sockopt::OobInline, &true)?;
    setsockopt(
        &server,
        sockopt::Linger,
        &libc::linger {
            l_onoff: 1,
            l_linger: 33,
        },
    )?;
    setsockopt(&server, sockopt::RcvBuf, &200_000)?;
    setsockopt(&server, sockopt::SndBuf, &100_000)?;
    server.set_read_timeout(Some(Duration::from_millis(98_760)))?;
    let read = |client: &TcpStream, server: &TcpStream| -> Result<Vec<String>> {
        let linger = getsockopt(server, sockopt::Linger)?;
        Ok(vec![
            format!("TCP_NODELAY {}", client.nodelay()?),
            format!("IP_TTL {}", client.ttl()?),
            format!("SO_KEEPALIVE {}", getsockopt(client, sockopt::KeepAlive)?),
            format!("TCP_KEEPIDLE {}", getsockopt(client, sockopt::TcpKeepIdle)?),
            format!(
                "TCP_KEEPINTVL {}",
                getsockopt(client, sockopt::TcpKeepInterval)?
            ),
            format!("TCP_KEEPCNT {}", getsockopt(client, sockopt::TcpKeepCount)?),
            format!(
                "TCP_USER_TIMEOUT {}",
                getsockopt(client, sockopt::TcpUserTimeout)?
            ),
            format!("SO_PRIORITY {}", getsockopt(client, sockopt::Priority)?),
            format!("SO_MARK {}", getsockopt(client, sockopt::Mark)?),
            format!("SO_OOBINLINE {}", getsockopt(client, sockopt::OobInline)?),
            format!("SO_LINGER {} {}", linger.l_onoff, linger.l_linger),
            format!("SO_RCVBUF {}", getsockopt(server, sockopt::RcvBuf)?),
            format!("SO_SNDBUF {}", getsockopt(server, sockopt::SndBuf)?),
            format!("SO_RCVTIMEO {:?}", server.read_timeout()?),
            format!("TCP_MAXSEG {}", getsockopt(client, sockopt::TcpMaxSeg)?),
            format!(
                "TCP_CONGESTION {:?}",
                getsockopt(client, sockopt::TcpCongestion)?
            ),
        ])
    };
    let before = read(&client, &server)?;
    let scales = |stream: &TcpStream| -> Result<[u8; 2]> {
        let info = info(stream)?;
        // Options negotiated (timestamps, SACK, window scale) and the scales.
        Ok([info.tcpi_options & 7, info.tcpi_snd_rcv_wscale])
    };
    let negotiated = (scales(&client)?, scales(&server)?);

    case.ready()?;

    let after = read(&client, &server)?;
    for (was, is) in before.iter().zip(&after) {
        ensure!(was == is, "{was} is now {is}");
    }
    let now = (scales(&client)?, scales(&server)?);
    ensure!(
        now == negotiated,
        "Negotiated options were {negotiated:x?}, are {now:x?}"
    );
    ensure!(
        client
            .read(&mut [0])
            .is_err_and(|e| e.kind() == ErrorKind::WouldBlock),
        "O_NONBLOCK is lost"
    );
    client.set_nonblocking(false)?;
    exchange(&mut client, &mut server, 1, 300_000)?;
    exchange(&mut server, &mut client, 2, 300_000)
}

/// Threads asleep in accept, recv and a send that nobody reads.
fn blocked(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut server, mut client) = pair(&listener)?;
    let (full_from, mut full_to) = pair(&listener)?;
    full_from.set_write_timeout(None)?;
    client.set_read_timeout(None)?;
    let address = listener.local_addr()?;
    let acceptor = blocked_thread(libc::SYS_accept4, move || Ok(listener.accept()?.0))?;
    let receiver = {
        let mut client = client.try_clone()?;
        blocked_thread(libc::SYS_recvfrom, move || {
            let mut text = [0; 4];
            ensure!(
                client.read(&mut text)? == 4,
                "Fewer bytes than were sent at once"
            );
            Ok(text)
        })?
    };
    const LENGTH: usize = 16 << 20;
    let sender = {
        let mut from = full_from.try_clone()?;
        blocked_thread(libc::SYS_sendto, move || {
            Ok(from.write_all(&pattern(8, LENGTH))?)
        })?
    };

    case.ready()?;

    let mut caller = TcpStream::connect(address)?;
    caller.write_all(b"call")?;
    let mut accepted = join("accept", acceptor)?;
    patient(&accepted)?;
    let mut text = [0; 4];
    accepted.read_exact(&mut text)?;
    ensure!(&text == b"call", "Received {text:?}");
    server.write_all(b"wake")?;
    ensure!(&join("recv", receiver)? == b"wake", "Wrong bytes");
    let mut received = vec![0; LENGTH];
    full_to
        .read_exact(&mut received)
        .context("Read what was too much for the queues")?;
    join("send", sender)?;
    check_pattern("16 MiB through full queues", 8, &received)?;
    exchange(&mut client, &mut server, 1, 1000)
}

/// Sixty connections in one program.
fn many(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let mut pairs = Vec::new();
    for seed in 0..60u64 {
        let (mut server, mut client) = pair(&listener)?;
        client.write_all(&pattern(seed, 100))?;
        server.write_all(&pattern(seed + 1000, 50))?;
        pairs.push((server, client));
    }
    case.ready()?;
    for (seed, (server, client)) in (0..).zip(&mut pairs) {
        let mut bytes = [0; 100];
        server.read_exact(&mut bytes)?;
        check_pattern(&format!("connection {seed}"), seed, &bytes)?;
        let mut bytes = [0; 50];
        client.read_exact(&mut bytes)?;
        check_pattern(&format!("connection {seed}"), seed + 1000, &bytes)?;
        exchange(client, server, seed, 2000)?;
    }
    Ok(())
}

/// What is unread is all there, whatever was looked at, and the next look goes on behind that
/// (`SO_PEEK_OFF`, of TCP since Linux 6.9).
fn peek_off(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let (mut server, mut client) = pair(&listener)?;
    client.write_all(b"0123456789")?;
    let own = |server: &TcpStream| option(server, libc::SOL_SOCKET, libc::SO_PEEK_OFF);
    let from = 3_i32.to_ne_bytes();
    let goes_on = set_option(&server, libc::SOL_SOCKET, libc::SO_PEEK_OFF, &from).is_ok();
    let look = |server: &TcpStream, wanted: &[u8]| -> Result<()> {
        let mut two = [0; 2];
        server.peek(&mut two)?;
        ensure!(two == wanted, "{two:?}, not {wanted:?}, is seen");
        Ok(())
    };
    look(&server, if goes_on { b"34" } else { b"01" })?;
    case.ready()?;
    if goes_on {
        let now = own(&server)?;
        ensure!(now == 5_i32.to_ne_bytes(), "SO_PEEK_OFF is {now:?}");
    }
    look(&server, if goes_on { b"56" } else { b"01" })?;
    let mut all = [0; 10];
    server.read_exact(&mut all)?;
    ensure!(&all == b"0123456789", "{all:?} was read");
    Ok(())
}
