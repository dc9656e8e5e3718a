//! Open file descriptions and what refers to them, for `apply`.

use super::apply::{Anomaly, Step};
use super::event::{FileKind, Object, OfdInfo, Owner, SockInfo, Watch};
use super::ids::{Fd, FilesId, GroupId, OfdId};
use super::state::{Epoll, Inotify, Ofd, Slot, Socket, Trust};
use std::collections::btree_map::Entry;

/// How many events a description without descriptors is kept.
const UNHELD_EVENTS: u64 = 4096;

/// How many events a copy is waited for whose end is not said. A thread that copies can be kept
/// from going on for as long as the scheduler, or a hypervisor, likes.
const COPY_EVENTS: u64 = 1 << 20;

/// Of a set that begins with this description: one with something in it already was not seen
/// from its beginning.
fn trust(info: &OfdInfo) -> Trust {
    if info.empty {
        Trust::Verified
    } else {
        Trust::Suspect
    }
}

/// What is said of a description, by what is known of the one with its address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Heard {
    /// It is that one.
    Same,
    /// Nothing, or less than was said later.
    Old,
    /// It is another one.
    Another,
    /// Another one, though descriptors still refer to the one that was known.
    Conflict,
}

fn hear(ofd: &mut Ofd, info: &OfdInfo, was_held: bool, seq: u64) -> Heard {
    let (known, same) = (ofd.kind != FileKind::Unknown, ofd.is(info));
    // What made it, said once more. A reading never says that of a file: it is later than its
    // number, so what nothing refers to gives way to what it says.
    let repeated = info.empty && ofd.told == seq;
    if info.kind == FileKind::Unknown || (known && (repeated || (was_held && ofd.told > seq))) {
        return if same { Heard::Same } else { Heard::Old };
    }
    // Many files share an inode, but only a new one is just made or empty.
    if same && (was_held || !info.empty) {
        ofd.told = ofd.told.max(seq);
        // It may be another one of the same kind after all, made where the last one was before
        // all had said that they had lost it. Of an owner an event of its own follows.
        if ofd.seq <= seq {
            ofd.seq = seq;
            (ofd.flags, ofd.owner) = (info.flags, info.owner);
        }
        return Heard::Same;
    }
    if known && was_held {
        Heard::Conflict
    } else {
        Heard::Another
    }
}

impl Step<'_> {
    /// Makes a descriptor of a known table refer to a description, unless later
    /// news of the descriptor came first; `socket` is its socket, if that was said too.
    pub(super) fn set_slot(
        &mut self,
        files: FilesId,
        fd: Fd,
        ofd: &OfdInfo,
        cloexec: bool,
        socket: Option<&SockInfo>,
    ) {
        let Some(table) = self.state.tables.get_mut(&files) else {
            return;
        };
        let slot = Slot {
            seq: self.seq,
            ofd: ofd.id,
            cloexec,
        };
        let old = match table.fds.entry(fd) {
            Entry::Vacant(place) => {
                place.insert(slot);
                None
            }
            Entry::Occupied(known) if known.get().seq > self.seq => return self.tell(ofd, socket),
            Entry::Occupied(mut known) => Some(known.insert(slot)),
        };
        // The new reference first: it may be the one that is replaced.
        self.reference(ofd, socket);
        if let Some(old) = old {
            self.unref(old.ofd);
        }
    }

    fn reference(&mut self, info: &OfdInfo, socket: Option<&SockInfo>) {
        let mut refs = 1;
        if let Some(ofd) = self.state.ofds.get_mut(&info.id) {
            ofd.refs += 1;
            refs = ofd.refs;
            let heard = hear(ofd, info, refs > 1, self.seq);
            if heard == Heard::Conflict {
                self.anomalies.push(Anomaly::Conflict(info.id));
            }
            if matches!(heard, Heard::Same | Heard::Old) {
                if heard == Heard::Same {
                    self.hold_details(info, socket);
                }
                if let Some(socket) = socket {
                    self.socket(socket);
                }
                return;
            }
        }
        self.make(info, refs, socket);
    }

    /// Hears what an address stands for without a descriptor to put it under: of its table
    /// nothing is known, or later news.
    pub(super) fn tell(&mut self, info: &OfdInfo, socket: Option<&SockInfo>) {
        let Some(ofd) = self.state.ofds.get_mut(&info.id) else {
            return;
        };
        let refs = ofd.refs;
        match hear(ofd, info, refs > 0, self.seq) {
            Heard::Same | Heard::Old => {}
            Heard::Conflict => {
                self.anomalies.push(Anomaly::Conflict(info.id));
                self.make(info, refs, socket);
            }
            Heard::Another if refs > 0 => self.make(info, refs, socket),
            Heard::Another => {
                if let Some(ofd) = self.state.ofds.remove(&info.id) {
                    self.forget_details(info.id, &ofd);
                }
            }
        }
    }

    fn make(&mut self, info: &OfdInfo, refs: u32, socket: Option<&SockInfo>) {
        let ofd = Ofd {
            seq: self.seq,
            told: self.seq,
            refs,
            kind: info.kind,
            inode: info.inode,
            mode: info.mode,
            flags: info.flags,
            owner: info.owner,
            sock: info.sock,
            group: info.group,
        };
        let old = self.state.ofds.insert(info.id, Box::new(ofd));
        if let Some(old) = old {
            self.forget_details(info.id, &old);
        }
        self.detail(info, socket);
    }

    /// Makes what is kept apart from a description that is new.
    fn detail(&mut self, info: &OfdInfo, socket: Option<&SockInfo>) {
        let (seq, ofd) = (self.seq, info.id);
        if info.kind == FileKind::Epoll {
            let trust = trust(info);
            let epoll = Epoll {
                seq,
                trust,
                ..Epoll::default()
            };
            self.state.epolls.insert(ofd, epoll);
            self.state.note(Object::Epoll(ofd), trust);
        }
        self.hold_details(info, socket);
    }

    /// Makes what is kept apart from a description, unless it is there or has a later
    /// holder: an event that is repeated may tell of one that is gone by now.
    fn hold_details(&mut self, info: &OfdInfo, socket: Option<&SockInfo>) {
        let (seq, holder) = (self.seq, info.id);
        let missing = |known: Option<(OfdId, u64)>| {
            known.is_none_or(|(by, since)| by != holder && since <= seq)
        };
        if let Some(group) = info.group {
            let known = self.state.inotifies.get(&group);
            let known = known.map(|inotify| (inotify.holder, inotify.seq));
            if missing(known) {
                let trust = trust(info);
                let inotify = Inotify {
                    seq,
                    trust,
                    holder,
                    ..Inotify::default()
                };
                self.state.inotifies.insert(group, inotify);
                self.state.note(Object::Inotify(group), trust);
                self.bereave(known, |ofd| ofd.group = None);
            } else if known.is_some_and(|(by, _)| by != holder) {
                self.disclaim(holder, |ofd| ofd.group = None);
            }
        }
        if let Some(sock) = info.sock {
            let known = self.state.sockets.get(&sock);
            let known = known.map(|socket| (socket.holder, socket.seq));
            if missing(known) {
                let said = socket.filter(|info| info.sock == sock);
                let trust = said.map_or(Trust::Suspect, |_| Trust::Verified);
                let unsaid = || SockInfo {
                    sock,
                    ..SockInfo::default()
                };
                let socket = Socket {
                    seq,
                    trust,
                    holder,
                    info: said.cloned().unwrap_or_else(unsaid),
                };
                self.state.sockets.insert(sock, Box::new(socket));
                self.state.note(Object::Socket(sock), trust);
                self.bereave(known, |ofd| ofd.sock = None);
            } else if known.is_some_and(|(by, _)| by != holder) {
                self.disclaim(holder, |ofd| ofd.sock = None);
            }
        }
    }

    /// A description does not have what another has had since.
    fn disclaim(&mut self, id: OfdId, forget: impl FnOnce(&mut Ofd)) {
        if let Some(ofd) = self.state.ofds.get_mut(&id) {
            forget(ofd);
        }
    }

    /// A description lost to another what only one can have: its address is used again, so it
    /// is gone, whoever still seems to refer to it.
    fn bereave(&mut self, old: Option<(OfdId, u64)>, forget: impl FnOnce(&mut Ofd)) {
        let Some((old, _)) = old else { return };
        self.disclaim(old, forget);
        if self.state.ofds.get(&old).is_some_and(|ofd| ofd.refs > 0) {
            self.anomalies.push(Anomaly::Conflict(old));
        }
    }

    /// A description that no descriptor refers to is kept for a while: a table that is
    /// being copied may hold it, of which word comes later, or a message on its way.
    pub(super) fn unref(&mut self, id: OfdId) {
        if let Some(ofd) = self.state.ofds.get_mut(&id) {
            ofd.refs = ofd.refs.saturating_sub(1);
            if ofd.refs == 0 {
                ofd.seq = ofd.seq.max(self.seq);
                let seq = ofd.seq;
                self.state.note_unheld(seq, id);
            }
        }
    }

    /// Forgets the descriptions that nothing has referred to for long, and that no copy under
    /// way can hold.
    pub(super) fn purge(&mut self) {
        let waited = self.seq.saturating_sub(COPY_EVENTS);
        let copied = self.state.copies_since().map(|since| since.max(waited));
        let old = self.seq.saturating_sub(UNHELD_EVENTS);
        let old = copied.map_or(old, |since| since.min(old));
        while let Some(id) = self.state.next_unheld(old) {
            // What had news since is on the list once more.
            let ofd = self.state.ofds.get(&id);
            if ofd.is_some_and(|ofd| ofd.refs == 0 && ofd.seq <= old)
                && let Some(ofd) = self.state.ofds.remove(&id)
            {
                self.forget_details(id, &ofd);
            }
        }
    }

    /// Forgets what is kept apart from a description that is gone.
    fn forget_details(&mut self, id: OfdId, ofd: &Ofd) {
        self.state.names.remove(&id);
        if ofd.kind == FileKind::Epoll {
            self.state.epolls.remove(&id);
            self.state.gone(Object::Epoll(id));
        }
        // Another description may have what has the same address now.
        let held = |holder: Option<OfdId>| holder == Some(id);
        if let Some(sock) = ofd.sock
            && held(self.state.sockets.get(&sock).map(|socket| socket.holder))
        {
            self.state.sockets.remove(&sock);
            self.state.gone(Object::Socket(sock));
        }
        if let Some(group) = ofd.group
            && held(
                self.state
                    .inotifies
                    .get(&group)
                    .map(|inotify| inotify.holder),
            )
        {
            self.state.inotifies.remove(&group);
            self.state.gone(Object::Inotify(group));
        }
    }

    pub(super) fn ofd_changed(&mut self, id: OfdId, flags: u32, owner: Owner) {
        // One that no descriptor was seen of yet is described when one is.
        if let Some(ofd) = self.state.ofds.get_mut(&id)
            && ofd.seq <= self.seq
        {
            ofd.seq = self.seq;
            ofd.flags = flags;
            ofd.owner = owner;
            if ofd.refs == 0 {
                self.state.note_unheld(self.seq, id);
            }
        }
    }

    pub(super) fn watch(&mut self, group: GroupId, wd: i32, watch: Option<Watch>) {
        // An instance of somebody else, or one that dies: nobody asks for it.
        let Some(inotify) = self.state.inotifies.get_mut(&group) else {
            return;
        };
        if inotify.seq >= self.seq {
            return;
        }
        inotify.seq = self.seq;
        inotify.paths.remove(&wd);
        match watch {
            Some(watch) => inotify.watches.insert(wd, watch),
            None => inotify.watches.remove(&wd),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::apply::apply;
    use crate::model::check::check;
    use crate::model::event::{Body, Event, Owner, TaskInfo};
    use crate::model::ids::SockId;
    use crate::model::snapshot::{Snapshot, absorb, replay};
    use crate::model::state::State;

    const FILES: FilesId = FilesId(64);
    const SOCK: SockId = SockId(128);

    /// One process; the events begin with number 3.
    fn start() -> State {
        let mut state = State::default();
        for (seq, body) in [
            (1, Body::FilesNew { files: FILES }),
            (2, Body::TaskNew(TaskInfo::sample(FILES))),
        ] {
            assert_eq!(apply(&mut state, &Event { seq, body }), []);
        }
        state
    }

    fn open(fd: i32, ofd: u64) -> Body {
        let ofd = OfdInfo {
            id: OfdId(ofd),
            kind: FileKind::Socket,
            sock: Some(SOCK),
            ..OfdInfo::default()
        };
        let socket = SockInfo {
            sock: SOCK,
            ino: ofd.id.0,
            ..SockInfo::default()
        };
        Body::FdInstall {
            files: FILES,
            fd: Fd(fd),
            cloexec: false,
            ofd,
            socket: Some(Box::new(socket)),
        }
    }

    fn close(fd: i32) -> Body {
        Body::FdClose {
            files: FILES,
            fd: Fd(fd),
        }
    }

    /// A socket whose address is used again outlives the description that had it before.
    #[test]
    fn a_socket_belongs_to_its_last_description() {
        let mut state = start();
        for (seq, body) in (3..).zip([open(3, 256), close(3), open(4, 320)]) {
            assert_eq!(apply(&mut state, &Event { seq, body }), []);
        }
        assert_eq!(check(&state), []);
        let body = Body::FdCloexec {
            files: FILES,
            fd: Fd(4),
            cloexec: true,
        };
        let seq = 10 + UNHELD_EVENTS;
        apply(&mut state, &Event { seq, body });
        assert!(!state.ofds.contains_key(&OfdId(256)), "kept for ever");
        assert_eq!(
            state.sockets.get(&SOCK).map(|socket| socket.info.ino),
            Some(320)
        );
        assert_eq!(check(&state), []);
    }

    /// Descriptors still refer to one file, as far as is known, when another one of the same kind
    /// is made at its address.
    #[test]
    fn an_installation_tells_flags_and_owner() {
        let eventfd = |fd, flags| Body::FdInstall {
            files: FILES,
            fd: Fd(fd),
            cloexec: false,
            ofd: OfdInfo {
                id: OfdId(256),
                kind: FileKind::Eventfd,
                flags,
                empty: true,
                ..OfdInfo::default()
            },
            socket: None,
        };
        let owner = Owner {
            pid: 7,
            kind: 1,
            signal: 10,
        };
        let owned = Body::Ofd {
            ofd: OfdId(256),
            flags: 0o4002,
            owner,
        };
        let mut state = start();
        for (seq, body) in (3..).zip([eventfd(3, 2), owned, eventfd(4, 2)]) {
            assert_eq!(apply(&mut state, &Event { seq, body }), []);
        }
        let ofd = &state.ofds[&OfdId(256)];
        assert_eq!((ofd.flags, ofd.owner, ofd.refs), (2, Owner::default(), 2));
        assert_eq!(check(&state), []);
    }

    /// A thread copies the table, another closes a descriptor, and the copy is said so late that
    /// nothing would be known of the description any more.
    #[test]
    fn what_a_copy_under_way_may_hold_is_kept() {
        let (copy, by) = (FilesId(256), TaskInfo::sample(FILES).task);
        let bodies = [open(3, 256), Body::FilesCopy { by }, close(3)];
        let mut state = start();
        for (seq, body) in (3..).zip(bodies) {
            assert_eq!(apply(&mut state, &Event { seq, body }), []);
        }
        let late = 10 + 2 * UNHELD_EVENTS;
        let bodies = [
            Body::FilesNew { files: copy },
            Body::FilesWord {
                files: copy,
                fds: vec![(Fd(3), OfdId(256), false)],
            },
            Body::FilesCopied { by },
            Body::FilesGone { files: copy },
        ];
        for (seq, body) in (late..).zip(bodies) {
            assert_eq!(apply(&mut state, &Event { seq, body }), []);
            assert_eq!(check(&state), []);
            let table = state.tables.get(&copy);
            assert!(table.is_none_or(|table| table.trust == Trust::Verified));
        }
        assert!(state.ofds.contains_key(&OfdId(256)));
        let seq = late + 10 + UNHELD_EVENTS;
        let body = close(3);
        apply(&mut state, &Event { seq, body });
        assert!(!state.ofds.contains_key(&OfdId(256)), "kept for ever");
    }

    /// Nobody waits for a copy for ever: the event of its end may be lost.
    #[test]
    fn a_copy_is_not_waited_for_for_ever() {
        let by = TaskInfo::sample(FILES).task;
        let mut state = start();
        for (seq, body) in (3..).zip([open(3, 256), Body::FilesCopy { by }, close(3)]) {
            apply(&mut state, &Event { seq, body });
        }
        for (seq, kept) in [(COPY_EVENTS, true), (COPY_EVENTS + 10, false)] {
            let body = close(3);
            apply(&mut state, &Event { seq, body });
            assert_eq!(state.ofds.contains_key(&OfdId(256)), kept);
        }
    }

    /// A file was just made when it was installed, and has no descriptor when that is said once
    /// more after a reading: it is none the less the one that a copy holds, of which word comes.
    #[test]
    fn what_is_repeated_of_a_description_is_no_news() {
        let copy = FilesId(256);
        let Body::FdInstall {
            files,
            fd,
            cloexec,
            ofd,
            socket,
        } = open(3, 256)
        else {
            unreachable!()
        };
        let ofd = OfdInfo { empty: true, ..ofd };
        let made = Body::FdInstall {
            files,
            fd,
            cloexec,
            ofd,
            socket,
        };
        let mut state = start();
        let events = [(3, made), (4, close(3))].map(|(seq, body)| Event { seq, body });
        for event in &events {
            assert_eq!(apply(&mut state, event), []);
        }
        assert_eq!(replay(&mut state, &events), []);
        let bodies = [
            Body::FilesNew { files: copy },
            Body::FilesWord {
                files: copy,
                fds: vec![(Fd(3), OfdId(256), false)],
            },
        ];
        for (seq, body) in (5..).zip(bodies) {
            assert_eq!(apply(&mut state, &Event { seq, body }), []);
        }
        assert_eq!(state.tables[&copy].trust, Trust::Verified);
    }

    /// An address was a file that was opened and closed while a reading was under way, which
    /// found another one there, later than its own number says.
    #[test]
    fn a_reading_says_what_an_address_is_that_nothing_refers_to() {
        let mut state = start();
        for (seq, body) in (3..).zip([open(3, 256), close(3)]) {
            assert_eq!(apply(&mut state, &Event { seq, body }), []);
        }
        let read = OfdInfo {
            id: OfdId(256),
            kind: FileKind::Pipe,
            ..OfdInfo::default()
        };
        let snapshot = Snapshot {
            seq: 2,
            tables: [(FILES, vec![(Fd(4), read, false)])].into(),
            ..Snapshot::default()
        };
        absorb(&mut state, &snapshot);
        assert_eq!(state.ofds[&OfdId(256)].kind, FileKind::Pipe);
    }

    /// That is a contradiction while the other still has descriptors.
    #[test]
    fn a_socket_has_one_description() {
        let mut state = start();
        apply(
            &mut state,
            &Event {
                seq: 3,
                body: open(3, 256),
            },
        );
        let anomalies = apply(
            &mut state,
            &Event {
                seq: 4,
                body: open(4, 320),
            },
        );
        assert_eq!(anomalies, [Anomaly::Conflict(OfdId(256))]);
        assert_eq!(check(&state), []);
    }
}
