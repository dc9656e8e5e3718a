//! Programs attached to sockets.

use std::net::UdpSocket;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use anyhow::{Result, ensure};
use nix::errno::Errno;

use super::probe::{PATIENCE, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("filter_unix", unix),
    Entry::carried("filter_udp_locked", udp),
    Entry::refused("refused_ebpf_filter", "eBPF", ebpf),
];

/// Lets through what has a `y` at this offset.
pub(super) fn attach(socket: &impl AsRawFd, offset: u32) -> Result<()> {
    let instruction = |code: u32, jt, jf, k| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt,
        jf,
        k,
    };
    let mut program = [
        instruction(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, offset),
        instruction(
            libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K,
            0,
            1,
            u32::from(b'y'),
        ),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let described = libc::sock_fprog {
        len: u16::try_from(program.len())?,
        filter: program.as_mut_ptr(),
    };
    // SAFETY: the kernel reads the program, which outlives the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const described).cast(),
            libc::socklen_t::try_from(size_of_val(&described))?,
        )
    };
    sys("SO_ATTACH_FILTER", result.into()).map(|_| ())
}

fn set(socket: &impl AsRawFd, option: i32, value: i32) -> Result<(), Errno> {
    // SAFETY: reads one int.
    Errno::result(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            (&raw const value).cast(),
            4,
        )
    })
    .map(drop)
}

/// What was queued before the filter came stays queued; what comes later is filtered.
fn unix(case: &Case) -> Result<()> {
    let (from, to) = UnixDatagram::pair()?;
    to.set_nonblocking(true)?;
    from.send(b"no, but before")?;
    attach(&to, 0)?;
    from.send(b"no")?;
    from.send(b"yes")?;
    case.ready()?;
    let mut bytes = [0; 32];
    let mut next = || -> Result<Vec<u8>> {
        let got = to.recv(&mut bytes)?;
        Ok(bytes[..got].to_vec())
    };
    ensure!(next()? == b"no, but before", "Not the first");
    ensure!(next()? == b"yes", "Not the second");
    from.send(b"no again")?;
    from.send(b"yes again")?;
    let got = next()?;
    ensure!(got == b"yes again", "It lets through {got:?}");
    ensure!(to.recv(&mut [0; 8]).is_err(), "There is more");
    set(&to, libc::SO_DETACH_FILTER, 0)?;
    from.send(b"no")?;
    ensure!(to.recv(&mut [0; 8])? == 2, "It was not detached");
    Ok(())
}

/// A filter that can be neither changed nor detached.
fn udp(case: &Case) -> Result<()> {
    const HEADER: u32 = 8;
    let to = UdpSocket::bind("127.0.0.1:0")?;
    to.set_read_timeout(Some(PATIENCE))?;
    attach(&to, HEADER)?;
    set(&to, libc::SO_LOCK_FILTER, 1)?;
    case.ready()?;
    let from = UdpSocket::bind("127.0.0.1:0")?;
    from.send_to(b"no", to.local_addr()?)?;
    from.send_to(b"yes", to.local_addr()?)?;
    let mut bytes = [0; 8];
    let got = to.recv(&mut bytes)?;
    ensure!(
        &bytes[..got] == b"yes",
        "It lets through {:?}",
        &bytes[..got]
    );
    ensure!(
        set(&to, libc::SO_DETACH_FILTER, 0) == Err(Errno::EPERM),
        "It can be detached"
    );
    Ok(())
}

/// A program that only the kernel has.
fn ebpf(case: &Case) -> Result<()> {
    const BPF_PROG_LOAD: i32 = 5;
    const SOCKET_FILTER: u32 = 1;
    // r0 = -1; exit
    let program: [u64; 2] = [0xffff_ffff_0000_00b7, 0x95];
    let license = c"GPL";
    // union bpf_attr: type, count, instructions, licence, then no log.
    let attributes: [u64; 16] = {
        let mut words = [0; 16];
        words[0] = u64::from(SOCKET_FILTER) | 2 << 32;
        words[1] = program.as_ptr() as u64;
        words[2] = license.as_ptr() as u64;
        words
    };
    // SAFETY: the kernel reads the attributes, the program and the licence.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            BPF_PROG_LOAD,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    // SAFETY: a new descriptor, owned by nobody else.
    let program = unsafe { OwnedFd::from_raw_fd(i32::try_from(sys("bpf", fd)?)?) };
    let (from, to) = UnixDatagram::pair()?;
    set(&to, libc::SO_ATTACH_BPF, program.as_raw_fd())?;
    drop(program);
    case.ready()?;
    from.send(b"all")?;
    let mut bytes = [0; 8];
    ensure!(to.recv(&mut bytes)? == 3, "The program is another");
    set(&to, libc::SO_DETACH_BPF, 0)?;
    Ok(())
}
