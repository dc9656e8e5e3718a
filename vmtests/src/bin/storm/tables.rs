//! Descriptor tables and epoll sets.

use crate::random::{LAST, Random};
use crate::sys::{call, close, flag, keep_small};
use std::mem::zeroed;
use std::os::raw::c_int;

const CLOSE_RANGE_UNSHARE: c_int = 2;
const CLOSE_RANGE_CLOEXEC: c_int = 4;

pub fn step(random: &mut Random) {
    let (a, b, cloexec) = (random.fd(), random.fd(), random.coin());
    match random.below(44) {
        0..6 => open_null(cloexec),
        6..12 => close(a),
        12..19 => {
            call!(libc::dup3(a, b, flag(cloexec, libc::O_CLOEXEC)));
        }
        19..22 => dup_from(a, b, cloexec),
        22..26 => {
            call!(libc::fcntl(
                a,
                libc::F_SETFD,
                flag(cloexec, libc::FD_CLOEXEC)
            ));
        }
        26..27 => close_range(a, 0),
        27..28 => close_range(a, CLOSE_RANGE_CLOEXEC),
        28..30 => pipe(cloexec),
        30..32 => {
            let fd = call!(libc::epoll_create1(flag(cloexec, libc::EPOLL_CLOEXEC)));
            // Nested, sometimes in itself or in a loop, which the kernel refuses.
            epoll_ctl(a, libc::EPOLL_CTL_ADD, fd, random);
            keep_small([fd]);
        }
        32..41 => {
            let op = random.pick(&[
                libc::EPOLL_CTL_ADD,
                libc::EPOLL_CTL_DEL,
                libc::EPOLL_CTL_MOD,
            ]);
            // Try some numbers: few of them are epoll instances.
            (3..=LAST).any(|epfd| epoll_ctl(epfd, op, b, random));
        }
        _ => pass(a),
    }
}

/// Gives this thread a table of its own.
pub fn unshare(random: &mut Random) {
    match random.below(3) {
        0 => {
            call!(libc::unshare(libc::CLONE_FILES));
        }
        1 => close_range(random.fd(), CLOSE_RANGE_UNSHARE),
        _ => close_range(random.fd(), CLOSE_RANGE_UNSHARE | CLOSE_RANGE_CLOEXEC),
    }
}

fn open_null(cloexec: bool) {
    let flags = libc::O_RDWR | flag(cloexec, libc::O_CLOEXEC);
    keep_small([call!(libc::open(c"/dev/null".as_ptr(), flags))]);
}

fn dup_from(fd: c_int, at_least: c_int, cloexec: bool) {
    let command = if cloexec {
        libc::F_DUPFD_CLOEXEC
    } else {
        libc::F_DUPFD
    };
    keep_small([call!(libc::fcntl(fd, command, at_least))]);
}

fn close_range(first: c_int, flags: c_int) {
    let last = (first + 4).min(LAST);
    call!(libc::syscall(libc::SYS_close_range, first, last, flags));
}

fn pipe(cloexec: bool) {
    let mut fds = [-1; 2];
    let flags = flag(cloexec, libc::O_CLOEXEC) | libc::O_NONBLOCK;
    call!(libc::pipe2(fds.as_mut_ptr(), flags));
    keep_small(fds);
}

/// Whether `epfd` is an epoll instance and took it.
fn epoll_ctl(epfd: c_int, op: c_int, fd: c_int, random: &mut Random) -> bool {
    const EXTRA: [c_int; 4] = [0, 0, libc::EPOLLET, libc::EPOLLONESHOT];
    let events = 1 | random.small(8) << 1 | random.pick(&EXTRA);
    let mut event = libc::epoll_event {
        events: events.cast_unsigned(),
        u64: random.next(),
    };
    call!(libc::epoll_ctl(epfd, op, fd, &raw mut event)) == 0
}

/// Sends a descriptor to ourselves in an SCM_RIGHTS message.
fn pass(fd: c_int) {
    let mut pair = [-1; 2];
    call!(libc::socketpair(
        libc::AF_UNIX,
        libc::SOCK_DGRAM | libc::SOCK_NONBLOCK,
        0,
        pair.as_mut_ptr()
    ));
    let mut byte = 0u8;
    let mut part = libc::iovec {
        iov_base: (&raw mut byte).cast(),
        iov_len: 1,
    };
    let mut control = [0u64; 3];
    let mut message: libc::msghdr = call!(zeroed());
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = 24;
    let header = libc::cmsghdr {
        cmsg_len: 20,
        cmsg_level: libc::SOL_SOCKET,
        cmsg_type: libc::SCM_RIGHTS,
    };
    call!(message.msg_control.cast::<libc::cmsghdr>().write(header));
    call!(message.msg_control.cast::<c_int>().add(4).write(fd));
    let flags = libc::MSG_DONTWAIT;
    if call!(libc::sendmsg(pair[0], &raw const message, flags)) == 1 {
        message.msg_controllen = 24;
        call!(libc::recvmsg(pair[1], &raw mut message, flags));
    }
    close(pair[0]);
    close(pair[1]);
}
