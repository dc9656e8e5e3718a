//! The inverse of `decode`: the ring record that says an event.
//!
//! Only BPF programs write records where the tracker runs. This is for what checks the way from
//! a ring into the model without them: tests, fuzzing (`fuzz/`) and the model's benchmark.

use super::super::events::{
    self, EpollCtlEvent, EventClass, EventHdr, EventKind, FdEvent, InstallEvent,
    InstallSocketEvent, MoveEvent, ObjectEvent, OfdEvent, RecHdr, SockOpts, SockPart,
    SockStateEvent, SocketEvent, TaskAttrEvent, TaskEvent, WatchEvent, WordEvent,
};
use super::{Layout, file_kind};
use crate::model::event::{
    Body, Event, Object, OfdInfo, SockInfo, SockOptions, TaskAttrs, TaskInfo, Watch,
};
use crate::model::ids::{Fd, FilesId, OfdId};

/// The record that `decode` makes this event of. What a record has no room for is left out:
/// of a [`Body::FilesWord`] what lies 64 numbers behind the first, of names what is too long.
#[must_use]
pub fn encode(event: &Event) -> Vec<u8> {
    let seq = event.seq;
    match &event.body {
        Body::TaskNew(info) => task(EventKind::TASK_NEW, seq, info),
        Body::TaskExec(info) => task(EventKind::TASK_EXEC, seq, info),
        Body::TaskRename { task, comm } => {
            let comm = text(comm.as_bytes());
            bare_task(EventKind::TASK_RENAME, seq, |e| {
                (e.task, e.comm) = (task.0, comm);
            })
        }
        Body::TaskExit { task } => bare_task(EventKind::TASK_EXIT, seq, |e| e.task = task.0),
        Body::TaskRelease { task } => bare_task(EventKind::TASK_RELEASE, seq, |e| e.task = task.0),
        Body::TaskFiles { task, files } => bare_task(EventKind::TASK_FILES, seq, |e| {
            (e.task, e.files) = (task.0, files.0);
        }),
        Body::TaskAttrs(attrs) => task_attrs(seq, attrs),
        Body::CgroupMove {
            tgid,
            cgroup,
            tracked,
        } => bytes(MoveEvent {
            ev: header::<MoveEvent>(EventKind::CGROUP_MOVE, seq),
            cgroup: cgroup.0,
            tgid: tgid.0.cast_unsigned(),
            tracked: u32::from(*tracked),
        }),
        Body::FilesWord { files, fds } => word(seq, *files, fds),
        Body::FdInstall {
            files,
            fd,
            cloexec,
            ofd,
            socket,
        } => install(seq, (*files, *fd, *cloexec), ofd, socket.as_deref()),
        Body::FilesNew { files } => fd(EventKind::FILES_NEW, seq, *files, Fd(0), 0),
        Body::FilesGone { files } => fd(EventKind::FILES_GONE, seq, *files, Fd(0), 0),
        Body::ExecClose { files } => fd(EventKind::EXEC_CLOSE, seq, *files, Fd(0), 0),
        Body::FdClose { files, fd: closed } => fd(EventKind::FD_CLOSE, seq, *files, *closed, 0),
        Body::FdCloexec {
            files,
            fd: of,
            cloexec,
        } => fd(EventKind::FD_CLOEXEC, seq, *files, *of, u64::from(*cloexec)),
        Body::CloexecWord { files, base, bits } => {
            fd(EventKind::CLOEXEC_WORD, seq, *files, *base, *bits)
        }
        Body::Socket(info) => bytes(SocketEvent {
            ev: header::<SocketEvent>(EventKind::SOCKET, seq),
            socket: socket_part(info),
        }),
        Body::SocketState {
            sock,
            state,
            shutdown,
        } => bytes(SockStateEvent {
            ev: header::<SockStateEvent>(EventKind::SOCKET_STATE, seq),
            sock: sock.0,
            state: (*state).into(),
            shutdown: (*shutdown).into(),
        }),
        Body::Ofd { ofd, flags, owner } => bytes(OfdEvent {
            ev: header::<OfdEvent>(EventKind::OFD, seq),
            file: ofd.0,
            flags: *flags,
            owner_pid: owner.pid.cast_unsigned(),
            owner_type: owner.kind,
            owner_sig: owner.signal,
        }),
        Body::WatchSet { group, wd, watch } => {
            watches(EventKind::WATCH_SET, seq, group.0, *wd, *watch)
        }
        Body::WatchDel { group, wd } => {
            watches(EventKind::WATCH_DEL, seq, group.0, *wd, Watch::default())
        }
        Body::EpollSet {
            epoll,
            target,
            fd,
            events,
            data,
        } => epoll_ctl(
            EventKind::EPOLL_SET,
            seq,
            (*epoll, *target, *fd),
            *events,
            *data,
        ),
        Body::EpollDel { epoll, target, fd } => {
            epoll_ctl(EventKind::EPOLL_DEL, seq, (*epoll, *target, *fd), 0, 0)
        }
        Body::Stale(object) => stale(seq, *object),
        Body::FilesCopy { by } => about(EventKind::FILES_COPY, seq, EventClass::TASK, by.0),
        Body::FilesCopied { by } => about(EventKind::FILES_COPIED, seq, EventClass::TASK, by.0),
        // A kind that nobody gave a meaning, with nothing but its number.
        Body::Malformed => bytes(header::<EventHdr>(0, seq)),
    }
}

// SAFETY: as for the other layouts; it is the part that all of them begin with.
unsafe impl Layout for EventHdr {}

fn header<T: Layout>(kind: u32, seq: u64) -> EventHdr {
    let size = u32::try_from(size_of::<T>()).unwrap_or(u32::MAX);
    EventHdr {
        hdr: RecHdr { kind, size },
        seq,
    }
}

fn bytes<T: Layout>(value: T) -> Vec<u8> {
    // SAFETY: a Layout has no padding, so all of its bytes are initialised.
    unsafe { std::slice::from_raw_parts((&raw const value).cast(), size_of::<T>()) }.to_vec()
}

/// Text as the kernel has it: with NULs behind it where there is room.
fn text<const N: usize>(from: &[u8]) -> [std::ffi::c_char; N] {
    let mut to = [0; N];
    for (to, from) in to.iter_mut().zip(from) {
        *to = from.cast_signed();
    }
    to
}

fn task(kind: u32, seq: u64, info: &TaskInfo) -> Vec<u8> {
    bare_task(kind, seq, |e| {
        e.task = info.task.0;
        e.files = info.files.map_or(0, |files| files.0);
        e.mm = info.mm.map_or(0, |mm| mm.0);
        e.cgroup = info.cgroup.0;
        e.tid = info.tid.0.cast_unsigned();
        e.tgid = info.tgid.0.cast_unsigned();
        e.ppid = info.parent.0.cast_unsigned();
        e.comm = text(info.comm.as_bytes());
    })
}

fn bare_task(kind: u32, seq: u64, fill: impl FnOnce(&mut TaskEvent)) -> Vec<u8> {
    let mut event = TaskEvent {
        ev: header::<TaskEvent>(kind, seq),
        ..TaskEvent::default()
    };
    fill(&mut event);
    bytes(event)
}

fn task_attrs(seq: u64, attrs: &TaskAttrs) -> Vec<u8> {
    let (fs, info) = attrs.fs.unwrap_or_default();
    let ids = &attrs.ids;
    let [uid, euid, suid, fsuid] = ids.uids;
    let [gid, egid, sgid, fsgid] = ids.gids;
    let [inheritable, permitted, effective, bounding, ambient] = ids.caps;
    bytes(TaskAttrEvent {
        ev: header::<TaskAttrEvent>(EventKind::TASK_ATTRS, seq),
        task: attrs.task.0,
        fs: fs.0,
        cwd_ino: info.cwd.ino,
        root_ino: info.root.ino,
        cap_inheritable: inheritable,
        cap_permitted: permitted,
        cap_effective: effective,
        cap_bset: bounding,
        cap_ambient: ambient,
        cwd_dev: info.cwd.dev,
        root_dev: info.root.dev,
        umask: info.umask,
        sid: ids.session.0.cast_unsigned(),
        pgid: ids.group.0.cast_unsigned(),
        uid,
        gid,
        euid,
        egid,
        suid,
        sgid,
        fsuid,
        fsgid,
        securebits: ids.securebits,
    })
}

fn word(seq: u64, files: FilesId, fds: &[(Fd, OfdId, bool)]) -> Vec<u8> {
    let base = fds.first().map_or(0, |(fd, ..)| fd.0);
    let mut event = WordEvent {
        ev: header::<WordEvent>(EventKind::FILES_WORD, seq),
        files: files.0,
        base: base.cast_unsigned(),
        ..WordEvent::default()
    };
    for (fd, ofd, cloexec) in fds {
        let bit = fd.0.wrapping_sub(base);
        let at = usize::try_from(bit).unwrap_or(usize::MAX);
        if let Some(file) = event.file.get_mut(at) {
            *file = ofd.0;
            event.open |= 1 << bit;
            event.cloexec |= u64::from(*cloexec) << bit;
        }
    }
    bytes(event)
}

fn install(
    seq: u64,
    (files, fd, cloexec): (FilesId, Fd, bool),
    ofd: &OfdInfo,
    socket: Option<&SockInfo>,
) -> Vec<u8> {
    let kind = (0..u32::from(u8::MAX)).find(|kind| file_kind(*kind) == ofd.kind);
    let object = ofd
        .sock
        .map(|sock| sock.0)
        .or(ofd.group.map(|group| group.0));
    let mut install = InstallEvent {
        ev: header::<InstallEvent>(EventKind::FD_INSTALL, seq),
        files: files.0,
        file: ofd.id.0,
        ino: ofd.inode.ino,
        object: object.unwrap_or(0),
        dev: ofd.inode.dev,
        fd: fd.0.cast_unsigned(),
        cloexec: cloexec.into(),
        kind: kind.unwrap_or(events::FileKind::OTHER),
        mode: ofd.mode,
        flags: ofd.flags,
        empty: ofd.empty.into(),
        pad: 0,
    };
    let Some(socket) = socket else {
        return bytes(install);
    };
    install.ev = header::<InstallSocketEvent>(EventKind::FD_INSTALL_SOCKET, seq);
    bytes(InstallSocketEvent {
        install,
        socket: socket_part(socket),
    })
}

fn fd(kind: u32, seq: u64, files: FilesId, fd: Fd, cloexec: u64) -> Vec<u8> {
    bytes(FdEvent {
        ev: header::<FdEvent>(kind, seq),
        files: files.0,
        cloexec,
        fd: fd.0.cast_unsigned(),
        pad: 0,
    })
}

fn watches(kind: u32, seq: u64, group: u64, wd: i32, watch: Watch) -> Vec<u8> {
    bytes(WatchEvent {
        ev: header::<WatchEvent>(kind, seq),
        group,
        ino: watch.inode.ino,
        dev: watch.inode.dev,
        wd,
        mask: watch.mask,
        pad: 0,
    })
}

fn epoll_ctl(
    kind: u32,
    seq: u64,
    (epoll, target, fd): (OfdId, OfdId, Fd),
    events: u32,
    data: u64,
) -> Vec<u8> {
    bytes(EpollCtlEvent {
        ev: header::<EpollCtlEvent>(kind, seq),
        epoll: epoll.0,
        target: target.0,
        data,
        fd: fd.0.cast_unsigned(),
        events,
    })
}

fn stale(seq: u64, object: Object) -> Vec<u8> {
    let (class, object) = match object {
        Object::Tasks => (EventClass::TASK, 0),
        Object::Files(id) => (EventClass::FILES, id.0),
        Object::Mm(id) => (EventClass::MM, id.0),
        Object::Epoll(id) => (EventClass::EPOLL, id.0),
        Object::Socket(id) => (EventClass::SOCKET, id.0),
        Object::Inotify(id) => (EventClass::INOTIFY, id.0),
    };
    about(EventKind::STALE, seq, class, object)
}

fn about(kind: u32, seq: u64, class: u32, object: u64) -> Vec<u8> {
    bytes(ObjectEvent {
        ev: header::<ObjectEvent>(kind, seq),
        object,
        class,
        pad: 0,
    })
}

fn socket_part(info: &SockInfo) -> SockPart {
    let path: [_; events::TRK_SUN_PATH_LEN as usize] = text(&info.name);
    let length = info.name.len().min(path.len());
    SockPart {
        sock: info.sock.0,
        ino: info.ino,
        peer: info.peer.map_or(0, |peer| peer.0),
        family: info.family,
        type_: info.kind,
        protocol: info.protocol,
        state: info.state,
        shutdown: info.shutdown,
        local_port: info.local_port,
        remote_port: info.remote_port,
        path_len: u32::try_from(length).unwrap_or(u32::MAX),
        local_addr: info.local_addr,
        remote_addr: info.remote_addr,
        path,
        pad: 0,
        opts: sock_opts(&info.options),
    }
}

fn sock_opts(options: &SockOptions) -> SockOpts {
    SockOpts {
        rcvtimeo: options.rcvtimeo,
        sndtimeo: options.sndtimeo,
        flags: options.flags,
        bound_ifindex: options.bound_ifindex,
        mark: options.mark,
        priority: options.priority,
        rcvbuf: options.rcvbuf,
        sndbuf: options.sndbuf,
        rcvlowat: options.rcvlowat,
        linger: options.linger,
        backlog: options.backlog,
        keepidle: options.keepidle,
        keepintvl: options.keepintvl,
        user_timeout: options.user_timeout,
        tos: options.tos,
        ttl: options.ttl,
        nonagle: options.nonagle,
        tclass: options.tclass,
        hops: options.hops,
        more: options.more,
        defer_accept: options.defer_accept,
        notsent_lowat: options.notsent_lowat,
        congestion: options
            .congestion
            .map(|byte| std::ffi::c_char::from_ne_bytes([byte])),
        keepcnt: options.keepcnt,
        pad: 0,
    }
}
