//! The live state of the tracked applications.
//!
//! Values only; `apply` changes them. Everything is keyed by the identity the
//! kernel gives it, and each object says whether it is known to be right.

use super::event::{FileKind, FsInfo, Ids, OfdInfo, Owner, SockInfo, Vma, Watch};
use super::ids::{
    CgroupId, Fd, FilesId, FsId, GroupId, InodeId, MmId, OfdId, Pid, SockId, TaskId, Tid,
};
use super::index::Index;
use super::map::Map;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// All that is known.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    /// Number of the last event applied.
    pub seq: u64,
    /// Threads.
    pub tasks: Map<TaskId, Task>,
    /// Descriptor tables.
    pub tables: Map<FilesId, Table>,
    /// Open file descriptions that some descriptor refers to, or did lately.
    pub ofds: Map<OfdId, Box<Ofd>>,
    /// Names of files, as /proc/PID/fd shows them: the path when it was last looked at, with
    /// ` (deleted)` behind it if there was none any more, or `/memfd:` and the name given. Short
    /// lived files have none here.
    pub names: Map<OfdId, Box<[u8]>>,
    /// Sockets that some description holds.
    pub sockets: Map<SockId, Box<Socket>>,
    /// Epoll instances that some descriptor refers to.
    pub epolls: Map<OfdId, Epoll>,
    /// Inotify instances that some description holds.
    pub inotifies: Map<GroupId, Inotify>,
    /// Address spaces.
    pub mms: Map<MmId, Mm>,
    /// Directories and umasks.
    pub fss: Map<FsId, Fs>,
    /// What is derived from these; [`State::reindex`] makes it where they came from elsewhere.
    #[serde(skip)]
    pub index: Index,
}

/// The objects decide.
impl PartialEq for State {
    fn eq(&self, other: &Self) -> bool {
        let Self {
            seq,
            tasks,
            tables,
            ofds,
            names,
            sockets,
            epolls,
            inotifies,
            mms,
            fss,
            index: _,
        } = self;
        *seq == other.seq
            && *tasks == other.tasks
            && *tables == other.tables
            && *ofds == other.ofds
            && *names == other.names
            && *sockets == other.sockets
            && *epolls == other.epolls
            && *inotifies == other.inotifies
            && *mms == other.mms
            && *fss == other.fss
    }
}

impl Eq for State {}

/// Whether an object is known to be as the kernel has it. Only the functions of `index` set it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Trust {
    /// Every change since it was made or read was seen.
    Verified,
    /// It must be read again before it is used.
    #[default]
    Suspect,
}

/// A thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// Generation: number of the last event that concerned it.
    pub seq: u64,
    /// Thread id.
    pub tid: Tid,
    /// Thread group.
    pub tgid: Pid,
    /// Real parent; `None` once it died, until the thread is read again.
    pub parent: Option<Pid>,
    /// Descriptor table; `None` once it exits.
    pub files: Option<FilesId>,
    /// Address space; `None` once it exits.
    pub mm: Option<MmId>,
    /// Cgroup.
    pub cgroup: CgroupId,
    /// Name.
    pub comm: String,
    /// Exited, not reaped yet.
    pub zombie: bool,
    /// Directories and umask; `None` once it exits, or before they were said.
    pub fs: Option<FsId>,
    /// Session, process group and credentials; `None` before they were said.
    pub ids: Option<Box<Ids>>,
}

/// A descriptor table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Table {
    /// Number of the event that made it; 0 if it was there before it was first seen.
    pub born: u64,
    /// Generation: number of the last event that concerned it.
    pub seq: u64,
    /// Whether all descriptors are right.
    pub trust: Trust,
    /// Threads that use it.
    pub users: BTreeSet<TaskId>,
    /// No thread used it when all were last read: a fork is under way, has failed, or the event
    /// of its end was lost.
    pub unused: bool,
    /// Descriptors.
    pub fds: BTreeMap<Fd, Slot>,
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Number of the last event about it, or that it was read at.
    pub seq: u64,
    /// What it refers to.
    pub ofd: OfdId,
    /// `FD_CLOEXEC`.
    pub cloexec: bool,
}

/// An open file description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ofd {
    /// Generation.
    pub seq: u64,
    /// Number of the last event that said which object it is, or that it was read at: its
    /// address is used again, and flags say nothing of that.
    pub told: u64,
    /// Descriptors that refer to it.
    pub refs: u32,
    /// Kind.
    pub kind: FileKind,
    /// Its inode.
    pub inode: InodeId,
    /// `st_mode`.
    pub mode: u32,
    /// `O_*` flags when it was last seen.
    pub flags: u32,
    /// Who gets its signals.
    pub owner: Owner,
    /// The socket, for sockets.
    pub sock: Option<SockId>,
    /// The watches, for inotify instances.
    pub group: Option<GroupId>,
}

impl Ofd {
    /// Whether it is what is said here, as far as identities tell.
    #[must_use]
    pub fn is(&self, info: &OfdInfo) -> bool {
        (self.kind, self.inode, self.sock, self.group)
            == (info.kind, info.inode, info.sock, info.group)
    }
}

/// A socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Socket {
    /// Generation.
    pub seq: u64,
    /// Whether `info` is right.
    pub trust: Trust,
    /// The description that holds it; its address may have been another socket's before.
    pub holder: OfdId,
    /// Its state.
    pub info: SockInfo,
}

/// An epoll instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoll {
    /// Generation.
    pub seq: u64,
    /// Whether all items are right.
    pub trust: Trust,
    /// Items by the description watched and the number it was added under.
    pub items: Map<(OfdId, Fd), EpollItem>,
}

/// An epoll item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollItem {
    /// Number of the last event about it, or that it was read at.
    pub seq: u64,
    /// `EPOLL*` bits; with `EPOLLONESHOT` the kernel disarms them without an event.
    pub events: u32,
    /// `epoll_data_t`.
    pub data: u64,
}

/// An address space.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mm {
    /// Generation.
    pub seq: u64,
    /// Whether `vmas` is what the kernel has.
    pub trust: Trust,
    /// Threads that use it.
    pub users: BTreeSet<TaskId>,
    /// Its mappings when it was last read, in order; `None` if it never was.
    pub vmas: Option<Vec<Vma>>,
}

/// Directories and umask, which threads may share (`CLONE_FS`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fs {
    /// Generation.
    pub seq: u64,
    /// Threads that use it.
    pub users: BTreeSet<TaskId>,
    /// What it is.
    pub info: FsInfo,
}

/// An inotify instance.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inotify {
    /// Generation.
    pub seq: u64,
    /// Whether all watches are right.
    pub trust: Trust,
    /// The description that holds it; its address may have been another instance's before.
    pub holder: OfdId,
    /// Watches by watch descriptor.
    pub watches: BTreeMap<i32, Watch>,
    /// Generation of which `paths` were asked for.
    pub named: u64,
    /// Paths of what is watched, when they were last looked at; of some, none can be found.
    pub paths: BTreeMap<i32, Box<[u8]>>,
}

impl State {
    /// The thread with this id.
    #[must_use]
    pub fn task_by_tid(&self, tid: Tid) -> Option<(TaskId, &Task)> {
        self.tasks
            .iter()
            .find(|(_, task)| task.tid == tid)
            .map(|(id, task)| (*id, task))
    }

    /// Thread groups, each with its threads.
    #[must_use]
    pub fn processes(&self) -> BTreeMap<Pid, Vec<(TaskId, &Task)>> {
        let mut processes = BTreeMap::<_, Vec<_>>::new();
        for (id, task) in &self.tasks {
            processes.entry(task.tgid).or_default().push((*id, task));
        }
        for threads in processes.values_mut() {
            threads.sort_unstable_by_key(|(id, _)| *id);
        }
        processes
    }
}
