//! Processes and threads: trees of them, who they are, programs they execute.

use crate::random::Random;
use crate::sys::{call, close, exit, flag, fork, pause_forever, sleep_ms};
use crate::{Place, files, memory};
use std::ffi::CString;
use std::os::raw::{c_int, c_long};
use std::process::{Command, Stdio};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

/// How many children of each process of the storm are kept to be audited.
const STAYING: usize = 8;
/// One in so many children stays, until there are enough.
const SELDOM: u64 = 12;

pub fn step(random: &mut Random) {
    match random.below(24) {
        0..6 => child(random, |random| run(random, 6)),
        6..9 => tree(random),
        9..11 => child(random, |random| {
            for _ in 0..1 + random.below(3) {
                change_child(random);
            }
            run(random, 2);
        }),
        11..14 => {
            let staying = stays(random);
            child_of(random, staying, |random| execute(random, staying));
        }
        14..16 => {
            let staying = stays(random);
            child_of(random, staying, |random| execute_in_thread(random, staying));
        }
        16..18 => brief_thread(random),
        18..20 => spawn(),
        20..22 => raw_clone(random, libc::CLONE_PIDFD),
        _ => raw_clone(random, libc::CLONE_FILES | libc::CLONE_FS),
    }
}

fn run(random: &mut Random, steps: usize) {
    (0..steps).for_each(|_| crate::step(random, Place::Child));
}

/// Whether the child that is made next stays.
fn stays(random: &mut Random) -> bool {
    static COUNT: AtomicUsize = AtomicUsize::new(0);
    random.below(SELDOM) == 0 && COUNT.fetch_add(1, Ordering::Relaxed) < STAYING
}

fn child(random: &mut Random, then: impl FnOnce(&mut Random)) {
    let staying = stays(random);
    child_of(random, staying, then);
}

/// Runs something in a child, which then exits or stays.
fn child_of(random: &mut Random, staying: bool, then: impl FnOnce(&mut Random)) {
    let mut random = random.fork();
    let child = fork();
    if child == 0 {
        then(&mut random);
        if staying {
            pause_forever();
        }
        if random.coin() {
            sleep_ms(5);
        }
        exit();
    }
    if child > 0 && random.below(4) == 0 {
        // Whether the child does it first, or is gone already, is left to chance.
        call!(libc::setpgid(child, child));
    }
}

/// Three generations that end in any order; whose parent ends first has another one.
fn tree(random: &mut Random) {
    child(random, |random| {
        if random.coin() {
            // What ends is then waited for by nobody, and a zombie.
            call!(libc::signal(libc::SIGCHLD, libc::SIG_DFL));
        }
        for _ in 0..2 {
            child(random, |random| {
                child(random, |random| {
                    run(random, 2);
                    sleep_ms(i64::from(random.small(4)));
                });
                if random.coin() {
                    call!(libc::setsid());
                }
                sleep_ms(i64::from(random.small(4)));
            });
        }
        if random.coin() {
            call!(libc::waitpid(-1, null_mut(), 0));
        }
    });
}

/// Something that a process of the storm itself would not survive.
pub fn change_child(random: &mut Random) {
    let id = 1000 + u32::try_from(random.below(9)).expect("small");
    match random.below(12) {
        0 => {
            call!(libc::setsid());
        }
        1 => {
            call!(libc::setpgid(0, 0));
        }
        2 => {
            call!(libc::setgroups(2, [id, id + 1].as_ptr()));
            call!(libc::setgid(id));
        }
        3 => {
            call!(libc::setuid(id));
        }
        4 => {
            call!(libc::setresuid(0, id, 0));
        }
        5 => {
            call!(libc::setresgid(id, id + 1, id + 2));
        }
        6 => drop_capabilities(random),
        7 => {
            const SECBIT_KEEP_CAPS: c_int = 1 << 4;
            call!(libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_KEEP_CAPS));
        }
        8 => {
            call!(libc::unshare(libc::CLONE_FS));
            files::change_root();
        }
        9 => memory::use_brk(random),
        10 => memory::lock_all(random),
        _ => crate::tables::unshare(random),
    }
}

/// capset(2), or out of the bounding set.
fn drop_capabilities(random: &mut Random) {
    const VERSION_3: u32 = 0x2008_0522;
    if random.coin() {
        call!(libc::prctl(libc::PR_CAPBSET_DROP, random.small(30)));
        return;
    }
    let header = [VERSION_3, 0];
    // Effective, permitted and inheritable, for each half.
    let low = 0x1fff_ffff >> random.below(20);
    let low = u32::try_from(low & 0xffff_ffff_u64).expect("32 bits");
    let data = [low, low, 0, 0, 0, 0];
    let (header, data) = (header.as_ptr(), data.as_ptr());
    call!(libc::syscall(libc::SYS_capset, header, data));
}

/// This program as a child, with what has no `FD_CLOEXEC`.
fn execute(random: &mut Random, staying: bool) {
    let path = CString::from(c"/proc/self/exe");
    let seed = CString::new(random.next().to_string()).expect("digits");
    let stay = if staying { c"1" } else { c"0" };
    let argv = [
        c"storm".as_ptr(),
        c"child".as_ptr(),
        seed.as_ptr(),
        stay.as_ptr(),
        null(),
    ];
    call!(libc::execv(path.as_ptr(), argv.as_ptr()));
}

/// The thread that does it takes over the identity of the one that leads.
fn execute_in_thread(random: &mut Random, staying: bool) {
    let mut random = random.fork();
    let other = thread::Builder::new().spawn(move || execute(&mut random, staying));
    if other.is_ok_and(|other| other.join().is_ok()) {
        exit();
    }
}

/// Shares everything, and ends at any time.
fn brief_thread(random: &mut Random) {
    let mut random = random.fork();
    let thread = thread::Builder::new().stack_size(65536).spawn(move || {
        if random.below(8) == 0 {
            call!(libc::unshare(libc::CLONE_FS));
        }
        (0..4).for_each(|_| crate::step(&mut random, Place::Storm));
    });
    // There may be too many already.
    drop(thread);
}

/// A child that shares the memory of its parent until it executes something.
fn spawn() {
    let mut command = Command::new("/bin/true");
    let command = command.stdin(Stdio::inherit()).stdout(Stdio::inherit());
    if let Ok(mut child) = command.spawn() {
        // It may be reaped by itself.
        let _ = child.wait();
    }
}

/// A child that libc knows nothing of: it may only make system calls.
fn raw_clone(random: &mut Random, flags: c_int) {
    let mut pidfd: c_int = -1;
    let flags = c_long::from(flags | libc::SIGCHLD);
    let (a, b, cloexec) = (random.fd(), random.fd(), random.coin());
    let pointer = &raw mut pidfd;
    let child = call!(libc::syscall(libc::SYS_clone, flags, 0, pointer, 0, 0));
    if child == 0 {
        call!(libc::dup3(a, b, flag(cloexec, libc::O_CLOEXEC)));
        close(a);
        call!(libc::chdir(c"/tmp".as_ptr()));
        exit();
    }
    crate::sys::keep_small([pidfd]);
}
