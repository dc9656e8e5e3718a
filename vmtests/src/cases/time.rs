//! Clocks, waits with a deadline, system calls that the kernel does not
//! restart by itself, and the rseq area.

use std::io::{self, Read, Write};
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use nix::time::{ClockId, clock_getres, clock_gettime};
use nix::unistd::Pid;

use super::probe::{blocked_thread, eventually, join, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("clocks", clocks),
    Entry::carried("clocks_threads", clock_threads),
    Entry::carried("futex_timeout", futex_timeout),
    Entry::carried("restart_calls", restart_calls),
    Entry::carried("rseq", rseq),
];

/// A clock in nanoseconds, through the vDSO.
fn read(clock: ClockId) -> Result<i128> {
    let time = clock_gettime(clock)?;
    Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
}

/// A clock in nanoseconds, by the system call.
fn read_by_call(clock: ClockId) -> Result<i128> {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the time lives across the call.
    let got = unsafe { libc::syscall(libc::SYS_clock_gettime, clock.as_raw(), &raw mut time) };
    sys("clock_gettime", got)?;
    Ok(i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec))
}

const SECOND: i128 = 1_000_000_000;

/// Every clock goes on where it was, by vDSO and by system call alike.
fn clocks(case: &Case) -> Result<()> {
    let all = [
        ClockId::CLOCK_MONOTONIC,
        ClockId::CLOCK_BOOTTIME,
        ClockId::CLOCK_MONOTONIC_RAW,
        ClockId::CLOCK_MONOTONIC_COARSE,
        ClockId::CLOCK_REALTIME,
        ClockId::CLOCK_REALTIME_COARSE,
    ];
    let before: Vec<i128> = all
        .iter()
        .map(|&clock| read(clock))
        .collect::<Result<_>>()?;

    case.ready()?;

    let after: Vec<i128> = all
        .iter()
        .map(|&clock| read(clock))
        .collect::<Result<_>>()?;
    let passed = after[4] - before[4];
    for ((clock, was), is) in all.iter().zip(before).zip(after) {
        ensure!(is >= was, "{clock:?} went back by {} ns", was - is);
        // Wall time may be set meanwhile, but not by a minute in a test.
        ensure!(
            is - was <= passed + 60 * SECOND,
            "{clock:?} jumped by {} ns in {passed} ns",
            is - was
        );
        let (first, by_call, last) = (read(*clock)?, read_by_call(*clock)?, read(*clock)?);
        ensure!(
            first <= by_call && by_call <= last,
            "{clock:?}: vDSO {first}, system call {by_call}, vDSO {last}"
        );
    }
    let (fine, coarse) = (
        read(ClockId::CLOCK_MONOTONIC)?,
        read(ClockId::CLOCK_MONOTONIC_COARSE)?,
    );
    ensure!(
        (fine - coarse).abs() < SECOND,
        "The coarse clock is {} ns off",
        fine - coarse
    );
    // SAFETY: a null pointer asks for the returned value only.
    let seconds = i128::from(unsafe { libc::time(std::ptr::null_mut()) });
    ensure!(
        (seconds - read(ClockId::CLOCK_REALTIME)? / SECOND).abs() <= 2,
        "time() says {seconds}"
    );
    let resolution = clock_getres(ClockId::CLOCK_MONOTONIC)?;
    ensure!(resolution.tv_nsec() > 0, "The clock's resolution is zero");
    let begun = std::time::Instant::now();
    std::thread::sleep(Duration::from_millis(20));
    ensure!(
        begun.elapsed() >= Duration::from_millis(20),
        "A short sleep was shorter"
    );
    Ok(())
}

/// Threads that read clocks all the time: some are stopped inside the vDSO.
fn clock_threads(case: &Case) -> Result<()> {
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(AtomicU64::new(0));
    let clocks = [ClockId::CLOCK_MONOTONIC, ClockId::CLOCK_MONOTONIC_COARSE];
    let threads: Vec<_> = clocks
        .into_iter()
        .map(|clock| {
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            std::thread::spawn(move || {
                // SAFETY: lowers this thread's priority.
                unsafe {
                    libc::setpriority(
                        libc::PRIO_PROCESS,
                        nix::unistd::gettid().as_raw().cast_unsigned(),
                        19,
                    )
                };
                let mut last = read(clock)?;
                while !stop.load(Ordering::Relaxed) {
                    for _ in 0..10_000 {
                        let now = read(clock)?;
                        ensure!(now >= last, "{clock:?} went back by {} ns", last - now);
                        last = now;
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                Ok(())
            })
        })
        .collect();
    let more = |from: u64| {
        eventually("the clock readers go on", || {
            Ok(rounds.load(Ordering::Relaxed) > from + 4
                || threads.iter().any(JoinHandle::is_finished))
        })
    };
    more(0)?;
    case.ready()?;
    more(rounds.load(Ordering::Relaxed))?;
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        join("reading clocks", thread)?;
    }
    Ok(())
}

/// Something done over and over by a thread of its own.
struct Loop {
    name: &'static str,
    rounds: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<()>>,
}

impl Loop {
    /// Starts it; `round` sleeps in system call `number` most of the time.
    fn start(
        name: &'static str,
        number: i64,
        mut round: impl FnMut() -> Result<()> + Send + 'static,
    ) -> Result<Loop> {
        let (rounds, stop) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let (count, end) = (Arc::clone(&rounds), Arc::clone(&stop));
        let thread = blocked_thread(number, move || {
            while !end.load(Ordering::Relaxed) {
                round().with_context(|| format!("Round {}", count.load(Ordering::Relaxed)))?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
        .with_context(|| name.to_owned())?;
        Ok(Loop {
            name,
            rounds,
            stop,
            thread,
        })
    }

    /// Waits for two more rounds and ends it.
    fn finish(self) -> Result<()> {
        let before = self.rounds.load(Ordering::Relaxed);
        let thread = &self.thread;
        eventually(&format!("{} goes on", self.name), || {
            Ok(thread.is_finished() || self.rounds.load(Ordering::Relaxed) > before + 1)
        })?;
        self.stop.store(true, Ordering::Relaxed);
        join(self.name, self.thread)
    }
}

const WAIT: Duration = Duration::from_millis(300);

/// Checks that a wait of [`WAIT`] took that long.
fn timed(wait: impl FnOnce() -> Result<()>) -> Result<()> {
    let begun = read(ClockId::CLOCK_MONOTONIC)?;
    wait()?;
    let took = read(ClockId::CLOCK_MONOTONIC)? - begun;
    // Socket timeouts count ticks, which a busy emulator delivers late and
    // then in a burst; one in a thousand of these waits ends a third early.
    ensure!(took >= 150_000_000, "A wait of {WAIT:?} took {took} ns");
    Ok(())
}

fn timespec(nanoseconds: i128) -> Result<libc::timespec> {
    Ok(libc::timespec {
        tv_sec: i64::try_from(nanoseconds / SECOND)?,
        tv_nsec: i64::try_from(nanoseconds % SECOND)?,
    })
}

/// Fails unless the call returned this error.
fn expect_error(name: &str, result: i64, error: i32) -> Result<()> {
    let have = nix::errno::Errno::last_raw();
    ensure!(
        result == -1 && have == error,
        "{name} returned {result}, errno {have}, not {error}"
    );
    Ok(())
}

/// Futex waits with a relative and an absolute timeout, which end by it.
fn futex_timeout(case: &Case) -> Result<()> {
    static WORD: AtomicU32 = AtomicU32::new(0);
    let relative = Loop::start("futex wait", libc::SYS_futex, || {
        timed(|| {
            let time = timespec(300_000_000)?;
            // SAFETY: word and time live across the call.
            let done = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    WORD.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    0usize,
                    &raw const time,
                )
            };
            expect_error("futex wait", done, libc::ETIMEDOUT)
        })
    })?;
    let absolute = Loop::start("futex wait until", libc::SYS_futex, || {
        timed(|| {
            let time = timespec(read(ClockId::CLOCK_MONOTONIC)? + 300_000_000)?;
            // SAFETY: as above.
            let done = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    WORD.as_ptr(),
                    libc::FUTEX_WAIT_BITSET | libc::FUTEX_PRIVATE_FLAG,
                    0usize,
                    &raw const time,
                    0usize,
                    u32::MAX,
                )
            };
            expect_error("futex wait until", done, libc::ETIMEDOUT)
        })
    })?;
    case.ready()?;
    relative.finish()?;
    absolute.finish()
}

/// Calls that a stop would make return EINTR: none may be seen, and their
/// timeouts hold.
fn restart_calls(case: &Case) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let never = EventFd::new()?;
    epoll.add(&never, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
    let epoll_fd = epoll.0.as_raw_fd();
    let never_fd = never.as_raw_fd();
    let mut loops = Vec::new();
    loops.push(Loop::start(
        "epoll_wait",
        libc::SYS_epoll_wait,
        move || {
            timed(|| {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                // SAFETY: room for one event.
                let ready = unsafe {
                    libc::syscall(libc::SYS_epoll_wait, epoll_fd, &raw mut event, 1, 300)
                };
                ensure!(
                    sys("epoll_wait", ready)? == 0,
                    "epoll_wait returned {ready}"
                );
                Ok(())
            })
        },
    )?);
    loops.push(Loop::start(
        "epoll_pwait2",
        libc::SYS_epoll_pwait2,
        move || {
            timed(|| {
                let mut event = libc::epoll_event { events: 0, u64: 0 };
                let time = timespec(300_000_000)?;
                // SAFETY: room for one event; the time lives across the call.
                let ready = unsafe {
                    libc::syscall(
                        libc::SYS_epoll_pwait2,
                        epoll_fd,
                        &raw mut event,
                        1,
                        &raw const time,
                        0usize,
                        8,
                    )
                };
                ensure!(
                    sys("epoll_pwait2", ready)? == 0,
                    "epoll_pwait2 returned {ready}"
                );
                Ok(())
            })
        },
    )?);
    loops.push(Loop::start("poll", libc::SYS_poll, move || {
        timed(|| {
            let mut fd = libc::pollfd {
                fd: never_fd,
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd.
            let ready = unsafe { libc::syscall(libc::SYS_poll, &raw mut fd, 1, 300) };
            ensure!(sys("poll", ready)? == 0, "poll returned {ready}");
            Ok(())
        })
    })?);
    loops.push(Loop::start("ppoll", libc::SYS_ppoll, move || {
        timed(|| {
            let mut fd = libc::pollfd {
                fd: never_fd,
                events: libc::POLLIN,
                revents: 0,
            };
            let mut time = timespec(300_000_000)?;
            // SAFETY: one pollfd and a time that live across the call.
            let ready =
                unsafe { libc::syscall(libc::SYS_ppoll, &raw mut fd, 1, &raw mut time, 0usize, 8) };
            ensure!(sys("ppoll", ready)? == 0, "ppoll returned {ready}");
            Ok(())
        })
    })?);
    loops.push(Loop::start(
        "rt_sigtimedwait",
        libc::SYS_rt_sigtimedwait,
        || {
            timed(|| {
                let time = timespec(300_000_000)?;
                // SIGURG, blocked nowhere and sent by nobody.
                let set = 1u64 << (libc::SIGURG - 1);
                // SAFETY: set and time live across the call.
                let done = unsafe {
                    libc::syscall(
                        libc::SYS_rt_sigtimedwait,
                        &raw const set,
                        0usize,
                        &raw const time,
                        8,
                    )
                };
                expect_error("rt_sigtimedwait", done, libc::EAGAIN)
            })
        },
    )?);
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    socket.set_read_timeout(Some(WAIT))?;
    loops.push(Loop::start(
        "recv with SO_RCVTIMEO",
        libc::SYS_recvfrom,
        move || {
            timed(|| {
                let error = socket.recv(&mut [0; 16]).err().map(|error| error.kind());
                ensure!(error == Some(io::ErrorKind::WouldBlock), "recv: {error:?}");
                Ok(())
            })
        },
    )?);
    let (mut from, mut to) = io::pipe()?;
    let reader = blocked_thread(libc::SYS_read, move || {
        let mut byte = [0];
        from.read_exact(&mut byte)?;
        Ok(byte[0])
    })?;
    let forever = {
        let event = EventFd::new()?;
        epoll.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 2))?;
        let endless = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        endless.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 3))?;
        let thread = blocked_thread(libc::SYS_epoll_wait, move || {
            let mut found = libc::epoll_event { events: 0, u64: 0 };
            // SAFETY: room for one event.
            let ready = unsafe {
                libc::syscall(
                    libc::SYS_epoll_wait,
                    endless.0.as_raw_fd(),
                    &raw mut found,
                    1,
                    -1,
                )
            };
            sys("epoll_wait without end", ready)?;
            Ok(found.u64)
        })?;
        (event, thread)
    };

    case.ready()?;

    for one in loops {
        one.finish()?;
    }
    to.write_all(b"r")?;
    ensure!(join("read", reader)? == b'r', "Wrong byte");
    forever.0.write(1)?;
    ensure!(
        join("epoll_wait without end", forever.1)? == 3,
        "Wrong event"
    );
    Ok(())
}

/// The CPU number in glibc's rseq area, which the kernel keeps up to date.
fn rseq_cpu() -> Result<u32> {
    // SAFETY: looks a symbol up.
    let symbol = |name: &std::ffi::CStr| unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    let (offset, size) = (symbol(c"__rseq_offset"), symbol(c"__rseq_size"));
    ensure!(
        !offset.is_null() && !size.is_null(),
        "This C library has no rseq"
    );
    let cpu: u32;
    // SAFETY: glibc exports both as variables of these types; the area lies
    // that far from the thread pointer, cpu_id is its second word.
    unsafe {
        ensure!(*size.cast::<u32>() != 0, "glibc has not registered rseq");
        std::arch::asm!("mov {cpu:e}, fs:[{offset} + 4]", cpu = out(reg) cpu, offset = in(reg) *offset.cast::<isize>());
    }
    Ok(cpu)
}

/// Moves between CPUs and compares.
fn check_rseq() -> Result<()> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    for cpu in (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu).unwrap_or(false)) {
        let mut only = CpuSet::new();
        only.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &only)?;
        let (rseq, call) = (rseq_cpu()?, sched_getcpu()?);
        ensure!(
            usize::try_from(rseq)? == cpu && call == cpu,
            "On CPU {cpu}, rseq says {rseq}, getcpu {call}"
        );
    }
    sched_setaffinity(Pid::from_raw(0), &allowed).context("Set the affinity back")
}

/// glibc's rseq registration works in every thread, old and new.
fn rseq(case: &Case) -> Result<()> {
    check_rseq()?;
    let go = Arc::new(EventFd::new()?);
    let thread = {
        let go = Arc::clone(&go);
        blocked_thread(libc::SYS_read, move || check_rseq_after(go.read()))?
    };
    case.ready()?;
    check_rseq()?;
    go.write(1)?;
    join("an old thread", thread)?;
    join("a new thread", std::thread::spawn(check_rseq))
}

fn check_rseq_after(read: nix::Result<u64>) -> Result<()> {
    read.context("Read the eventfd")?;
    check_rseq()
}
