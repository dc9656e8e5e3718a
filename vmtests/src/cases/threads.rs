//! Threads: sleeping in different calls, computing, and what each thread has
//! of its own.

use std::arch::asm;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use anyhow::{Context, Result, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::EventFd;
use nix::sys::signal::{SigSet, Signal};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::gettid;

use super::probe::{blocked_thread, eventually, join, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("threads_blocked", blocked),
    Entry::carried("threads_registers", registers),
    Entry::carried("threads_own", own),
    Entry::carried("threads_many", many),
];

/// CLOCK_MONOTONIC in nanoseconds.
fn now() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}

fn timespec(nanoseconds: i64) -> libc::timespec {
    libc::timespec {
        tv_sec: nanoseconds / 1_000_000_000,
        tv_nsec: nanoseconds % 1_000_000_000,
    }
}

/// Eight threads asleep in eight ways; each is then woken as it expects.
fn blocked(case: &Case) -> Result<()> {
    let word = Arc::new(AtomicU32::new(0));
    let futex = {
        let word = Arc::clone(&word);
        blocked_thread(libc::SYS_futex, move || {
            // SAFETY: the word outlives the call, there is no timeout.
            let woken = unsafe {
                libc::syscall(
                    libc::SYS_futex,
                    word.as_ptr(),
                    libc::FUTEX_WAIT | libc::FUTEX_PRIVATE_FLAG,
                    0usize,
                    0usize,
                )
            };
            sys("futex wait", woken)
        })?
    };
    let pair = Arc::new((Mutex::new(0), Condvar::new()));
    let condition = {
        let pair = Arc::clone(&pair);
        blocked_thread(libc::SYS_futex, move || {
            let guard = pair.0.lock().unwrap_or_else(PoisonError::into_inner);
            let guard = pair
                .1
                .wait_while(guard, |value| *value == 0)
                .unwrap_or_else(PoisonError::into_inner);
            Ok(*guard)
        })?
    };
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new([AtomicU64::new(0), AtomicU64::new(0)]);
    let relative = {
        let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
        blocked_thread(libc::SYS_nanosleep, move || {
            while !stop.load(Ordering::Relaxed) {
                let begun = now()?;
                let time = timespec(300_000_000);
                // SAFETY: the time lives across the call; no remainder wanted.
                sys("nanosleep", unsafe {
                    libc::syscall(libc::SYS_nanosleep, &raw const time, 0usize)
                })?;
                ensure!(now()? - begun >= 300_000_000, "nanosleep was cut short");
                rounds[0].fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })?
    };
    let absolute = {
        let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
        blocked_thread(libc::SYS_clock_nanosleep, move || {
            while !stop.load(Ordering::Relaxed) {
                let deadline = now()? + 300_000_000;
                let time = timespec(deadline);
                // SAFETY: as above.
                let slept = unsafe {
                    libc::syscall(
                        libc::SYS_clock_nanosleep,
                        libc::CLOCK_MONOTONIC,
                        libc::TIMER_ABSTIME,
                        &raw const time,
                        0usize,
                    )
                };
                sys("clock_nanosleep", slept)?;
                ensure!(now()? >= deadline, "clock_nanosleep was cut short");
                rounds[1].fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })?
    };
    let (mut from, mut to) = io::pipe()?;
    let reader = blocked_thread(libc::SYS_read, move || {
        let mut byte = [0];
        ensure!(from.read(&mut byte)? == 1, "End of file");
        Ok(byte[0])
    })?;
    let polled = Arc::new(EventFd::new()?);
    let poller = {
        let polled = Arc::clone(&polled);
        blocked_thread(libc::SYS_poll, move || {
            let mut fd = libc::pollfd {
                fd: polled.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one pollfd, alive across the call.
            sys("poll", unsafe {
                libc::syscall(libc::SYS_poll, &raw mut fd, 1, -1)
            })?;
            Ok(fd.revents)
        })?
    };
    let selected = Arc::new(EventFd::new()?);
    let selector = {
        let selected = Arc::clone(&selected);
        blocked_thread(libc::SYS_pselect6, move || {
            // SAFETY: an all-zero set is an empty one.
            let mut set: libc::fd_set = unsafe { std::mem::zeroed() };
            let fd = selected.as_raw_fd();
            // SAFETY: fd is far below FD_SETSIZE; the set lives across the call.
            let ready = unsafe {
                libc::FD_SET(fd, &raw mut set);
                libc::syscall(
                    libc::SYS_pselect6,
                    fd + 1,
                    &raw mut set,
                    0usize,
                    0usize,
                    0usize,
                    0usize,
                )
            };
            sys("pselect6", ready)
        })?
    };
    let event = EventFd::new()?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(
        &event,
        EpollEvent::new(EpollFlags::EPOLLIN, 0x1122_3344_5566_7788),
    )?;
    let waiter = blocked_thread(libc::SYS_epoll_wait, move || {
        let mut events = [EpollEvent::empty()];
        let ready = epoll
            .wait(&mut events, EpollTimeout::NONE)
            .context("epoll_wait")?;
        ensure!(ready == 1, "{ready} events");
        Ok(events[0].data())
    })?;

    case.ready()?;

    for (i, name) in ["nanosleep", "clock_nanosleep"].into_iter().enumerate() {
        let before = rounds[i].load(Ordering::Relaxed);
        eventually(&format!("the thread in {name} wakes"), || {
            ensure!(
                !relative.is_finished() && !absolute.is_finished(),
                "A sleeping thread has ended"
            );
            Ok(rounds[i].load(Ordering::Relaxed) > before + 1)
        })
        .or_else(|error| {
            // The thread's own complaint says more.
            stop.store(true, Ordering::Relaxed);
            if relative.is_finished() || absolute.is_finished() {
                Ok(())
            } else {
                Err(error)
            }
        })?;
    }
    stop.store(true, Ordering::Relaxed);
    join("nanosleep", relative)?;
    join("clock_nanosleep", absolute)?;

    ensure!(!futex.is_finished(), "The futex waiter woke by itself");
    // SAFETY: the word is alive.
    let woken = unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAKE | libc::FUTEX_PRIVATE_FLAG,
            1,
        )
    };
    ensure!(woken == 1, "{woken} threads waited at the futex");
    ensure!(join("futex", futex)? == 0, "futex wait");
    *pair.0.lock().unwrap_or_else(PoisonError::into_inner) = 77;
    pair.1.notify_all();
    ensure!(
        join("condition variable", condition)? == 77,
        "Wrong value from the condition variable"
    );
    to.write_all(b"p")?;
    ensure!(join("read", reader)? == b'p', "Wrong byte from the pipe");
    polled.write(1)?;
    ensure!(join("poll", poller)? == libc::POLLIN, "Wrong poll events");
    selected.write(1)?;
    ensure!(
        join("pselect6", selector)? == 1,
        "Wrong number of selected files"
    );
    event.write(1)?;
    ensure!(
        join("epoll_wait", waiter)? == 0x1122_3344_5566_7788,
        "Wrong epoll data"
    );
    Ok(())
}

thread_local! {
    static MARK: AtomicU64 = const { AtomicU64::new(0) };
}

/// One stretch of computing with values in registers that nobody saves:
/// false if one of them has changed.
fn hold_registers(seed: u64) -> bool {
    let lanes = [seed, !seed, seed.rotate_left(17), seed ^ 0x5555];
    let mut lanes_after = [0u64; 4];
    let mut general = [seed; 6];
    let control_before: u16 = 0x0c7f;
    let mut control_after: u16 = 0;
    let mxcsr_before: u32 = 0x7f80;
    let mut mxcsr_after: u32 = 0;
    let mut pi = 0f64;
    // SAFETY: needs AVX, which the caller has checked. Registers are declared;
    // x87 and MXCSR control words are put back to their defaults.
    unsafe {
        asm!(
            "vmovdqu ymm13, [{lanes}]",
            "fldcw [{control}]",
            "ldmxcsr [{mxcsr}]",
            "fldpi",
            "2:",
            "dec {count}",
            "jnz 2b",
            "fstp qword ptr [{pi}]",
            "fnstcw [{control_after}]",
            "stmxcsr [{mxcsr_after}]",
            "vmovdqu [{lanes_after}], ymm13",
            "vzeroupper",
            "fninit",
            lanes = in(reg) &raw const lanes,
            control = in(reg) &raw const control_before,
            mxcsr = in(reg) &raw const mxcsr_before,
            count = inout(reg) 5_000_000u64 => _,
            pi = in(reg) &raw mut pi,
            control_after = in(reg) &raw mut control_after,
            mxcsr_after = in(reg) &raw mut mxcsr_after,
            lanes_after = in(reg) &raw mut lanes_after,
            inout("r12") general[0],
            inout("r13") general[1],
            inout("r14") general[2],
            out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
            out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
            out("ymm13") _,
        );
        let default = 0x1f80u32;
        asm!("ldmxcsr [{}]", in(reg) &raw const default);
    }
    lanes == lanes_after
        && general == [seed; 6]
        && control_after == control_before
        && mxcsr_after & 0xffc0 == mxcsr_before
        && pi.to_bits() == std::f64::consts::PI.to_bits()
}

/// Threads that compute all the time with state in AVX, x87 and general
/// registers, their own thread-local values and a gs base.
fn registers(case: &Case) -> Result<()> {
    ensure!(std::is_x86_feature_detected!("avx"), "The CPU has no AVX");
    let stop = Arc::new(AtomicBool::new(false));
    let rounds = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (1..=2u64)
        .map(|seed| {
            let (stop, rounds) = (Arc::clone(&stop), Arc::clone(&rounds));
            std::thread::spawn(move || {
                let (mut first, mut second) = (0u64, 0u64);
                let base = 0x1000 * seed;
                // SAFETY: nothing uses gs; the second call writes 8 bytes.
                unsafe {
                    sys(
                        "ARCH_SET_GS",
                        libc::syscall(libc::SYS_arch_prctl, 0x1001, base),
                    )?;
                    // Below the other cases, yet not so far that it gets nothing beside them.
                    libc::setpriority(libc::PRIO_PROCESS, gettid().as_raw().cast_unsigned(), 10);
                }
                let address = MARK.with(|mark| {
                    mark.store(seed, Ordering::Relaxed);
                    mark.as_ptr() as usize
                });
                while !stop.load(Ordering::Relaxed) {
                    ensure!(
                        hold_registers(seed * 0x0123_4567_89ab),
                        "A register has changed"
                    );
                    let place =
                        MARK.with(|mark| (mark.load(Ordering::Relaxed), mark.as_ptr() as usize));
                    ensure!(place == (seed, address), "Thread-local value: {place:x?}");
                    // SAFETY: writes the base into `first`.
                    sys("ARCH_GET_GS", unsafe {
                        libc::syscall(libc::SYS_arch_prctl, 0x1004, &raw mut first)
                    })?;
                    ensure!(first == base, "gs base is {first:#x}, not {base:#x}");
                    second += 1;
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
                ensure!(second > 1, "The thread did nothing");
                Ok(())
            })
        })
        .collect();
    let moving = |from: u64| {
        eventually("the threads compute", || {
            Ok(threads.iter().any(std::thread::JoinHandle::is_finished)
                || rounds.load(Ordering::Relaxed) > from + 4)
        })
    };
    moving(0)?;
    case.ready()?;
    moving(rounds.load(Ordering::Relaxed))?;
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        join("the computation", thread)?;
    }
    Ok(())
}

/// Name, signal mask, alternate stack and CPU affinity of single threads.
fn own(case: &Case) -> Result<()> {
    let go = Arc::new(EventFd::new()?);
    let threads: Vec<_> = [("alpha", Signal::SIGUSR2), ("beta two", Signal::SIGWINCH)]
        .into_iter()
        .map(|(name, signal)| {
            let go = Arc::clone(&go);
            blocked_thread(libc::SYS_poll, move || {
                let comm = format!("/proc/self/task/{}/comm", gettid());
                fs::write(&comm, name)?;
                let mut mask = SigSet::thread_get_mask()?;
                mask.add(signal);
                mask.thread_block()?;
                let tid = gettid();
                // SAFETY: a null pointer asks for the current stack only.
                let stack = || unsafe {
                    let mut stack: libc::stack_t = std::mem::zeroed();
                    libc::sigaltstack(std::ptr::null(), &raw mut stack);
                    (stack.ss_sp as usize, stack.ss_size, stack.ss_flags)
                };
                let before = stack();
                ensure!(
                    before.0 != 0 && before.2 == 0,
                    "Rust gives each thread an alternate stack"
                );
                let mut fd = libc::pollfd {
                    fd: go.as_raw_fd(),
                    events: libc::POLLIN,
                    revents: 0,
                };
                // SAFETY: one pollfd, alive across the call.
                sys("poll", unsafe {
                    libc::syscall(libc::SYS_poll, &raw mut fd, 1, -1)
                })?;
                ensure!(gettid() == tid, "TID {} is now {}", tid, gettid());
                let comm_now = fs::read_to_string(&comm)?;
                ensure!(comm_now.trim() == name, "The name is now {comm_now}");
                ensure!(
                    stack() == before,
                    "The alternate stack is now {:x?}, not {before:x?}",
                    stack()
                );
                let now = SigSet::thread_get_mask()?;
                ensure!(now == mask, "The mask is now {now:?}, not {mask:?}");
                Ok(())
            })
        })
        .collect::<Result<_>>()?;
    let main_mask = SigSet::thread_get_mask()?;
    case.ready()?;
    go.write(1)?;
    for thread in threads {
        join("poll", thread)?;
    }
    ensure!(
        SigSet::thread_get_mask()? == main_mask,
        "The main thread's mask has changed"
    );
    let another = std::thread::spawn(|| Ok(gettid()));
    ensure!(
        join("a new thread", another)? != gettid(),
        "A new thread has the main thread's ID"
    );
    Ok(())
}

/// A hundred threads that take turns.
fn many(case: &Case) -> Result<()> {
    let turn = Arc::new((Mutex::new(0usize), Condvar::new()));
    let threads: Vec<_> = (0..100usize)
        .map(|number| {
            let turn = Arc::clone(&turn);
            std::thread::spawn(move || {
                let guard = turn.0.lock().unwrap_or_else(PoisonError::into_inner);
                let mut guard = turn
                    .1
                    .wait_while(guard, |next| *next != number + 1)
                    .unwrap_or_else(PoisonError::into_inner);
                *guard += 1;
                turn.1.notify_all();
                Ok(())
            })
        })
        .collect();
    eventually("a hundred threads", || {
        Ok(fs::read_dir("/proc/self/task")?.count() == 101)
    })?;
    case.ready()?;
    *turn.0.lock().unwrap_or_else(PoisonError::into_inner) = 1;
    turn.1.notify_all();
    for thread in threads {
        join("its turn", thread)?;
    }
    let last = *turn.0.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(last == 101, "Only {last} turns were taken");
    eventually("all threads gone", || {
        Ok(fs::read_dir("/proc/self/task")?.count() == 1)
    })
}
