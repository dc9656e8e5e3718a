//! What the kernel hooks report, decoded: identities and resulting state.
//!
//! An event says what *is* now, not what was called, so that applying one twice
//! or late leads to the same state. Events are applied in the order of their
//! number, which the BPF side takes from one counter at a point where the order
//! of any two events about one object is decided (HOOKS.md section 2).

use super::ids::{
    CgroupId, Fd, FilesId, FsId, GroupId, InodeId, MmId, OfdId, Pid, SockId, TaskId, Tid,
};
use serde::{Deserialize, Serialize};

/// One event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its number: 1 for the first event since the programs were loaded, without gaps.
    pub seq: u64,
    /// What happened.
    pub body: Body,
}

/// What an event says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// A thread exists (clone(2), or found in a cgroup that is tracked now).
    TaskNew(TaskInfo),
    /// execve(2) is past its point of no return.
    TaskExec(TaskInfo),
    /// A thread has another name: `PR_SET_NAME`, exec, a write to /proc.
    TaskRename {
        /// Thread.
        task: TaskId,
        /// Its new `comm`.
        comm: String,
    },
    /// A thread exits; it gives up its descriptors and memory and is a zombie until it is reaped.
    TaskExit {
        /// Thread.
        task: TaskId,
    },
    /// A thread was reaped.
    TaskRelease {
        /// Thread.
        task: TaskId,
    },
    /// Credentials, session, process group, directories or umask of a thread.
    TaskAttrs(Box<TaskAttrs>),
    /// A process moved to another cgroup.
    CgroupMove {
        /// Process.
        tgid: Pid,
        /// Where it is now.
        cgroup: CgroupId,
        /// Whether that cgroup is tracked.
        tracked: bool,
    },
    /// A thread uses another descriptor table now.
    TaskFiles {
        /// Thread.
        task: TaskId,
        /// The table.
        files: FilesId,
    },
    /// A thread begins to copy a descriptor table that others use. What they close from here
    /// on may be in the copy.
    FilesCopy {
        /// The thread that copies.
        by: TaskId,
    },
    /// All of the copy that a thread began has been said, or it failed.
    FilesCopied {
        /// The thread that copied.
        by: TaskId,
    },
    /// A descriptor table was made by copying another; its descriptors follow in `FilesWord`s.
    FilesNew {
        /// The new table.
        files: FilesId,
    },
    /// The fork that copied this table failed.
    FilesGone {
        /// The table.
        files: FilesId,
    },
    /// Up to 64 descriptors of a table that was just copied.
    FilesWord {
        /// The new table.
        files: FilesId,
        /// What they refer to.
        fds: Vec<(Fd, OfdId, bool)>,
    },
    /// A descriptor refers to this open file description now.
    FdInstall {
        /// Table.
        files: FilesId,
        /// Number.
        fd: Fd,
        /// `FD_CLOEXEC`.
        cloexec: bool,
        /// What it refers to.
        ofd: OfdInfo,
        /// The socket as it is, for sockets.
        socket: Option<Box<SockInfo>>,
    },
    /// A descriptor is free.
    FdClose {
        /// Table.
        files: FilesId,
        /// Number.
        fd: Fd,
    },
    /// `FD_CLOEXEC` of a descriptor, if it is open.
    FdCloexec {
        /// Table.
        files: FilesId,
        /// Number.
        fd: Fd,
        /// Its value.
        cloexec: bool,
    },
    /// `FD_CLOEXEC` of 64 descriptors, as far as they are open: close_range(2) with
    /// `CLOSE_RANGE_CLOEXEC` sets many at once.
    CloexecWord {
        /// Table.
        files: FilesId,
        /// First number.
        base: Fd,
        /// Bit 0 is that of `base`.
        bits: u64,
    },
    /// exec closed every descriptor with `FD_CLOEXEC`.
    ExecClose {
        /// Table.
        files: FilesId,
    },
    /// Resulting state of a socket.
    Socket(SockInfo),
    /// A TCP-like state change (`inet_sock_set_state`), or the other end of a Unix
    /// connection was shut.
    SocketState {
        /// Socket.
        sock: SockId,
        /// `TCP_*` (include/net/tcp_states.h).
        state: u8,
        /// Receive side 1, send side 2.
        shutdown: u8,
    },
    /// Status flags or the owner of an open file description.
    Ofd {
        /// Description.
        ofd: OfdId,
        /// `O_*`.
        flags: u32,
        /// Who gets its signals.
        owner: Owner,
    },
    /// An inotify watch exists with this mask.
    WatchSet {
        /// Instance.
        group: GroupId,
        /// Watch descriptor.
        wd: i32,
        /// What is watched, and for what.
        watch: Watch,
    },
    /// An inotify watch is gone.
    WatchDel {
        /// Instance.
        group: GroupId,
        /// Watch descriptor.
        wd: i32,
    },
    /// An epoll item exists with these values.
    EpollSet {
        /// Epoll instance.
        epoll: OfdId,
        /// Watched description.
        target: OfdId,
        /// Number it is watched under.
        fd: Fd,
        /// `EPOLL*` bits as the kernel keeps them.
        events: u32,
        /// `epoll_data_t`.
        data: u64,
    },
    /// An epoll item was removed, by epoll_ctl(2) or because the watched description dies.
    EpollDel {
        /// Epoll instance.
        epoll: OfdId,
        /// Watched description.
        target: OfdId,
        /// Number it was watched under.
        fd: Fd,
    },
    /// The object changed in a way that was not reported, or a report of it was lost.
    Stale(Object),
    /// A record that could not be decoded; counted, and nothing else is known of it.
    Malformed,
}

/// An object that can be suspect and read again by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Object {
    /// Threads: any may be missing, wrong or gone.
    Tasks,
    /// A descriptor table.
    Files(FilesId),
    /// An address space.
    Mm(MmId),
    /// An epoll instance.
    Epoll(OfdId),
    /// A socket.
    Socket(SockId),
    /// An inotify instance.
    Inotify(GroupId),
}

impl Object {
    /// The kind of object, in the plural, as status and metrics name it.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self {
            Self::Tasks => "tasks",
            Self::Files(_) => "tables",
            Self::Mm(_) => "address-spaces",
            Self::Epoll(_) => "epolls",
            Self::Socket(_) => "sockets",
            Self::Inotify(_) => "inotifies",
        }
    }
}

/// A thread as an event describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskInfo {
    /// Identity.
    pub task: TaskId,
    /// Thread id.
    pub tid: Tid,
    /// Thread group.
    pub tgid: Pid,
    /// Real parent's thread group.
    pub parent: Pid,
    /// Descriptor table; `None` for a thread that gave it up.
    pub files: Option<FilesId>,
    /// Address space; `None` for a thread that gave it up.
    pub mm: Option<MmId>,
    /// Cgroup.
    pub cgroup: CgroupId,
    /// Name.
    pub comm: String,
}

#[cfg(test)]
impl TaskInfo {
    /// The only thread of process 7, which has this table.
    pub(super) fn sample(files: FilesId) -> Self {
        Self {
            task: TaskId(64),
            tid: Tid(7),
            tgid: Pid(7),
            parent: Pid(1),
            files: Some(files),
            mm: Some(MmId(64)),
            cgroup: CgroupId(1),
            comm: "server".into(),
        }
    }
}

/// What of a thread must be restored and changes seldom.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskAttrs {
    /// Identity.
    pub task: TaskId,
    /// Its directories and umask; `None` for a thread that gave them up.
    pub fs: Option<(FsId, FsInfo)>,
    /// The rest.
    pub ids: Ids,
}

/// Directories and umask: chdir(2), chroot(2), umask(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsInfo {
    /// Working directory.
    pub cwd: InodeId,
    /// Root directory.
    pub root: InodeId,
    /// umask.
    pub umask: u32,
}

/// Session, process group and credentials (credentials(7)); user and group ids as the
/// initial user namespace counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ids {
    /// Session of the process.
    pub session: Pid,
    /// Process group of the process.
    pub group: Pid,
    /// Real, effective, saved and filesystem user id.
    pub uids: [u32; 4],
    /// Real, effective, saved and filesystem group id.
    pub gids: [u32; 4],
    /// Inheritable, permitted, effective, bounding and ambient capabilities.
    pub caps: [u64; 5],
    /// `SECBIT_*`.
    pub securebits: u32,
}

/// Who is told of readiness by a signal: `F_SETOWN`, `F_SETSIG`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Id of the thread, process or group; 0 for nobody.
    pub pid: i32,
    /// 0 thread, 1 process, 2 process group.
    pub kind: u32,
    /// Signal; 0 is SIGIO.
    pub signal: i32,
}

/// What an inotify watch watches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Inode.
    pub inode: InodeId,
    /// `IN_*`, with bits of the kernel's own.
    pub mask: u32,
}

/// A mapping.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vma {
    /// First byte.
    pub start: u64,
    /// Behind the last byte.
    pub end: u64,
    /// `VM_*`.
    pub flags: u64,
    /// Offset in the file in pages.
    pub pgoff: u64,
    /// The file; zero for none.
    pub inode: InodeId,
}

/// What an open file description is.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
#[allow(missing_docs)]
pub enum FileKind {
    /// Not known: only the address was seen.
    #[default]
    Unknown,
    /// A kind without a name of its own here.
    Other,
    Regular,
    Directory,
    CharDevice,
    BlockDevice,
    Symlink,
    Fifo,
    Pipe,
    Socket,
    Eventfd,
    Epoll,
    Timerfd,
    Signalfd,
    Inotify,
    Fanotify,
    Pidfd,
    Memfd,
    IoUring,
    Userfaultfd,
    PerfEvent,
    Bpf,
    Mqueue,
    Namespace,
}

/// An open file description as an event describes it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfdInfo {
    /// Identity.
    pub id: OfdId,
    /// Kind.
    pub kind: FileKind,
    /// Its inode; for anonymous kinds the one they all share.
    pub inode: InodeId,
    /// `st_mode`.
    pub mode: u32,
    /// `O_*` flags when it was last seen (status flags change without events).
    pub flags: u32,
    /// Who gets its signals.
    pub owner: Owner,
    /// The socket, for sockets.
    pub sock: Option<SockId>,
    /// The watches, for inotify instances.
    pub group: Option<GroupId>,
    /// Just made, or an epoll instance without items, an inotify instance without watches. A
    /// reading never says so.
    pub empty: bool,
}

/// A socket as an event describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SockInfo {
    /// Identity.
    pub sock: SockId,
    /// Inode number in sockfs.
    pub ino: u64,
    /// `AF_*`.
    pub family: u16,
    /// `SOCK_*`.
    pub kind: u16,
    /// `IPPROTO_*`.
    pub protocol: u16,
    /// `TCP_*`, also for Unix sockets.
    pub state: u8,
    /// Receive side 1, send side 2.
    pub shutdown: u8,
    /// Local port; 0 if none.
    pub local_port: u16,
    /// Remote port; 0 if none.
    pub remote_port: u16,
    /// Local address in network order; IPv4 in the first four bytes.
    pub local_addr: [u8; 16],
    /// Remote address, same form.
    pub remote_addr: [u8; 16],
    /// The socket at the other end of a Unix connection.
    pub peer: Option<SockId>,
    /// Name of a Unix socket; starts with NUL if abstract.
    pub name: Vec<u8>,
    /// What was set.
    pub options: SockOptions,
}

/// What setsockopt(2) set and listen(2) was told, as the kernel keeps it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct SockOptions {
    /// Jiffies; `LONG_MAX` for none.
    pub rcvtimeo: u64,
    pub sndtimeo: u64,
    /// `sock_flag` of `bpf/events.h`, and bits of the kernel's `sk_flags` above them.
    pub flags: u32,
    pub bound_ifindex: u32,
    pub mark: u32,
    pub priority: u32,
    /// 0 while the kernel sizes the buffer by itself.
    pub rcvbuf: u32,
    pub sndbuf: u32,
    pub rcvlowat: u32,
    /// Jiffies.
    pub linger: u32,
    /// As listen(2) was told.
    pub backlog: u32,
    /// Jiffies; 0 is the system's default.
    pub keepidle: u32,
    pub keepintvl: u32,
    pub keepcnt: u8,
    /// Milliseconds.
    pub user_timeout: u32,
    pub tos: u8,
    pub ttl: u8,
    /// `TCP_NAGLE_*`.
    pub nonagle: u8,
    pub tclass: u8,
    /// All bits are set for the system's default.
    pub hops: u8,
    /// `sock_more` of `bpf/events.h`.
    pub more: u8,
    /// Retransmissions.
    pub defer_accept: u8,
    pub notsent_lowat: u32,
    /// Name of the algorithm, filled up with zeroes.
    pub congestion: [u8; 16],
}
