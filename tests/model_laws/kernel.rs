//! A kernel in miniature, which random steps drive.

use proptest::prelude::*;
use std::collections::{BTreeMap, BTreeSet};
use tracker::model::check::check;
use tracker::model::event::{Body, Event, FileKind, OfdInfo, TaskInfo};
use tracker::model::ids::{CgroupId, Fd, FilesId, InodeId, MmId, OfdId, Pid, TaskId, Tid};
use tracker::model::snapshot::Snapshot;
use tracker::model::state::State;

/// What a random step tries to do; the kernel below makes it something possible.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Fork {
        who: u8,
        share_files: bool,
    },
    Unshare {
        who: u8,
    },
    Exec {
        who: u8,
    },
    Exit {
        who: u8,
    },
    Open {
        who: u8,
        epoll: bool,
        cloexec: bool,
    },
    Close {
        who: u8,
        fd: u8,
    },
    Dup2 {
        who: u8,
        from: u8,
        to: u8,
        cloexec: bool,
    },
    Cloexec {
        who: u8,
        fd: u8,
        on: bool,
    },
    RangeCloexec {
        who: u8,
        first: u8,
        last: u8,
    },
    Watch {
        who: u8,
        epfd: u8,
        fd: u8,
        add: bool,
        events: u32,
    },
}

pub fn op() -> impl Strategy<Value = Op> {
    let who = any::<u8>();
    prop_oneof![
        2 => (who, any::<bool>()).prop_map(|(who, share_files)| Op::Fork { who, share_files }),
        1 => who.prop_map(|who| Op::Unshare { who }),
        1 => who.prop_map(|who| Op::Exec { who }),
        2 => who.prop_map(|who| Op::Exit { who }),
        6 => (who, any::<bool>(), any::<bool>())
            .prop_map(|(who, epoll, cloexec)| Op::Open { who, epoll, cloexec }),
        5 => (who, any::<u8>()).prop_map(|(who, fd)| Op::Close { who, fd }),
        4 => (who, any::<u8>(), 0..12u8, any::<bool>())
            .prop_map(|(who, from, to, cloexec)| Op::Dup2 { who, from, to, cloexec }),
        2 => (who, any::<u8>(), any::<bool>()).prop_map(|(who, fd, on)| Op::Cloexec { who, fd, on }),
        1 => (who, 0..12u8, 0..12u8)
            .prop_map(|(who, first, last)| Op::RangeCloexec { who, first, last }),
        6 => (who, any::<u8>(), any::<u8>(), prop::bool::weighted(0.7), any::<u32>())
            .prop_map(|(who, epfd, fd, add, events)| Op::Watch { who, epfd, fd, add, events }),
    ]
}

#[derive(Clone, Debug)]
pub struct Thread {
    pub task: TaskId,
    pub files: FilesId,
    pub mm: MmId,
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
    pub files: BTreeMap<OfdId, (FileKind, u64)>,
    pub epolls: BTreeMap<OfdId, Items>,
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
        kernel.start(FilesId(64));
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

    fn start(&mut self, files: FilesId) {
        self.serial += 1;
        let task = free(&self.threads.iter().map(|t| t.task).collect(), TaskId);
        let mm = free(&self.threads.iter().map(|t| t.mm).collect(), MmId);
        let pid = i32::try_from(self.serial).expect("few threads");
        let thread = Thread {
            task,
            files,
            mm,
            pid,
        };
        self.emit(Body::TaskNew(Self::info(&thread)));
        self.threads.push(thread);
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
            self.files.remove(&id);
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
        let (kind, ino) = self.files[&id];
        let empty = self.epolls.get(&id).is_some_and(BTreeMap::is_empty);
        OfdInfo {
            id,
            kind,
            inode: InodeId { dev: 1, ino },
            empty,
            ..OfdInfo::default()
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
        let who = match op {
            Op::Fork { who, .. }
            | Op::Unshare { who }
            | Op::Exec { who }
            | Op::Exit { who }
            | Op::Open { who, .. }
            | Op::Close { who, .. }
            | Op::Dup2 { who, .. }
            | Op::Cloexec { who, .. }
            | Op::RangeCloexec { who, .. }
            | Op::Watch { who, .. } => usize::from(who),
        };
        if self.threads.is_empty() {
            return;
        }
        let who = who % self.threads.len();
        let files = self.threads[who].files;
        match op {
            Op::Fork { share_files, .. } if self.threads.len() < 6 => {
                let files = if share_files { files } else { self.copy(files) };
                self.start(files);
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
                    self.emit(Body::TaskExec(Self::info(&self.threads[who])));
                }
            }
            Op::Exit { .. } if self.threads.len() > 1 => {
                let task = self.threads.remove(who).task;
                self.emit(Body::TaskExit { task });
                self.emit(Body::TaskRelease { task });
            }
            Op::Open { epoll, cloexec, .. } => {
                let id = free(&self.files.keys().copied().collect(), OfdId);
                self.serial += 1;
                let kind = if epoll {
                    FileKind::Epoll
                } else {
                    FileKind::Regular
                };
                self.files.insert(id, (kind, self.serial));
                if epoll {
                    self.epolls.insert(id, Items::new());
                }
                let table = &self.tables[&files];
                let fd = (0..)
                    .map(Fd)
                    .find(|fd| !table.contains_key(fd))
                    .expect("free number");
                self.install(files, fd, id, cloexec);
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
                    self.install(files, Fd(i32::from(to)), id, cloexec);
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
            _ => {}
        }
        self.reap();
    }

    fn install(&mut self, files: FilesId, fd: Fd, id: OfdId, cloexec: bool) {
        let ofd = self.ofd(id);
        self.emit(Body::FdInstall {
            files,
            fd,
            cloexec,
            ofd,
            socket: None,
        });
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

    pub fn snapshot(&self, all_tasks: bool) -> Snapshot {
        let table = |(id, fds): (&FilesId, &BTreeMap<Fd, (OfdId, bool)>)| {
            (
                *id,
                fds.iter()
                    .map(|(fd, (ofd, c))| (*fd, self.ofd(*ofd), *c))
                    .collect(),
            )
        };
        let epoll = |(id, items): (&OfdId, &Items)| {
            let item = |((target, fd), events): (&(OfdId, Fd), &u32)| {
                (*target, *fd, *events, u64::from(*events))
            };
            (*id, items.iter().map(item).collect())
        };
        Snapshot {
            seq: self.seq,
            all_tasks,
            tasks: self
                .threads
                .iter()
                .map(|t| (Self::info(t), false))
                .collect(),
            tables: self.tables.iter().map(table).collect(),
            epolls: self.epolls.iter().map(epoll).collect(),
            ..Snapshot::default()
        }
    }

    /// The model must say exactly this.
    pub fn assert_model(&self, state: &State) {
        assert_eq!(check(state), [], "contradictions");
        let model: BTreeMap<_, BTreeMap<_, _>> = state
            .tables
            .iter()
            .filter(|(_, t)| !t.users.is_empty())
            .map(|(id, t)| {
                (
                    *id,
                    t.fds
                        .iter()
                        .map(|(fd, s)| (*fd, (s.ofd, s.cloexec)))
                        .collect(),
                )
            })
            .collect();
        assert_eq!(model, self.tables, "descriptor tables");
        let used = state
            .tables
            .values()
            .filter(|table| !table.users.is_empty());
        let held: BTreeSet<OfdId> = used
            .flat_map(|table| table.fds.values())
            .map(|slot| slot.ofd)
            .collect();
        let model: BTreeMap<_, _> = state
            .ofds
            .iter()
            .filter(|(id, _)| held.contains(id))
            .map(|(id, ofd)| (*id, (ofd.kind, ofd.inode.ino)))
            .collect();
        assert_eq!(model, self.files, "open file descriptions");
        let model: BTreeMap<_, Items> = state
            .epolls
            .iter()
            .filter(|(id, _)| held.contains(id))
            .map(|(id, e)| {
                (
                    *id,
                    e.items
                        .iter()
                        .map(|(key, item)| (*key, item.events))
                        .collect(),
                )
            })
            .collect();
        assert_eq!(model, self.epolls, "epoll items");
        let mut model: Vec<_> = state.tasks.iter().map(|(id, t)| (*id, t.files)).collect();
        model.sort_unstable();
        let mut threads: Vec<_> = self
            .threads
            .iter()
            .map(|t| (t.task, Some(t.files)))
            .collect();
        threads.sort_unstable();
        assert_eq!(model, threads, "threads");
    }
}

pub fn history(ops: &[Op]) -> Kernel {
    let mut kernel = Kernel::boot();
    for op in ops {
        kernel.run(*op);
    }
    kernel
}
