//! Decodes the events of the tracking hooks: the only place that knows their layout.

mod encode;
#[cfg(test)]
mod tests;

pub use encode::encode;

use super::events::{self, EpollCtlEvent};
use super::events::{
    EventClass, EventKind, FdEvent, FileKind as Kind, InstallEvent, InstallSocketEvent, MoveEvent,
    ObjectEvent, OfdEvent, SockOpts, SockPart, SockStateEvent, SocketEvent, TaskAttrEvent,
    TaskEvent, WatchEvent, WordEvent,
};
use super::record::{Malformed, c_text};
use crate::model::event::{
    Body, Event, FileKind, FsInfo, Ids, Object, OfdInfo, Owner, SockInfo, SockOptions, TaskAttrs,
    TaskInfo, Vma, Watch,
};
use crate::model::ids::{
    CgroupId, Fd, FilesId, FsId, GroupId, InodeId, MmId, OfdId, Pid, SockId, TaskId, Tid,
};

/// Several event kinds share a layout, so the kind is checked where a layout is chosen.
macro_rules! events {
    ($($type:ty),+) => {$(
        // SAFETY: bindgen made the type from events.h, which allows integers and arrays of
        // them only, asserts sizes that leave no room for padding, and puts a rec_hdr first.
        unsafe impl Layout for $type {}
    )+};
}

/// An event layout.
///
/// # Safety
///
/// Valid for every bit pattern, no padding.
unsafe trait Layout: Copy {}

events!(
    TaskEvent,
    MoveEvent,
    InstallEvent,
    InstallSocketEvent,
    FdEvent,
    WordEvent,
    SocketEvent,
    SockStateEvent,
    EpollCtlEvent,
    TaskAttrEvent,
    OfdEvent,
    WatchEvent,
    ObjectEvent
);

/// Decodes one ring record; one that cannot be decoded still has its number if it
/// is long enough for one, else it is `Err`.
///
/// # Errors
///
/// The record has no room for an event header.
pub fn decode(bytes: &[u8]) -> Result<Event, Malformed> {
    let kind = word(bytes, 0);
    let size = word(bytes, 4);
    let torn = Malformed {
        kind,
        size,
        offset: 0,
    };
    let seq = bytes
        .get(8..)
        .and_then(|rest| rest.first_chunk::<8>())
        .ok_or(torn)?;
    let seq = u64::from_ne_bytes(*seq);
    // The kernel pads what a ring holds to eight bytes.
    let len = usize::try_from(size).unwrap_or(usize::MAX);
    let body = bytes
        .get(..len)
        .and_then(|bytes| body(kind, bytes))
        .unwrap_or(Body::Malformed);
    Ok(Event { seq, body })
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let chunk = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    chunk.map_or(0, |chunk| u32::from_ne_bytes(*chunk))
}

fn read<T: Layout>(bytes: &[u8]) -> Option<T> {
    // SAFETY: Layout promises that any bytes are a valid T, and there are exactly
    // size_of::<T>() of them; the read does not need alignment.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

fn body(kind: u32, bytes: &[u8]) -> Option<Body> {
    Some(match kind {
        EventKind::TASK_NEW => Body::TaskNew(task(&read(bytes)?)),
        EventKind::TASK_EXEC => Body::TaskExec(task(&read(bytes)?)),
        EventKind::TASK_RENAME => {
            let TaskInfo { task, comm, .. } = task(&read(bytes)?);
            Body::TaskRename { task, comm }
        }
        EventKind::TASK_EXIT => Body::TaskExit {
            task: task(&read(bytes)?).task,
        },
        EventKind::TASK_RELEASE => Body::TaskRelease {
            task: task(&read(bytes)?).task,
        },
        EventKind::TASK_FILES => {
            let TaskInfo { task, files, .. } = task(&read(bytes)?);
            Body::TaskFiles {
                task,
                files: files?,
            }
        }
        EventKind::CGROUP_MOVE => {
            let e: MoveEvent = read(bytes)?;
            Body::CgroupMove {
                tgid: Pid(e.tgid.cast_signed()),
                cgroup: CgroupId(e.cgroup),
                tracked: e.tracked != 0,
            }
        }
        EventKind::FILES_WORD => files_word(&read(bytes)?),
        EventKind::FD_INSTALL => install(&read(bytes)?, None),
        EventKind::FD_INSTALL_SOCKET => {
            let e: InstallSocketEvent = read(bytes)?;
            install(&e.install, Some(Box::new(socket(&e.socket))))
        }
        EventKind::FILES_NEW
        | EventKind::FILES_GONE
        | EventKind::FD_CLOSE
        | EventKind::FD_CLOEXEC
        | EventKind::CLOEXEC_WORD
        | EventKind::EXEC_CLOSE => descriptor(kind, &read(bytes)?),
        EventKind::SOCKET => {
            let e: SocketEvent = read(bytes)?;
            Body::Socket(socket(&e.socket))
        }
        EventKind::SOCKET_STATE => {
            let e: SockStateEvent = read(bytes)?;
            Body::SocketState {
                sock: SockId(e.sock),
                state: u8::try_from(e.state).ok()?,
                shutdown: u8::try_from(e.shutdown).ok()?,
            }
        }
        EventKind::TASK_ATTRS => Body::TaskAttrs(Box::new(attrs(&read(bytes)?))),
        EventKind::OFD => {
            let e: OfdEvent = read(bytes)?;
            Body::Ofd {
                ofd: OfdId(e.file),
                flags: e.flags,
                owner: Owner {
                    pid: e.owner_pid.cast_signed(),
                    kind: e.owner_type,
                    signal: e.owner_sig,
                },
            }
        }
        EventKind::WATCH_SET | EventKind::WATCH_DEL => watch_event(kind, &read(bytes)?),
        EventKind::EPOLL_SET | EventKind::EPOLL_DEL => epoll_ctl(kind, &read(bytes)?),
        EventKind::STALE => {
            let e: ObjectEvent = read(bytes)?;
            Body::Stale(object(e.class, e.object)?)
        }
        EventKind::FILES_COPY | EventKind::FILES_COPIED => {
            let e: ObjectEvent = read(bytes)?;
            let by = TaskId(e.object);
            if kind == EventKind::FILES_COPY {
                Body::FilesCopy { by }
            } else {
                Body::FilesCopied { by }
            }
        }
        _ => return None,
    })
}

/// The object an address names, by the class of the event that named it.
#[must_use]
pub fn object(class: u32, address: u64) -> Option<Object> {
    Some(match class {
        EventClass::TASK => Object::Tasks,
        EventClass::FILES => Object::Files(FilesId(address)),
        EventClass::SOCKET => Object::Socket(SockId(address)),
        EventClass::EPOLL => Object::Epoll(OfdId(address)),
        EventClass::MM => Object::Mm(MmId(address)),
        EventClass::INOTIFY => Object::Inotify(GroupId(address)),
        _ => return None,
    })
}

/// Names of the event classes, in the order of their numbers.
pub const CLASSES: [&str; EventClass::COUNT as usize] =
    ["task", "files", "socket", "epoll", "mm", "inotify"];

fn some(address: u64) -> Option<u64> {
    (address != 0).then_some(address)
}

fn task(e: &TaskEvent) -> TaskInfo {
    TaskInfo {
        task: TaskId(e.task),
        tid: Tid(e.tid.cast_signed()),
        tgid: Pid(e.tgid.cast_signed()),
        parent: Pid(e.ppid.cast_signed()),
        files: some(e.files).map(FilesId),
        mm: some(e.mm).map(MmId),
        cgroup: CgroupId(e.cgroup),
        comm: c_text(&e.comm),
    }
}

fn inode(dev: u32, ino: u64) -> InodeId {
    InodeId { dev, ino }
}

fn attrs(e: &TaskAttrEvent) -> TaskAttrs {
    let fs = FsInfo {
        cwd: inode(e.cwd_dev, e.cwd_ino),
        root: inode(e.root_dev, e.root_ino),
        umask: e.umask,
    };
    TaskAttrs {
        task: TaskId(e.task),
        fs: some(e.fs).map(|id| (FsId(id), fs)),
        ids: Ids {
            session: Pid(e.sid.cast_signed()),
            group: Pid(e.pgid.cast_signed()),
            uids: [e.uid, e.euid, e.suid, e.fsuid],
            gids: [e.gid, e.egid, e.sgid, e.fsgid],
            caps: [
                e.cap_inheritable,
                e.cap_permitted,
                e.cap_effective,
                e.cap_bset,
                e.cap_ambient,
            ],
            securebits: e.securebits,
        },
    }
}

fn watch_event(kind: u32, e: &WatchEvent) -> Body {
    let (group, wd) = (GroupId(e.group), e.wd);
    if kind == EventKind::WATCH_DEL {
        return Body::WatchDel { group, wd };
    }
    let watch = Watch {
        inode: inode(e.dev, e.ino),
        mask: e.mask,
    };
    Body::WatchSet { group, wd, watch }
}

fn install(e: &InstallEvent, socket: Option<Box<SockInfo>>) -> Body {
    let object = |kind| if e.kind == kind { some(e.object) } else { None };
    Body::FdInstall {
        files: FilesId(e.files),
        fd: Fd(e.fd.cast_signed()),
        cloexec: e.cloexec != 0,
        ofd: OfdInfo {
            id: OfdId(e.file),
            kind: file_kind(e.kind),
            inode: InodeId {
                dev: e.dev,
                ino: e.ino,
            },
            mode: e.mode,
            flags: e.flags,
            owner: Owner::default(),
            sock: object(Kind::SOCKET).map(SockId),
            group: object(Kind::INOTIFY).map(GroupId),
            empty: e.empty != 0,
        },
        socket,
    }
}

fn descriptor(kind: u32, e: &FdEvent) -> Body {
    let files = FilesId(e.files);
    let fd = Fd(e.fd.cast_signed());
    match kind {
        EventKind::FILES_NEW => Body::FilesNew { files },
        EventKind::FD_CLOSE => Body::FdClose { files, fd },
        EventKind::FD_CLOEXEC => Body::FdCloexec {
            files,
            fd,
            cloexec: e.cloexec != 0,
        },
        EventKind::EXEC_CLOSE => Body::ExecClose { files },
        EventKind::FILES_GONE => Body::FilesGone { files },
        _ => Body::CloexecWord {
            files,
            base: fd,
            bits: e.cloexec,
        },
    }
}

fn files_word(e: &WordEvent) -> Body {
    let base = e.base.cast_signed();
    let fds = (0..64)
        .zip(e.file)
        .filter(|(bit, file)| e.open >> bit & 1 != 0 && *file != 0);
    let fds = fds.map(|(bit, file)| {
        (
            Fd(base.saturating_add(bit)),
            OfdId(file),
            e.cloexec >> bit & 1 != 0,
        )
    });
    Body::FilesWord {
        files: FilesId(e.files),
        fds: fds.collect(),
    }
}

fn epoll_ctl(kind: u32, e: &EpollCtlEvent) -> Body {
    let (epoll, target, fd) = (OfdId(e.epoll), OfdId(e.target), Fd(e.fd.cast_signed()));
    if kind == EventKind::EPOLL_DEL {
        return Body::EpollDel { epoll, target, fd };
    }
    let (events, data) = (e.events, e.data);
    Body::EpollSet {
        epoll,
        target,
        fd,
        events,
        data,
    }
}

fn socket(e: &SockPart) -> SockInfo {
    let len = usize::try_from(e.path_len).map_or(e.path.len(), |len| len.min(e.path.len()));
    SockInfo {
        sock: SockId(e.sock),
        ino: e.ino,
        family: e.family,
        kind: e.type_,
        protocol: e.protocol,
        state: e.state,
        shutdown: e.shutdown,
        local_port: e.local_port,
        remote_port: e.remote_port,
        local_addr: e.local_addr,
        remote_addr: e.remote_addr,
        peer: some(e.peer).map(SockId),
        name: e.path[..len].iter().map(|c| c.to_ne_bytes()[0]).collect(),
        options: options(&e.opts),
    }
}

fn options(opts: &SockOpts) -> SockOptions {
    SockOptions {
        rcvtimeo: opts.rcvtimeo,
        sndtimeo: opts.sndtimeo,
        flags: opts.flags,
        bound_ifindex: opts.bound_ifindex,
        mark: opts.mark,
        priority: opts.priority,
        rcvbuf: opts.rcvbuf,
        sndbuf: opts.sndbuf,
        rcvlowat: opts.rcvlowat,
        linger: opts.linger,
        backlog: opts.backlog,
        keepidle: opts.keepidle,
        keepintvl: opts.keepintvl,
        keepcnt: opts.keepcnt,
        user_timeout: opts.user_timeout,
        tos: opts.tos,
        ttl: opts.ttl,
        nonagle: opts.nonagle,
        tclass: opts.tclass,
        hops: opts.hops,
        more: opts.more,
        defer_accept: opts.defer_accept,
        notsent_lowat: opts.notsent_lowat,
        congestion: opts.congestion.map(|c| c.to_ne_bytes()[0]),
    }
}

/// A socket as the iterators describe it.
#[must_use]
pub fn sock_info(rec: &events::SockRec) -> SockInfo {
    SockInfo {
        sock: SockId(rec.sock),
        ino: rec.ino,
        family: rec.family,
        kind: rec.type_,
        protocol: rec.protocol,
        state: rec.state,
        shutdown: rec.shutdown,
        local_port: rec.local_port,
        remote_port: rec.remote_port,
        local_addr: rec.local_addr,
        remote_addr: rec.remote_addr,
        peer: some(rec.peer).map(SockId),
        name: rec.unix_path(),
        options: options(&rec.opts),
    }
}

/// A thread as the iterators describe it, with its parent's PID.
#[must_use]
pub fn task_info(rec: &events::ThreadRec, parent: Pid) -> TaskInfo {
    TaskInfo {
        task: TaskId(rec.task),
        tid: Tid(rec.tid.cast_signed()),
        tgid: Pid(rec.tgid.cast_signed()),
        parent,
        files: some(rec.files).map(FilesId),
        mm: some(rec.mm).map(MmId),
        cgroup: CgroupId(rec.cgroup_id),
        comm: rec.comm(),
    }
}

/// The rest of a thread as the iterators describe it.
#[must_use]
pub fn task_attrs(rec: &events::ThreadRec, process: &events::ProcessRec) -> TaskAttrs {
    let fs = FsInfo {
        cwd: inode(rec.cwd_dev, rec.cwd_ino),
        root: inode(rec.root_dev, rec.root_ino),
        umask: rec.umask,
    };
    TaskAttrs {
        task: TaskId(rec.task),
        fs: some(rec.fs).map(|id| (FsId(id), fs)),
        ids: Ids {
            session: Pid(process.sid.cast_signed()),
            group: Pid(process.pgid.cast_signed()),
            uids: [rec.uid, rec.euid, rec.suid, rec.fsuid],
            gids: [rec.gid, rec.egid, rec.sgid, rec.fsgid],
            caps: [
                rec.cap_inheritable,
                rec.cap_permitted,
                rec.cap_effective,
                rec.cap_bset,
                rec.cap_ambient,
            ],
            securebits: rec.securebits,
        },
    }
}

/// A mapping as the iterators describe it.
#[must_use]
pub fn vma(rec: &events::VmaRec) -> Vma {
    Vma {
        start: rec.start,
        end: rec.end,
        flags: rec.flags,
        pgoff: rec.pgoff,
        inode: inode(rec.dev, rec.ino),
    }
}

/// An inotify watch as the iterators describe it.
#[must_use]
pub fn watch(rec: &events::WatchRec) -> (i32, Watch) {
    let watch = Watch {
        inode: inode(rec.dev, rec.ino),
        mask: rec.mask,
    };
    (rec.wd, watch)
}

/// A description as the iterators describe it; `sock` is its socket.
#[must_use]
pub fn ofd_info(rec: &events::FileRec, sock: Option<SockId>) -> OfdInfo {
    OfdInfo {
        id: OfdId(rec.file),
        kind: file_kind(rec.kind),
        inode: InodeId {
            dev: rec.dev,
            ino: rec.ino,
        },
        mode: rec.mode,
        flags: rec.flags,
        owner: Owner {
            pid: rec.owner_pid.cast_signed(),
            kind: rec.owner_type,
            signal: rec.owner_sig,
        },
        sock,
        group: (rec.kind == Kind::INOTIFY).then_some(GroupId(rec.private_data)),
        empty: false,
    }
}

/// A file kind of `events.h` as the model names it.
#[must_use]
pub fn file_kind(kind: u32) -> FileKind {
    match kind {
        Kind::REGULAR => FileKind::Regular,
        Kind::DIRECTORY => FileKind::Directory,
        Kind::CHAR_DEVICE => FileKind::CharDevice,
        Kind::BLOCK_DEVICE => FileKind::BlockDevice,
        Kind::SYMLINK => FileKind::Symlink,
        Kind::FIFO => FileKind::Fifo,
        Kind::PIPE => FileKind::Pipe,
        Kind::SOCKET => FileKind::Socket,
        Kind::EVENTFD => FileKind::Eventfd,
        Kind::EPOLL => FileKind::Epoll,
        Kind::TIMERFD => FileKind::Timerfd,
        Kind::SIGNALFD => FileKind::Signalfd,
        Kind::INOTIFY => FileKind::Inotify,
        Kind::FANOTIFY => FileKind::Fanotify,
        Kind::PIDFD => FileKind::Pidfd,
        Kind::MEMFD => FileKind::Memfd,
        Kind::IO_URING => FileKind::IoUring,
        Kind::USERFAULTFD => FileKind::Userfaultfd,
        Kind::PERF_EVENT => FileKind::PerfEvent,
        Kind::BPF => FileKind::Bpf,
        Kind::MQUEUE => FileKind::Mqueue,
        Kind::NAMESPACE => FileKind::Namespace,
        _ => FileKind::Other,
    }
}
