//! Steps about what descriptors and threads have besides their tables.

use super::{Kernel, Kind, Op, free};
use std::collections::BTreeMap;
use tracker::model::event::{Body, FileKind, Object, OfdInfo, SockInfo, TaskAttrs, Vma, Watch};
use tracker::model::ids::{FsId, GroupId, InodeId, MmId, OfdId, Pid, SockId};

impl Kernel {
    pub(super) fn detail(&mut self, op: Op, who: usize) {
        let files = self.threads[who].files;
        match op {
            Op::Inotify {
                fd, wd, add, mask, ..
            } => {
                let Some(fd) = self.pick(files, fd) else {
                    return;
                };
                if let Some(group) = self.files[&self.tables[&files][&fd].0].group {
                    self.set_watch(group, i32::from(wd), add.then_some(mask));
                }
            }
            Op::Option { fd, mark, .. } => {
                let Some(fd) = self.pick(files, fd) else {
                    return;
                };
                if let Some(sock) = self.files[&self.tables[&files][&fd].0].sock {
                    let info = self.sockets.get_mut(&sock).expect("open");
                    info.options.mark = mark;
                    let info = info.clone();
                    self.emit(Body::Socket(info));
                }
            }
            Op::Status { fd, flags, .. } => {
                let Some(fd) = self.pick(files, fd) else {
                    return;
                };
                let ofd = self.tables[&files][&fd].0;
                let file = self.files.get_mut(&ofd).expect("open");
                file.flags = flags;
                // What an installation does not say of a description that was known before.
                file.owner.signal = (flags & 31).cast_signed();
                let owner = file.owner;
                self.emit(Body::Ofd { ofd, flags, owner });
            }
            Op::Directory { ino, umask, .. } => {
                let fs = self.fss.get_mut(&self.threads[who].fs).expect("used");
                fs.cwd.ino = u64::from(ino);
                fs.umask = umask;
                self.say_attrs(who);
            }
            Op::UnshareFs { .. } => {
                let fs = self.threads[who].fs;
                self.threads[who].fs = self.copy_fs(fs);
                self.say_attrs(who);
            }
            Op::Identity { uid, session, .. } => {
                let thread = &mut self.threads[who];
                thread.ids.uids[1] = uid;
                if session {
                    thread.ids.session = Pid(thread.pid);
                }
                self.say_attrs(who);
            }
            Op::Map {
                page, flags, add, ..
            } => {
                let id = self.threads[who].mm;
                let start = u64::from(page) * 4096;
                let vma = Vma {
                    start,
                    end: start + 4096,
                    flags,
                    ..Vma::default()
                };
                let vmas = self.mms.get_mut(&id).expect("used");
                if add {
                    vmas.insert(start, vma);
                } else {
                    vmas.remove(&start);
                }
                self.emit(Body::Stale(Object::Mm(id)));
            }
            _ => {}
        }
    }

    pub(super) fn create(&mut self, kind: Kind) -> OfdId {
        let id = free(&self.files.keys().copied().collect(), OfdId);
        self.serial += 1;
        let mut info = OfdInfo {
            id,
            kind: FileKind::Regular,
            inode: InodeId {
                dev: 1,
                ino: self.serial,
            },
            ..OfdInfo::default()
        };
        match kind {
            Kind::Regular => {}
            Kind::Epoll => {
                info.kind = FileKind::Epoll;
                self.epolls.insert(id, BTreeMap::new());
            }
            Kind::Inotify => {
                let group = free(&self.inotifies.keys().copied().collect(), GroupId);
                info.kind = FileKind::Inotify;
                info.group = Some(group);
                self.inotifies.insert(group, BTreeMap::new());
            }
            Kind::Socket => {
                let sock = free(&self.sockets.keys().copied().collect(), SockId);
                info.kind = FileKind::Socket;
                info.sock = Some(sock);
                let socket = SockInfo {
                    sock,
                    ino: self.serial,
                    ..SockInfo::default()
                };
                self.sockets.insert(sock, socket);
            }
        }
        self.files.insert(id, info);
        id
    }

    /// What goes with a file.
    pub(super) fn forget_details(&mut self, file: &OfdInfo) {
        if let Some(sock) = file.sock {
            self.sockets.remove(&sock);
        }
        if let Some(group) = file.group {
            for wd in self
                .inotifies
                .remove(&group)
                .unwrap_or_default()
                .into_keys()
            {
                self.emit(Body::WatchDel { group, wd });
            }
        }
    }

    fn set_watch(&mut self, group: GroupId, wd: i32, mask: Option<u32>) {
        let watches = self.inotifies.get_mut(&group).expect("open");
        match mask {
            Some(mask) => {
                let watch = Watch {
                    mask,
                    ..Watch::default()
                };
                watches.insert(wd, watch);
                self.emit(Body::WatchSet { group, wd, watch });
            }
            None if watches.remove(&wd).is_some() => self.emit(Body::WatchDel { group, wd }),
            None => {}
        }
    }

    pub(super) fn copy_fs(&mut self, from: FsId) -> FsId {
        let fs = free(&self.fss.keys().copied().collect(), FsId);
        self.fss.insert(fs, self.fss[&from]);
        fs
    }

    /// As exec gives one.
    pub(super) fn new_mm(&mut self, who: usize) {
        let mm = free(&self.mms.keys().copied().collect(), MmId);
        self.mms.remove(&self.threads[who].mm);
        self.mms.insert(mm, BTreeMap::new());
        self.threads[who].mm = mm;
    }

    pub(super) fn attrs(&self, who: usize) -> TaskAttrs {
        let thread = &self.threads[who];
        TaskAttrs {
            task: thread.task,
            fs: Some((thread.fs, self.fss[&thread.fs])),
            ids: thread.ids,
        }
    }

    pub(super) fn say_attrs(&mut self, who: usize) {
        let attrs = self.attrs(who);
        self.emit(Body::TaskAttrs(Box::new(attrs)));
    }
}
