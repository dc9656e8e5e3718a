//! Writes the first inputs of each fuzz target: `seeds DIR` makes `DIR/events` and `DIR/image`.

use std::io;
use std::path::Path;
use std::{env, fs};
use tracker::bpf::wire::encode;
use tracker::image::{self, DirectoryStore, Image};
use tracker::model::event::{
    Body, Event, FileKind, FsInfo, Ids, Object, OfdInfo, Owner, SockInfo, TaskAttrs, TaskInfo,
    Watch,
};
use tracker::model::ids::{
    CgroupId, Fd, FilesId, FsId, GroupId, InodeId, MmId, OfdId, Pid, SockId, TaskId, Tid,
};

#[path = "../../tests/sample/mod.rs"]
mod sample;

fn main() -> io::Result<()> {
    let dir = env::args_os().nth(1).unwrap_or_else(|| "corpus".into());
    write(Path::new(&dir), "events", &events())?;
    write(Path::new(&dir), "image", &images())
}

fn write(dir: &Path, target: &str, inputs: &[Vec<u8>]) -> io::Result<()> {
    let dir = dir.join(target);
    fs::create_dir_all(&dir)?;
    for (n, input) in inputs.iter().enumerate() {
        fs::write(dir.join(format!("seed-{n}")), input)?;
    }
    Ok(())
}

/// A process that opens one of everything, forks and dies, and each of its first events alone.
fn events() -> Vec<Vec<u8>> {
    let record = |seq, body: &Body| {
        let record = encode(&Event {
            seq,
            body: body.clone(),
        });
        let length = u16::try_from(record.len()).unwrap_or(u16::MAX);
        [&length.to_le_bytes()[..], &record].concat()
    };
    let life = life();
    let whole: Vec<u8> = (1..).zip(&life).flat_map(|(seq, body)| record(seq, body)).collect();
    let alone = life.iter().map(|body| record(1, body));
    std::iter::once(whole).chain(alone).collect()
}

fn life() -> Vec<Body> {
    let (task, files, fs) = (TaskId(0x40), FilesId(0x80), FsId(0xc0));
    let info = TaskInfo {
        task,
        tid: Tid(7),
        tgid: Pid(7),
        parent: Pid(1),
        files: Some(files),
        mm: Some(MmId(0x100)),
        cgroup: CgroupId(9),
        comm: "seed".into(),
    };
    let install = |fd, kind, sock: Option<SockId>, group| Body::FdInstall {
        files,
        fd: Fd(fd),
        cloexec: fd % 2 == 1,
        ofd: OfdInfo {
            id: OfdId(0x1000 + 64 * u64::from(fd.unsigned_abs())),
            kind,
            inode: InodeId { dev: 1, ino: 2 },
            empty: true,
            sock,
            group,
            ..OfdInfo::default()
        },
        socket: sock.map(|sock| {
            Box::new(SockInfo {
                sock,
                name: b"/run/seed".to_vec(),
                ..SockInfo::default()
            })
        }),
    };
    let (sock, group, epoll) = (SockId(0x2000), GroupId(0x3000), OfdId(0x1000 + 64 * 5));
    let target = OfdId(0x1000 + 64 * 3);
    let copy = FilesId(0x180);
    let child = TaskInfo {
        task: TaskId(0x240),
        tid: Tid(8),
        tgid: Pid(8),
        parent: Pid(7),
        files: Some(copy),
        mm: Some(MmId(0x280)),
        ..info.clone()
    };
    vec![
        Body::FilesNew { files },
        Body::TaskNew(info.clone()),
        Body::TaskAttrs(Box::new(TaskAttrs {
            task,
            fs: Some((fs, FsInfo::default())),
            ids: Ids::default(),
        })),
        install(3, FileKind::Regular, None, None),
        install(4, FileKind::Socket, Some(sock), None),
        install(5, FileKind::Epoll, None, None),
        install(6, FileKind::Inotify, None, Some(group)),
        Body::EpollSet {
            epoll,
            target,
            fd: Fd(3),
            events: 1,
            data: 3,
        },
        Body::WatchSet {
            group,
            wd: 1,
            watch: Watch::default(),
        },
        Body::Socket(SockInfo {
            sock,
            ..SockInfo::default()
        }),
        Body::SocketState {
            sock,
            state: 1,
            shutdown: 3,
        },
        Body::Ofd {
            ofd: target,
            flags: 2,
            owner: Owner::default(),
        },
        Body::FdCloexec {
            files,
            fd: Fd(3),
            cloexec: false,
        },
        Body::CloexecWord {
            files,
            base: Fd(0),
            bits: 0x70,
        },
        Body::FilesCopy { by: task },
        Body::FilesNew { files: copy },
        Body::FilesWord {
            files: copy,
            fds: vec![(Fd(3), target, true), (Fd(5), epoll, false)],
        },
        Body::FilesCopied { by: task },
        Body::TaskNew(child),
        Body::TaskRename {
            task,
            comm: "renamed".into(),
        },
        Body::Stale(Object::Files(copy)),
        Body::TaskFiles { task, files: copy },
        Body::ExecClose { files: copy },
        Body::TaskExec(TaskInfo {
            files: Some(copy),
            ..info
        }),
        Body::EpollDel {
            epoll,
            target,
            fd: Fd(3),
        },
        Body::WatchDel { group, wd: 1 },
        Body::FdClose { files, fd: Fd(6) },
        Body::CgroupMove {
            tgid: Pid(8),
            cgroup: CgroupId(10),
            tracked: true,
        },
        Body::TaskExit { task },
        Body::TaskRelease { task },
        Body::FilesGone { files },
        Body::Malformed,
    ]
}

/// An empty one, and one of everything.
fn images() -> Vec<Vec<u8>> {
    let path = env::temp_dir().join(format!("seeds.{}", std::process::id()));
    let store = DirectoryStore::create(&path).expect("a directory for the pages");
    let full = sample::everything(&store);
    store.discard();
    vec![image::encode(&Image::default()), image::encode(&full)]
}
