//! What sockets are and are set to, as getsockopt(2) says of a duplicate of the descriptor.

use super::Audit;
use super::ticks::{Ticks, timeval};
use crate::bpf::events::{SockFlag, SockMore, TRK_SK_FLAGS_SHIFT};
use crate::model::event::{SockInfo, SockOptions};
use crate::model::ids::{Fd, Pid};
use crate::sys::socket::{int_option, option};
use nix::libc;
use std::os::fd::BorrowedFd;

/// An option whose value is an integer.
struct Check {
    name: &'static str,
    level: i32,
    option: i32,
    /// `None` for what is the default of the system, whatever that is.
    model: fn(&SockOptions) -> Option<i32>,
    /// What the model's value is of what getsockopt(2) says.
    kernel: fn(i32) -> i32,
}

const fn check(
    name: &'static str,
    (level, option): (i32, i32),
    model: fn(&SockOptions) -> Option<i32>,
) -> Check {
    let kernel = |value| value;
    Check {
        name,
        level,
        option,
        model,
        kernel,
    }
}

/// One that is set or not.
const fn switch(
    name: &'static str,
    (level, option): (i32, i32),
    model: fn(&SockOptions) -> Option<i32>,
) -> Check {
    let kernel = |value| i32::from(value != 0);
    Check {
        name,
        level,
        option,
        model,
        kernel,
    }
}

fn flag(options: &SockOptions, bit: u32) -> Option<i32> {
    Some(i32::from(options.flags & bit != 0))
}

/// By the number of a bit of the kernel's `sk_flags` (`enum sock_flags`, include/net/sock.h).
fn sk_flag(options: &SockOptions, bit: u32) -> bool {
    options.flags & 1 << (TRK_SK_FLAGS_SHIFT + bit) != 0
}

fn more(options: &SockOptions, bit: u32) -> Option<i32> {
    Some(i32::from(u32::from(options.more) & bit != 0))
}

fn number(value: u32) -> Option<i32> {
    Some(value.cast_signed())
}

/// As small numbers that stand for the default of the system when all bits are set.
fn unless_default(value: u8) -> Option<i32> {
    (value != u8::MAX).then_some(value.into())
}

const SOCKET: &[Check] = &[
    switch(
        "SO_REUSEADDR",
        (libc::SOL_SOCKET, libc::SO_REUSEADDR),
        |o| flag(o, SockFlag::REUSEADDR),
    ),
    switch(
        "SO_REUSEPORT",
        (libc::SOL_SOCKET, libc::SO_REUSEPORT),
        |o| flag(o, SockFlag::REUSEPORT),
    ),
    switch(
        "SO_OOBINLINE",
        (libc::SOL_SOCKET, libc::SO_OOBINLINE),
        |o| Some(sk_flag(o, 2).into()),
    ),
    switch(
        "SO_KEEPALIVE",
        (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
        |o| Some(sk_flag(o, 3).into()),
    ),
    // Of struct linger the first member.
    switch("SO_LINGER", (libc::SOL_SOCKET, libc::SO_LINGER), |o| {
        Some(sk_flag(o, 4).into())
    }),
    switch(
        "SO_BROADCAST",
        (libc::SOL_SOCKET, libc::SO_BROADCAST),
        |o| Some(sk_flag(o, 6).into()),
    ),
    switch(
        "SO_TIMESTAMP",
        (libc::SOL_SOCKET, libc::SO_TIMESTAMP),
        |o| Some((sk_flag(o, 11) && !sk_flag(o, 12)).into()),
    ),
    switch(
        "SO_TIMESTAMPNS",
        (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
        |o| Some(sk_flag(o, 12).into()),
    ),
    switch(
        "SO_DONTROUTE",
        (libc::SOL_SOCKET, libc::SO_DONTROUTE),
        |o| Some(sk_flag(o, 13).into()),
    ),
    switch("SO_PASSCRED", (libc::SOL_SOCKET, libc::SO_PASSCRED), |o| {
        more(o, SockMore::PASSCRED)
    }),
    check("SO_PRIORITY", (libc::SOL_SOCKET, libc::SO_PRIORITY), |o| {
        number(o.priority)
    }),
    check("SO_MARK", (libc::SOL_SOCKET, libc::SO_MARK), |o| {
        number(o.mark)
    }),
    check("SO_RCVLOWAT", (libc::SOL_SOCKET, libc::SO_RCVLOWAT), |o| {
        number(o.rcvlowat)
    }),
    check(
        "SO_BINDTOIFINDEX",
        (libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX),
        |o| number(o.bound_ifindex),
    ),
];

const INET: &[Check] = &[
    check("IP_TOS", (libc::IPPROTO_IP, libc::IP_TOS), |o| {
        Some(o.tos.into())
    }),
    check("IP_TTL", (libc::IPPROTO_IP, libc::IP_TTL), |o| {
        unless_default(o.ttl)
    }),
    switch("IP_FREEBIND", (libc::IPPROTO_IP, libc::IP_FREEBIND), |o| {
        more(o, SockMore::FREEBIND)
    }),
    switch(
        "IP_TRANSPARENT",
        (libc::IPPROTO_IP, libc::IP_TRANSPARENT),
        |o| more(o, SockMore::TRANSPARENT),
    ),
    switch("IP_PKTINFO", (libc::IPPROTO_IP, libc::IP_PKTINFO), |o| {
        more(o, SockMore::PKTINFO)
    }),
];

const INET6: &[Check] = &[
    switch(
        "IPV6_V6ONLY",
        (libc::IPPROTO_IPV6, libc::IPV6_V6ONLY),
        |o| flag(o, SockFlag::V6ONLY),
    ),
    check(
        "IPV6_TCLASS",
        (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
        |o| Some(o.tclass.into()),
    ),
    check(
        "IPV6_UNICAST_HOPS",
        (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
        |o| unless_default(o.hops),
    ),
    switch(
        "IPV6_RECVPKTINFO",
        (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
        |o| more(o, SockMore::V6_PKTINFO),
    ),
];

const TCP: &[Check] = &[
    // TCP_NAGLE_OFF and TCP_NAGLE_CORK of include/net/tcp.h.
    switch("TCP_NODELAY", (libc::IPPROTO_TCP, libc::TCP_NODELAY), |o| {
        Some((o.nonagle & 1 != 0).into())
    }),
    switch("TCP_CORK", (libc::IPPROTO_TCP, libc::TCP_CORK), |o| {
        Some((o.nonagle & 2 != 0).into())
    }),
    check("TCP_KEEPCNT", (libc::IPPROTO_TCP, libc::TCP_KEEPCNT), |o| {
        (o.keepcnt != 0).then_some(o.keepcnt.into())
    }),
    check(
        "TCP_USER_TIMEOUT",
        (libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT),
        |o| number(o.user_timeout),
    ),
    check(
        "TCP_NOTSENT_LOWAT",
        (libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT),
        |o| number(o.notsent_lowat),
    ),
    check(
        "TCP_DEFER_ACCEPT",
        (libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT),
        |o| retransmissions(o.defer_accept),
    ),
];

/// The seconds that so many retransmissions take, each twice as long after the one before;
/// `None` where that would be longer than the kernel waits at most, which can be set.
fn retransmissions(count: u8) -> Option<i32> {
    const MOST: u8 = 6;
    (count <= MOST).then(|| (1 << count) - 1)
}

impl Audit<'_> {
    /// Compares what a socket is, and what it is set to.
    pub(super) fn options(
        &mut self,
        (pid, fd): (Pid, Fd),
        info: &SockInfo,
        duplicate: BorrowedFd<'_>,
    ) {
        let identity = |name| int_option(duplicate, libc::SOL_SOCKET, name).unwrap_or(-1);
        let [family, kind, protocol] = [info.family, info.kind, info.protocol].map(i32::from);
        let [found_family, found_kind, found_protocol] =
            [libc::SO_DOMAIN, libc::SO_TYPE, libc::SO_PROTOCOL].map(identity);
        self.differ(
            pid,
            format!("kind of socket fd {fd}"),
            format!("family {family} type {kind} protocol {protocol}"),
            format!("family {found_family} type {found_kind} protocol {found_protocol}"),
        );
        let inet = matches!(family, libc::AF_INET | libc::AF_INET6);
        if !inet && family != libc::AF_UNIX {
            return;
        }
        let tcp = protocol == libc::IPPROTO_TCP && kind == libc::SOCK_STREAM;
        let of = |checks: &'static [Check], applies: bool| if applies { checks } else { &[] };
        let checks = [
            SOCKET,
            of(INET, inet),
            of(INET6, family == libc::AF_INET6),
            of(TCP, inet && tcp),
        ];
        let (mut model, mut kernel) = (String::new(), String::new());
        let mut both = |name: &str, ours: &str, theirs: &str| {
            if ours != theirs {
                model += &format!("{name} {ours} ");
                kernel += &format!("{name} {theirs} ");
            }
        };
        for check in checks.into_iter().flatten() {
            let Some(ours) = (check.model)(&info.options) else {
                continue;
            };
            // One that this kernel or kind of socket does not have is nobody's.
            if let Ok(theirs) = int_option(duplicate, check.level, check.option) {
                let theirs = (check.kernel)(theirs);
                both(check.name, &ours.to_string(), &theirs.to_string());
            }
        }
        for (name, ours, locked, option) in [
            ("SO_SNDBUF", info.options.sndbuf, 1, libc::SO_SNDBUF),
            ("SO_RCVBUF", info.options.rcvbuf, 2, libc::SO_RCVBUF),
        ] {
            if let Some(theirs) = buffer(duplicate, locked, option) {
                both(name, &ours.to_string(), &theirs.to_string());
            }
        }
        if let Some(ticks) = self.ticks {
            times(ticks, (&info.options, inet && tcp), duplicate, &mut both);
        }
        if inet && tcp {
            let named = |bytes: &[u8]| {
                let name = bytes.split(|byte| *byte == 0).next();
                String::from_utf8_lossy(name.unwrap_or_default()).into_owned()
            };
            let ours = named(&info.options.congestion);
            let theirs = option(duplicate, libc::IPPROTO_TCP, libc::TCP_CONGESTION, 16);
            both(
                "TCP_CONGESTION",
                &ours,
                &theirs.map_or(ours.clone(), |name| named(&name)),
            );
        }
        self.differ(pid, format!("options of fd {fd}"), model, kernel);
    }
}

/// Compares what the kernel keeps in ticks.
fn times(
    ticks: Ticks,
    (options, tcp): (&SockOptions, bool),
    socket: BorrowedFd<'_>,
    both: &mut impl FnMut(&str, &str, &str),
) {
    for (name, ours, number) in [
        ("SO_RCVTIMEO", options.rcvtimeo, libc::SO_RCVTIMEO),
        ("SO_SNDTIMEO", options.sndtimeo, libc::SO_SNDTIMEO),
    ] {
        let found = option(socket, libc::SOL_SOCKET, number, 16);
        if let Some(theirs) = found.ok().and_then(|bytes| timeval(&bytes)) {
            both(
                name,
                &format!("{:?}", ticks.shown(ours)),
                &format!("{theirs:?}"),
            );
        }
    }
    // Of struct linger the second member.
    let linger = option(socket, libc::SOL_SOCKET, libc::SO_LINGER, 8).ok();
    let linger = linger.and_then(|bytes| bytes.last_chunk::<4>().copied());
    let mut seconds = vec![("linger", options.linger, linger.map(i32::from_ne_bytes))];
    if tcp {
        let set = |name| int_option(socket, libc::IPPROTO_TCP, name).ok();
        let (idle, interval) = (libc::TCP_KEEPIDLE, libc::TCP_KEEPINTVL);
        seconds.push(("TCP_KEEPIDLE", options.keepidle, set(idle)));
        seconds.push(("TCP_KEEPINTVL", options.keepintvl, set(interval)));
    }
    for (name, ours, theirs) in seconds {
        // What was not set is the default of the system, whatever that is.
        if let Some(theirs) = theirs
            && (ours != 0 || name == "linger")
        {
            both(
                name,
                &ours.to_string(),
                &ticks.in_seconds(theirs).to_string(),
            );
        }
    }
}

/// The size of a buffer that was set; 0 of one that the kernel sizes by itself.
fn buffer(socket: BorrowedFd<'_>, locked: i32, size: i32) -> Option<i32> {
    let locks = int_option(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK).ok()?;
    if locks & locked == 0 {
        return Some(0);
    }
    int_option(socket, libc::SOL_SOCKET, size).ok()
}
