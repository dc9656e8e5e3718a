//! Sockets: options as raw bytes, TCP repair mode, queue lengths.

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use std::io;
use std::net::{SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A system call that failed on a socket.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call}: {errno}")]
pub struct SocketError {
    /// The call with what it was about.
    pub call: String,
    /// What the kernel answered.
    pub errno: Errno,
}

fn failed(call: String) -> SocketError {
    SocketError {
        call,
        errno: Errno::last(),
    }
}

/// getsockopt(2) into at most `len` bytes.
///
/// # Errors
/// As the system call.
pub fn option(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    len: usize,
) -> Result<Vec<u8>, SocketError> {
    let mut value = vec![0_u8; len];
    let mut got = libc::socklen_t::try_from(len).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: the kernel writes at most `got` bytes, which `value` holds.
    let result = unsafe {
        libc::getsockopt(
            fd.as_raw_fd(),
            level,
            name,
            value.as_mut_ptr().cast(),
            &raw mut got,
        )
    };
    if result < 0 {
        return Err(failed(format!("getsockopt({level}, {name})")));
    }
    value.truncate(usize::try_from(got).unwrap_or(len));
    Ok(value)
}

/// getsockopt(2) of an `int`.
///
/// # Errors
/// As the system call.
pub fn int_option(fd: BorrowedFd<'_>, level: i32, name: i32) -> Result<i32, SocketError> {
    let bytes = option(fd, level, name, 4)?;
    Ok(bytes.try_into().map_or(0, i32::from_ne_bytes))
}

/// setsockopt(2) of raw bytes.
///
/// # Errors
/// As the system call.
pub fn set_option(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: &[u8],
) -> Result<(), SocketError> {
    let len = libc::socklen_t::try_from(value.len()).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: the kernel reads `len` bytes of `value`.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
    if result < 0 {
        Err(failed(format!("setsockopt({level}, {name})")))
    } else {
        Ok(())
    }
}

/// setsockopt(2) of an `int`.
///
/// # Errors
/// As the system call.
pub fn set_int_option(
    fd: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: i32,
) -> Result<(), SocketError> {
    set_option(fd, level, name, &value.to_ne_bytes())
}

/// Bytes of a `struct sock_filter`.
const INSTRUCTION: usize = 8;

/// The classic program attached to a socket (`SO_GET_FILTER`, socket(7)); its length is counted
/// in instructions.
///
/// # Errors
/// `EACCES`: it is an eBPF program.
pub fn filter(fd: BorrowedFd<'_>) -> Result<Vec<u8>, SocketError> {
    let told = || failed("getsockopt(SO_GET_FILTER)".to_owned());
    let mut count: libc::socklen_t = 0;
    let null = std::ptr::null_mut();
    let (level, name) = (libc::SOL_SOCKET, libc::SO_GET_FILTER);
    // SAFETY: a length of 0 asks for the number of instructions; nothing is written but that.
    if unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, null, &raw mut count) } < 0 {
        return Err(told());
    }
    let len = usize::try_from(count).unwrap_or(0) * INSTRUCTION;
    let mut program = vec![0_u8; len];
    let to = program.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `count` instructions, which `program` holds.
    if unsafe { libc::getsockopt(fd.as_raw_fd(), level, name, to, &raw mut count) } < 0 {
        return Err(told());
    }
    Ok(program)
}

/// Attaches a classic program (`SO_ATTACH_FILTER`).
///
/// # Errors
/// As setsockopt(2).
pub fn attach_filter(fd: BorrowedFd<'_>, program: &[u8]) -> Result<(), SocketError> {
    let words = program.chunks_exact(INSTRUCTION);
    let mut instructions: Vec<u64> = words
        .filter_map(|bytes| bytes.first_chunk().map(|word| u64::from_ne_bytes(*word)))
        .collect();
    let described = libc::sock_fprog {
        len: u16::try_from(instructions.len()).unwrap_or(u16::MAX),
        filter: instructions.as_mut_ptr().cast(),
    };
    // SAFETY: the kernel reads `len` instructions, which outlive the call; a u64 is aligned for them.
    let result = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const described).cast(),
            libc::socklen_t::try_from(size_of_val(&described)).unwrap_or(0),
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(failed("setsockopt(SO_ATTACH_FILTER)".to_owned())),
    }
}

/// What an ioctl(2) counts on a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    /// `SIOCINQ`: bytes that can be read.
    Unread,
    /// `SIOCOUTQ`: bytes not acknowledged.
    Unacknowledged,
    /// `SIOCOUTQNSD`: bytes not sent.
    Unsent,
}

/// Bytes in a queue (tcp(7), unix(7)).
///
/// # Errors
/// `EINVAL`: a listening socket.
pub fn queued(fd: BorrowedFd<'_>, which: Count) -> Result<usize, SocketError> {
    let (request, name) = match which {
        Count::Unread => (libc::FIONREAD, "SIOCINQ"),
        Count::Unacknowledged => (libc::TIOCOUTQ, "SIOCOUTQ"),
        Count::Unsent => (0x894B, "SIOCOUTQNSD"),
    };
    let mut value = 0_i32;
    // SAFETY: each of these requests writes one int.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut value) };
    if result < 0 {
        return Err(failed(format!("ioctl({name})")));
    }
    Ok(usize::try_from(value).unwrap_or(0))
}

/// recv(2) until `len` bytes are there; with `MSG_PEEK` in one call.
///
/// # Errors
/// As the system call; `UnexpectedEof` when fewer come.
pub fn peek_exact(fd: BorrowedFd<'_>, len: usize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0_u8; len];
    if len == 0 {
        return Ok(bytes);
    }
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: the kernel writes at most `len` bytes into `bytes`.
    let got = unsafe { libc::recv(fd.as_raw_fd(), bytes.as_mut_ptr().cast(), len, flags) };
    match usize::try_from(got) {
        Ok(got) if got == len => Ok(bytes),
        Ok(got) => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{got} of {len} bytes could be peeked"),
        )),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// accept4(2) with `FD_CLOEXEC`.
///
/// # Errors
/// As the system call.
pub fn accept(listener: BorrowedFd<'_>) -> Result<OwnedFd, SocketError> {
    let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: null pointers ask for no address.
    let fd = unsafe { libc::accept4(listener.as_raw_fd(), address, length, libc::SOCK_CLOEXEC) };
    if fd < 0 {
        return Err(failed("accept4".to_owned()));
    }
    // SAFETY: the kernel has just handed out this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Where an internet socket is, its port also when that is not its own any more (getsockname(2)).
///
/// # Errors
/// `EAFNOSUPPORT`: it is of another family.
pub fn local_address(fd: BorrowedFd<'_>) -> Result<SocketAddr, Errno> {
    let name: ns::SockaddrStorage = ns::getsockname(fd.as_raw_fd())?;
    match (name.as_sockaddr_in(), name.as_sockaddr_in6()) {
        (Some(v4), _) => Ok(SocketAddrV4::from(*v4).into()),
        (_, Some(v6)) => Ok(SocketAddrV6::from(*v6).into()),
        _ => Err(Errno::EAFNOSUPPORT),
    }
}

/// The `struct sockaddr` a socket is bound to (getsockname(2)).
///
/// # Errors
/// As the system call.
pub fn own_address(fd: BorrowedFd<'_>) -> Result<Vec<u8>, SocketError> {
    let mut address = vec![0_u8; size_of::<libc::sockaddr_storage>()];
    let mut length = libc::socklen_t::try_from(address.len()).unwrap_or(0);
    let at = address.as_mut_ptr().cast();
    // SAFETY: the kernel writes at most `length` bytes, which `address` holds.
    if unsafe { libc::getsockname(fd.as_raw_fd(), at, &raw mut length) } < 0 {
        return Err(failed("getsockname".to_owned()));
    }
    address.truncate(usize::try_from(length).unwrap_or(0));
    Ok(address)
}

/// Takes a datagram socket's peer away, and the port with it that bind(2) has chosen: connect(2)
/// with `AF_UNSPEC`.
///
/// # Errors
/// As the system call.
pub fn disconnect(fd: BorrowedFd<'_>) -> Result<(), SocketError> {
    // SAFETY: plain data, for which zero is `AF_UNSPEC`.
    let nobody: libc::sockaddr = unsafe { std::mem::zeroed() };
    let length = libc::socklen_t::try_from(size_of_val(&nobody)).unwrap_or(0);
    // SAFETY: the kernel reads `length` bytes of the address.
    if unsafe { libc::connect(fd.as_raw_fd(), &raw const nobody, length) } < 0 {
        return Err(failed("connect(AF_UNSPEC)".to_owned()));
    }
    Ok(())
}

/// Binds a packet socket to a protocol (`ETH_P_*`) and an interface; index 0 is all of them.
///
/// # Errors
/// `ENODEV`: there is no such interface.
pub fn bind_packet(fd: BorrowedFd<'_>, protocol: u16, index: u32) -> Result<(), SocketError> {
    // SAFETY: plain data for which zero is valid.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = u16::try_from(libc::AF_PACKET).unwrap_or(0);
    address.sll_protocol = protocol.to_be();
    address.sll_ifindex = index.cast_signed();
    let length = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or(0);
    let at = (&raw const address).cast();
    // SAFETY: the kernel reads `length` bytes of the address.
    if unsafe { libc::bind(fd.as_raw_fd(), at, length) } < 0 {
        return Err(failed("bind".to_owned()));
    }
    Ok(())
}

/// A new socket of any family, type and protocol.
///
/// # Errors
/// As socket(2).
pub fn new(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd, SocketError> {
    // SAFETY: takes three integers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(failed(format!("socket({family}, {kind}, {protocol})")));
    }
    // SAFETY: the kernel has just handed out this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
