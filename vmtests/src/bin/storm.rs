//! Changes descriptor tables, epoll sets, sockets and process trees at random, in
//! processes whose threads share one table, then keeps still to be audited.
//!
//! `storm OPS [PROCESSES [SEED]]`: each of two threads of each process performs OPS
//! operations; the seed is printed. SIGTERM ends it.

use std::os::raw::c_int;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{SystemTime, UNIX_EPOCH};

/// Numbers that are played with; below are the standard streams.
const FIRST: u64 = 3;
const NUMBERS: u64 = 90;
const THREADS: usize = 2;

fn main() {
    let mut args = std::env::args()
        .skip(1)
        .map(|arg| arg.parse::<u64>().expect("a number"));
    let ops = args.next().expect("usage: storm OPS [PROCESSES [SEED]]");
    let processes = args.next().unwrap_or(2);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_nanos();
    let seed = args
        .next()
        .unwrap_or(u64::try_from(now & 0xffff_ffff).expect("32 bits"));
    println!("storm: {ops} operations, {processes} processes, seed {seed}");
    // Children of the storm's children are never waited for.
    sys::ignore_children();
    for process in 1..processes {
        if sys::fork() == 0 {
            storm(ops, seed ^ process << 32, false);
        }
    }
    storm(ops, seed, true);
}

/// Storms in two threads that share the table, then waits to be killed.
fn storm(ops: u64, seed: u64, tell: bool) -> ! {
    static STILL: AtomicUsize = AtomicUsize::new(0);
    for thread in 0..THREADS {
        let mut random = Random(seed.wrapping_mul(2) + thread as u64 + 1);
        thread::spawn(move || {
            for _ in 0..ops {
                step(&mut random, thread == 1);
            }
            STILL.fetch_add(1, Ordering::SeqCst);
            sys::pause_forever();
        });
    }
    while STILL.load(Ordering::SeqCst) < THREADS {
        sys::sleep_ms(20);
    }
    if tell {
        println!("storm: still");
    }
    sys::pause_forever()
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    fn fd(&mut self) -> c_int {
        c_int::try_from(FIRST + self.below(NUMBERS)).expect("small")
    }

    fn coin(&mut self) -> bool {
        self.below(2) == 0
    }
}

/// One random operation; most fail now and then, which is part of the storm.
fn step(random: &mut Random, may_unshare: bool) {
    let (a, b, cloexec) = (random.fd(), random.fd(), random.coin());
    match random.below(100) {
        0..12 => sys::open_null(cloexec),
        12..22 => sys::close(a),
        22..34 => sys::dup3(a, b, cloexec),
        34..40 => sys::dup_from(a, b, cloexec),
        40..48 => sys::set_cloexec(a, cloexec),
        48..51 => sys::close_range(a, a + 4, false),
        51..53 => sys::close_range(a, a + 4, true),
        53..57 => sys::pipe(cloexec),
        57..60 => sys::eventfd(cloexec),
        60..64 => sys::epoll_create(cloexec),
        64..80 => {
            // Try some numbers: few of them are epoll instances.
            let op = c_int::try_from(1 + random.below(3)).expect("small");
            let events = 1 | u32::try_from(random.below(8)).expect("small") << 1;
            for epfd in 3..93 {
                if sys::epoll_ctl(epfd, op, b, events, random.next()) {
                    break;
                }
            }
        }
        80..84 => sys::socketpair(cloexec),
        84..88 => sys::tcp_pair(),
        88..90 => sys::unix_listener(random.next()),
        90..94 => sys::pass(a),
        94..96 => sys::fork_and(cloexec, || (0..5).for_each(|_| step(random, false))),
        96..97 => sys::fork_and_exec(),
        97..98 if may_unshare => sys::unshare_files(),
        _ => sys::set_name(random.next()),
    }
}

/// System calls whose failure is fine.
mod sys {
    use std::ffi::CString;
    use std::mem::zeroed;
    use std::os::raw::c_int;
    use std::ptr::null_mut;

    macro_rules! call {
        ($call:expr) => {
            // SAFETY: integers, and pointers to values that live across the call.
            unsafe { $call }
        };
    }

    fn flag(cloexec: bool, value: c_int) -> c_int {
        if cloexec { value } else { 0 }
    }

    pub fn open_null(cloexec: bool) {
        let flags = libc::O_RDWR | flag(cloexec, libc::O_CLOEXEC);
        let fd = call!(libc::open(c"/dev/null".as_ptr(), flags));
        keep_small([fd, -1]);
    }

    pub fn close(fd: c_int) {
        call!(libc::close(fd));
    }

    pub fn dup3(from: c_int, to: c_int, cloexec: bool) {
        call!(libc::dup3(from, to, flag(cloexec, libc::O_CLOEXEC)));
    }

    pub fn dup_from(fd: c_int, at_least: c_int, cloexec: bool) {
        let command = if cloexec {
            libc::F_DUPFD_CLOEXEC
        } else {
            libc::F_DUPFD
        };
        // A number above the range would never be closed again.
        let new = call!(libc::fcntl(fd, command, at_least));
        if new > 92 {
            close(new);
        }
    }

    pub fn set_cloexec(fd: c_int, on: bool) {
        call!(libc::fcntl(fd, libc::F_SETFD, flag(on, libc::FD_CLOEXEC)));
    }

    pub fn close_range(first: c_int, last: c_int, only_flag: bool) {
        const CLOSE_RANGE_CLOEXEC: c_int = 4;
        let flags = flag(only_flag, CLOSE_RANGE_CLOEXEC);
        call!(libc::syscall(
            libc::SYS_close_range,
            first,
            last.min(92),
            flags
        ));
    }

    fn keep_small(fds: [c_int; 2]) {
        for fd in fds {
            if fd > 92 {
                close(fd);
            }
        }
    }

    pub fn pipe(cloexec: bool) {
        let mut fds = [-1; 2];
        call!(libc::pipe2(
            fds.as_mut_ptr(),
            flag(cloexec, libc::O_CLOEXEC)
        ));
        keep_small(fds);
    }

    pub fn eventfd(cloexec: bool) {
        let fd = call!(libc::eventfd(0, flag(cloexec, libc::EFD_CLOEXEC)));
        keep_small([fd, -1]);
    }

    pub fn epoll_create(cloexec: bool) {
        let fd = call!(libc::epoll_create1(flag(cloexec, libc::EPOLL_CLOEXEC)));
        keep_small([fd, -1]);
    }

    /// Whether `epfd` is an epoll instance and took it.
    pub fn epoll_ctl(epfd: c_int, op: c_int, fd: c_int, events: u32, data: u64) -> bool {
        let mut event = libc::epoll_event { events, u64: data };
        call!(libc::epoll_ctl(epfd, op, fd, &raw mut event)) == 0
    }

    pub fn socketpair(cloexec: bool) {
        let mut fds = [-1; 2];
        let kind = libc::SOCK_STREAM | flag(cloexec, libc::SOCK_CLOEXEC);
        call!(libc::socketpair(libc::AF_UNIX, kind, 0, fds.as_mut_ptr()));
        keep_small(fds);
    }

    /// A listener, a connection to it, and its accepted end; the listener goes.
    pub fn tcp_pair() {
        let mut address: libc::sockaddr_in = call!(zeroed());
        address.sin_family = 2;
        address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
        let mut len = 16;
        let listener = call!(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0));
        let client = call!(libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0));
        let pointer = (&raw mut address).cast();
        call!(libc::bind(listener, pointer, len));
        call!(libc::listen(listener, 4));
        call!(libc::getsockname(listener, pointer, &raw mut len));
        // The other thread may have closed or replaced any of them meanwhile: never block.
        for fd in [listener, client] {
            call!(libc::fcntl(fd, libc::F_SETFL, libc::O_NONBLOCK));
        }
        call!(libc::connect(client, pointer, len));
        let accepted = call!(libc::accept(listener, null_mut(), null_mut()));
        close(listener);
        keep_small([client, accepted]);
    }

    pub fn unix_listener(name: u64) {
        let fd = call!(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM, 0));
        let mut address: libc::sockaddr_un = call!(zeroed());
        address.sun_family = 1;
        // Abstract: starts with NUL.
        for (to, from) in address.sun_path[1..]
            .iter_mut()
            .zip(format!("storm{name:x}").bytes())
        {
            *to = from.cast_signed();
        }
        call!(libc::bind(fd, (&raw const address).cast(), 24));
        call!(libc::listen(fd, 4));
        keep_small([fd, -1]);
    }

    /// Sends a descriptor to ourselves in an SCM_RIGHTS message.
    pub fn pass(fd: c_int) {
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
        if call!(libc::sendmsg(
            pair[0],
            &raw const message,
            libc::MSG_DONTWAIT
        )) == 1
        {
            message.msg_controllen = 24;
            call!(libc::recvmsg(pair[1], &raw mut message, libc::MSG_DONTWAIT));
        }
        close(pair[0]);
        close(pair[1]);
    }

    pub fn fork() -> c_int {
        call!(libc::fork())
    }

    /// Runs something in a child, which then exits.
    pub fn fork_and(linger: bool, then: impl FnOnce()) {
        if fork() == 0 {
            then();
            if linger {
                sleep_ms(5);
            }
            call!(libc::_exit(0));
        }
    }

    pub fn fork_and_exec() {
        if fork() == 0 {
            let path = CString::from(c"/bin/true");
            let argv = [path.as_ptr(), std::ptr::null()];
            call!(libc::execv(path.as_ptr(), argv.as_ptr()));
            call!(libc::_exit(0));
        }
    }

    pub fn unshare_files() {
        call!(libc::unshare(libc::CLONE_FILES));
    }

    pub fn set_name(random: u64) {
        let name = CString::new(format!("storm{:x}", random & 0xffff)).expect("no NUL");
        call!(libc::prctl(libc::PR_SET_NAME, name.as_ptr()));
    }

    pub fn ignore_children() {
        call!(libc::signal(libc::SIGCHLD, libc::SIG_IGN));
    }

    pub fn sleep_ms(ms: i64) {
        let time = libc::timespec {
            tv_sec: 0,
            tv_nsec: ms * 1_000_000,
        };
        call!(libc::nanosleep(&raw const time, null_mut()));
    }

    pub fn pause_forever() -> ! {
        loop {
            call!(libc::pause());
        }
    }
}
