//! Sockets that do not block: nobody knows what a number stands for by the time it is used.
//! (One that was at a number of those that may block for a moment can have become one.)

use crate::random::{LAST, Random};
use crate::sys::{call, flag, keep_small};
use std::mem::zeroed;
use std::os::raw::{c_int, c_void};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU16, Ordering};

/// Ports that something listens at, or did.
static PORTS: [AtomicU16; 8] = [const { AtomicU16::new(9) }; 8];
/// Abstract names that something listens at, or did.
const NAMES: u64 = 6;

/// Level, name and the greatest value of options with an integer.
const OPTIONS: [(c_int, c_int, u8); 31] = [
    (libc::SOL_SOCKET, libc::SO_REUSEADDR, 2),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT, 2),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE, 2),
    (libc::SOL_SOCKET, libc::SO_BROADCAST, 2),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE, 2),
    (libc::SOL_SOCKET, libc::SO_RCVBUF, 250),
    (libc::SOL_SOCKET, libc::SO_SNDBUF, 250),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT, 9),
    (libc::SOL_SOCKET, libc::SO_PRIORITY, 7),
    (libc::SOL_SOCKET, libc::SO_MARK, 9),
    (libc::SOL_SOCKET, libc::SO_PASSCRED, 2),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE, 2),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP, 2),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, 2),
    (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, 99),
    (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 9),
    (libc::IPPROTO_IP, libc::IP_FREEBIND, 2),
    (libc::IPPROTO_IP, libc::IP_TRANSPARENT, 2),
    (libc::IPPROTO_IP, libc::IP_PKTINFO, 2),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS, 99),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 2),
    (libc::IPPROTO_TCP, libc::TCP_NODELAY, 2),
    (libc::IPPROTO_TCP, libc::TCP_CORK, 2),
    (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, 99),
    (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, 99),
    (libc::IPPROTO_TCP, libc::TCP_KEEPCNT, 99),
    (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, 99),
    (libc::IPPROTO_IP, libc::IP_TOS, 64),
    (libc::IPPROTO_IP, libc::IP_TTL, 99),
    (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 2),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS, 99),
];

pub fn step(random: &mut Random) {
    match random.below(18) {
        0..2 => pair(random),
        2..4 => {
            let fd = unix(random);
            let queue = random.small(5);
            unix_address(random, |address, len| {
                call!(libc::bind(fd, address, len));
            });
            call!(libc::listen(fd, queue));
            keep_small([fd]);
        }
        4..6 => {
            let fd = unix(random);
            unix_address(random, |address, len| {
                call!(libc::connect(fd, address, len));
            });
            keep_small([fd]);
        }
        6..8 => {
            let fd = inet(random, libc::SOCK_STREAM);
            listen(random, fd);
            keep_small([fd]);
        }
        8..10 => {
            let fd = inet(random, libc::SOCK_STREAM);
            connect(random, fd);
            keep_small([fd]);
        }
        10..13 => accept(random),
        13..15 => {
            let (fd, how) = (random.fd(), random.small(3));
            call!(libc::shutdown(fd, how));
        }
        15..17 => option(random),
        _ => udp(random),
    }
}

fn kind(random: &mut Random, kind: c_int) -> c_int {
    kind | libc::SOCK_NONBLOCK | flag(random.coin(), libc::SOCK_CLOEXEC)
}

fn pair(random: &mut Random) {
    const KINDS: [c_int; 3] = [libc::SOCK_STREAM, libc::SOCK_SEQPACKET, libc::SOCK_DGRAM];
    let of = random.pick(&KINDS);
    let mut fds = [-1; 2];
    let of = kind(random, of);
    call!(libc::socketpair(libc::AF_UNIX, of, 0, fds.as_mut_ptr()));
    keep_small(fds);
}

fn unix(random: &mut Random) -> c_int {
    let of = random.pick(&[libc::SOCK_STREAM, libc::SOCK_STREAM, libc::SOCK_SEQPACKET]);
    call!(libc::socket(libc::AF_UNIX, kind(random, of), 0))
}

fn unix_address(random: &mut Random, then: impl FnOnce(*const libc::sockaddr, u32)) {
    let mut address: libc::sockaddr_un = call!(zeroed());
    address.sun_family = 1;
    // Abstract: starts with NUL.
    let name = format!("storm{}", random.below(NAMES));
    for (to, from) in address.sun_path[1..].iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let len = 3 + u32::try_from(name.len()).expect("short");
    then((&raw const address).cast(), len);
}

fn inet(random: &mut Random, of: c_int) -> c_int {
    call!(libc::socket(libc::AF_INET, kind(random, of), 0))
}

fn loopback(port: u16) -> libc::sockaddr_in {
    let mut address: libc::sockaddr_in = call!(zeroed());
    address.sin_family = 2;
    address.sin_port = port.to_be();
    address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    address
}

fn listen(random: &mut Random, fd: c_int) {
    let mut address = loopback(0);
    let mut len = 16;
    let pointer = (&raw mut address).cast();
    call!(libc::bind(fd, pointer, len));
    let queue = 1 + random.small(5);
    if call!(libc::listen(fd, queue)) == 0
        && call!(libc::getsockname(fd, pointer, &raw mut len)) == 0
    {
        random
            .pick(&[0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| &PORTS[n]))
            .store(u16::from_be(address.sin_port), Ordering::Relaxed);
    }
}

fn connect(random: &mut Random, fd: c_int) {
    let ports = [0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| &PORTS[n]);
    let address = loopback(random.pick(&ports).load(Ordering::Relaxed));
    call!(libc::connect(fd, (&raw const address).cast(), 16));
}

/// Of the first number from a random one on that has something to accept.
fn accept(random: &mut Random) {
    let flags = kind(random, 0);
    for fd in random.fd()..=LAST {
        let mut about = libc::pollfd {
            fd,
            events: libc::POLLIN,
            revents: 0,
        };
        if call!(libc::poll(&raw mut about, 1, 0)) != 1 {
            continue;
        }
        let new = call!(libc::accept4(fd, null_mut(), null_mut(), flags));
        if new >= 0 {
            return keep_small([new]);
        }
    }
}

fn option(random: &mut Random) {
    let (level, name, limit) = random.pick(&OPTIONS);
    let integer = random.small(limit);
    let pair = [libc::time_t::from(integer), 0];
    let linger = libc::linger {
        l_onoff: random.small(2),
        l_linger: 0,
    };
    let first = random.fd();
    let other = random.below(9);
    let congestion = random.pick(&[c"reno", c"cubic"]);
    // Few numbers are sockets.
    for fd in first..=LAST {
        let (level, name, value, len): (_, _, *const c_void, _) = match other {
            0 => {
                let pointer = (&raw const linger).cast();
                (libc::SOL_SOCKET, libc::SO_LINGER, pointer, 8)
            }
            1 => {
                let pointer = (&raw const pair).cast();
                (libc::SOL_SOCKET, libc::SO_RCVTIMEO, pointer, 16)
            }
            2 => {
                let pointer = congestion.as_ptr().cast();
                (libc::IPPROTO_TCP, libc::TCP_CONGESTION, pointer, 5)
            }
            _ => (level, name, (&raw const integer).cast(), 4),
        };
        if call!(libc::setsockopt(fd, level, name, value, len)) == 0 {
            return;
        }
    }
}

/// Bound or not, connected, connected elsewhere, disconnected, or sending unasked.
fn udp(random: &mut Random) {
    let fd = inet(random, libc::SOCK_DGRAM);
    if random.below(4) == 0 {
        // Only to be set options of.
        let of = random.pick(&[libc::SOCK_DGRAM, libc::SOCK_STREAM]);
        let of = kind(random, of);
        keep_small([call!(libc::socket(libc::AF_INET6, of, 0))]);
    }
    let address = loopback(0);
    let pointer = (&raw const address).cast();
    if random.coin() {
        call!(libc::bind(fd, pointer, 16));
    }
    connect(random, fd);
    match random.below(4) {
        0 => connect(random, fd),
        1 => {
            let mut nowhere = loopback(0);
            nowhere.sin_family = 0;
            call!(libc::connect(fd, (&raw const nowhere).cast(), 16));
        }
        2 => {
            let fd = inet(random, libc::SOCK_DGRAM);
            let to = loopback(9);
            let flags = libc::MSG_DONTWAIT;
            let pointer = (&raw const to).cast();
            call!(libc::sendto(fd, pointer, 1, flags, pointer.cast(), 16));
            keep_small([fd]);
        }
        _ => {}
    }
    keep_small([fd]);
}
