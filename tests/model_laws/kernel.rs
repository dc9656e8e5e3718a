//! A kernel in miniature, which random steps drive.

#[path = "compare.rs"]
mod compare;
#[path = "details.rs"]
mod details;
#[path = "op.rs"]
mod op;

use op::Kind;
pub use op::{Op, op};
use std::collections::{BTreeMap, BTreeSet};
use tracker::model::event::{
    Body, Event, FsInfo, Ids, OfdInfo, Owner, SockInfo, TaskInfo, Vma, Watch,
};
use tracker::model::ids::{
    CgroupId, Fd, FilesId, FsId, GroupId, MmId, OfdId, Pid, SockId, TaskId, Tid,
};

#[derive(Clone, Debug)]
pub struct Thread {
    pub task: TaskId,
    pub files: FilesId,
    pub mm: MmId,
    pub fs: FsId,
    pub ids: Ids,
    pub pid: i32,
}

pub type Items = BTreeMap<(OfdId, Fd), u32>;

/// A kernel in miniature: the truth the model must arrive at. Addresses of what
/// died are used again at once, as slab caches do.
#[derive(Clone, Debug, Default)]
pub struct Kernel {
    pub seq: u64,
    pub events: Vec<Event>,
    pub threads: Vec<Thread>,
    pub tables: BTreeMap<FilesId, BTreeMap<Fd, (OfdId, bool)>>,
    pub files: BTreeMap<OfdId, OfdInfo>,
    pub epolls: BTreeMap<OfdId, Items>,
    pub inotifies: BTreeMap<GroupId, BTreeMap<i32, Watch>>,
    pub sockets: BTreeMap<SockId, SockInfo>,
    pub fss: BTreeMap<FsId, FsInfo>,
    pub mms: BTreeMap<MmId, BTreeMap<u64, Vma>>,
    pub serial: u64,
}

fn free<K: Ord + Copy>(used: &BTreeSet<K>, make: impl Fn(u64) -> K) -> K {
    let mut address = (1..).map(|n| make(n * 64));
    address
        .find(|id| !used.contains(id))
        .expect("addresses never run out")
}

impl Kernel {
    pub fn boot() -> Self {
        let mut kernel = Self::default();
        kernel.emit(Body::FilesNew { files: FilesId(64) });
        kernel.tables.insert(FilesId(64), BTreeMap::new());
        kernel.fss.insert(FsId(64), FsInfo::default());
        kernel.start(FilesId(64), FsId(64), Ids::default());
        kernel
    }

    fn emit(&mut self, body: Body) {
        self.seq += 1;
        self.events.push(Event {
            seq: self.seq,
            body,
        });
    }

    fn info(thread: &Thread) -> TaskInfo {
        TaskInfo {
            task: thread.task,
            tid: Tid(thread.pid),
            tgid: Pid(thread.pid),
            parent: Pid(1),
            files: Some(thread.files),
            mm: Some(thread.mm),
            cgroup: CgroupId(7),
            comm: format!("t{}", thread.pid),
        }
    }

    fn start(&mut self, files: FilesId, fs: FsId, ids: Ids) {
        self.serial += 1;
        let task = free(&self.threads.iter().map(|t| t.task).collect(), TaskId);
        let mm = free(&self.threads.iter().map(|t| t.mm).collect(), MmId);
        let pid = i32::try_from(self.serial).expect("few threads");
        let thread = Thread {
            task,
            files,
            mm,
            fs,
            ids,
            pid,
        };
        self.mms.insert(mm, BTreeMap::new());
        self.emit(Body::TaskNew(Self::info(&thread)));
        self.threads.push(thread);
        self.say_attrs(self.threads.len() - 1);
    }

    fn copy(&mut self, from: FilesId) -> FilesId {
        let files = free(&self.tables.keys().copied().collect(), FilesId);
        let fds = self.tables[&from].clone();
        self.emit(Body::FilesNew { files });
        let all: Vec<_> = fds
            .iter()
            .map(|(fd, (ofd, cloexec))| (*fd, *ofd, *cloexec))
            .collect();
        for word in all.chunk_by(|a, b| a.0.0 / 8 == b.0.0 / 8) {
            self.emit(Body::FilesWord {
                files,
                fds: word.to_vec(),
            });
        }
        self.tables.insert(files, fds);
        files
    }

    /// Files no table refers to die: their items leave all epoll instances.
    fn reap(&mut self) {
        if self.threads.is_empty() {
            self.tables.clear();
        }
        let used: BTreeSet<FilesId> = self.threads.iter().map(|t| t.files).collect();
        self.tables.retain(|id, _| used.contains(id));
        let used: BTreeSet<FsId> = self.threads.iter().map(|t| t.fs).collect();
        self.fss.retain(|id, _| used.contains(id));
        let used: BTreeSet<MmId> = self.threads.iter().map(|t| t.mm).collect();
        self.mms.retain(|id, _| used.contains(id));
        let held: BTreeSet<OfdId> = self
            .tables
            .values()
            .flatten()
            .map(|(_, slot)| slot.0)
            .collect();
        let dead: Vec<OfdId> = self
            .files
            .keys()
            .filter(|id| !held.contains(id))
            .copied()
            .collect();
        for id in dead {
            if let Some(file) = self.files.remove(&id) {
                self.forget_details(&file);
            }
            self.epolls.remove(&id);
            let mut gone = Vec::new();
            for (epoll, items) in &mut self.epolls {
                let of_it = items.extract_if(.., |(target, _), _| *target == id);
                gone.extend(of_it.map(|((target, fd), _)| (*epoll, target, fd)));
            }
            for (epoll, target, fd) in gone {
                self.emit(Body::EpollDel { epoll, target, fd });
            }
        }
    }

    fn ofd(&self, id: OfdId) -> OfdInfo {
        let info = self.files[&id];
        let watches = info.group.map(|group| self.inotifies[&group].is_empty());
        let items = self.epolls.get(&id).map(BTreeMap::is_empty);
        OfdInfo {
            empty: items.or(watches).unwrap_or(false),
            ..info
        }
    }

    /// As a reading has it, which finds what is there and not that it was just made.
    fn read(&self, id: OfdId) -> OfdInfo {
        OfdInfo {
            empty: false,
            ..self.files[&id]
        }
    }

    fn pick(&self, files: FilesId, n: u8) -> Option<Fd> {
        let table = &self.tables[&files];
        table
            .keys()
            .nth(usize::from(n) % table.len().max(1))
            .copied()
    }

    pub fn run(&mut self, op: Op) {
        if self.threads.is_empty() {
            return;
        }
        let who = op.who() % self.threads.len();
        let files = self.threads[who].files;
        match op {
            Op::Fork {
                share_files,
                share_fs,
                ..
            } if self.threads.len() < 6 => {
                let files = if share_files { files } else { self.copy(files) };
                let ids = self.threads[who].ids;
                let fs = self.threads[who].fs;
                let fs = if share_fs { fs } else { self.copy_fs(fs) };
                self.start(files, fs, ids);
            }
            Op::Unshare { .. } | Op::Exec { .. } => {
                if self.threads.iter().filter(|t| t.files == files).count() > 1 {
                    let files = self.copy(files);
                    self.threads[who].files = files;
                    self.emit(Body::TaskFiles {
                        task: self.threads[who].task,
                        files,
                    });
                }
                if let Op::Exec { .. } = op {
                    let files = self.threads[who].files;
                    self.tables
                        .get_mut(&files)
                        .expect("used")
                        .retain(|_, slot| !slot.1);
                    self.emit(Body::ExecClose { files });
                    self.new_mm(who);
                    self.emit(Body::TaskExec(Self::info(&self.threads[who])));
                    self.say_attrs(who);
                }
            }
            Op::Exit { .. } if self.threads.len() > 1 => {
                let task = self.threads.remove(who).task;
                self.emit(Body::TaskExit { task });
                self.emit(Body::TaskRelease { task });
            }
            Op::Open { kind, cloexec, .. } => {
                let id = self.create(kind);
                let table = &self.tables[&files];
                let fd = (0..)
                    .map(Fd)
                    .find(|fd| !table.contains_key(fd))
                    .expect("free number");
                self.install(files, fd, id, cloexec, true);
            }
            Op::Close { fd, .. } => {
                if let Some(fd) = self.pick(files, fd) {
                    self.tables.get_mut(&files).expect("used").remove(&fd);
                    self.emit(Body::FdClose { files, fd });
                }
            }
            Op::Dup2 {
                from, to, cloexec, ..
            } => {
                if let Some(from) = self.pick(files, from) {
                    let id = self.tables[&files][&from].0;
                    self.install(files, Fd(i32::from(to)), id, cloexec, false);
                }
            }
            Op::Cloexec { fd, on, .. } => {
                if let Some(fd) = self.pick(files, fd) {
                    self.tables
                        .get_mut(&files)
                        .expect("used")
                        .get_mut(&fd)
                        .expect("open")
                        .1 = on;
                    self.emit(Body::FdCloexec {
                        files,
                        fd,
                        cloexec: on,
                    });
                }
            }
            Op::RangeCloexec { first, last, .. } if first <= last => {
                let range = Fd(i32::from(first))..=Fd(i32::from(last));
                let table = self.tables.get_mut(&files).expect("used");
                for slot in table.range_mut(range) {
                    slot.1.1 = true;
                }
                let flagged = table.iter().filter(|(fd, slot)| fd.0 < 64 && slot.1);
                let bits = flagged.fold(0, |bits, (fd, _)| bits | 1 << fd.0);
                self.emit(Body::CloexecWord {
                    files,
                    base: Fd(0),
                    bits,
                });
            }
            Op::Watch {
                epfd,
                fd,
                add,
                events,
                ..
            } => self.watch(files, epfd, fd, add, events),
            _ => self.detail(op, who),
        }
        self.reap();
    }

    fn install(&mut self, files: FilesId, fd: Fd, id: OfdId, cloexec: bool, new: bool) {
        let mut ofd = self.ofd(id);
        ofd.empty |= new;
        // The kernel's event has no room for it.
        let owner = std::mem::take(&mut ofd.owner);
        let flags = ofd.flags;
        self.emit(Body::FdInstall {
            files,
            fd,
            cloexec,
            ofd,
            socket: ofd.sock.map(|sock| Box::new(self.sockets[&sock].clone())),
        });
        if owner != Owner::default() {
            let ofd = id;
            self.emit(Body::Ofd { ofd, flags, owner });
        }
        self.tables
            .get_mut(&files)
            .expect("used")
            .insert(fd, (id, cloexec));
    }

    fn watch(&mut self, files: FilesId, epfd: u8, fd: u8, add: bool, events: u32) {
        let (Some(fd), table) = (self.pick(files, fd), &self.tables[&files]) else {
            return;
        };
        let mut epolls = table
            .iter()
            .filter(|(_, slot)| self.epolls.contains_key(&slot.0));
        let Some((_, (epoll, _))) = epolls.nth(usize::from(epfd) % 2) else {
            return;
        };
        let (epoll, target) = (*epoll, table[&fd].0);
        if target == epoll {
            return;
        }
        let items = self.epolls.get_mut(&epoll).expect("an epoll instance");
        if add {
            items.insert((target, fd), events);
            let data = u64::from(events);
            self.emit(Body::EpollSet {
                epoll,
                target,
                fd,
                events,
                data,
            });
        } else if items.remove(&(target, fd)).is_some() {
            self.emit(Body::EpollDel { epoll, target, fd });
        }
    }
}

pub fn history(ops: &[Op]) -> Kernel {
    let mut kernel = Kernel::boot();
    for op in ops {
        kernel.run(*op);
    }
    kernel
}
