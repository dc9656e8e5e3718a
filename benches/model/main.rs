//! How fast events are applied to the model, and how much memory it takes.
//!
//! `cargo bench --bench model` prints both; one processor is used.

mod workload;

use criterion::{BatchSize, Criterion, Throughput};
use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};
use std::alloc::System;
use std::hint::black_box;
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
/// Events of one measurement.
const EVENTS: usize = 200_000;

fn main() {
    sizes();
    let mut criterion = Criterion::default().configure_from_args().sample_size(10);
    rates(&mut criterion);
    criterion.final_summary();
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

fn rates(criterion: &mut Criterion) {
    let mut server = Server::new(PROCESSES, FDS, Kinds::Both);
    let start = std::mem::take(&mut server.events);
    let (mut large, _) = build(&start);
    absorb(&mut large, &server.mappings(MAPPINGS));
    let events = server.serve(EVENTS);

    let mut group = criterion.benchmark_group("model");
    group.throughput(Throughput::Elements(events.len() as u64));
    group.bench_function("serve", |bencher| {
        let run = |mut state: State| {
            replay(&mut state, &events);
            state
        };
        bencher.iter_batched(|| large.clone(), run, BatchSize::PerIteration);
    });
    group.throughput(Throughput::Elements(start.len() as u64));
    group.bench_function("start", |bencher| {
        bencher.iter_with_large_drop(|| build(&start));
    });
    group.finish();

    // What the agent does every 50 ms, however much it tracks.
    criterion.bench_function("tick", |bencher| {
        bencher.iter(|| black_box(&large).suspects())
    });
}
