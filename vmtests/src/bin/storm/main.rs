//! Changes everything that a process has at random, in processes whose threads share
//! their tables, then keeps still to be audited.
//!
//! `storm OPS [PROCESSES [SEED]]`: each of two threads of each process performs OPS
//! operations; the seed is printed. SIGTERM ends it. `storm child SEED STAY` is what it
//! executes itself as: a few operations, then it stays if STAY is 1.

mod files;
mod memory;
mod processes;
mod random;
mod sockets;
mod sys;
mod tables;

use random::Random;
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use sys::call;

const THREADS: usize = 2;

/// For an operation, on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(20);

fn main() {
    sys::ignore_signals();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |n: usize| args.get(n).map(|arg| arg.parse::<u64>().expect("a number"));
    if args.first().is_some_and(|arg| arg == "child") {
        let mut random = Random(number(1).expect("a seed"));
        (0..5).for_each(|_| step(&mut random, Place::Child));
        if number(2) == Some(1) {
            sys::pause_forever();
        }
        return;
    }
    let ops = number(0).expect("usage: storm OPS [PROCESSES [SEED]]");
    let processes = number(1).unwrap_or(2);
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .expect("a clock")
        .as_nanos();
    let seed = number(2).unwrap_or(u64::try_from(now & 0xffff_ffff).expect("32 bits"));
    println!("storm: {ops} operations, {processes} processes, seed {seed}");
    files::prepare();
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
    static STEPS: [AtomicU64; THREADS] = [const { AtomicU64::new(0) }; THREADS];
    sys::be_interruptible();
    let mut threads = Vec::new();
    for (thread, steps) in (0..).zip(&STEPS) {
        let mut random = Random(seed.wrapping_mul(2) + thread + 1);
        threads.push(thread::spawn(move || {
            for n in 0..ops {
                steps.store(n, Ordering::Relaxed);
                // Late, for the table to be shared until then.
                if thread == 1 && n == ops / 4 * 3 {
                    tables::unshare(&mut random);
                }
                step(&mut random, Place::Storm);
            }
            steps.store(ops, Ordering::Relaxed);
            STILL.fetch_add(1, Ordering::SeqCst);
            sys::pause_forever();
        }));
    }
    let mut depth = 0;
    let mut seen = [(0, Instant::now()); THREADS];
    while STILL.load(Ordering::SeqCst) < THREADS {
        for ((seen, steps), thread) in seen.iter_mut().zip(&STEPS).zip(&threads) {
            let now = steps.load(Ordering::Relaxed);
            if now != seen.0 || now == ops {
                *seen = (now, Instant::now());
            } else if seen.1.elapsed() > PATIENCE {
                // What it waits for may have gone to another process, or never come.
                println!("storm: operation {now} hangs");
                call!(libc::pthread_kill(thread.as_pthread_t(), libc::SIGUSR2));
                seen.1 = Instant::now();
            }
        }
        depth = (depth + 1).min(60);
        memory::use_stack(depth);
        thread::sleep(Duration::from_millis(20));
    }
    if tell {
        println!("storm: still");
    }
    sys::pause_forever()
}

/// Where an operation runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In a thread of the storm.
    Storm,
    /// In a process of its own with one thread, which nobody minds to lose.
    Child,
}

/// One random operation; most fail now and then, which is part of the storm.
pub fn step(random: &mut Random, place: Place) {
    match random.below(100) {
        0..44 => tables::step(random),
        44..62 => sockets::step(random),
        62..76 => memory::step(random),
        76..92 => files::step(random),
        92..95 if place == Place::Storm => processes::step(random),
        92..98 if place == Place::Child => processes::change_child(random),
        _ => sys::set_name(random.next()),
    }
}
