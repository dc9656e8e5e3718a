//! Descriptors and what they refer to, read while their owners stand still.
//!
//! Identities and most values come from the BPF iterators' pass; a descriptor is
//! borrowed (pidfd_getfd(2)) only for what they cannot give: contents of queues
//! and memfds, socket options. Borrowed descriptors are dropped before the thaw.
//!
//! A TCP connection is put into repair mode only if something it has sent is not acknowledged,
//! which nothing else shows, or before its process is killed.

mod accept;
mod alike;
mod borrow;
mod describe;
mod ended;
mod error;
mod fanotify;
mod filter;
mod interfaces;
mod lease;
mod mqueue;
mod netlink;
mod options;
mod orphan;
mod owner;
mod pidfd;
mod pipe;
mod pseudo;
mod pty;
mod raw;
mod refuse;
mod regular;
mod socket;
mod tcp;
mod udp;
mod unix;
mod unix_accept;
mod uring;

pub use accept::{is_any as any_unaccepted, refusal as accept_queues_refusal};
pub use alike::Alike;
pub use error::CollectError;
pub(in crate::capture) use lease::mapped as leased_and_mapped;
pub use mqueue::has_messages;
pub use options::of_tcp as options_of_tcp;
pub use orphan::read as orphans;
pub use pseudo::is_pseudo;
pub use pty::{controlling, has_terminals, unsettled};
pub use refuse::{UNREPORTED, blockers, handshakes, unaccepted};
pub use uring::refused as rings;

use crate::bpf::events::SockRec;
use crate::bpf::iter::{Detail, File, Files, Iterators, Scope, Tasks};
use crate::capture::contents::Contents;
use crate::capture::restart::Now;
use crate::capture::view::View;
use crate::model::frozen::{FdEntry, FilesTable, OpenFile};
use crate::model::ids::{Fd, FilesId, OfdId};
use crate::model::map::Set;
use borrow::Lender;
use describe::Reader;
use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

/// Hands out page slots of an image, each once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slots(u64);

impl Slots {
    /// Starts behind the slots already in use.
    #[must_use]
    pub fn from(next: u64) -> Self {
        Self(next)
    }

    /// Takes `pages` slots in a row; gives the first.
    pub fn take(&mut self, pages: u64) -> u64 {
        let first = self.0;
        self.0 += pages;
        first
    }

    /// Slots handed out so far.
    #[must_use]
    pub fn used(self) -> u64 {
        self.0
    }
}

/// Connections in repair mode. Unless they are given up, dropping this lets
/// every one of them talk again.
#[derive(Debug, Default)]
pub struct Repaired(Vec<socket::Connection>);

impl Repaired {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Has one of them talk again.
    fn leave(&mut self, sock: u64) {
        for connection in self.0.extract_if(.., |connection| connection.sock == sock) {
            socket::undo(&connection);
        }
    }

    /// Leaves them in repair mode: the application is about to be killed, and a
    /// connection that is closed in repair mode sends nothing (tcp_close()).
    #[must_use]
    pub fn give_up(mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.0)
            .into_iter()
            .map(|connection| connection.from.fd)
            .collect()
    }
}

impl Drop for Repaired {
    fn drop(&mut self) {
        for connection in &self.0 {
            socket::undo(connection);
        }
    }
}

/// What the descriptors of an application refer to.
#[derive(Debug, Default)]
pub struct FrozenFiles {
    /// Descriptor tables.
    pub files: BTreeMap<FilesId, FilesTable>,
    /// Open file descriptions, those in flight over Unix sockets included.
    pub ofds: BTreeMap<OfdId, OpenFile>,
    /// TCP connections, silent until this is dropped.
    pub repaired: Repaired,
}

/// Frozen processes with what they have open.
#[derive(Clone, Copy, Debug)]
pub(in crate::capture) struct Still<'a> {
    /// The iterators' pass over what is open.
    pub found: &'a Files,
    /// Theirs over the processes.
    pub tasks: &'a Tasks,
    /// Which processes these are.
    pub scope: Scope,
    /// What the clocks showed when they stopped.
    pub now: &'a Now,
    /// Where names lead.
    pub view: &'a View,
}

/// Whether packets come while files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::capture) enum Network {
    /// None do: the network lock drops them.
    Silent,
    /// They do, and are answered.
    Talking,
}

/// How often connections are read that something has arrived for meanwhile. With their application
/// frozen, peers have soon said what they can without an answer.
const READINGS: usize = 8;

/// Reads the open files of frozen processes. Returns `None` if the network talks, and what comes
/// does not cease, or waits to be accepted: with the network silent they can be read.
///
/// `alike` is prepared for the kinds of their sockets. Bytes that no filesystem keeps are noted in
/// `contents`. On an error everything borrowed is given back and every connection left as it was.
///
/// # Errors
/// Something is not carried, or a system call fails.
pub(in crate::capture) fn collect(
    still: Still<'_>,
    iterators: &mut Iterators,
    contents: &mut Contents,
    alike: &mut Alike,
    network: Network,
) -> Result<Option<FrozenFiles>, CollectError> {
    let Still {
        found,
        tasks,
        scope,
        ..
    } = still;
    let talking = network == Network::Talking;
    let awaits = |file| accept::unaccepted(file).is_some();
    if talking && (found.files.iter().any(awaits) || handshakes(found)) {
        return Ok(None);
    }
    let queues = accept::Queues::read(found, tasks, scope, iterators)?;
    let any = connections(found).next().is_some();
    let mut look = || match any {
        true => iterators.tcp_connections(scope, &tasks.processes),
        false => Ok(Vec::new()),
    };
    let mut reader = Reader::new(still, contents, alike, queues, look()?);
    for file in &found.files {
        reader.describe(file)?;
    }
    let mut readings = 1;
    while talking && reader.read_moved(found, look()?)? {
        if readings == READINGS {
            return Ok(None);
        }
        readings += 1;
    }
    if talking && reader.has_in_flight() {
        // A connection may be among them, which no pass tells of.
        return Ok(None);
    }
    reader.describe_in_flight(iterators)?;
    reader.describe_ended(iterators)?;
    reader.check_pipes()?;
    reader.check_terminals()?;
    reader.check_mqueues()?;
    let mut frozen = reader.finish();
    frozen.files = tables(found);
    Ok(Some(frozen))
}

/// The TCP connections among descriptors.
fn connections(found: &Files) -> impl Iterator<Item = (&File, &SockRec)> {
    found.files.iter().filter_map(|file| match &file.detail {
        Detail::Socket(rec) if socket::is_connection(rec) => Some((file, &**rec)),
        _ => None,
    })
}

/// Puts the other connections of frozen processes into repair mode, too. To be called before they
/// are killed: a connection that is closed in repair mode sends nothing.
///
/// # Errors
/// A system call fails. Those that it was done with are in `repaired`.
pub(in crate::capture) fn silence(
    found: &Files,
    repaired: &mut Repaired,
) -> Result<(), CollectError> {
    let mut done: Set<u64> = repaired.0.iter().map(|done| done.sock).collect();
    let mut lender = Lender::default();
    for (file, rec) in connections(found) {
        if done.insert(rec.sock) {
            let from = lender.borrow(file)?;
            repaired.0.push(socket::silence(from, rec)?);
        }
    }
    Ok(())
}

fn tables(found: &Files) -> BTreeMap<FilesId, FilesTable> {
    let mut tables: BTreeMap<FilesId, FilesTable> = BTreeMap::new();
    for file in &found.files {
        let entry = FdEntry {
            fd: Fd(file.rec.fd.cast_signed()),
            ofd: OfdId(file.rec.file),
            cloexec: file.rec.cloexec != 0,
        };
        let table = tables.entry(FilesId(file.rec.files)).or_default();
        table.fds.push(entry);
    }
    for table in tables.values_mut() {
        // In ascending order, once for each process that shares the table.
        table.fds.sort_by_key(|entry| entry.fd);
        table.fds.dedup_by_key(|entry| entry.fd);
    }
    tables
}
