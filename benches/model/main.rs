//! How fast events are applied to the model, and how much memory it takes.
//!
//! `cargo bench --bench model` prints both. Time is the CPU time of the one thread that does the
//! work, median of some rounds, so that it means something on a machine that does other things.

mod workload;

use nix::time::{ClockId, clock_gettime};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;
use std::hint::black_box;
use std::time::Duration;
use tracker::model::apply::apply;
use tracker::model::event::Event;
use tracker::model::snapshot::absorb;
use tracker::model::state::State;
use workload::{Kinds, Server};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const PROCESSES: usize = 1_000;
const FDS: usize = 100;
const MAPPINGS: u64 = 100;
/// Events of one round.
const EVENTS: usize = 400_000;
const ROUNDS: usize = 11;
/// Looks at what is suspect in one round.
const TICKS: usize = 100_000;

fn main() {
    sizes();
    rates();
}

fn replay(state: &mut State, events: &[Event]) {
    for event in events {
        black_box(apply(state, event));
    }
}

/// Bytes that are allocated now.
fn allocated() -> usize {
    let stats = ALLOCATOR.stats();
    stats.bytes_allocated - stats.bytes_deallocated
}

/// A model after these events, and what it allocated.
fn build(events: &[Event]) -> (State, usize) {
    let before = allocated();
    let mut state = State::default();
    replay(&mut state, events);
    (state, allocated() - before)
}

/// Prints the memory the model takes: what it allocated, without the allocator's own share.
fn sizes() {
    let count = PROCESSES * FDS;
    let print =
        |what: &str, bytes: usize, of: usize| println!("{what:<40} {:>8} bytes", bytes / of);
    println!("{PROCESSES} processes with {FDS} descriptors each");
    let (_, bare) = build(&Server::new(PROCESSES, 0, Kinds::Files).events);
    print("a process, without descriptors", bare, PROCESSES);
    let (_, files) = build(&Server::new(PROCESSES, FDS, Kinds::Files).events);
    print("a descriptor and its open file", files - bare, count);
    let (_, sockets) = build(&Server::new(PROCESSES, FDS, Kinds::Sockets).events);
    print("a socket, beside its descriptor", sockets - files, count);
    let server = Server::new(PROCESSES, FDS, Kinds::Both);
    let (mut state, both) = build(&server.events);
    let snapshot = server.mappings(MAPPINGS);
    let before = allocated();
    absorb(&mut state, &snapshot);
    let mappings = allocated() - before;
    let vmas = usize::try_from(MAPPINGS).expect("few") * PROCESSES;
    print("a mapping", mappings, vmas);
    print("all: half sockets, 100 mappings each", both + mappings, 1);
}

/// Prints how fast events are applied.
fn rates() {
    let print = |what: &str, of: usize, time: Duration| {
        let each = time.as_secs_f64() / u32::try_from(of).map_or(f64::NAN, f64::from);
        let (nanoseconds, rate) = (each * 1e9, 1e-6 / each);
        println!("{what:<40} {nanoseconds:>8.1} ns {rate:>8.2} million/s");
    };
    let mut looks = Vec::new();
    for processes in [10, PROCESSES] {
        let mut server = Server::new(processes, FDS, Kinds::Both);
        let start = std::mem::take(&mut server.events);
        let (mut state, _) = build(&start);
        absorb(&mut state, &server.mappings(MAPPINGS));
        let events = server.serve(EVENTS);
        let served = median(|| {
            let mut state = state.clone();
            let time = cpu_time(|| replay(&mut state, &events));
            (time, state)
        });
        print(
            &format!("an event while {processes} processes serve"),
            events.len(),
            served,
        );
        let started = median(|| {
            let mut state = State::default();
            let time = cpu_time(|| replay(&mut state, &start));
            (time, state)
        });
        print(
            &format!("an event while {processes} processes start"),
            start.len(),
            started,
        );
        looks.push((format!("all suspects of {processes} processes"), state));
    }
    for (what, state) in &looks {
        let looked = median(|| {
            let look = || (0..TICKS).for_each(|_| drop(black_box(black_box(state).suspects())));
            (cpu_time(look), ())
        });
        print(what, TICKS, looked);
    }
}

/// The median time of some rounds; what they leave is dropped outside of it.
fn median<T>(mut round: impl FnMut() -> (Duration, T)) -> Duration {
    let mut times: Vec<_> = (0..ROUNDS).map(|_| round().0).collect();
    times.sort_unstable();
    times[ROUNDS / 2]
}

fn cpu_time(work: impl FnOnce()) -> Duration {
    let now = || {
        let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
        Duration::from(time.expect("every kernel has this clock"))
    };
    let before = now();
    work();
    now() - before
}
