//! Open file descriptions and what refers to them, for `apply`.

use super::apply::{Anomaly, Step};
use super::event::{FileKind, OfdInfo, Owner, SockInfo, Watch};
use super::ids::{Fd, FilesId, GroupId, OfdId};
use super::state::{Epoll, Inotify, Ofd, Slot, Socket, Trust};

/// How many events a description without descriptors is kept.
const UNHELD_EVENTS: u64 = 4096;

/// Of a set that begins with this description.
fn trust(info: &OfdInfo) -> Trust {
    if info.empty {
        Trust::Verified
    } else {
        Trust::Suspect
    }
}

impl Step<'_> {
    /// Makes a descriptor of a known table refer to a description, unless later
    /// news of the descriptor came first.
    pub(super) fn set_slot(&mut self, files: FilesId, fd: Fd, ofd: &OfdInfo, cloexec: bool) {
        let Some(table) = self.state.tables.get(&files) else {
            return;
        };
        if table.fds.get(&fd).is_some_and(|slot| slot.seq > self.seq) {
            return;
        }
        // The new reference first: it may be the one that is replaced.
        self.reference(ofd);
        let slot = Slot {
            seq: self.seq,
            ofd: ofd.id,
            cloexec,
        };
        let old = self
            .state
            .tables
            .get_mut(&files)
            .and_then(|table| table.fds.insert(fd, slot));
        if let Some(old) = old {
            self.unref(old.ofd);
        }
    }

    fn reference(&mut self, info: &OfdInfo) {
        let seq = self.seq;
        let mut refs = 1;
        if let Some(ofd) = self.state.ofds.get_mut(&info.id) {
            let was_held = ofd.refs > 0;
            ofd.refs += 1;
            refs = ofd.refs;
            let known = ofd.kind != FileKind::Unknown;
            let same = ofd.kind == info.kind && ofd.inode == info.inode && ofd.sock == info.sock;
            // Many files share an inode, but only a new one is just made or empty.
            let revived = was_held || !info.empty;
            if info.kind == FileKind::Unknown
                || (same && revived)
                || (known && was_held && ofd.seq > seq)
            {
                if same {
                    self.hold_details(info);
                }
                return;
            }
            if known && was_held {
                self.anomalies.push(Anomaly::Conflict(info.id));
            }
        }
        let ofd = Ofd {
            seq,
            refs,
            kind: info.kind,
            inode: info.inode,
            mode: info.mode,
            flags: info.flags,
            owner: info.owner,
            sock: info.sock,
            group: info.group,
        };
        let old = self.state.ofds.insert(info.id, ofd);
        self.forget_details(info.id, old);
        if info.kind == FileKind::Epoll {
            let epoll = Epoll {
                seq,
                trust: trust(info),
                ..Epoll::default()
            };
            self.state.epolls.insert(info.id, epoll);
        }
        self.hold_details(info);
    }

    /// Makes what is kept apart from a description, unless it is there or has a later
    /// holder: an event that is repeated may tell of one that is gone by now.
    fn hold_details(&mut self, info: &OfdInfo) {
        let (seq, holder) = (self.seq, info.id);
        let missing = |known: Option<(OfdId, u64)>| {
            known.is_none_or(|(by, since)| by != holder && since <= seq)
        };
        if let Some(group) = info.group {
            let known = self.state.inotifies.get(&group);
            if missing(known.map(|inotify| (inotify.holder, inotify.seq))) {
                let inotify = Inotify {
                    seq,
                    trust: trust(info),
                    holder,
                    ..Inotify::default()
                };
                self.state.inotifies.insert(group, inotify);
            }
        }
        if let Some(sock) = info.sock {
            let known = self.state.sockets.get(&sock);
            if missing(known.map(|socket| (socket.holder, socket.seq))) {
                let info = SockInfo {
                    sock,
                    ..SockInfo::default()
                };
                let socket = Socket {
                    seq,
                    trust: Trust::Suspect,
                    holder,
                    info,
                };
                self.state.sockets.insert(sock, socket);
            }
        }
    }

    /// A description that no descriptor refers to is kept for a while: a table that is
    /// being copied may hold it, of which word comes later, or a message on its way.
    pub(super) fn unref(&mut self, id: OfdId) {
        if let Some(ofd) = self.state.ofds.get_mut(&id) {
            ofd.refs = ofd.refs.saturating_sub(1);
            if ofd.refs == 0 {
                ofd.seq = ofd.seq.max(self.seq);
            }
        }
    }

    /// Forgets the descriptions that nothing has referred to for long.
    pub(super) fn purge(&mut self) {
        let old = self.seq.saturating_sub(UNHELD_EVENTS);
        let gone = self
            .state
            .ofds
            .extract_if(.., |_, ofd| ofd.refs == 0 && ofd.seq <= old);
        for (id, ofd) in gone.collect::<Vec<_>>() {
            self.forget_details(id, Some(ofd));
        }
    }

    /// Forgets what is kept apart from a description that is gone.
    fn forget_details(&mut self, id: OfdId, ofd: Option<Ofd>) {
        self.state.epolls.remove(&id);
        let Some(ofd) = ofd else { return };
        // Another description may have what has the same address now.
        let held = |holder: Option<OfdId>| holder == Some(id);
        if let Some(sock) = ofd.sock
            && held(self.state.sockets.get(&sock).map(|socket| socket.holder))
        {
            self.state.sockets.remove(&sock);
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
        match watch {
            Some(watch) => inotify.watches.insert(wd, watch),
            None => inotify.watches.remove(&wd),
        };
    }
}
