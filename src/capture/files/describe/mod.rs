//! One open file description at a time: from the iterators' record to what the image carries.

mod sockets;

use super::alike::Alike;
use super::borrow::{Borrowed, Lender, place};
use super::refuse::{END_OUTSIDE, Survey};
use super::{
    CollectError, FrozenFiles, Repaired, Still, accept, fanotify, lease, mqueue, pipe, pseudo, pty,
    regular, unix, uring,
};
use crate::bpf::events::{
    EpollItemRec, FileKind as Kind, LockClass, LockRec, MemberRec, MqueueRec, PipeRec, TtyDataRec,
    TtyRec, WaitingRec, WatchRec,
};
use crate::bpf::iter::{Detail, File};
use crate::capture::contents::Contents;
use crate::capture::restart::Now;
use crate::capture::view::View;
use crate::model::frozen::{
    Blocker, BusyPoll, ContentId, ContentKind, EpollItem, FileKind, FileLock, InotifyWatch,
    LockKind, OpenFile, PipeId, PipeState, Timerfd,
};
use crate::model::ids::{Fd, InodeId, OfdId, Pid};
use crate::model::map::Map;
use crate::sys::inode::Watches;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;
use std::collections::BTreeMap;

/// Messages whose descriptors in flight are still to be identified.
type InFlight = (OfdId, Vec<unix::Peeked>);

/// Describes descriptions, each once.
pub(super) struct Reader<'a> {
    /// The clocks as the image shows them, whatever time reading takes.
    now: &'a Now,
    contents: &'a mut Contents,
    view: &'a View,
    survey: Survey,
    items: Map<u64, Vec<&'a EpollItemRec>>,
    watches: Map<u64, Vec<&'a WatchRec>>,
    locks: Map<u64, Vec<&'a LockRec>>,
    members: Map<u64, Vec<&'a MemberRec>>,
    alike: &'a mut Alike,
    lender: Lender,
    ofds: BTreeMap<OfdId, OpenFile>,
    repaired: Repaired,
    /// Pipes whose content some end carries already.
    pipes: Map<u64, OfdId>,
    /// Of each pipe, where one end is, and how many readers and writers it has.
    ends: BTreeMap<PipeId, (Pid, Fd, u32, u32)>,
    in_flight: Vec<InFlight>,
    /// Connections that have ended since their records were made.
    ended: Vec<(OfdId, Borrowed)>,
    tty_data: Map<u64, Vec<&'a TtyDataRec>>,
    /// By the address of a pseudo-terminal: where an end is, and what ends there are.
    terminals: BTreeMap<u64, (Pid, Fd, TtyRec, pty::Ends)>,
    messages: mqueue::Messages,
    accept_queues: accept::Queues,
    /// TCP sockets as they were just before they were read, by their addresses.
    connections: Map<u64, WaitingRec>,
    /// By the address of a message queue's inode: where it is open, and how often.
    mqueues: BTreeMap<u64, (Pid, Fd, MqueueRec, u32)>,
}

fn grouped<T>(records: &[T], key: impl Fn(&T) -> u64) -> Map<u64, Vec<&T>> {
    let mut groups: Map<u64, Vec<&T>> = Map::default();
    for record in records {
        groups.entry(key(record)).or_default().push(record);
    }
    groups
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        still: Still<'a>,
        contents: &'a mut Contents,
        alike: &'a mut Alike,
        accept_queues: accept::Queues,
        connections: Vec<WaitingRec>,
    ) -> Self {
        let Still {
            found,
            tasks,
            now,
            view,
            ..
        } = still;
        Self {
            now,
            contents,
            view,
            survey: Survey::of(found, tasks),
            items: grouped(&found.epoll_items, |item| item.epoll),
            watches: grouped(&found.watches, |watch| watch.group),
            locks: grouped(&found.locks, |lock| lock.ino),
            members: grouped(&found.members, |member| member.sock),
            alike,
            lender: Lender::default(),
            ofds: BTreeMap::new(),
            repaired: Repaired::default(),
            pipes: Map::default(),
            ends: BTreeMap::new(),
            in_flight: Vec::new(),
            ended: Vec::new(),
            tty_data: grouped(&found.tty_data, |data| data.tty),
            terminals: BTreeMap::new(),
            messages: mqueue::Messages::of(&found.messages),
            accept_queues,
            connections: connections.into_iter().map(|rec| (rec.sock, rec)).collect(),
            mqueues: BTreeMap::new(),
        }
    }

    pub(super) fn finish(self) -> FrozenFiles {
        FrozenFiles {
            files: BTreeMap::new(),
            ofds: self.ofds,
            repaired: self.repaired,
        }
    }

    /// Describes the description behind `file`, unless that is done.
    pub(super) fn describe(&mut self, file: &File) -> Result<(), CollectError> {
        let id = OfdId(file.rec.file);
        if self.ofds.contains_key(&id) {
            return Ok(());
        }
        if let Some(blocker) = self.survey.refusal(file) {
            return Err(CollectError::Blocked(blocker));
        }
        let kind = self.kind(id, file)?;
        let rec = &file.rec;
        let open = OpenFile {
            flags: rec.flags,
            pos: u64::try_from(rec.pos).unwrap_or(0),
            owner: self.survey.owners.carried(rec, &self.survey.processes),
            locks: self.locks(file),
            lease: lease::of(self.locks.get(&rec.ino).map_or(&[], Vec::as_slice), file),
            hints: regular::hints(rec),
            kind,
        };
        self.ofds.insert(id, open);
        Ok(())
    }

    fn kind(&mut self, id: OfdId, file: &File) -> Result<FileKind, CollectError> {
        let rec = &file.rec;
        Ok(match (rec.kind, &file.detail) {
            (Kind::REGULAR, Detail::Pressure(pressure)) => FileKind::Pressure {
                at: regular::path(file, self.view)?,
                trigger: pseudo::trigger(pressure),
            },
            (Kind::REGULAR, _) if rec.nlink > 0 => {
                FileKind::Regular(regular::identity(file, self.view)?)
            }
            (Kind::REGULAR | Kind::MEMFD, _) => FileKind::Content(self.content(file)?),
            (Kind::DIRECTORY, _) => FileKind::Directory(regular::path(file, self.view)?),
            (Kind::CHAR_DEVICE, Detail::Tty(tty)) => self.terminal(file, tty)?,
            (Kind::CHAR_DEVICE, _) => FileKind::CharDevice {
                at: regular::path(file, self.view)?,
                rdev: rec.rdev,
            },
            (Kind::PIPE, Detail::Pipe(pipe)) => FileKind::Pipe {
                id: rec.ino,
                state: self.pipe_state(id, file, pipe, PipeId::Anonymous(rec.ino))?,
            },
            (Kind::FIFO, Detail::Pipe(pipe)) => {
                let at = regular::path(file, self.view)?;
                let state = self.pipe_state(id, file, pipe, PipeId::Fifo(at.inode))?;
                FileKind::Fifo { at, state }
            }
            (Kind::EVENTFD, Detail::Eventfd(eventfd)) => FileKind::Eventfd {
                count: eventfd.count,
                semaphore: eventfd.flags & 1 != 0,
            },
            (Kind::TIMERFD, Detail::Timerfd(timer)) => FileKind::Timerfd(Timerfd {
                clock: timer.clock,
                settime_flags: timer.settime_flags.cast_signed(),
                remaining: match remaining(
                    timer.expires_ns,
                    self.now.clock(timer.base_clock.cast_signed()),
                    timer.interval_ns,
                ) {
                    // A periodic timer that has expired rests until it is read
                    // (timerfd_tmrproc()); it is not disarmed.
                    0 if timer.ticks > 0 => timer.interval_ns,
                    left => left,
                },
                interval: timer.interval_ns,
                ticks: timer.ticks,
            }),
            (Kind::SIGNALFD, Detail::Signalfd(signalfd)) => FileKind::Signalfd {
                mask: signalfd.mask,
            },
            (Kind::EPOLL, detail) => FileKind::Epoll {
                items: self.epoll_items(rec.file),
                busy_poll: match detail {
                    Detail::Epoll(epoll) => Some(BusyPoll {
                        usecs: epoll.busy_poll_usecs,
                        budget: epoll.busy_poll_budget,
                        prefer: epoll.prefer_busy_poll != 0,
                    }),
                    _ => None,
                },
            },
            (Kind::INOTIFY, _) => FileKind::Inotify {
                watches: self.inotify_watches(file)?,
            },
            (Kind::FANOTIFY, _) => FileKind::Fanotify(Box::new(fanotify::read(file, self.view)?)),
            (Kind::PIDFD, Detail::Pidfd(pidfd)) => FileKind::Pidfd {
                pid: self.survey.processes.target(pidfd),
            },
            (Kind::IO_URING, Detail::Uring(ring)) => {
                let from = self.lender.borrow(file)?;
                FileKind::IoUring(Box::new(uring::read(&from, ring)?))
            }
            (Kind::SOCKET, Detail::Socket(sock)) => self.socket(id, file, sock)?,
            (Kind::MQUEUE, Detail::Mqueue(queue)) => self.mqueue(file, queue)?,
            _ => {
                let (pid, fd) = place(file);
                return Err(CollectError::Blocked(Blocker {
                    pid,
                    fd: Some(fd),
                    object: rec.name(),
                    reason: "its state could not be read; report this".into(),
                }));
            }
        })
    }

    fn content(&mut self, file: &File) -> Result<ContentId, CollectError> {
        let inode = InodeId {
            dev: file.rec.dev,
            ino: file.rec.ino,
        };
        if let Some(id) = self.contents.known(inode) {
            return Ok(id);
        }
        let kind = if file.rec.kind == Kind::MEMFD {
            let path = String::from_utf8_lossy(&regular::name(file)?).into_owned();
            let name = path.strip_prefix("/memfd:").unwrap_or(&path).to_owned();
            ContentKind::Memfd { name, seals: 0 }
        } else {
            ContentKind::Deleted {
                at: regular::path(file, self.view)?,
            }
        };
        let from = self.lender.borrow(file)?;
        // A description of our own: the borrowed one may be write-only, and its offset is the
        // owner's.
        let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
        let own =
            open(from.reopen_path().as_str(), flags, Mode::empty()).map_err(from.failed("open"))?;
        let added = self.contents.add(inode, own.into(), kind);
        added.map_err(from.failed("fstat"))
    }

    fn pipe_state(
        &mut self,
        id: OfdId,
        file: &File,
        rec: &PipeRec,
        pipe: PipeId,
    ) -> Result<Option<PipeState>, CollectError> {
        let (pid, fd) = place(file);
        self.ends
            .entry(pipe)
            .or_insert((pid, fd, rec.readers, rec.writers));
        if *self.pipes.entry(rec.pipe).or_insert(id) != id {
            return Ok(None);
        }
        let end = self.lender.borrow(file)?;
        pipe::read_state(&end, rec).map(Some)
    }

    fn terminal(&mut self, file: &File, tty: &TtyRec) -> Result<FileKind, CollectError> {
        let (pid, fd) = place(file);
        let (id, master) = (tty.master.tty, tty.is_master != 0);
        let first = !self.terminals.contains_key(&id);
        let (.., ends) = self
            .terminals
            .entry(id)
            .or_insert((pid, fd, *tty, pty::Ends::default()));
        ends.add(master);
        let data = |tty| self.tty_data.get(&tty).map_or(&[][..], Vec::as_slice);
        let state = first.then(|| pty::state(tty, data(id), data(tty.slave.tty)));
        let state = state.transpose().map_err(|reason| {
            CollectError::Blocked(Blocker {
                pid,
                fd: Some(fd),
                object: pty::object(tty),
                reason,
            })
        })?;
        Ok(FileKind::Pty {
            id,
            master,
            at: regular::path(file, self.view)?,
            state: state.map(Box::new),
        })
    }

    /// Every end of every pseudo-terminal must be among what was described, those in flight
    /// included.
    pub(super) fn check_terminals(&self) -> Result<(), CollectError> {
        for (pid, fd, tty, ends) in self.terminals.values() {
            if let Some(reason) = ends.outside(tty) {
                return Err(CollectError::Blocked(Blocker {
                    pid: *pid,
                    fd: Some(*fd),
                    object: pty::object(tty),
                    reason,
                }));
            }
        }
        Ok(())
    }

    fn mqueue(&mut self, file: &File, queue: &MqueueRec) -> Result<FileKind, CollectError> {
        let (pid, fd) = place(file);
        let (.., open) = self
            .mqueues
            .entry(queue.inode)
            .or_insert((pid, fd, *queue, 0));
        *open += 1;
        let first = *open == 1;
        let state = first.then(|| mqueue::state(&file.rec, queue, &self.messages));
        let state = state.transpose().map_err(|reason| {
            CollectError::Blocked(Blocker {
                pid,
                fd: Some(fd),
                object: mqueue::object(queue),
                reason,
            })
        })?;
        Ok(FileKind::Mqueue {
            id: queue.inode,
            state: state.map(Box::new),
        })
    }

    /// All that have a queue open must be among what was described, those in flight included.
    pub(super) fn check_mqueues(&self) -> Result<(), CollectError> {
        for (pid, fd, queue, open) in self.mqueues.values() {
            if queue.open > *open {
                return Err(CollectError::Blocked(Blocker {
                    pid: *pid,
                    fd: Some(*fd),
                    object: mqueue::object(queue),
                    reason: mqueue::OPEN_OUTSIDE.into(),
                }));
            }
        }
        Ok(())
    }

    fn epoll_items(&self, epoll: u64) -> Vec<EpollItem> {
        let items = self.items.get(&epoll).map_or(&[][..], Vec::as_slice);
        items
            .iter()
            .map(|item| EpollItem {
                fd: Fd(item.fd.cast_signed()),
                ofd: OfdId(item.target),
                events: item.events,
                data: item.data,
            })
            .collect()
    }

    fn inotify_watches(&mut self, file: &File) -> Result<Vec<InotifyWatch>, CollectError> {
        let (pid, fd) = place(file);
        let watches = self
            .watches
            .get(&file.rec.file)
            .map_or(&[][..], Vec::as_slice);
        if watches.is_empty() {
            return Ok(Vec::new());
        }
        let failed = |call| {
            move |source| CollectError::File {
                pid,
                fd,
                call,
                source,
            }
        };
        let mut shown = Watches::read(pid, fd).map_err(failed("fdinfo"))?;
        let mut watches = watches
            .iter()
            .map(|watch| {
                let inode = InodeId {
                    dev: watch.dev,
                    ino: watch.ino,
                };
                let watched = shown.watched(watch.wd);
                let watched = watched.map_err(failed("open_by_handle_at"))?;
                let object = "inotify watch of";
                let at = fanotify::watched(file, watched.path, inode, self.view, object)?;
                Ok(InotifyWatch {
                    wd: watch.wd,
                    mask: watched.mask,
                    at,
                })
            })
            .collect::<Result<Vec<_>, CollectError>>()?;
        watches.sort_unstable_by_key(|watch| watch.wd);
        Ok(watches)
    }

    fn locks(&self, file: &File) -> Vec<FileLock> {
        let rec = &file.rec;
        let mut locks = Vec::new();
        for lock in self.locks.get(&rec.ino).map_or(&[][..], Vec::as_slice) {
            if lock.dev != rec.dev {
                continue;
            }
            const FL_OFDLCK: u32 = 1024;
            let kind = match lock.class {
                LockClass::FLOCK if lock.file == rec.file => LockKind::Flock,
                LockClass::POSIX if lock.flags & FL_OFDLCK != 0 && lock.file == rec.file => {
                    LockKind::Ofd
                }
                LockClass::POSIX if lock.flags & FL_OFDLCK == 0 && lock.file == rec.file => {
                    LockKind::Posix
                }
                _ => continue,
            };
            let start = u64::try_from(lock.start).unwrap_or(0);
            let to_the_end = lock.end == i64::MAX;
            let end = u64::try_from(lock.end).unwrap_or(0);
            locks.push(FileLock {
                kind,
                exclusive: lock.type_ == 1,
                start,
                len: if to_the_end { 0 } else { end + 1 - start },
                pid: Pid(lock.pid.cast_signed()),
            });
        }
        locks
    }

    /// Every end of every pipe must be among what was described, those in flight included.
    pub(super) fn check_pipes(&self) -> Result<(), CollectError> {
        let mut found: BTreeMap<PipeId, (u32, u32)> = BTreeMap::new();
        for open in self.ofds.values() {
            let Some(pipe) = open.kind.pipe() else {
                continue;
            };
            let (readers, writers) = found.entry(pipe).or_default();
            *readers += u32::from(open.flags & 3 != 1);
            *writers += u32::from(open.flags & 3 != 0);
        }
        for (pipe, &(pid, fd, readers, writers)) in &self.ends {
            let (found_readers, found_writers) = found.get(pipe).copied().unwrap_or_default();
            if readers > found_readers || writers > found_writers {
                return Err(CollectError::Blocked(Blocker {
                    pid,
                    fd: Some(fd),
                    object: "pipe".into(),
                    reason: END_OUTSIDE.into(),
                }));
            }
        }
        Ok(())
    }
}

/// Time left until `expires` on a clock that shows `now`; at least 1 ns while armed.
fn remaining(expires: u64, now: u64, interval: u64) -> u64 {
    if expires == 0 {
        return 0;
    }
    match expires.checked_sub(now) {
        Some(left) if left > 0 => left,
        // Expired while frozen: a periodic timer goes on in step, a single one fires at once.
        _ if interval > 0 => interval - (now - expires) % interval,
        _ => 1,
    }
}
