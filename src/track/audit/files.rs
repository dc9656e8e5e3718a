//! Descriptors and what they refer to.

use super::Audit;
use super::kernel::fds::{self, ProcFd, ProcItem, ProcWatch};
use super::kernel::place_at;
use super::kernel::sockets::ProcSocket;
use crate::model::event::FileKind;
use crate::model::ids::{Fd, FilesId, GroupId, OfdId, Pid, Tid};
use crate::model::state::Ofd;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::rc::Rc;

impl Audit<'_> {
    /// Compares the table that this thread uses.
    pub(super) fn table(&mut self, pid: Pid, tid: Tid, files: FilesId) {
        let Some(table) = self.state.tables.get(&files) else {
            return;
        };
        let kernel = match fds::read(pid, tid) {
            Ok(fds) => fds,
            Err(error) => return self.unread(pid, format!("table of {tid}"), &error),
        };
        let sockets = self.sockets.of(pid);
        let fds: BTreeSet<Fd> = table.fds.keys().chain(kernel.keys()).copied().collect();
        for fd in fds {
            self.compared.descriptors += 1;
            let truth = kernel.get(&fd);
            let slot = table.fds.get(&fd);
            let ofd = slot.and_then(|slot| Some((slot, self.state.ofds.get(&slot.ofd)?)));
            let model = ofd.map(|(slot, ofd)| {
                let inode = match truth {
                    Some(truth) => self.known(ofd.inode, truth.place),
                    None => ofd.inode.to_string(),
                };
                describe(kind(ofd.kind), &inode, ofd.flags, slot.cloexec)
            });
            let said = truth.map(|truth| {
                let inode = self.found(truth.place);
                describe(truth.kind, &inode, truth.flags, truth.cloexec)
            });
            let (model, said) = (model.unwrap_or_default(), said.unwrap_or_default());
            self.differ(pid, format!("fd {fd}"), model, said);
            if let (Some((slot, ofd)), Some(truth)) = (ofd, truth) {
                self.open_file((pid, fd), slot.ofd, ofd, truth, &sockets);
            }
        }
    }

    fn open_file(
        &mut self,
        at: (Pid, Fd),
        id: OfdId,
        ofd: &Ofd,
        truth: &ProcFd,
        sockets: &Rc<BTreeMap<u64, ProcSocket>>,
    ) {
        if let Some(name) = self.state.names.get(&id) {
            self.compared.names += 1;
            let name = String::from_utf8_lossy(name);
            self.differ(at.0, format!("name of fd {}", at.1), name, &truth.link);
        }
        if ofd.kind == FileKind::Epoll {
            self.epoll(at, id, truth);
        }
        if let Some(group) = ofd.group {
            self.inotify(at, group, truth);
        }
        self.settings(at, ofd);
        let Some(sock) = ofd.sock else { return };
        match (self.state.sockets.get(&sock), sockets.get(&ofd.inode.ino)) {
            (Some(socket), Some(truth)) => self.socket(at, socket, truth),
            // Not every socket is on a list; the model has every one that is open.
            (None, _) => self.differ(at.0, format!("socket of fd {}", at.1), "", "exists"),
            (Some(_), None) => {}
        }
    }

    fn inotify(&mut self, (pid, fd): (Pid, Fd), group: GroupId, truth: &ProcFd) {
        /// `IN_ALL_EVENTS`; other bits are the kernel's own.
        const EVENTS: u32 = 0xfff;
        let watches = self.state.inotifies.get(&group);
        let watches = watches.into_iter().flat_map(|inotify| &inotify.watches);
        let model: Vec<ProcWatch> = watches
            .map(|(wd, watch)| ProcWatch {
                wd: *wd,
                inode: watch.inode,
                mask: watch.mask & EVENTS,
            })
            .collect();
        let shown = |watch: &ProcWatch| ProcWatch {
            mask: watch.mask & EVENTS,
            ..*watch
        };
        let kernel: Vec<ProcWatch> = truth.watches.iter().map(shown).collect();
        self.compared.watches += kernel.len();
        self.paths((pid, fd), group);
        let object = format!("watches of inotify fd {fd}");
        self.differ_sets(pid, object, (&model, &kernel), |watch| {
            let ProcWatch { wd, inode, mask } = watch;
            format!("wd {wd} inode {inode} mask {mask:x}")
        });
    }

    /// The paths of what is watched still lead there. Those that lead nowhere are no difference:
    /// a file keeps its watch for a while after it lost its name.
    fn paths(&mut self, (pid, fd): (Pid, Fd), group: GroupId) {
        let Some(inotify) = self.state.inotifies.get(&group) else {
            return;
        };
        for (wd, path) in &inotify.paths {
            self.compared.watched_paths += 1;
            let object = format!("path of watch {wd} of inotify fd {fd}");
            match place_at(Path::new(OsStr::from_bytes(path))) {
                Err(error) => self.unread(pid, object, &error),
                Ok(place) => {
                    let inode = inotify.watches.get(wd).map_or(0, |watch| watch.inode.ino);
                    self.differ(pid, object, inode.to_string(), place.ino.to_string());
                }
            }
        }
    }

    fn epoll(&mut self, (pid, fd): (Pid, Fd), id: OfdId, truth: &ProcFd) {
        const ONESHOT: u32 = 1 << 30;
        // The kernel disarms a one-shot item when it fires, which no hook sees.
        let armed = |item: ProcItem| ProcItem {
            events: if item.events & ONESHOT != 0 {
                ONESHOT
            } else {
                item.events
            },
            ..item
        };
        let items = self
            .state
            .epolls
            .get(&id)
            .into_iter()
            .flat_map(|epoll| &epoll.items);
        let mut model: Vec<ProcItem> = items
            .map(|((target, fd), item)| {
                let ino = self.state.ofds.get(target).map_or(0, |ofd| ofd.inode.ino);
                armed(ProcItem {
                    fd: *fd,
                    events: item.events,
                    data: item.data,
                    ino,
                })
            })
            .collect();
        let mut kernel: Vec<ProcItem> = truth.items.iter().copied().map(armed).collect();
        // A description that no descriptor refers to any more is known by address only.
        let unknown: BTreeSet<_> = model
            .iter()
            .filter(|item| item.ino == 0)
            .map(|item| (item.fd, item.data))
            .collect();
        for item in &mut kernel {
            if unknown.contains(&(item.fd, item.data)) {
                item.ino = 0;
            }
        }
        for item in &mut model {
            if unknown.contains(&(item.fd, item.data)) {
                item.ino = 0;
            }
        }
        self.compared.epoll_items += kernel.len();
        let object = format!("items of epoll fd {fd}");
        self.differ_sets(pid, object, (&model, &kernel), |item| {
            let ProcItem {
                fd,
                events,
                data,
                ino,
            } = item;
            format!("tfd {fd} events {events:x} data {data:x} ino {ino}")
        });
    }
}

fn describe(kind: &str, inode: &str, flags: u32, cloexec: bool) -> String {
    let flags = flags & !fds::O_CLOEXEC;
    let cloexec = if cloexec { " cloexec" } else { "" };
    format!("{kind} {inode} flags {flags:o}{cloexec}")
}

fn kind(kind: FileKind) -> &'static str {
    match kind {
        FileKind::Unknown => "unknown",
        FileKind::Socket => "socket",
        FileKind::Pipe => "pipe",
        FileKind::Eventfd => "eventfd",
        FileKind::Epoll => "eventpoll",
        FileKind::Timerfd => "timerfd",
        FileKind::Signalfd => "signalfd",
        FileKind::Inotify => "inotify",
        FileKind::Fanotify => "fanotify",
        FileKind::Pidfd => "pidfd",
        FileKind::Memfd => "memfd",
        FileKind::IoUring => "io_uring",
        FileKind::Userfaultfd => "userfaultfd",
        FileKind::PerfEvent => "perf_event",
        FileKind::Namespace => "namespace",
        FileKind::Bpf => "bpf",
        _ => "file",
    }
}
