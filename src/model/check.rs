//! What must hold between the parts of a state, whatever events made it.

use super::event::FileKind;
use super::ids::{FilesId, GroupId, MmId, OfdId, SockId, TaskId};
use super::state::State;
use std::collections::BTreeMap;

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
    /// An inotify instance and its description do not name each other.
    Inotify(GroupId),
    /// What is derived from the objects says otherwise than they do.
    Index,
}

/// Everything that is contradictory; empty for a sound state.
#[must_use]
pub fn check(state: &State) -> Vec<Inconsistency> {
    let mut found = Vec::new();
    for (id, task) in &state.tasks {
        if let Some(files) = task.files
            && !state
                .tables
                .get(&files)
                .is_some_and(|table| table.users.contains(id))
        {
            found.push(Inconsistency::TableOfTask(*id, files));
        }
        if let Some(mm) = task.mm
            && !state.mms.get(&mm).is_some_and(|mm| mm.users.contains(id))
        {
            found.push(Inconsistency::MmOfTask(*id, mm));
        }
    }
    let mut refs = BTreeMap::<OfdId, u32>::new();
    for (id, table) in &state.tables {
        for user in &table.users {
            if state
                .tasks
                .get(user)
                .is_none_or(|task| task.files != Some(*id))
            {
                found.push(Inconsistency::UserOfTable(*id, *user));
            }
        }
        for slot in table.fds.values() {
            *refs.entry(slot.ofd).or_default() += 1;
        }
    }
    for (id, mm) in &state.mms {
        for user in &mm.users {
            if state
                .tasks
                .get(user)
                .is_none_or(|task| task.mm != Some(*id))
            {
                found.push(Inconsistency::UserOfMm(*id, *user));
            }
        }
    }
    for id in refs.keys().filter(|id| !state.ofds.contains_key(id)) {
        found.push(Inconsistency::References(*id));
    }
    for (id, ofd) in &state.ofds {
        if refs.get(id).copied().unwrap_or(0) != ofd.refs {
            found.push(Inconsistency::References(*id));
        }
        if let Some(sock) = ofd.sock
            && state.sockets.get(&sock).is_none_or(|s| s.ofd != *id)
        {
            found.push(Inconsistency::Socket(sock));
        }
        if let Some(group) = ofd.group
            && state.inotifies.get(&group).is_none_or(|i| i.ofd != *id)
        {
            found.push(Inconsistency::Inotify(group));
        }
        if (ofd.kind == FileKind::Epoll) != state.epolls.contains_key(id) {
            found.push(Inconsistency::Epoll(*id));
        }
    }
    let holder = |id: &OfdId| state.ofds.get(id);
    for (id, socket) in &state.sockets {
        if holder(&socket.ofd).is_none_or(|ofd| ofd.sock != Some(*id)) {
            found.push(Inconsistency::Socket(*id));
        }
    }
    for (id, inotify) in &state.inotifies {
        if holder(&inotify.ofd).is_none_or(|ofd| ofd.group != Some(*id)) {
            found.push(Inconsistency::Inotify(*id));
        }
    }
    let unnamed = state
        .epolls
        .keys()
        .filter(|id| !state.ofds.contains_key(id));
    found.extend(unnamed.map(|id| Inconsistency::Epoll(*id)));
    if !state.is_indexed() {
        found.push(Inconsistency::Index);
    }
    found
}
