//! Reads objects from the kernel through the BPF iterators, in a thread of its own.

use crate::bpf::iter::{Files, Iterators, ReadError, Scope, Tasks};
use crate::bpf::reading::{add_files, add_tasks, foreign};
use crate::bpf::wire;
use crate::model::ids::{MmId, SockId};
use crate::model::snapshot::Snapshot;
use crate::sys::membarrier;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::collections::BTreeSet;
use std::thread::{self, JoinHandle};

/// What to read.
#[derive(Clone, Debug)]
pub(super) struct Order {
    /// Number of the last event when reading was asked for.
    pub seq: u64,
    /// Whose objects.
    pub scopes: Vec<Scope>,
    /// The scopes are all that is tracked.
    pub all: bool,
    /// Read tasks and descriptors.
    pub files: bool,
    /// Read mappings.
    pub mms: bool,
}

/// What came of it.
#[derive(Debug)]
pub(super) struct Reading {
    pub order: Order,
    pub result: Result<Found, ReadError>,
}

/// What was read.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub snapshot: Snapshot,
    /// Sockets in it that were made outside the tracked cgroups.
    pub foreign: BTreeSet<SockId>,
}

/// Starts the thread; it ends when the sender is dropped.
pub(super) fn start(
    iterators: Iterators,
) -> std::io::Result<(Sender<Order>, Receiver<Reading>, JoinHandle<()>)> {
    let (orders, inbox) = bounded::<Order>(1);
    let (outbox, readings) = bounded(1);
    let mut iterators = Some(iterators);
    let thread = thread::Builder::new()
        .name("reader".into())
        .spawn(move || {
            let Some(mut iterators) = iterators.take() else {
                return;
            };
            for order in inbox {
                // An event is numbered just before its change can be seen; after this, the
                // changes of all events up to order.seq can be.
                if let Err(errno) = membarrier::grace_period() {
                    tracing::debug!(%errno, "membarrier");
                }
                let result = read(&mut iterators, &order);
                if outbox.send(Reading { order, result }).is_err() {
                    return;
                }
            }
        })?;
    Ok((orders, readings, thread))
}

/// Whether a thread uses a table of which no descriptor was listed.
fn has_unlisted(files: &Files, tasks: &Tasks) -> bool {
    let listed: BTreeSet<u64> = files.files.iter().map(|file| file.rec.files).collect();
    let mut alive = tasks.threads.iter().filter(|thread| !thread.is_zombie());
    alive.any(|thread| thread.files != 0 && !listed.contains(&thread.files))
}

fn read(iterators: &mut Iterators, order: &Order) -> Result<Found, ReadError> {
    let mut found = Found::default();
    let snapshot = &mut found.snapshot;
    snapshot.seq = order.seq;
    snapshot.all_tasks = order.all && order.files;
    for scope in &order.scopes {
        if order.files {
            // Descriptors first: a table is then never listed without its threads.
            let mut files = iterators.files_and_sets(*scope)?;
            let tasks = iterators.threads(*scope)?;
            if has_unlisted(&files, &tasks) {
                // A thread came in between, with a table that is not empty for that.
                files = iterators.files_and_sets(*scope)?;
            }
            add_tasks(snapshot, &tasks);
            add_files(snapshot, &files);
            found.foreign.extend(foreign(&files));
        }
        if order.mms {
            for vma in iterators.vmas(*scope)? {
                let vmas = snapshot.mms.entry(MmId(vma.mm)).or_default();
                vmas.push(wire::vma(&vma));
            }
        }
    }
    Ok(found)
}
