//! Options of TCP sockets: whatever setsockopt(2) changes, the records of two sockets that differ
//! in it differ.

use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Result, bail, ensure};
use tracker::bpf::events::SockRec;
use tracker::bpf::iter::{Detail, Iterators};
use tracker::capture::files::options_of_tcp;
use tracker::sys::socket::{self, SocketError, option, set_option};

use crate::files::{find_among, me};
use crate::sys::check;

/// Level, name and bytes of an option.
type Named = (i32, i32, usize);

/// Whether the kernel keeps the same of both; fails where it is not known.
fn alike(one: &SockRec, other: &SockRec) -> Result<bool> {
    ensure!(
        one.choices.known == 1 && other.choices.known == 1,
        "It is not known what was set: {:?}",
        one.choices
    );
    Ok(one.opts == other.opts && one.choices == other.choices)
}

fn record(iterators: &mut Iterators, fd: &impl AsFd) -> Result<SockRec> {
    let files = iterators.files(me())?.files;
    match find_among(files, fd)?.detail {
        Detail::Socket(rec) => Ok(*rec),
        other => bail!("Not a socket: {other:?}"),
    }
}

fn get(fd: &OwnedFd, (level, name, len): Named) -> Result<Vec<u8>, SocketError> {
    option(fd.as_fd(), level, name, len)
}

/// Sets the option to something else than it is, whatever the kernel takes; `false` if it takes
/// nothing.
fn change(fd: &OwnedFd, option: Named) -> Result<bool> {
    let before = get(fd, option)?;
    let numbers = [1_i32, 0, 2, 3, 5, 64, 255, 1000, 0x10, 40000 << 16 | 30000];
    let mut values: Vec<Vec<u8>> = numbers.iter().map(|n| n.to_ne_bytes().to_vec()).collect();
    // A linger, time or SO_TXTIME; a timeval; NOPs as IP options; an algorithm.
    values.push([1_i32, 1].map(i32::to_ne_bytes).concat());
    values.push([3_i64, 0].map(i64::to_ne_bytes).concat());
    values.push(vec![1; 4]);
    values.push(b"reno".to_vec());
    for value in values {
        // What is refused changes nothing, which is found out.
        let _ = set_option(fd.as_fd(), option.0, option.1, &value);
        if get(fd, option)? != before {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Two of the same kind, and what keeps a connection.
type Pair = (OwnedFd, OwnedFd, Vec<OwnedFd>);

fn unconnected(family: i32) -> Result<OwnedFd> {
    Ok(socket::new(family, libc::SOCK_STREAM, 0)?)
}

fn new(family: i32) -> Result<Pair> {
    Ok((unconnected(family)?, unconnected(family)?, Vec::new()))
}

fn listening(family: i32) -> Result<Pair> {
    let (one, other, rest) = new(family)?;
    for fd in [&one, &other] {
        // SAFETY: our own socket.
        check(unsafe { libc::listen(fd.as_raw_fd(), 5) }.into(), "listen")?;
    }
    Ok((one, other, rest))
}

fn connected(family: i32) -> Result<Pair> {
    let address = if family == libc::AF_INET6 {
        "[::1]:0"
    } else {
        "127.0.0.1:0"
    };
    let listener = TcpListener::bind(address)?;
    let connect = || -> Result<(OwnedFd, OwnedFd)> {
        let client = TcpStream::connect(listener.local_addr()?)?;
        Ok((client.into(), listener.accept()?.0.into()))
    };
    let ((one, far), (other, further)) = (connect()?, connect()?);
    Ok((one, other, vec![far, further, listener.into()]))
}

/// What a kernel may lack, or takes no other value for.
fn may_stay((level, name, _): Named) -> bool {
    match (level, name) {
        // SO_PEEK_OFF of TCP since 6.9; IP_LOCAL_PORT_RANGE since 6.3.
        (libc::SOL_SOCKET, libc::SO_PEEK_OFF) | (libc::IPPROTO_IP, 51) => true,
        // Only before there is an address.
        (libc::IPPROTO_TCP, 30) | (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY) => true,
        _ => false,
    }
}

pub fn choices(iterators: &mut Iterators) -> Result<()> {
    type Make = fn(i32) -> Result<Pair>;
    let kinds: [(&str, Make, bool); 3] = [
        ("new", new, false),
        ("listening", listening, false),
        ("connected", connected, true),
    ];
    for family in [libc::AF_INET, libc::AF_INET6] {
        for (what, make, connected) in kinds {
            if family == libc::AF_INET6 && !std::path::Path::new("/proc/net/if_inet6").exists() {
                continue;
            }
            let mut changed = 0;
            for option in options_of_tcp(family == libc::AF_INET6, connected) {
                let (one, other, _rest) = make(family)?;
                let unlike = |what| format!("{what}, family {family}, option {option:?}");
                if get(&one, option).is_err() || !change(&one, option)? {
                    ensure!(may_stay(option), unlike("Not to be set"));
                    continue;
                }
                let told = (record(iterators, &one)?, record(iterators, &other)?);
                // IP options, and nothing else here, are not among what is compared.
                if (option.0, option.1) == (libc::IPPROTO_IP, libc::IP_OPTIONS) {
                    ensure!(told.0.choices.known == 0, unlike(what));
                } else {
                    ensure!(!alike(&told.0, &told.1)?, unlike(what));
                }
                changed += 1;
            }
            ensure!(changed > 30, "{what}: only {changed} options");
            let (one, other, _rest) = make(family)?;
            let told = (record(iterators, &one)?, record(iterators, &other)?);
            ensure!(alike(&told.0, &told.1)?, "{what}: {told:#?}");
        }
    }
    Ok(())
}
