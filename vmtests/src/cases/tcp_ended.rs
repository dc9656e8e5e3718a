//! TCP connections that are over and not closed: what was not read of them, and what their ends
//! have told.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, connect, setsockopt, socket, sockopt,
};

use super::probe::{check_pattern, eventually, pattern};
use super::tcp::{exchange, info, pair, patient};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("tcp_ended", |case| ended(case, Ipv4Addr::LOCALHOST.into())),
    Entry::carried("tcp_ended_ipv6", |case| {
        ended(case, Ipv6Addr::LOCALHOST.into())
    }),
    Entry::carried("tcp_ended_polled", polled),
    Entry::carried("tcp_ended_elsewhere", elsewhere),
    Entry::refused_frozen(
        "tcp_failed_connect",
        "connect(2) failed by error 111",
        failed_connect,
    ),
];

/// `TCP_ESTABLISHED`.
const ESTABLISHED: u8 = 1;

/// `TCP_CLOSE`.
const CLOSE: u8 = 7;

/// `TCP_CLOSE_WAIT`.
const CLOSE_WAIT: u8 = 8;

/// How a connection came to its end.
#[derive(Clone, Copy, Debug, PartialEq)]
enum How {
    /// Both ends have sent a FIN, the other one first.
    Closed,
    /// We first: the kernel keeps the addresses for a minute.
    ClosedByUs,
    /// The other end has sent a reset.
    Reset,
    /// We have closed our side before.
    HalfClosedAndReset,
    /// The other end has sent a FIN before.
    ClosedAndReset,
}

impl How {
    const ALL: [Self; 5] = [
        Self::Closed,
        Self::ClosedByUs,
        Self::Reset,
        Self::HalfClosedAndReset,
        Self::ClosedAndReset,
    ];

    /// What reading comes to behind the last byte, the first time.
    fn read(self) -> Result<usize, i32> {
        match self {
            Self::Closed | Self::ClosedByUs | Self::ClosedAndReset => Ok(0),
            Self::Reset | Self::HalfClosedAndReset => Err(libc::ECONNRESET),
        }
    }

    /// The error that the socket keeps for whoever asks.
    fn error(self) -> i32 {
        match self {
            Self::Closed | Self::ClosedByUs => 0,
            Self::Reset | Self::HalfClosedAndReset => libc::ECONNRESET,
            Self::ClosedAndReset => libc::EPIPE,
        }
    }
}

/// Our end of a connection that has ended.
struct Over {
    ours: TcpStream,
    how: How,
    /// Where it was, if the machine still has that address.
    address: Option<SocketAddr>,
    unread: usize,
    /// The error was asked for before.
    told: bool,
}

impl Over {
    const SEED: u64 = 29;

    fn make(listener: &TcpListener, how: How, unread: usize, told: bool) -> Result<Self> {
        Self::of(pair(listener)?, how, unread, told)
    }

    /// Of our end and theirs.
    fn of(
        (ours, mut theirs): (TcpStream, TcpStream),
        how: How,
        unread: usize,
        told: bool,
    ) -> Result<Self> {
        theirs.write_all(&pattern(Self::SEED, unread))?;
        if how == How::ClosedByUs {
            ours.shutdown(Shutdown::Write)?;
            eventually("their knowledge of it", || {
                Ok(info(&theirs)?.tcpi_state == CLOSE_WAIT)
            })?;
        }
        if matches!(how, How::Closed | How::ClosedByUs | How::ClosedAndReset) {
            theirs.shutdown(Shutdown::Write)?;
        }
        if matches!(how, How::Closed | How::HalfClosedAndReset) {
            ours.shutdown(Shutdown::Write)?;
        }
        if !matches!(how, How::Closed | How::ClosedByUs) {
            let at_once = libc::linger {
                l_onoff: 1,
                l_linger: 0,
            };
            setsockopt(&theirs, sockopt::Linger, &at_once)?;
            drop(theirs);
        }
        eventually("the end", || Ok(info(&ours)?.tcpi_state == CLOSE))?;
        if told {
            error_of(&ours)?;
        }
        let address = Some(ours.local_addr()?);
        Ok(Self {
            ours,
            how,
            address,
            unread,
            told,
        })
    }

    fn check(mut self) -> Result<()> {
        let address = self.ours.local_addr()?;
        ensure!(
            self.address.is_none_or(|own| own == address),
            "It was at {address}"
        );
        ensure!(self.ours.peer_addr().is_err(), "There still is another end");
        let mut received = vec![0; self.unread];
        self.ours.read_exact(&mut received).context("Read")?;
        check_pattern("what was unread", Self::SEED, &received)?;
        if !self.told {
            self.check_first_words()?;
        }
        let end = self.ours.read(&mut [0]).context("Read behind the end")?;
        ensure!(end == 0, "There was more");
        let error = error_of(&self.ours)?;
        ensure!(error == 0, "It told error {error} twice");
        let written = self.ours.write(&[0]).map_err(|e| e.kind());
        ensure!(
            written == Err(ErrorKind::BrokenPipe),
            "Writing gave {written:?}"
        );
        Ok(())
    }

    /// What an application is told once.
    fn check_first_words(&mut self) -> Result<()> {
        let (wanted, mut left) = (self.how.read(), self.how.error());
        let got = self.ours.read(&mut [0]);
        let got = got.map_err(|e| e.raw_os_error().unwrap_or(0));
        ensure!(got == wanted, "Reading came to {got:?}, not {wanted:?}");
        if wanted.is_err() {
            left = 0;
        }
        let error = error_of(&self.ours)?;
        ensure!(error == left, "It told error {error}, not {left}");
        Ok(())
    }
}

/// `SO_ERROR`, which it has no more afterwards.
fn error_of(socket: &TcpStream) -> Result<i32> {
    let error = socket.take_error()?;
    Ok(error.and_then(|e| e.raw_os_error()).unwrap_or(0))
}

fn ended(case: &Case, address: IpAddr) -> Result<()> {
    let listener = TcpListener::bind((address, 0))?;
    let mut all = Vec::new();
    for how in How::ALL {
        for (unread, told) in [(0, false), (3000, false), (40_000, true)] {
            let over = Over::make(&listener, how, unread, told);
            all.push(over.with_context(|| format!("{how:?}"))?);
        }
    }
    case.ready()?;
    for over in all {
        let what = format!("{:?}, {} unread, told {}", over.how, over.unread, over.told);
        over.check().context(what)?;
    }
    let (mut server, mut client) = pair(&listener)?;
    exchange(&mut client, &mut server, 5, 1000)
}

/// Nobody has called connect(2) again since it told that the connection was under way, as is the
/// custom of programs that wait for events: for the kernel it is so until the end.
fn polled(case: &Case) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let connection = || -> Result<_> {
        let client = begin_connect(listener.local_addr()?)?;
        let (server, _) = listener.accept()?;
        eventually("the connection", || {
            Ok(info(&client)?.tcpi_state == ESTABLISHED)
        })?;
        client.set_nonblocking(false)?;
        patient(&client)?;
        Ok((client, server))
    };
    let mut all = Vec::new();
    for how in How::ALL {
        for (unread, told) in [(3000, false), (0, true)] {
            all.push(Over::of(connection()?, how, unread, told)?);
        }
    }
    case.ready()?;
    for over in all {
        let what = format!("{:?}, told {}", over.how, over.told);
        over.check().context(what)?;
    }
    Ok(())
}

/// A connect(2) that does not wait for its end.
fn begin_connect(to: SocketAddr) -> Result<TcpStream> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let client: TcpStream = socket(AddressFamily::Inet, SockType::Stream, flags, None)?.into();
    let begun = connect(client.as_raw_fd(), &SockaddrStorage::from(to));
    ensure!(
        begun == Err(Errno::EINPROGRESS),
        "connect(2) gave {begun:?}"
    );
    Ok(client)
}

/// The machine does not have their address any more.
fn elsewhere(case: &Case) -> Result<()> {
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 77);
    let ip = |verb| -> Result<()> {
        let address = format!("{ADDRESS}/32");
        let words = ["address", verb, &address, "dev", "lo"];
        let status = Command::new("ip").args(words).status().context("Run ip")?;
        ensure!(status.success(), "ip address {verb}: {status}");
        Ok(())
    };
    ip("add")?;
    let all = How::ALL.map(|how| {
        let listener = TcpListener::bind((ADDRESS, 0))?;
        Over::make(&listener, how, 3000, false)
    });
    let all = all.into_iter().collect::<Result<Vec<_>>>()?;
    ip("del")?;
    case.ready()?;
    for mut over in all {
        over.address = None;
        let what = format!("{:?}", over.how);
        over.check().context(what)?;
    }
    Ok(())
}

/// Nobody has asked yet what came of a connect(2).
fn failed_connect(case: &Case) -> Result<()> {
    let nobody = {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.local_addr()?
    };
    let client = begin_connect(nobody)?;
    eventually("the refusal", || Ok(info(&client)?.tcpi_state == CLOSE))?;
    case.ready()?;
    let error = error_of(&client)?;
    ensure!(error == libc::ECONNREFUSED, "It told error {error}");
    Ok(())
}
