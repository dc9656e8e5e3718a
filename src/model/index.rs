//! What is kept beside the objects, so that neither an event nor a look at what is suspect
//! costs more the more objects there are.
//!
//! All of it follows from the objects: [`State::reindex`] makes it of them, and the functions
//! here keep it right while they change.

use super::event::Object;
use super::ids::{OfdId, Pid, TaskId};
use super::state::{State, Task, Trust};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Derived from the objects of a state; only functions of the state use it.
#[derive(Clone, Debug, Default)]
pub struct Index {
    /// Every object whose trust is [`Trust::Suspect`], and no other.
    suspects: BTreeSet<Object>,
    /// Threads by their thread group.
    threads: BTreeSet<(Pid, TaskId)>,
    /// Threads by their parent, those that have one.
    children: BTreeSet<(Pid, TaskId)>,
    /// Descriptions that lost their last descriptor, by the number of the last event that
    /// concerned them; also such as were referred to again, or are gone.
    unheld: VecDeque<(u64, OfdId)>,
    /// Threads that copy a descriptor table, and the number of the event that said so.
    copies: BTreeMap<TaskId, u64>,
}

impl PartialEq for Index {
    fn eq(&self, other: &Self) -> bool {
        // The queue and the copies tell the history, not what is.
        self.suspects == other.suspects
            && self.threads == other.threads
            && self.children == other.children
    }
}

impl State {
    /// Everything that must be read again before it is used. What nothing refers to need not.
    #[must_use]
    pub fn suspects(&self) -> BTreeSet<Object> {
        let suspects = self.index.suspects.iter().copied();
        suspects.filter(|object| self.is_used(*object)).collect()
    }

    fn is_used(&self, object: Object) -> bool {
        let held = |id: &OfdId| self.ofds.get(id).is_some_and(|ofd| ofd.refs > 0);
        match object {
            Object::Tasks | Object::Mm(_) => true,
            Object::Files(id) => self.tables.get(&id).is_some_and(|t| !t.users.is_empty()),
            Object::Epoll(id) => held(&id),
            Object::Socket(id) => self.sockets.get(&id).is_some_and(|s| held(&s.holder)),
            Object::Inotify(id) => self.inotifies.get(&id).is_some_and(|i| held(&i.holder)),
        }
    }

    /// Marks an object for being read again, if it is there.
    pub fn suspect(&mut self, object: Object) {
        self.set_trust(object, Trust::Suspect);
    }

    /// Marks every object for being read again.
    pub fn suspect_everything(&mut self) {
        self.suspect_all(|_| true);
    }

    /// Marks all sockets and the items and watches of all instances.
    pub fn suspect_details(&mut self) {
        self.suspect_all(|object| !matches!(object, Object::Files(_) | Object::Mm(_)));
    }

    fn suspect_all(&mut self, which: impl Fn(&Object) -> bool) {
        let all: Vec<_> = self.trusts().map(|(object, _)| object).collect();
        for object in all.into_iter().filter(which) {
            self.suspect(object);
        }
    }

    /// Every object that can be suspect, and whether it is.
    fn trusts(&self) -> impl Iterator<Item = (Object, Trust)> {
        let tables = self.tables.iter();
        let tables = tables.map(|(id, table)| (Object::Files(*id), table.trust));
        let mms = self.mms.iter().map(|(id, mm)| (Object::Mm(*id), mm.trust));
        let sockets = self.sockets.iter();
        let sockets = sockets.map(|(id, socket)| (Object::Socket(*id), socket.trust));
        let epolls = self.epolls.iter();
        let epolls = epolls.map(|(id, epoll)| (Object::Epoll(*id), epoll.trust));
        let inotifies = self.inotifies.iter();
        let inotifies = inotifies.map(|(id, inotify)| (Object::Inotify(*id), inotify.trust));
        let details = sockets.chain(epolls).chain(inotifies);
        tables.chain(mms).chain(details)
    }

    /// Sets whether an object is right, if it is there.
    pub(super) fn set_trust(&mut self, object: Object, trust: Trust) {
        let field = match object {
            Object::Tasks => None,
            Object::Files(id) => self.tables.get_mut(&id).map(|table| &mut table.trust),
            Object::Mm(id) => self.mms.get_mut(&id).map(|mm| &mut mm.trust),
            Object::Epoll(id) => self.epolls.get_mut(&id).map(|epoll| &mut epoll.trust),
            Object::Socket(id) => self.sockets.get_mut(&id).map(|socket| &mut socket.trust),
            Object::Inotify(id) => self.inotifies.get_mut(&id).map(|i| &mut i.trust),
        };
        if let Some(field) = field {
            *field = trust;
            self.note(object, trust);
        }
    }

    /// Notes the trust that an object was given, or put in its place with.
    pub(super) fn note(&mut self, object: Object, trust: Trust) {
        match trust {
            Trust::Suspect => self.index.suspects.insert(object),
            Trust::Verified => self.index.suspects.remove(&object),
        };
    }

    /// Takes an object that is gone off the list.
    pub(super) fn gone(&mut self, object: Object) {
        self.index.suspects.remove(&object);
    }

    /// Puts a thread in.
    pub(super) fn put_task(&mut self, id: TaskId, task: Task) {
        let (tgid, parent) = (task.tgid, task.parent);
        let old = self.tasks.insert(id, task);
        let at = old.map(|old| (old.tgid, old.parent));
        if at == Some((tgid, parent)) {
            return;
        }
        if let Some((tgid, parent)) = at {
            self.index.remove_task(id, tgid, parent);
        }
        self.index.add_task(id, tgid, parent);
    }

    /// Takes a thread out.
    pub(super) fn take_task(&mut self, id: TaskId) -> Option<Task> {
        let task = self.tasks.remove(&id)?;
        self.index.remove_task(id, task.tgid, task.parent);
        self.index.copies.remove(&id);
        Some(task)
    }

    /// The threads of a process.
    pub(super) fn threads(&self, tgid: Pid) -> impl Iterator<Item = TaskId> {
        of(&self.index.threads, tgid)
    }

    /// Has the children of a process whose last news came before `seq` have no parent.
    pub(super) fn orphan(&mut self, parent: Pid, seq: u64) {
        let children: Vec<TaskId> = of(&self.index.children, parent).collect();
        for id in children {
            if let Some(task) = self.tasks.get_mut(&id)
                && task.seq < seq
            {
                task.parent = None;
                self.index.children.remove(&(parent, id));
            }
        }
    }

    /// Notes that a description has no descriptor since its last event.
    pub(super) fn note_unheld(&mut self, seq: u64, id: OfdId) {
        self.index.unheld.push_back((seq, id));
    }

    /// A description that may have been without a descriptor since this number or longer.
    pub(super) fn next_unheld(&mut self, seq: u64) -> Option<OfdId> {
        let (since, id) = *self.index.unheld.front()?;
        (since <= seq).then(|| {
            self.index.unheld.pop_front();
            id
        })
    }

    /// Notes that a thread copies a table.
    pub(super) fn copy_begins(&mut self, by: TaskId, seq: u64) {
        self.index.copies.insert(by, seq);
    }

    /// Notes that it does not any more.
    pub(super) fn copy_ends(&mut self, by: TaskId) {
        self.index.copies.remove(&by);
    }

    /// Number of the event with which the oldest copy under way began.
    pub(super) fn copies_since(&self) -> Option<u64> {
        self.index.copies.values().copied().min()
    }

    /// Makes the index of the objects, for a state that was put together from parts.
    pub fn reindex(&mut self) {
        self.index = self.make_index();
    }

    /// Whether the index says what the objects do.
    pub(super) fn is_indexed(&self) -> bool {
        let unheld = |id: &OfdId| self.index.unheld.iter().any(|(_, unheld)| unheld == id);
        let mut ofds = self.ofds.iter().filter(|(_, ofd)| ofd.refs == 0);
        self.index == self.make_index() && ofds.all(|(id, _)| unheld(id))
    }

    fn make_index(&self) -> Index {
        let mut index = Index::default();
        for (id, task) in &self.tasks {
            index.add_task(*id, task.tgid, task.parent);
        }
        let unheld = self.ofds.iter().filter(|(_, ofd)| ofd.refs == 0);
        let mut unheld: Vec<_> = unheld.map(|(id, ofd)| (ofd.seq, *id)).collect();
        unheld.sort_unstable();
        index.unheld = unheld.into();
        let suspects = self.trusts().filter(|(_, trust)| *trust == Trust::Suspect);
        index.suspects = suspects.map(|(object, _)| object).collect();
        index
    }
}

impl Index {
    fn add_task(&mut self, id: TaskId, tgid: Pid, parent: Option<Pid>) {
        self.threads.insert((tgid, id));
        if let Some(parent) = parent {
            self.children.insert((parent, id));
        }
    }

    fn remove_task(&mut self, id: TaskId, tgid: Pid, parent: Option<Pid>) {
        self.threads.remove(&(tgid, id));
        if let Some(parent) = parent {
            self.children.remove(&(parent, id));
        }
    }
}

fn of(index: &BTreeSet<(Pid, TaskId)>, pid: Pid) -> impl Iterator<Item = TaskId> {
    let all = (pid, TaskId(u64::MIN))..=(pid, TaskId(u64::MAX));
    index.range(all).map(|(_, id)| *id)
}
