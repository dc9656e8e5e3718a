//! What a server with many processes makes happen, as the hooks say it.

use tracker::model::event::{
    Body, Event, FileKind, FsInfo, Ids, Object, OfdInfo, SockInfo, TaskAttrs, TaskInfo, Vma,
};
use tracker::model::ids::{
    CgroupId, Fd, FilesId, FsId, InodeId, MmId, OfdId, Pid, SockId, TaskId, Tid,
};
use tracker::model::snapshot::Snapshot;

/// Where the kernel's objects of one type lie: addresses come scattered over its slabs.
fn address(kind: u64, n: u64) -> u64 {
    // An odd factor permutes the 22 bits it is taken modulo.
    let scattered = n.wrapping_mul(0x9e_3779) & 0x3f_ffff;
    0xffff_8880_0000_0000 + (kind << 36) + (scattered << 8)
}

/// Events and the kernel objects they need, reproducible.
#[derive(Debug)]
pub struct Server {
    pub events: Vec<Event>,
    processes: Vec<Process>,
    seq: u64,
    objects: u64,
    random: u64,
}

#[derive(Debug)]
struct Process {
    task: TaskInfo,
    files: FilesId,
    epoll: OfdId,
    /// Open descriptors with their descriptions; the number is the index.
    fds: Vec<Option<OfdId>>,
}

/// Which descriptors processes have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kinds {
    Files,
    Sockets,
    Both,
}

impl Server {
    /// A server with this many processes, all of which have this many descriptors.
    pub fn new(processes: usize, fds: usize, kinds: Kinds) -> Self {
        let mut server = Self {
            events: Vec::new(),
            processes: Vec::new(),
            seq: 0,
            objects: 0,
            random: 0x2545_f491_4f6c_dd1d,
        };
        for _ in 0..processes {
            let mut process = server.start();
            for fd in 0..fds {
                let socket = match kinds {
                    Kinds::Files => false,
                    Kinds::Sockets => true,
                    Kinds::Both => fd % 2 == 1,
                };
                if fd == 3 && kinds == Kinds::Both {
                    process.epoll = server.open(&mut process, FileKind::Epoll);
                } else if socket {
                    server.accept(&mut process);
                } else {
                    server.open(&mut process, FileKind::Regular);
                }
            }
            server.processes.push(process);
        }
        server
    }

    /// Lets it serve until that many more events happened, and returns these.
    pub fn serve(&mut self, events: usize) -> Vec<Event> {
        self.events.clear();
        while self.events.len() < events {
            let which = self.below(self.processes.len());
            let mut process = self.processes.swap_remove(which);
            match self.below(100) {
                0 => self.fork(&process),
                1..10 => self.emit(Body::Stale(Object::Mm(process.task.mm.unwrap_or_default()))),
                10..40 => {
                    // A file is opened, read and closed.
                    self.open(&mut process, FileKind::Regular);
                    let last = process.fds.iter().rposition(Option::is_some);
                    self.close(&mut process, last.unwrap_or(0));
                }
                _ => {
                    // A client comes, and another goes.
                    self.accept(&mut process);
                    let fds = process.fds.len();
                    let fd = 4 + self.below(fds - 4);
                    self.close(&mut process, fd);
                }
            }
            self.processes.push(process);
        }
        std::mem::take(&mut self.events)
    }

    /// A reading of the mappings of all processes, so many each.
    pub fn mappings(&self, each: u64) -> Snapshot {
        let vma = |n: u64| Vma {
            start: n << 21,
            end: (n << 21) + 4096,
            flags: 0x75,
            pgoff: n,
            inode: InodeId { dev: 1, ino: n },
        };
        let mms = self.processes.iter().filter_map(|process| process.task.mm);
        Snapshot {
            seq: self.seq,
            mms: mms.map(|mm| (mm, (1..=each).map(vma).collect())).collect(),
            ..Snapshot::default()
        }
    }

    fn emit(&mut self, body: Body) {
        self.seq += 1;
        self.events.push(Event {
            seq: self.seq,
            body,
        });
    }

    /// xorshift64 (Marsaglia, 2003).
    fn below(&mut self, bound: usize) -> usize {
        for shift in [13_i32, -7, 17] {
            let x = self.random;
            self.random ^= if shift > 0 { x << shift } else { x >> -shift };
        }
        let bound = bound as u64;
        usize::try_from(self.random % bound).expect("below a usize")
    }

    fn object(&mut self, kind: u64) -> u64 {
        self.objects += 1;
        address(kind, self.objects)
    }

    fn start(&mut self) -> Process {
        let files = FilesId(self.object(1));
        let pid = i32::try_from(self.objects & 0xf_ffff).expect("20 bits");
        let task = TaskInfo {
            task: TaskId(self.object(2)),
            tid: Tid(pid),
            tgid: Pid(pid),
            parent: Pid(1),
            files: Some(files),
            mm: Some(MmId(self.object(3))),
            cgroup: CgroupId(7),
            comm: "server".into(),
        };
        self.emit(Body::FilesNew { files });
        self.emit(Body::TaskNew(task.clone()));
        let attrs = TaskAttrs {
            task: task.task,
            fs: Some((FsId(self.object(4)), FsInfo::default())),
            ids: Ids::default(),
        };
        self.emit(Body::TaskAttrs(Box::new(attrs)));
        Process {
            task,
            files,
            epoll: OfdId::default(),
            fds: Vec::new(),
        }
    }

    fn fork(&mut self, parent: &Process) {
        let child = self.start();
        let open = (0..).map(Fd).zip(&parent.fds);
        let open = open.filter_map(|(fd, ofd)| Some((fd, (*ofd)?, false)));
        let open: Vec<_> = open.collect();
        for word in open.chunk_by(|a, b| a.0.0 / 64 == b.0.0 / 64) {
            self.emit(Body::FilesWord {
                files: child.files,
                fds: word.to_vec(),
            });
        }
        let task = child.task.task;
        self.emit(Body::ExecClose { files: child.files });
        self.emit(Body::TaskExec(child.task));
        self.emit(Body::TaskExit { task });
        self.emit(Body::TaskRelease { task });
    }

    fn install(
        &mut self,
        process: &mut Process,
        kind: FileKind,
        socket: Option<Box<SockInfo>>,
    ) -> (Fd, OfdId) {
        let free = process.fds.iter().position(Option::is_none);
        let fd = free.unwrap_or(process.fds.len());
        let id = OfdId(self.object(5));
        let ofd = OfdInfo {
            id,
            kind,
            inode: InodeId {
                dev: 9,
                ino: self.objects,
            },
            mode: 0o100_644,
            flags: 2,
            sock: socket.as_ref().map(|info| info.sock),
            empty: true,
            ..OfdInfo::default()
        };
        if fd == process.fds.len() {
            process.fds.push(None);
        }
        process.fds[fd] = Some(id);
        let fd = Fd(i32::try_from(fd).expect("few descriptors"));
        self.emit(Body::FdInstall {
            files: process.files,
            fd,
            cloexec: true,
            ofd,
            socket,
        });
        (fd, id)
    }

    fn open(&mut self, process: &mut Process, kind: FileKind) -> OfdId {
        self.install(process, kind, None).1
    }

    fn accept(&mut self, process: &mut Process) {
        let info = SockInfo {
            sock: SockId(self.object(6)),
            ino: self.objects,
            family: 2,
            kind: 1,
            protocol: 6,
            state: 1,
            local_port: 80,
            ..SockInfo::default()
        };
        let (fd, target) = self.install(process, FileKind::Socket, Some(Box::new(info)));
        if process.epoll != OfdId::default() {
            self.emit(Body::EpollSet {
                epoll: process.epoll,
                target,
                fd,
                events: 0x8000_0001,
                data: 7,
            });
        }
    }

    fn close(&mut self, process: &mut Process, fd: usize) {
        let Some(target) = process.fds[fd].take() else {
            return;
        };
        let number = Fd(i32::try_from(fd).expect("few descriptors"));
        if process.epoll != OfdId::default() {
            self.emit(Body::EpollDel {
                epoll: process.epoll,
                target,
                fd: number,
            });
        }
        self.emit(Body::FdClose {
            files: process.files,
            fd: number,
        });
    }
}
