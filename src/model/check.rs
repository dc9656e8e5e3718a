//! What must hold between the parts of a state, whatever events made it.

use super::event::FileKind;
use super::ids::{FilesId, FsId, GroupId, MmId, OfdId, Pid, SockId, TaskId};
use super::state::State;
use std::collections::{BTreeMap, BTreeSet};

/// Two parts of a state contradict each other: a bug of the model itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inconsistency {
    /// A thread names a table that does not exist or does not list it.
    TableOfTask(TaskId, FilesId),
    /// A thread names an address space that does not exist or does not list it.
    MmOfTask(TaskId, MmId),
    /// A table lists a thread that does not use it.
    UserOfTable(FilesId, TaskId),
    /// An address space lists a thread that does not use it.
    UserOfMm(MmId, TaskId),
    /// A description does not exist or counts another number of descriptors.
    References(OfdId),
    /// A socket and its description do not name each other.
    Socket(SockId),
    /// A description of kind epoll has no item set, or an item set no description.
    Epoll(OfdId),
    /// A thread names directories that do not exist or do not list it.
    FsOfTask(TaskId, FsId),
    /// Directories list a thread that does not use them.
    UserOfFs(FsId, TaskId),
    /// A description of an inotify instance has no watches, or watches no description, or a path
    /// no watch.
    Inotify(GroupId),
    /// A name of a description that does not exist or is of a kind without names.
    Name(OfdId),
    /// Mappings overlap or are out of order.
    Mappings(MmId),
    /// Threads of one process are in different sessions or process groups.
    Session(Pid),
    /// What is derived from the objects says otherwise than they do.
    Index,
}

/// Everything that is contradictory; empty for a sound state.
#[must_use]
pub fn check(state: &State) -> Vec<Inconsistency> {
    let mut found = Vec::new();
    tasks(state, &mut found);
    users(state, &mut found);
    descriptions(state, &mut found);
    if !state.is_indexed() {
        found.push(Inconsistency::Index);
    }
    let unsound = state.mms.iter().filter(|(_, mm)| {
        let vmas = mm.vmas.as_deref().unwrap_or_default();
        let ordered = vmas.is_sorted_by(|a, b| a.end <= b.start);
        !ordered || vmas.iter().any(|vma| vma.start >= vma.end)
    });
    found.extend(unsound.map(|(id, _)| Inconsistency::Mappings(*id)));
    found
}

/// What threads name exists and lists them.
fn tasks(state: &State, found: &mut Vec<Inconsistency>) {
    for (id, task) in &state.tasks {
        let listed = |users: Option<&BTreeSet<TaskId>>| users.is_some_and(|u| u.contains(id));
        if let Some(files) = task.files
            && !listed(state.tables.get(&files).map(|table| &table.users))
        {
            found.push(Inconsistency::TableOfTask(*id, files));
        }
        if let Some(mm) = task.mm
            && !listed(state.mms.get(&mm).map(|mm| &mm.users))
        {
            found.push(Inconsistency::MmOfTask(*id, mm));
        }
        if let Some(fs) = task.fs
            && !listed(state.fss.get(&fs).map(|fs| &fs.users))
        {
            found.push(Inconsistency::FsOfTask(*id, fs));
        }
    }
    for (pid, tasks) in state.processes() {
        let ids = tasks.iter().filter_map(|(_, task)| task.ids.as_ref());
        let places: BTreeSet<_> = ids.map(|ids| (ids.session, ids.group)).collect();
        if places.len() > 1 {
            found.push(Inconsistency::Session(pid));
        }
    }
}

/// Threads that are listed name what lists them.
fn users(state: &State, found: &mut Vec<Inconsistency>) {
    for (id, table) in &state.tables {
        let uses = |task: &TaskId| state.tasks.get(task).and_then(|task| task.files);
        let others = table.users.iter().filter(|user| uses(user) != Some(*id));
        found.extend(others.map(|user| Inconsistency::UserOfTable(*id, *user)));
    }
    for (id, mm) in &state.mms {
        let uses = |task: &TaskId| state.tasks.get(task).and_then(|task| task.mm);
        let others = mm.users.iter().filter(|user| uses(user) != Some(*id));
        found.extend(others.map(|user| Inconsistency::UserOfMm(*id, *user)));
    }
    for (id, fs) in &state.fss {
        let uses = |task: &TaskId| state.tasks.get(task).and_then(|task| task.fs);
        let others = fs.users.iter().filter(|user| uses(user) != Some(*id));
        found.extend(others.map(|user| Inconsistency::UserOfFs(*id, *user)));
    }
}

/// Descriptions count their descriptors, and they and their details name each other.
fn descriptions(state: &State, found: &mut Vec<Inconsistency>) {
    let mut refs = BTreeMap::<OfdId, u32>::new();
    for slot in state.tables.values().flat_map(|table| table.fds.values()) {
        *refs.entry(slot.ofd).or_default() += 1;
    }
    let unknown = refs.keys().filter(|id| !state.ofds.contains_key(id));
    found.extend(unknown.map(|id| Inconsistency::References(*id)));
    for (id, ofd) in &state.ofds {
        if refs.get(id).copied().unwrap_or(0) != ofd.refs {
            found.push(Inconsistency::References(*id));
        }
        if let Some(sock) = ofd.sock
            && ofd.refs > 0
            && !state.sockets.contains_key(&sock)
        {
            found.push(Inconsistency::Socket(sock));
        }
        if let Some(group) = ofd.group
            && ofd.refs > 0
            && !state.inotifies.contains_key(&group)
        {
            found.push(Inconsistency::Inotify(group));
        }
        if (ofd.kind == FileKind::Epoll) != state.epolls.contains_key(id) {
            found.push(Inconsistency::Epoll(*id));
        }
    }
    for id in state.names.keys() {
        if !state.ofds.get(id).is_some_and(|ofd| ofd.kind.has_name()) {
            found.push(Inconsistency::Name(*id));
        }
    }
    for (id, socket) in &state.sockets {
        let holder = state.ofds.get(&socket.holder);
        if holder.and_then(|ofd| ofd.sock) != Some(*id) {
            found.push(Inconsistency::Socket(*id));
        }
    }
    for (id, inotify) in &state.inotifies {
        let holder = state.ofds.get(&inotify.holder);
        let mut paths = inotify.paths.keys();
        let watched = paths.all(|wd| inotify.watches.contains_key(wd));
        if holder.and_then(|ofd| ofd.group) != Some(*id) || !watched {
            found.push(Inconsistency::Inotify(*id));
        }
    }
    let unnamed = state
        .epolls
        .keys()
        .filter(|id| !state.ofds.contains_key(id));
    found.extend(unnamed.map(|id| Inconsistency::Epoll(*id)));
}
