//! `State x Event -> State`.
//!
//! Total: any event can be applied to any state. What does not fit becomes an
//! [`Anomaly`] and makes the object suspect; nothing is guessed. An event whose
//! number is not above the object's generation was applied before and is ignored.

use super::event::{Body, Event, FileKind, Object, OfdInfo, SockInfo, TaskInfo};
use super::ids::{CgroupId, Fd, FilesId, MmId, OfdId, Pid, SockId, TaskId};
use super::state::{EpollItem, Mm, State, Table, Task, Trust};

/// Something an event says that the state cannot explain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Anomaly {
    /// An event about a thread that was never seen.
    UnknownTask(TaskId),
    /// A process came into a tracked cgroup and was never seen.
    UnknownProcess(Pid),
    /// An event about a descriptor table that was never seen.
    UnknownTable(FilesId),
    /// An event about an epoll instance that was never seen.
    UnknownEpoll(OfdId),
    /// A description is not what it was, though descriptors still refer to it.
    Conflict(OfdId),
    /// An event said so.
    Stale(Object),
    /// An event could not be decoded.
    Malformed,
}

/// Applies one event and says what did not fit.
pub fn apply(state: &mut State, event: &Event) -> Vec<Anomaly> {
    let mut step = Step {
        state,
        seq: event.seq,
        anomalies: Vec::new(),
    };
    step.body(&event.body);
    step.purge();
    step.state.seq = step.state.seq.max(event.seq);
    step.anomalies
}

pub(super) struct Step<'a> {
    pub(super) state: &'a mut State,
    pub(super) seq: u64,
    pub(super) anomalies: Vec<Anomaly>,
}

impl Step<'_> {
    fn body(&mut self, body: &Body) {
        match *body {
            Body::TaskNew(ref info) => self.task_new(info, false),
            Body::TaskExec(ref info) => self.task_new(info, false),
            Body::TaskRename { task, ref comm } => {
                if let Some(task) = self.task(task) {
                    task.comm.clone_from(comm);
                }
            }
            Body::TaskExit { task } => self.task_exit(task),
            Body::TaskRelease { task } => self.task_release(task),
            Body::CgroupMove {
                tgid,
                cgroup,
                tracked,
            } => self.cgroup_move(tgid, cgroup, tracked),
            Body::TaskFiles { task, files } => self.task_files(task, files),
            Body::FilesCopy { by } => self.state.copy_begins(by, self.seq),
            Body::FilesCopied { by } => self.state.copy_ends(by),
            Body::FilesNew { files } => self.files_new(files),
            Body::FilesGone { files } => self.files_gone(files),
            Body::FilesWord { files, ref fds } => self.files_word(files, fds),
            Body::FdInstall {
                files,
                fd,
                cloexec,
                ref ofd,
                ref socket,
            } => {
                if self.table(files).is_some() {
                    self.set_slot(files, fd, ofd, cloexec, socket.as_deref());
                } else {
                    self.tell(ofd, socket.as_deref());
                }
            }
            Body::FdClose { files, fd } => {
                let seq = self.seq;
                if let Some(table) = self.table(files)
                    && table.fds.get(&fd).is_some_and(|slot| slot.seq < seq)
                    && let Some(slot) = table.fds.remove(&fd)
                {
                    self.unref(slot.ofd);
                }
            }
            Body::FdCloexec { files, fd, cloexec } => {
                let seq = self.seq;
                if let Some(table) = self.table(files)
                    && let Some(slot) = table.fds.get_mut(&fd)
                    && slot.seq < seq
                {
                    slot.cloexec = cloexec;
                    slot.seq = seq;
                }
            }
            Body::CloexecWord { files, base, bits } => self.cloexec_word(files, base, bits),
            Body::ExecClose { files } => self.exec_close(files),
            Body::Socket(ref info) => self.socket(info),
            Body::SocketState {
                sock,
                state,
                shutdown,
            } => self.socket_state(sock, state, shutdown),
            Body::TaskAttrs(ref attrs) => self.task_attrs(attrs),
            Body::Ofd { ofd, flags, owner } => self.ofd_changed(ofd, flags, owner),
            Body::WatchSet { group, wd, watch } => self.watch(group, wd, Some(watch)),
            Body::WatchDel { group, wd } => self.watch(group, wd, None),
            Body::EpollSet {
                epoll,
                target,
                fd,
                events,
                data,
            } => self.epoll_item(epoll, (target, fd), Some((events, data))),
            Body::EpollDel { epoll, target, fd } => self.epoll_item(epoll, (target, fd), None),
            Body::Stale(object) => {
                self.anomalies.push(Anomaly::Stale(object));
                self.state.suspect(object);
            }
            Body::Malformed => self.anomalies.push(Anomaly::Malformed),
        }
    }

    /// The thread, if it is known and this event is news to it.
    pub(super) fn task(&mut self, id: TaskId) -> Option<&mut Task> {
        match self.state.tasks.get_mut(&id) {
            None => {
                self.anomalies.push(Anomaly::UnknownTask(id));
                None
            }
            Some(task) if task.seq >= self.seq => None,
            Some(task) => {
                task.seq = self.seq;
                Some(task)
            }
        }
    }

    /// The table, if it is known and this event is news to it.
    fn table(&mut self, id: FilesId) -> Option<&mut Table> {
        match self.state.tables.get_mut(&id) {
            None => {
                self.anomalies.push(Anomaly::UnknownTable(id));
                None
            }
            Some(table) if table.seq >= self.seq => None,
            Some(table) => {
                table.seq = self.seq;
                Some(table)
            }
        }
    }

    pub(super) fn task_new(&mut self, info: &TaskInfo, zombie: bool) {
        let id = info.task;
        let (mut fs, mut ids) = (None, None);
        if let Some(old) = self.state.tasks.get_mut(&id) {
            if old.seq >= self.seq {
                return;
            }
            // What an exec leaves alone, and else is said next.
            (fs, ids) = (old.fs, old.ids.take());
            let (old_files, old_mm) = (old.files, old.mm);
            if old_files != info.files {
                self.leave_table(id, old_files);
            }
            if old_mm != info.mm {
                self.leave_mm(id, old_mm);
            }
        }
        let task = Task {
            seq: self.seq,
            tid: info.tid,
            tgid: info.tgid,
            parent: Some(info.parent),
            files: info.files,
            mm: info.mm,
            cgroup: info.cgroup,
            comm: info.comm.clone(),
            zombie,
            fs,
            ids,
        };
        self.state.put_task(id, task);
        self.join_table(id, info.files);
        self.join_mm(id, info.mm);
    }

    fn task_exit(&mut self, id: TaskId) {
        if !self.state.tasks.contains_key(&id) {
            return; // what was never known need not be known to be gone
        }
        let Some(task) = self.task(id) else { return };
        task.zombie = true;
        let (files, mm, tgid) = (task.files.take(), task.mm.take(), task.tgid);
        let fs = task.fs.take();
        self.leave_fs(id, fs);
        self.leave_table(id, files);
        self.leave_mm(id, mm);
        let dead = |id: &TaskId| self.state.tasks.get(id).is_none_or(|task| task.zombie);
        if self.state.threads(tgid).all(|id| dead(&id)) {
            // The children have a new parent, which no hook names.
            self.state.orphan(tgid, self.seq);
        }
    }

    fn task_release(&mut self, id: TaskId) {
        if self.state.tasks.contains_key(&id) && self.task(id).is_some() {
            self.forget_task(id);
        }
    }

    pub(super) fn forget_task(&mut self, id: TaskId) {
        if let Some(task) = self.state.take_task(id) {
            self.leave_fs(id, task.fs);
            self.leave_table(id, task.files);
            self.leave_mm(id, task.mm);
        }
    }

    fn cgroup_move(&mut self, tgid: Pid, cgroup: CgroupId, tracked: bool) {
        let members: Vec<TaskId> = self.state.threads(tgid).collect();
        if tracked && members.is_empty() {
            self.anomalies.push(Anomaly::UnknownProcess(tgid));
        }
        for id in members {
            let Some(task) = self.task(id) else { continue };
            if tracked {
                task.cgroup = cgroup;
            } else {
                self.forget_task(id);
            }
        }
    }

    fn task_files(&mut self, id: TaskId, files: FilesId) {
        let Some(task) = self.task(id) else { return };
        let old = task.files.replace(files);
        if old != Some(files) {
            self.leave_table(id, old);
            self.join_table(id, Some(files));
        }
    }

    fn join_table(&mut self, task: TaskId, files: Option<FilesId>) {
        let Some(files) = files else { return };
        if !self.state.tables.contains_key(&files) {
            self.anomalies.push(Anomaly::UnknownTable(files));
            // When it was made is not known: before anything that reads it.
            self.state.tables.insert(
                files,
                Table {
                    seq: self.seq,
                    ..Table::default()
                },
            );
            self.state.note(Object::Files(files), Trust::Suspect);
        }
        if let Some(table) = self.state.tables.get_mut(&files) {
            table.users.insert(task);
        }
    }

    fn leave_table(&mut self, task: TaskId, files: Option<FilesId>) {
        let Some(files) = files else { return };
        if let Some(table) = self.state.tables.get_mut(&files)
            && table.users.remove(&task)
            && table.users.is_empty()
        {
            self.forget_table(files);
        }
    }

    pub(super) fn forget_table(&mut self, files: FilesId) {
        if let Some(table) = self.state.tables.remove(&files) {
            self.state.gone(Object::Files(files));
            for slot in table.fds.values() {
                self.unref(slot.ofd);
            }
        }
    }

    fn join_mm(&mut self, task: TaskId, mm: Option<MmId>) {
        let Some(mm) = mm else { return };
        if let Some(known) = self.state.mms.get_mut(&mm) {
            known.users.insert(task);
            return;
        }
        let new = Mm {
            seq: self.seq,
            users: [task].into(),
            ..Mm::default()
        };
        self.state.mms.insert(mm, new);
        self.state.note(Object::Mm(mm), Trust::Suspect);
    }

    fn leave_mm(&mut self, task: TaskId, mm: Option<MmId>) {
        let Some(id) = mm else { return };
        if let Some(mm) = self.state.mms.get_mut(&id)
            && mm.users.remove(&task)
            && mm.users.is_empty()
        {
            self.state.mms.remove(&id);
            self.state.gone(Object::Mm(id));
        }
    }

    fn files_new(&mut self, files: FilesId) {
        if self
            .state
            .tables
            .get(&files)
            .is_some_and(|table| table.seq >= self.seq)
        {
            return;
        }
        // The address is new or used again, and what had it before is gone; or a
        // thread that moved here is introduced, and others go on using the table.
        let users = self
            .state
            .tables
            .get(&files)
            .map(|table| table.users.clone());
        self.forget_table(files);
        let table = Table {
            born: self.seq,
            seq: self.seq,
            trust: Trust::Verified,
            users: users.unwrap_or_default(),
            ..Table::default()
        };
        self.state.tables.insert(files, table);
    }

    fn files_word(&mut self, files: FilesId, fds: &[(Fd, OfdId, bool)]) {
        if self.table(files).is_none() {
            return;
        }
        for (fd, id, cloexec) in fds {
            let known = self.state.ofds.get(id);
            let known = known.is_some_and(|ofd| ofd.kind != FileKind::Unknown);
            let info = OfdInfo {
                id: *id,
                ..OfdInfo::default()
            };
            self.set_slot(files, *fd, &info, *cloexec, None);
            if !known {
                self.state.suspect(Object::Files(files));
            }
        }
    }

    /// Unless a thread uses it: then it is not what the failing fork copied.
    fn files_gone(&mut self, files: FilesId) {
        let table = self.state.tables.get(&files);
        if table.is_some_and(|table| table.users.is_empty() && table.seq < self.seq) {
            self.forget_table(files);
        }
    }

    fn cloexec_word(&mut self, files: FilesId, base: Fd, bits: u64) {
        let seq = self.seq;
        let Some(table) = self.table(files) else {
            return;
        };
        let last = Fd(base.0.saturating_add(63));
        for (fd, slot) in table.fds.range_mut(base..=last) {
            if slot.seq < seq {
                slot.cloexec = bits >> (fd.0 - base.0) & 1 != 0;
                slot.seq = seq;
            }
        }
    }

    fn exec_close(&mut self, files: FilesId) {
        let seq = self.seq;
        let Some(table) = self.table(files) else {
            return;
        };
        let closed = table
            .fds
            .extract_if(.., |_, slot| slot.cloexec && slot.seq < seq);
        let closed: Vec<OfdId> = closed.map(|(_, slot)| slot.ofd).collect();
        for ofd in closed {
            self.unref(ofd);
        }
    }

    pub(super) fn socket(&mut self, info: &SockInfo) {
        // A socket no descriptor refers to is described again when one does.
        if let Some(socket) = self.state.sockets.get_mut(&info.sock)
            && socket.seq <= self.seq
        {
            socket.seq = self.seq;
            socket.info.clone_from(info);
            self.state
                .set_trust(Object::Socket(info.sock), Trust::Verified);
        }
    }

    fn socket_state(&mut self, sock: SockId, state: u8, shutdown: u8) {
        if let Some(socket) = self.state.sockets.get_mut(&sock)
            && socket.seq < self.seq
        {
            socket.seq = self.seq;
            socket.info.state = state;
            socket.info.shutdown = shutdown;
        }
    }

    fn epoll_item(&mut self, id: OfdId, key: (OfdId, Fd), value: Option<(u32, u64)>) {
        let Some(epoll) = self.state.epolls.get_mut(&id) else {
            // The file that dies may be watched by anyone; nobody watches through one that
            // was never seen.
            if value.is_some() {
                self.anomalies.push(Anomaly::UnknownEpoll(id));
            }
            return;
        };
        if epoll.seq >= self.seq {
            return;
        }
        epoll.seq = self.seq;
        match value {
            Some((events, data)) => {
                let item = EpollItem {
                    seq: self.seq,
                    events,
                    data,
                };
                epoll.items.insert(key, item);
            }
            None => {
                epoll.items.remove(&key);
            }
        }
    }
}
