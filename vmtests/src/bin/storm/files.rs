//! Open files of all kinds, their flags and owners, inotify watches, directories.

use crate::random::Random;
use crate::sys::{call, close, flag, keep_small};
use std::ffi::CStr;
use std::mem::zeroed;
use std::os::raw::c_int;

/// Numbers whose files nothing waits for, so that they may block.
const APART: c_int = 93;
const NUMBERS_APART: u8 = 6;
/// libc does not name it.
const F_SETSIG: c_int = 10;

const DIRS: [&CStr; 6] = [c"/", c"/tmp", c"/tmp/storm", c"/usr", c"/proc", c"/dev"];
const FILES: [&CStr; 4] = [
    c"/tmp/storm/a",
    c"/tmp/storm/b",
    c"/tmp/storm/c",
    c"/tmp/storm/d",
];

/// Makes what is played with.
pub fn prepare() {
    call!(libc::mkdir(c"/tmp/storm".as_ptr(), 0o777));
}

pub fn step(random: &mut Random) {
    let (fd, on) = (random.fd(), random.coin());
    match random.below(30) {
        0..2 => keep_small([call!(libc::eventfd(0, libc::EFD_NONBLOCK))]),
        2..3 => keep_small([call!(libc::timerfd_create(
            libc::CLOCK_MONOTONIC,
            flag(on, libc::TFD_CLOEXEC)
        ))]),
        3..4 => {
            let mut set: libc::sigset_t = call!(zeroed());
            call!(libc::sigaddset(&raw mut set, libc::SIGUSR2));
            keep_small([call!(libc::signalfd(
                -1,
                &raw const set,
                libc::SFD_NONBLOCK
            ))]);
        }
        4..5 => keep_small([call!(libc::memfd_create(c"storm".as_ptr(), 0))]),
        5..7 => pidfd(fd),
        7..11 => open(random),
        11..13 => keep_small([call!(libc::inotify_init1(flag(on, libc::IN_CLOEXEC)))]),
        13..18 => watch(random),
        18..19 => {
            call!(libc::unlink(random.pick(&FILES).as_ptr()));
        }
        19..22 => status_flags(random, fd),
        22..24 => owner(random, fd),
        24..25 => {
            let request = if on { libc::FIOCLEX } else { libc::FIONCLEX };
            call!(libc::ioctl(fd, request));
        }
        25..27 => apart(random),
        27..28 => {
            call!(libc::umask(random.pick(&[0o22, 0o77, 0o2, 0])));
        }
        28..29 => {
            call!(libc::chdir(random.pick(&DIRS).as_ptr()));
        }
        _ => {
            call!(libc::fchdir(fd));
        }
    }
}

fn pidfd(fd: c_int) {
    let pid = call!(libc::getpid());
    let new = call!(libc::syscall(libc::SYS_pidfd_open, pid, 0));
    let pidfd = c_int::try_from(new).unwrap_or(-1);
    let copy = call!(libc::syscall(libc::SYS_pidfd_getfd, pidfd, fd, 0));
    keep_small([pidfd, c_int::try_from(copy).unwrap_or(-1)]);
}

fn open(random: &mut Random) {
    let (path, flags) = match random.below(3) {
        0 => (random.pick(&DIRS), libc::O_RDONLY | libc::O_DIRECTORY),
        1 => (random.pick(&DIRS), libc::O_PATH),
        _ => (random.pick(&FILES), libc::O_RDWR | libc::O_CREAT),
    };
    let flags = flags | flag(random.coin(), libc::O_CLOEXEC);
    keep_small([call!(libc::open(path.as_ptr(), flags, 0o666))]);
}

fn watch(random: &mut Random) {
    const ALL: u32 = libc::IN_ALL_EVENTS;
    let mask = random.pick(&[
        ALL,
        libc::IN_MODIFY,
        libc::IN_DELETE_SELF | libc::IN_ATTRIB,
        libc::IN_OPEN | libc::IN_MASK_ADD,
        libc::IN_CREATE | libc::IN_ONESHOT,
    ]);
    let file = random.coin();
    let path = if file {
        random.pick(&FILES)
    } else {
        random.pick(&DIRS)
    };
    let (first, wd) = (random.fd(), 1 + random.small(6));
    let remove = random.below(4) == 0;
    for fd in first..=crate::random::LAST {
        let done = if remove {
            call!(libc::inotify_rm_watch(fd, wd))
        } else {
            call!(libc::inotify_add_watch(fd, path.as_ptr(), mask))
        };
        if done >= 0 {
            return;
        }
    }
}

/// Whatever the file is, it does not block afterwards.
fn status_flags(random: &mut Random, fd: c_int) {
    let more = random.pick(&[0, libc::O_APPEND, libc::O_ASYNC, libc::O_NOATIME]);
    call!(libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK | more));
}

fn owner(random: &mut Random, fd: c_int) {
    let pid = call!(libc::getpid());
    match random.below(4) {
        0 => {
            call!(libc::fcntl(fd, libc::F_SETOWN, pid));
        }
        1 => {
            call!(libc::fcntl(fd, libc::F_SETOWN, 0));
        }
        2 => {
            let signal = random.pick(&[0, libc::SIGIO, libc::SIGUSR1]);
            call!(libc::fcntl(fd, F_SETSIG, signal));
        }
        _ => {
            call!(libc::ioctl(fd, libc::FIOASYNC, &raw const pid));
        }
    }
}

/// Flags of files that may block, since nothing else uses their numbers.
fn apart(random: &mut Random) {
    let (fd, on) = (APART + random.small(NUMBERS_APART), random.small(2));
    if random.coin() {
        let new = match random.below(3) {
            0 => call!(libc::eventfd(0, 0)),
            1 => call!(libc::socket(libc::AF_INET, libc::SOCK_DGRAM, 0)),
            _ => call!(libc::open(c"/dev/zero".as_ptr(), libc::O_RDWR)),
        };
        call!(libc::dup3(new, fd, flag(on == 1, libc::O_CLOEXEC)));
        close(new);
    }
    if random.coin() {
        call!(libc::ioctl(fd, libc::FIONBIO, &raw const on));
    } else {
        let more = random.pick(&[0, libc::O_APPEND, libc::O_DIRECT]);
        let flags = flag(on == 1, libc::O_NONBLOCK) | more;
        call!(libc::fcntl(fd, libc::F_SETFL, flags));
    }
}

/// Directories of a process that nobody else shares.
pub fn change_root() {
    if call!(libc::chroot(c"/tmp/storm".as_ptr())) == 0 {
        call!(libc::chdir(c"/".as_ptr()));
    }
}
