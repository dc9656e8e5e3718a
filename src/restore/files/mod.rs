//! Open file descriptions and descriptor tables.
//!
//! Every description is created once, by the restorer, at numbers above those
//! the application uses ([`open_all`]). The processes inherit them all. When all of
//! them are born, what needs processes follows ([`complete`], [`fetch`]); each puts
//! its own in place ([`install`]), does what only it can do ([`finish`]) and
//! closes the rest. TCP connections keep silent until [`go_live`].

mod accept;
mod anonymous;
pub(super) mod content;
mod datagram;
mod ended;
mod epoll;
mod error;
mod fanotify;
mod filter;
mod interfaces;
mod ip;
mod lock;
mod mqueue;
mod netlink;
mod owner;
mod packet;
mod peer;
mod pidfd;
mod pipe;
mod pty;
mod raw;
mod regular;
mod room;
mod segment;
pub(super) mod tcp;
mod udp_queue;
mod unix;
mod unix_accept;
mod unix_queue;
mod uring;

pub use error::FilesError;
pub(super) use mqueue::remove as remove_mqueues;

use crate::image::Pages;
use crate::model::frozen::{
    Application, Content, ContentId, ContentKind, FdEntry, FileKind, FilesTable, OpenFile, Socket,
    SocketState, proc_owner,
};
use crate::model::ids::{OfdId, Pid};
use crate::restore::sources::programs;
use crate::sys::fd;
use error::{call, missing};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd};

/// What the restorer has opened for its children.
#[derive(Debug, Default)]
pub struct OpenedFiles {
    ofds: BTreeMap<OfdId, OwnedFd>,
    contents: BTreeMap<ContentId, OwnedFd>,
    departed: Departed,
    /// A slave of each pseudo-terminal that can be somebody's controlling terminal.
    terminals: BTreeMap<u64, OwnedFd>,
}

/// Other ends of Unix sockets that the application had closed.
#[derive(Debug, Default)]
pub struct Departed {
    /// By the end that is left.
    ends: BTreeMap<OfdId, OwnedFd>,
    /// Those of connections that nobody has accepted.
    clients: unix_accept::Closed,
}

impl OpenedFiles {
    /// Takes out what [`complete`] needs, which no child is to hold.
    pub fn take_departed(&mut self) -> Departed {
        std::mem::take(&mut self.departed)
    }

    /// The controlling terminal of a session: its descriptor in the restorer and the group to
    /// be in its foreground.
    #[must_use]
    pub fn terminal(&self, app: &Application, session: Pid) -> Option<(BorrowedFd<'_>, Pid)> {
        app.ofds.values().find_map(|file| match &file.kind {
            FileKind::Pty {
                id,
                state: Some(state),
                ..
            } if state.session == Some(session) => {
                let fd = self.terminals.get(id)?.as_fd();
                Some((fd, state.foreground.unwrap_or(session)))
            }
            _ => None,
        })
    }

    /// Number of a description in the restorer.
    #[must_use]
    pub fn description(&self, id: OfdId) -> Option<i32> {
        self.ofds.get(&id).map(AsRawFd::as_raw_fd)
    }

    /// Descriptor of a content in the restorer, to map it from.
    #[must_use]
    pub fn content(&self, id: ContentId) -> Option<i32> {
        self.contents.get(&id).map(AsRawFd::as_raw_fd)
    }
}

/// Creates every open file description and every content of the application. The names of new
/// message queues are added to `mqueues`.
///
/// # Errors
/// A file is gone or changed, an address is in use, or the kernel refuses a step.
/// What was created goes with the caller's descriptors and with these names; no packet was sent.
pub fn open_all(
    app: &Application,
    image: Pages<'_>,
    mqueues: &mut Vec<CString>,
) -> Result<OpenedFiles, FilesError> {
    let mut opened = OpenedFiles::default();
    // Segments are reached by their ids.
    let is_file = |content: &Content| !matches!(content.kind, ContentKind::SysvShm(_));
    let programs = programs(app);
    for (&id, content) in app.contents.iter().filter(|(_, content)| is_file(content)) {
        let mut fd = content::make(content, image)?;
        if programs.contains(&id) {
            // What somebody may write to cannot be executed.
            fd = content::reopen(&fd, OFlag::O_RDONLY.bits().cast_unsigned(), 0)?;
        }
        opened.contents.insert(id, fd);
    }
    opened.ofds = pipe::open_all(app)?;
    opened.ofds.append(&mut mqueue::open_all(app, mqueues)?);
    let mut terminals = pty::open_all(app)?;
    opened.ofds.append(&mut terminals.ofds);
    opened.terminals = terminals.slaves;
    let mut unix = unix::open_all(app)?;
    opened.ofds.append(&mut unix.opened);
    // Listeners first: a connection on a listener's port is bound by force only after it. One that
    // has ended may have had the addresses of one that has not.
    for turn in [Turn::Other, Turn::Ended, Turn::Connection] {
        for (&id, file) in &app.ofds {
            if Turn::of(file) == turn
                && !is_born_later(app, file)
                && let Some(fd) = open_one(app, file, &opened.contents)?
            {
                opened.ofds.insert(id, fd);
            }
        }
    }
    for (&id, file) in app
        .ofds
        .iter()
        .filter(|(_, file)| !is_born_later(app, file))
    {
        let fd = opened
            .ofds
            .get(&id)
            .ok_or_else(|| FilesError::Missing(format!("{id}")))?;
        set_status(fd, file, || owner::is_held(app, id))?;
        regular::hint(fd.as_fd(), &file.hints)?;
        lock::take_shared(fd, file)?;
    }
    opened.departed = Departed {
        ends: unix.departed,
        clients: unix.closed,
    };
    move_up(app, &mut opened)?;
    Ok(opened)
}

/// Does what needs all processes of the application: pidfds, then the queues of Unix sockets,
/// in which pidfds may be in flight, the accept queues of listeners, then the filters, which let through only what is to come.
/// To be called by the restorer when all are born.
///
/// # Errors
/// The kernel refuses a step.
pub fn complete(
    app: &Application,
    opened: &OpenedFiles,
    departed: Departed,
) -> Result<(), FilesError> {
    pidfd::open_all(app, &opened.ofds)?;
    unix_queue::fill_all(app, &opened.ofds, departed)?;
    accept::fill_all(app, &opened.ofds)?;
    filter::attach_all(app, &opened.ofds)
}

/// Gets what [`complete`] has opened since the caller was born. To be called by a process with
/// a table of its own, before [`install`].
///
/// # Errors
/// A descriptor of the restorer cannot be had.
pub fn fetch(app: &Application, opened: &OpenedFiles, restorer: Pid) -> Result<(), FilesError> {
    pidfd::fetch(app, &opened.ofds, restorer)
}

/// Both ends of the connections that packets bring to where they were, the application's first:
/// they answer to them.
#[must_use]
pub fn brought_by_packets(app: &Application) -> Vec<(SocketAddr, SocketAddr)> {
    accept::unaccepted(app).chain(ended::all(app)).collect()
}

/// When a description is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Other,
    Ended,
    Connection,
}

impl Turn {
    fn of(file: &OpenFile) -> Self {
        match &file.kind {
            FileKind::Socket(socket) => match socket.state {
                SocketState::TcpEnded(_) => Self::Ended,
                SocketState::TcpConnection(_) => Self::Connection,
                _ => Self::Other,
            },
            _ => Self::Other,
        }
    }
}

/// Whether a file shows one of the processes (`/proc/PID/stat`): that process opens it itself.
fn is_born_later(app: &Application, file: &OpenFile) -> bool {
    let at = match &file.kind {
        FileKind::Regular(identity) => &identity.at,
        FileKind::Directory(at) => at,
        _ => return false,
    };
    proc_owner(&at.path).is_some_and(|pid| app.processes.iter().any(|p| p.pid == pid))
}

/// Opens a description that needs no other; `None` for kinds made elsewhere.
fn open_one(
    app: &Application,
    file: &OpenFile,
    contents: &BTreeMap<ContentId, OwnedFd>,
) -> Result<Option<OwnedFd>, FilesError> {
    let fd = match &file.kind {
        FileKind::Regular(identity) => regular::open_regular(identity, file.flags, file.pos)?,
        FileKind::Directory(at) => regular::open_directory(at, file.flags, file.pos)?,
        FileKind::Pressure { at, trigger } => {
            regular::open_pressure(at, trigger, file.flags, file.pos)?
        }
        FileKind::CharDevice { at, rdev } => regular::open_device(at, *rdev, file.flags)?,
        FileKind::Content(id) => {
            let fd = contents
                .get(id)
                .ok_or_else(|| FilesError::Missing(format!("the content of inode {}", id.0)))?;
            content::reopen(fd, file.flags, file.pos)?
        }
        FileKind::Eventfd { count, semaphore } => {
            anonymous::eventfd(*count, *semaphore, is_nonblocking(file))?
        }
        FileKind::Timerfd(timer) => anonymous::timerfd(timer, app.header.clocks.realtime)?,
        FileKind::Signalfd { mask } => anonymous::signalfd(*mask)?,
        FileKind::Epoll { busy_poll, .. } => epoll::create(busy_poll.as_ref())?,
        FileKind::Inotify { .. } => anonymous::inotify()?,
        FileKind::Fanotify(group) => fanotify::make(group)?,
        FileKind::Pidfd { .. } => pidfd::reserve()?,
        FileKind::IoUring(ring) => uring::make(ring)?,
        FileKind::Socket(socket) => match open_socket(socket)? {
            Some(fd) => {
                interfaces::restore(fd.as_fd(), &socket.interfaces)?;
                fd
            }
            None => return Ok(None),
        },
        FileKind::Pipe { .. }
        | FileKind::Fifo { .. }
        | FileKind::Pty { .. }
        | FileKind::Mqueue { .. } => return Ok(None),
    };
    Ok(Some(fd))
}

fn open_socket(socket: &Socket) -> Result<Option<OwnedFd>, FilesError> {
    match &socket.state {
        SocketState::TcpIdle { .. }
        | SocketState::TcpListen { .. }
        | SocketState::TcpConnection(_)
        | SocketState::TcpEnded(_) => tcp::open(socket).map(Some),
        SocketState::Unix(_) => Ok(None),
        SocketState::Udp { .. } => datagram::udp(socket).map(Some),
        SocketState::Netlink(state) => netlink::make(state, &socket.options).map(Some),
        SocketState::Raw { .. } => raw::raw(socket).map(Some),
        SocketState::Packet { .. } => raw::packet(socket).map(Some),
    }
}

fn is_nonblocking(file: &OpenFile) -> bool {
    OFlag::from_bits_retain(file.flags.cast_signed()).contains(OFlag::O_NONBLOCK)
}

/// `F_SETFL`: the status flags that open(2) or socket(2) was not asked for. `O_ASYNC` comes when
/// the descriptor has its number, if one is to refer to it ([`owner::set`]); to find out whether
/// one is takes a look at all of them.
fn set_status(
    fd: &OwnedFd,
    file: &OpenFile,
    held: impl FnOnce() -> bool,
) -> Result<(), FilesError> {
    let mut flags = OFlag::from_bits_retain(file.flags.cast_signed());
    if flags.contains(OFlag::O_ASYNC) && held() {
        flags.remove(OFlag::O_ASYNC);
    }
    let asked_for = match &file.kind {
        _ if flags.contains(OFlag::O_PATH) => true,
        FileKind::Eventfd { .. } => {
            let made_with = OFlag::O_ACCMODE | OFlag::O_NONBLOCK;
            flags.difference(made_with).is_empty()
        }
        _ => false,
    };
    if asked_for {
        return Ok(());
    }
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags)).map_err(call("Open file", "fcntl(F_SETFL)"))?;
    Ok(())
}

/// Moves every descriptor above the numbers that any process of the application uses.
fn move_up(app: &Application, opened: &mut OpenedFiles) -> Result<(), FilesError> {
    let highest = app
        .files
        .values()
        .flat_map(|table| &table.fds)
        .map(|entry| entry.fd.0)
        .max();
    let base = highest.map_or(0, |fd| fd + 1);
    let all = opened.ofds.values_mut().chain(opened.contents.values_mut());
    let mut low = Vec::new();
    for fd in all.chain(opened.terminals.values_mut()) {
        if fd.as_raw_fd() < base {
            let high = fd::duplicate_above(fd.as_fd(), base)
                .map_err(call("Open file", "fcntl(F_DUPFD_CLOEXEC)"))?;
            low.push(std::mem::replace(fd, high).into_raw_fd());
        }
    }
    // Neighbours at once: there may be very many.
    low.sort_unstable();
    for run in low.chunk_by(|a, b| a + 1 == *b) {
        fd::close_range(run[0], run[run.len() - 1]).map_err(call("Open files", "close_range"))?;
    }
    Ok(())
}

/// Gives a session leader its controlling terminal. To be called by the leader, before it has
/// children in its session.
///
/// # Errors
/// The kernel refuses.
pub fn take_terminal(app: &Application, pid: Pid, opened: &OpenedFiles) -> Result<(), FilesError> {
    match opened.terminal(app, pid) {
        Some((fd, _)) => crate::sys::tty::set_controlling(fd).map_err(call(
            format!("Controlling terminal of session {pid}"),
            "ioctl(TIOCSCTTY)",
        )),
        None => Ok(()),
    }
}

/// Puts a process's descriptors in place. To be called by that process, on a table of its own.
///
/// # Errors
/// The image lacks a description, or the limit on descriptors is too low.
pub fn install(
    app: &Application,
    table: &FilesTable,
    opened: &OpenedFiles,
) -> Result<(), FilesError> {
    let put = |fd: BorrowedFd<'_>, entry: &FdEntry| {
        fd::duplicate_to(fd, entry.fd.0, entry.cloexec)
            .map_err(call(format_args!("Descriptor {}", entry.fd), "dup3"))
    };
    let mut later = Vec::new();
    for entry in &table.fds {
        match opened.ofds.get(&entry.ofd) {
            Some(fd) => put(fd.as_fd(), entry)?,
            None => later.push(entry),
        }
    }
    let base = table.fds.iter().map(|entry| entry.fd.0 + 1).max();
    for entry in later {
        let file = app.ofds.get(&entry.ofd);
        let file = file.filter(|file| is_born_later(app, file));
        let file = file.ok_or_else(|| missing(entry.fd, entry.ofd))?;
        let fd = open_one(app, file, &opened.contents)?;
        let fd = fd.ok_or_else(|| missing(entry.fd, entry.ofd))?;
        set_status(&fd, file, || true)?;
        // Out of the way: it may have got this number itself, or that of another one. The low
        // number must be closed before it is given to the process.
        let high = fd::duplicate_above(fd.as_fd(), base.unwrap_or(0)).map_err(call(
            format_args!("Descriptor {}", entry.fd),
            "fcntl(F_DUPFD_CLOEXEC)",
        ))?;
        drop(fd);
        put(high.as_fd(), entry)?;
    }
    Ok(())
}

/// Does what needs the process's own numbers and identity: epoll sets, POSIX
/// locks, owners of `SIGIO`, leases. Then closes all that is not in its table.
///
/// # Errors
/// The image lacks a description, or the kernel refuses a step.
pub fn finish(app: &Application, pid: Pid, opened: &OpenedFiles) -> Result<(), FilesError> {
    let Some(process) = app.processes.iter().find(|process| process.pid == pid) else {
        return Ok(());
    };
    let Some(table) = app.files.get(&process.files) else {
        return Ok(());
    };
    epoll::fill_of(app, process, &opened.ofds)?;
    for entry in &table.fds {
        let Some(file) = app.ofds.get(&entry.ofd) else {
            continue;
        };
        lock::take_posix(entry.fd, file, pid)?;
        owner::set(app, process.files, entry, file)?;
        lock::take_lease(entry.fd, file, pid)?;
    }
    let mut next = 0;
    for entry in &table.fds {
        fd::close_range(next, entry.fd.0 - 1).map_err(call("Descriptors", "close_range"))?;
        next = entry.fd.0 + 1;
    }
    fd::close_range(next, i32::MAX).map_err(call("Descriptors", "close_range"))
}

/// Has inotify instances and fanotify groups watch what they did. To be called when nothing is left
/// that opens or reads files of the application: it is not to be told of a restore.
///
/// # Errors
/// A watched file is gone, or the kernel refuses a step.
pub fn watch_all(app: &Application, opened: &OpenedFiles) -> Result<(), FilesError> {
    for (id, file) in &app.ofds {
        let Some(fd) = opened.ofds.get(id) else {
            continue;
        };
        match &file.kind {
            FileKind::Inotify { watches } => anonymous::watch(fd, watches)?,
            FileKind::Fanotify(group) => fanotify::mark(fd, &group.marks)?,
            _ => {}
        }
    }
    Ok(())
}

/// Lets every TCP connection talk again. To be called by the restorer when all
/// listeners exist and all processes stand.
///
/// # Errors
/// The kernel refuses a step.
pub fn go_live(app: &Application, opened: &OpenedFiles) -> Result<(), FilesError> {
    // Two rounds: both ends of a connection may be here.
    for step in [tcp::go_live, tcp::settle] {
        for (id, file) in &app.ofds {
            if let FileKind::Socket(socket) = &file.kind
                && let Some(fd) = opened.ofds.get(id)
            {
                step(fd.as_fd(), socket)?;
            }
        }
    }
    Ok(())
}
