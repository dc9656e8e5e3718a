//! What is not carried, named before anything is frozen.

use super::borrow::place;
use super::owner::Owners;
use super::pidfd::Processes;
use super::unix_accept::Meetings;
use super::{accept, fanotify, lease, mqueue, pseudo, pty, regular, socket, unix, uring};
use crate::bpf::events::{
    FileHint, FileKind as Kind, LockClass, LockRec, MqueueRec, SockRec, TtyRec,
};
use crate::bpf::iter::{Detail, File, Files, Tasks};
use crate::capture::huge;
use crate::model::frozen::Blocker;
use crate::model::ids::OfdId;
use crate::model::map::{Map, Set};

/// Character devices without state of their own: (major, minor) of Linux'
/// devices.txt: null, zero, full, random, urandom.
const STATELESS: &[(u32, u32)] = &[(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

/// `O_PATH` descriptors carry no state but their path.
pub(super) const O_PATH: u32 = 0o10_000_000;

/// Every open file that keeps the application from being checkpointed.
#[must_use]
pub fn blockers(found: &Files, tasks: &Tasks) -> Vec<Blocker> {
    let survey = Survey::of(found, tasks);
    found
        .files
        .iter()
        .filter_map(|file| survey.refusal(file))
        .collect()
}

/// Listeners of a frozen application with connections that it has not accepted, for this reason
/// why whoever restores it cannot make them again.
#[must_use]
pub fn unaccepted(found: &Files, reason: &str) -> Vec<Blocker> {
    let blocker = |file: &File| {
        let connections = accept::unaccepted(file)?.ack_backlog;
        let (pid, fd) = place(file);
        Some(Blocker {
            pid,
            fd: Some(fd),
            object: "TCP listener".to_owned(),
            reason: format!("it has {connections} connections that were not accepted: {reason}"),
        })
    };
    found.files.iter().filter_map(blocker).collect()
}

/// Whether some TCP handshake is under way: its connection would be one to accept.
#[must_use]
pub fn handshakes(found: &Files) -> bool {
    found.files.iter().any(|file| match &file.detail {
        Detail::Socket(sock) => sock.syn_backlog > 0,
        _ => false,
    })
}

/// What one pass tells about relations between open files.
pub(super) struct Survey {
    /// Which description each `struct sock` belongs to.
    pub sockets: Map<u64, OfdId>,
    pub meetings: Meetings,
    /// Readers and writers of each pipe within the application.
    pipes: Map<u64, (u32, u32)>,
    /// Ends of each pseudo-terminal within the application.
    terminals: Map<u64, pty::Ends>,
    /// Processes with open files.
    pids: Set<u32>,
    /// Some Unix socket has descriptors in flight, which no table shows.
    in_flight: bool,
    pub processes: Processes,
    pub owners: Owners,
    /// Why a file is not carried for a lock taken through it.
    locked: Map<u64, String>,
    /// epoll sets that watch a file which is open nowhere in the application.
    strays: Map<u64, u32>,
    queues: mqueue::Queues,
}

impl Survey {
    /// Goes through a pass once.
    pub fn of(found: &Files, tasks: &Tasks) -> Self {
        let processes = Processes::of(tasks);
        let tables: Set<u64> = found.files.iter().map(|file| file.rec.files).collect();
        let places = lease::Places::of(found);
        let reason = |lock: &LockRec| {
            let reason = match lock.class {
                LockClass::LEASE => lease::refusal(lock, &places),
                _ => lock_refusal(lock, &tables, &processes),
            };
            Some((lock.file, reason?))
        };
        let locked = found.locks.iter().filter_map(reason).collect();
        let mut survey = Self {
            owners: Owners::of(tasks, &processes),
            processes,
            locked,
            sockets: Map::default(),
            meetings: Meetings::of(found),
            pipes: Map::default(),
            terminals: Map::default(),
            pids: found.files.iter().map(|file| file.rec.tgid).collect(),
            in_flight: false,
            strays: Map::default(),
            queues: mqueue::Queues::of(found),
        };
        let mut open = Set::default();
        for file in &found.files {
            if !open.insert(file.rec.file) {
                continue;
            }
            match &file.detail {
                Detail::Socket(sock) => {
                    survey.sockets.insert(sock.sock, OfdId(file.rec.file));
                    survey.in_flight |= sock.inflight > 0;
                }
                Detail::Pipe(pipe) => {
                    // A description opened O_RDWR counts as a reader and as a writer.
                    let access = file.rec.flags & 3;
                    let (readers, writers) = survey.pipes.entry(pipe.pipe).or_default();
                    *readers += u32::from(access != 1);
                    *writers += u32::from(access != 0);
                }
                Detail::Tty(tty) => survey
                    .terminals
                    .entry(tty.master.tty)
                    .or_default()
                    .add(tty.is_master != 0),
                _ => {}
            }
        }
        survey.strays = found
            .epoll_items
            .iter()
            .filter(|item| !open.contains(&item.target))
            .map(|item| (item.epoll, item.fd))
            .collect();
        survey
    }

    /// Why one open file is not carried; `None` when it is.
    pub fn refusal(&self, file: &File) -> Option<Blocker> {
        let (pid, fd) = place(file);
        let blocked = |object: String, reason: String| Blocker {
            pid,
            fd: Some(fd),
            object,
            reason,
        };
        let rec = &file.rec;
        let not_yet = |object: String| {
            Some(blocked(
                object,
                "it is not carried yet; close it before the update".to_owned(),
            ))
        };
        if let Some(reason) = self.locked.get(&rec.file) {
            return Some(blocked(format!("file {}", rec.name()), reason.clone()));
        }
        if let Some(reason) = self.owners.refusal(rec, &self.processes) {
            return Some(blocked(format!("file {}", rec.name()), reason));
        }
        if rec.hints & FileHint::NOTIFY != 0 {
            return not_yet(format!("directory {} watched by F_NOTIFY", rec.name()));
        }
        if rec.hints & FileHint::WRITE_ERROR != 0 && rec.flags & O_PATH == 0 {
            let object = format!("file {}", rec.name());
            return Some(blocked(object, UNREPORTED.to_owned()));
        }
        match rec.kind {
            Kind::REGULAR if rec.nlink == 0 && rec.flags & O_PATH != 0 => {
                not_yet("O_PATH descriptor of a deleted file".into())
            }
            Kind::REGULAR | Kind::DIRECTORY if pseudo::is_pseudo(rec.magic) => {
                // One that cannot be read any more has been closed.
                let path = regular::name(file).ok()?;
                pseudo::refusal(&path, rec).map(|reason| {
                    blocked(
                        String::from_utf8_lossy(&path).into_owned(),
                        reason.to_owned(),
                    )
                })
            }
            Kind::REGULAR if huge::is_magic(rec.magic) => {
                not_yet(format!("file {} on hugetlbfs", rec.name()))
            }
            Kind::DIRECTORY if rec.nlink == 0 => not_yet("deleted directory".into()),
            Kind::REGULAR
            | Kind::DIRECTORY
            | Kind::EVENTFD
            | Kind::TIMERFD
            | Kind::SIGNALFD
            | Kind::MEMFD => None,
            Kind::INOTIFY => (rec.hints & FileHint::EVENTS != 0).then(|| {
                blocked(
                    "inotify".into(),
                    "events that it has not read yet are not carried; try again".into(),
                )
            }),
            Kind::FANOTIFY => {
                fanotify::refusal(file).map(|reason| blocked("fanotify".into(), reason))
            }
            Kind::CHAR_DEVICE => {
                let (major, minor) = (rec.rdev >> 20, rec.rdev & 0xf_ffff);
                if STATELESS.contains(&(major, minor)) {
                    return None;
                }
                if let Detail::Tty(tty) = &file.detail {
                    return self
                        .terminal_refusal(tty)
                        .map(|reason| blocked(pty::object(tty), reason));
                }
                not_yet(format!("character device {major}:{minor} ({})", rec.name()))
            }
            Kind::PIPE => self
                .pipe_refusal(file)
                .map(|reason| blocked("pipe".into(), reason)),
            Kind::FIFO => self
                .pipe_refusal(file)
                .map(|reason| blocked(format!("FIFO {}", rec.name()), reason)),
            Kind::EPOLL => self.strays.get(&rec.file).map(|number| {
                blocked(
                    "epoll".into(),
                    format!(
                        "it watches a file (added as descriptor {number}) that no process of \
                         the application has open; remove it from the set"
                    ),
                )
            }),
            Kind::MQUEUE => match &file.detail {
                Detail::Mqueue(queue) => self
                    .mqueue_refusal(queue)
                    .map(|reason| blocked(mqueue::object(queue), reason)),
                _ => not_yet(format!("POSIX message queue {}", rec.name())),
            },
            Kind::SOCKET => match &file.detail {
                Detail::Socket(sock) => socket::refusal(sock)
                    .or_else(|| self.unix_refusal(sock))
                    .map(|reason| blocked(format!("socket {}", sock.ino), reason)),
                _ => not_yet("socket".into()),
            },
            Kind::IO_URING => match &file.detail {
                Detail::Uring(ring) => {
                    uring::refusal(ring).map(|reason| blocked(uring::OBJECT.into(), reason))
                }
                _ => not_yet(uring::OBJECT.into()),
            },
            Kind::PIDFD => match &file.detail {
                Detail::Pidfd(pidfd) => self
                    .processes
                    .refusal(rec, pidfd)
                    .map(|reason| blocked("pidfd".into(), reason)),
                _ => not_yet("pidfd".into()),
            },
            kind => not_yet(kind_name(kind, &rec.name())),
        }
    }

    fn unix_refusal(&self, sock: &SockRec) -> Option<String> {
        let unix = i32::from(sock.family) == nix::libc::AF_UNIX;
        unix.then(|| unix::state(sock, &self.sockets, &self.meetings).err())
            .flatten()
    }

    fn terminal_refusal(&self, tty: &TtyRec) -> Option<String> {
        let ends = self.terminals.get(&tty.master.tty).copied();
        // An end may be in flight, as with pipes.
        let outside = || ends.unwrap_or_default().outside(tty);
        pty::refusal(tty, &self.pids).or_else(|| (!self.in_flight).then(outside).flatten())
    }

    fn mqueue_refusal(&self, queue: &MqueueRec) -> Option<String> {
        // It may be in flight, as with pipes.
        let outside = || self.queues.outside(queue);
        let of_notice = self.queues.notice_refusal(queue);
        of_notice.or_else(|| (!self.in_flight).then(outside).flatten())
    }

    /// Both ends must be the application's own: an end outside would lose its peer.
    fn pipe_refusal(&self, file: &File) -> Option<String> {
        let Detail::Pipe(pipe) = &file.detail else {
            return None;
        };
        // An end may be in flight; what is in flight is known once it is frozen and peeked at.
        if self.in_flight {
            return None;
        }
        let (readers, writers) = self.pipes.get(&pipe.pipe).copied().unwrap_or_default();
        (pipe.readers > readers || pipe.writers > writers).then(|| END_OUTSIDE.into())
    }
}

/// Why a file is not carried for a lock; `None` when it is.
fn lock_refusal(lock: &LockRec, tables: &Set<u64>, processes: &Processes) -> Option<String> {
    const FL_OFDLCK: u32 = 1024;
    match lock.class {
        // Such locks belong to the descriptor table, which others may share.
        LockClass::POSIX
            if lock.flags & FL_OFDLCK == 0
                && tables.contains(&lock.owner)
                && !processes.has(lock.pid) =>
        {
            Some(format!(
                "PID {}, which took a lock on it, is gone and others share its descriptor \
                 table; release the lock before the update",
                lock.pid
            ))
        }
        _ => None,
    }
}

/// Why a file is not carried of which something could not be written back: after the update
/// fsync(2) or msync(2) would say that all is well.
pub const UNREPORTED: &str = "what was written to it could not be written back, and the \
    application has not been told yet; have it call fsync(2) or close it";

/// Why a pipe with an end elsewhere is not carried.
pub(super) const END_OUTSIDE: &str =
    "another end is open outside the application; close it, or checkpoint both together";

fn kind_name(kind: u32, name: &str) -> String {
    match kind {
        Kind::BLOCK_DEVICE => format!("block device {name}"),
        Kind::USERFAULTFD => "userfaultfd".into(),
        Kind::PERF_EVENT => "perf event".into(),
        Kind::BPF => format!("BPF object {name}"),
        Kind::NAMESPACE => format!("namespace {name}"),
        _ => format!("file of unknown kind ({name})"),
    }
}
