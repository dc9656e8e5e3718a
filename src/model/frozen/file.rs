//! Descriptor tables and open file descriptions.

use super::{ContentId, FileIdentity, IoUring, MqueueState, PathRef, PtyState, Socket};
use crate::model::ids::{Fd, InodeId, OfdId, Pid};
use serde::{Deserialize, Serialize};

/// One descriptor table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesTable {
    /// Descriptors in ascending order.
    pub fds: Vec<FdEntry>,
}

/// Whether a field goes without saying. There may be very many descriptors: to encode and to
/// decode what is said of each takes longer than to make it.
fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// One descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FdEntry {
    /// Number.
    pub fd: Fd,
    /// What it refers to.
    pub ofd: OfdId,
    /// `FD_CLOEXEC`.
    #[serde(default, skip_serializing_if = "is_default")]
    pub cloexec: bool,
}

/// One open file description.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OpenFile {
    /// `F_GETFL` flags: access mode and status flags.
    pub flags: u32,
    /// File offset in bytes.
    #[serde(default, skip_serializing_if = "is_default")]
    pub pos: u64,
    /// `F_SETOWN`/`F_SETSIG`, when set.
    #[serde(default, skip_serializing_if = "is_default")]
    pub owner: Option<FileOwner>,
    /// flock(2) and fcntl(2) locks held through it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub locks: Vec<FileLock>,
    /// fcntl(2) lease held through it.
    #[serde(default, skip_serializing_if = "is_default")]
    pub lease: Option<Lease>,
    /// How it will be used.
    #[serde(default, skip_serializing_if = "is_default")]
    pub hints: FileHints,
    /// What it is.
    pub kind: FileKind,
}

/// Who gets `SIGIO`, or what was chosen instead, of an open file description.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileOwner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// The id; 0 for nobody.
    pub id: i32,
    /// `F_SETSIG` value; 0 = `SIGIO`.
    pub signal: i32,
}

/// What the kernel was told of how a regular file will be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHints {
    /// `POSIX_FADV_SEQUENTIAL`.
    pub sequential: bool,
    /// `POSIX_FADV_RANDOM`, which does not undo the former.
    pub random: bool,
    /// `POSIX_FADV_NOREUSE`.
    pub noreuse: bool,
    /// `F_SET_RW_HINT`, of the file itself: `RWH_WRITE_LIFE_*`.
    pub write_life: u8,
}

/// A lock on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    /// Which family.
    pub kind: LockKind,
    /// Exclusive rather than shared.
    pub exclusive: bool,
    /// First byte.
    pub start: u64,
    /// Length in bytes, 0 = to the end of the file.
    pub len: u64,
    /// Process that holds a POSIX lock.
    pub pid: Pid,
}

/// A lease on a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// `F_WRLCK` rather than `F_RDLCK`.
    pub exclusive: bool,
    /// Process that took it.
    pub pid: Pid,
    /// Its descriptor, which the signal names when the lease is broken.
    pub fd: Fd,
}

/// Lock families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// flock(2).
    Flock,
    /// fcntl(2) `F_SETLK`.
    Posix,
    /// fcntl(2) `F_OFD_SETLK`.
    Ofd,
}

/// The kinds of open file descriptions that are carried.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file on a filesystem. On a pseudo filesystem its inode number and size are 0:
    /// its name is all that identifies it.
    Regular(FileIdentity),
    /// A directory.
    Directory(PathRef),
    /// A character device without state of its own: null, zero, full, random, urandom.
    CharDevice {
        /// Its name.
        at: PathRef,
        /// `MKDEV(major, minor)` of the device.
        rdev: u32,
    },
    /// A memfd or a deleted file.
    Content(ContentId),
    /// One end of a pipe; ends with one id belong together.
    Pipe {
        /// Inode number of the pipe.
        id: u64,
        /// The queue, carried by the first end in order of `OfdId` only.
        state: Option<PipeState>,
    },
    /// A named FIFO; as a pipe.
    Fifo {
        /// Its name.
        at: PathRef,
        /// Queue, as for a pipe.
        state: Option<PipeState>,
    },
    /// One end of a pseudo-terminal; ends with one id belong together.
    Pty {
        /// The kernel's address of the terminal.
        id: u64,
        /// The master rather than a slave.
        master: bool,
        /// Its name: `/dev/ptmx`, or `/dev/pts/N`.
        at: PathRef,
        /// The terminal, carried by the first end in order of discovery only.
        state: Option<Box<PtyState>>,
    },
    /// eventfd(2).
    Eventfd {
        /// Counter.
        #[serde(default, skip_serializing_if = "is_default")]
        count: u64,
        /// `EFD_SEMAPHORE`.
        #[serde(default, skip_serializing_if = "is_default")]
        semaphore: bool,
    },
    /// timerfd_create(2).
    Timerfd(Timerfd),
    /// signalfd(2) with its mask.
    Signalfd {
        /// Signals it reads.
        mask: u64,
    },
    /// epoll_create(2) with its interest list.
    Epoll {
        /// Items in the order they are added.
        items: Vec<EpollItem>,
        /// `EPIOCSPARAMS`, unless it was not used.
        #[serde(default, skip_serializing_if = "is_default")]
        busy_poll: Option<BusyPoll>,
    },
    /// inotify_init(2) with its watches.
    Inotify {
        /// Watches in ascending order of their descriptor.
        watches: Vec<InotifyWatch>,
    },
    /// fanotify_init(2) with its marks.
    Fanotify(Box<Fanotify>),
    /// pidfd_open(2) of a process of the same application.
    Pidfd {
        /// The process.
        pid: Pid,
    },
    /// A socket.
    Socket(Box<Socket>),
    /// io_uring_setup(2).
    IoUring(Box<IoUring>),
    /// A file of pressure stall information (/proc/pressure, cgroup v2) with a trigger.
    Pressure {
        /// Its name.
        at: PathRef,
        /// What was written to it.
        trigger: PressureTrigger,
    },
    /// A POSIX message queue; descriptions with one id are of one queue.
    Mqueue {
        /// The kernel's address of the queue.
        id: u64,
        /// The queue, carried by the first description in order of discovery only.
        state: Option<Box<MqueueState>>,
    },
}

/// Names one pipe of an application. Inode numbers alone do not: those of FIFOs are their
/// filesystems' own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PipeId {
    /// pipe(2): its inode number on the kernel's own filesystem of pipes.
    Anonymous(u64),
    /// A FIFO.
    Fifo(InodeId),
}

impl FileKind {
    /// The pipe that this is an end of.
    #[must_use]
    pub fn pipe(&self) -> Option<PipeId> {
        match self {
            Self::Pipe { id, .. } => Some(PipeId::Anonymous(*id)),
            Self::Fifo { at, .. } => Some(PipeId::Fifo(at.inode)),
            _ => None,
        }
    }
}

/// The process that a file of procfs belongs to (`/proc/PID/...`): it can be opened only once
/// that process exists.
#[must_use]
pub fn proc_owner(path: &[u8]) -> Option<Pid> {
    let rest = path.strip_prefix(b"/proc/")?;
    let end = rest.iter().position(|byte| *byte == b'/');
    let number = std::str::from_utf8(&rest[..end.unwrap_or(rest.len())]).ok()?;
    number.parse().ok().filter(|pid| *pid > 0).map(Pid)
}

/// What a pipe holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PipeState {
    /// `F_GETPIPE_SZ`, bytes.
    pub capacity: u32,
    /// Bytes written and not yet read. In packet mode (`O_DIRECT`) one entry a packet, else one entry.
    pub packets: Vec<serde_bytes::ByteBuf>,
}

/// timerfd state; times in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timerfd {
    /// `CLOCK_*`.
    pub clock: i32,
    /// `TFD_TIMER_*` flags of the last timerfd_settime(2).
    pub settime_flags: i32,
    /// Time left; 0 = not armed.
    pub remaining: u64,
    /// Period.
    pub interval: u64,
    /// Expirations not yet read.
    pub ticks: u64,
}

/// When a process is told of pressure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PressureTrigger {
    /// Of all tasks at once rather than of some.
    pub full: bool,
    /// Time stalled within a window, microseconds.
    pub threshold: u64,
    /// Length of a window, microseconds.
    pub window: u64,
}

/// How an epoll instance polls devices (`struct epoll_params`, since Linux 6.9).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BusyPoll {
    /// For how long, microseconds.
    pub usecs: u32,
    /// Packets at once.
    pub budget: u16,
    /// In place of interrupts.
    pub prefer: bool,
}

/// One item of an epoll interest list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollItem {
    /// Descriptor number it was added under.
    pub fd: Fd,
    /// The description it watches (which the number may no longer name).
    pub ofd: OfdId,
    /// `EPOLL*` bits, `EPOLLONESHOT` disarm state included.
    pub events: u32,
    /// `epoll_data_t`.
    pub data: u64,
}

/// One inotify watch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyWatch {
    /// Watch descriptor.
    pub wd: i32,
    /// `IN_*`.
    pub mask: u32,
    /// What is watched.
    pub at: PathRef,
}

/// A fanotify group.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fanotify {
    /// `FAN_*` flags of fanotify_init(2).
    pub flags: u32,
    /// `O_*` of the files that its events open.
    pub event_flags: u32,
    /// Made by who was not privileged (`CAP_SYS_ADMIN`), and told less.
    pub unprivileged: bool,
    /// Its marks.
    pub marks: Vec<FanotifyMark>,
}

/// One mark of a fanotify group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FanotifyMark {
    /// What is marked of what `at` names.
    pub on: MarkOn,
    /// A file; of a mount where it is, of a filesystem one of its mounts.
    pub at: PathRef,
    /// Events.
    pub mask: u32,
    /// Events that are left out.
    pub ignored: u32,
    /// `FAN_MARK_IGNORED_SURV_MODIFY`, `FAN_MARK_EVICTABLE`, `FAN_MARK_IGNORE`.
    pub flags: u32,
}

/// What a fanotify mark is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MarkOn {
    /// An inode.
    Inode,
    /// A mount.
    Mount,
    /// A filesystem.
    Filesystem,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_process_are_told_from_others() {
        let owner = |path: &str| proc_owner(path.as_bytes());
        assert_eq!(owner("/proc/77/stat"), Some(Pid(77)));
        assert_eq!(owner("/proc/77"), Some(Pid(77)));
        for other in [
            "/proc/meminfo",
            "/proc",
            "/proc/-1/stat",
            "/tmp/proc/7",
            "/proc/0/x",
        ] {
            assert_eq!(owner(other), None, "{other}");
        }
    }
}
