//! Netlink sockets: what they are bound and connected to, and their groups.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    MsgFlags, NetlinkAddr, bind, connect, getpeername, getsockname, recv, send, sendto,
};

use super::probe::{option, set_option, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("netlink", netlink),
    Entry::refused(
        "refused_netlink_queue",
        "messages that it has not read yet",
        queue,
    ),
    Entry::refused("refused_netlink_generic", "generic netlink", generic),
    Entry::refused(
        "refused_netlink_audit",
        "netlink sockets of protocol 9",
        audit,
    ),
];

/// Groups of rtnetlink that hear nothing here: DECnet's, of bridges' VLANs, of statistics.
const QUIET: [u32; 2] = [13, 15];
const QUIET_HIGH: [u32; 2] = [33, 36];

/// `RTM_NEWLINK`, `RTM_GETLINK`; `NLM_F_REQUEST` and `NLM_F_DUMP`.
const NEWLINK: u8 = 16;
const GETLINK: u8 = 18;
const REQUEST: u16 = 1;
const DUMP: u16 = 0x300;

fn open(kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: takes integers.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, kind | libc::SOCK_CLOEXEC, protocol) };
    sys("socket", fd.into())?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn join(socket: &OwnedFd, group: u32) -> Result<()> {
    let (level, name) = (libc::SOL_NETLINK, libc::NETLINK_ADD_MEMBERSHIP);
    set_option(socket, level, name, &group.to_ne_bytes()).with_context(|| format!("Group {group}"))
}

/// A request about links, of `struct nlmsghdr` and `struct ifinfomsg`: about this one, or all.
fn links(flags: u16, index: u8) -> Vec<u8> {
    let mut request = vec![32, 0, 0, 0, GETLINK, 0];
    request.extend((REQUEST | flags).to_ne_bytes());
    request.resize(20, 0);
    request.push(index);
    request.resize(32, 0);
    request
}

/// What can be asked about a socket.
#[derive(Debug, PartialEq)]
struct Told {
    kind: Vec<u8>,
    local: NetlinkAddr,
    remote: NetlinkAddr,
    groups: Vec<u8>,
}

impl Told {
    fn by(socket: &OwnedFd) -> Result<Told> {
        Ok(Told {
            kind: option(socket, libc::SOL_SOCKET, libc::SO_TYPE)?,
            local: getsockname(socket.as_raw_fd())?,
            remote: getpeername(socket.as_raw_fd())?,
            groups: option(socket, libc::SOL_NETLINK, libc::NETLINK_LIST_MEMBERSHIPS)?,
        })
    }
}

/// Of both types, bound, connected and member of groups in all combinations that make sense.
fn netlink(case: &Case) -> Result<()> {
    let route = libc::NETLINK_ROUTE;
    let bound = open(libc::SOCK_DGRAM, route)?;
    bind(bound.as_raw_fd(), &NetlinkAddr::new(0, 1 << (QUIET[0] - 1)))?;
    join(&bound, QUIET_HIGH[0])?;
    let unbound = open(libc::SOCK_RAW, route)?;
    join(&unbound, QUIET[1])?;
    join(&unbound, QUIET_HIGH[1])?;
    let to_kernel = open(libc::SOCK_RAW, route)?;
    connect(to_kernel.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
    let to_bound = open(libc::SOCK_DGRAM, route)?;
    let port = getsockname::<NetlinkAddr>(bound.as_raw_fd())?.pid();
    connect(to_bound.as_raw_fd(), &NetlinkAddr::new(port, 4))?;
    let diag = open(libc::SOCK_DGRAM, libc::NETLINK_SOCK_DIAG)?;
    let all = [bound, unbound, to_kernel, to_bound, diag];
    let told = |all: &[OwnedFd]| all.iter().map(Told::by).collect::<Result<Vec<_>>>();
    let before = told(&all)?;
    case.ready()?;
    let after = told(&all)?;
    ensure!(after == before, "{after:?}, before {before:?}");

    let [bound, _, to_kernel, to_bound, _] = &all;
    let mut answer = [0; 4096];
    send(to_kernel.as_raw_fd(), &links(0, 1), MsgFlags::empty()).context("To the kernel")?;
    recv(to_kernel.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT).context("Its answer")?;
    ensure!(answer[4] == NEWLINK, "The answer's type is {}", answer[4]);
    let sent = links(0, 2);
    send(to_bound.as_raw_fd(), &sent, MsgFlags::empty()).context("To the other socket")?;
    let got = recv(bound.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)
        .context("From the other socket")?;
    ensure!(answer[..got] == sent, "{got} bytes of something else");
    Ok(())
}

/// An answer of the kernel that was not read.
fn queue(case: &Case) -> Result<()> {
    let route = open(libc::SOCK_RAW, libc::NETLINK_ROUTE)?;
    let kernel = NetlinkAddr::new(0, 0);
    sendto(
        route.as_raw_fd(),
        &links(DUMP, 0),
        &kernel,
        MsgFlags::empty(),
    )?;
    case.ready()?;
    let mut answer = [0; 4096];
    let got = recv(route.as_raw_fd(), &mut answer, MsgFlags::MSG_DONTWAIT)?;
    ensure!(got > 16 && answer[4] == NEWLINK, "{got} bytes");
    Ok(())
}

/// Families that have other numbers under another kernel.
fn generic(case: &Case) -> Result<()> {
    let _socket = open(libc::SOCK_RAW, libc::NETLINK_GENERIC)?;
    case.ready()
}

/// A family with state that no option tells.
fn audit(case: &Case) -> Result<()> {
    let _socket = open(libc::SOCK_RAW, libc::NETLINK_AUDIT)?;
    case.ready()
}
