//! Unix domain sockets: listeners, connected pairs, and what is queued in them.

use super::error::{FilesError, call, socket};
use crate::model::frozen::{
    Application, FileKind, Socket, SocketState, UnixAddress, UnixMessage, UnixSocket, UnixState,
};
use crate::model::ids::OfdId;
use crate::sys::socket::{accept, int_option, set_int_option, set_option};
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket as ns;
use nix::sys::stat::{Mode, SFlag, stat};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Every Unix socket of the application.
fn sockets(app: &Application) -> impl Iterator<Item = (OfdId, &Socket, &UnixSocket)> {
    app.ofds.iter().filter_map(|(id, file)| match &file.kind {
        FileKind::Socket(socket) => match &socket.state {
            SocketState::Unix(unix) => Some((*id, &**socket, unix)),
            _ => None,
        },
        _ => None,
    })
}

/// What is made of the Unix sockets.
#[derive(Debug, Default)]
pub struct UnixSockets {
    /// The application's.
    pub opened: BTreeMap<OfdId, OwnedFd>,
    /// Other ends that the application had closed, by the end that is left:
    /// they send what that has not read yet, and are closed then.
    pub departed: BTreeMap<OfdId, OwnedFd>,
}

/// Makes every Unix socket; queues are filled by [`fill_all`] once all files exist.
///
/// # Errors
/// An address is in use, or the kernel refuses a step.
pub fn open_all(app: &Application) -> Result<UnixSockets, FilesError> {
    let all: BTreeMap<OfdId, (&Socket, &UnixSocket)> = sockets(app)
        .map(|(id, described, unix)| (id, (described, unix)))
        .collect();
    let mut made = UnixSockets::default();
    for (&id, &(described, unix)) in &all {
        let alone = match unix.state {
            UnixState::Unconnected | UnixState::Listening { .. } => true,
            UnixState::Connected { peer } => !is_mutual(&all, id, peer),
            UnixState::PeerClosed => false,
        };
        if alone {
            let fd = new_socket(socket_type(unix.socktype)?)?;
            set_options(&fd, described)?;
            name_and_listen(&fd, unix)?;
            made.opened.insert(id, fd);
        }
    }
    for (&id, &(described, unix)) in &all {
        if made.opened.contains_key(&id) {
            continue;
        }
        let peer = match unix.state {
            UnixState::Connected { peer } => all.get(&peer).map(|(_, unix)| (peer, *unix)),
            _ => None,
        };
        let (here, there) = couple(&all, &made.opened, unix, peer.map(|(_, unix)| unix))?;
        set_options(&here, described)?;
        made.opened.insert(id, here);
        if let Some((peer, _)) = peer {
            set_options(&there, all[&peer].0)?;
            made.opened.insert(peer, there);
        } else {
            made.departed.insert(id, there);
        }
    }
    for (&id, &(_, unix)) in &all {
        if let UnixState::Connected { peer } = unix.state
            && !is_mutual(&all, id, peer)
        {
            let address = all.get(&peer).and_then(|(_, unix)| unix.address.as_ref());
            let Some(address) = address else {
                let what = format!("Unix socket {id} connected to one without a name");
                return Err(FilesError::Unsupported(what));
            };
            ns::connect(made.opened[&id].as_raw_fd(), &encode(address)?)
                .map_err(call(display(address), "connect"))?;
        }
    }
    Ok(made)
}

/// Whether two sockets are connected to each other. Streams always are; a
/// datagram socket may send to one that knows nothing of it.
fn is_mutual(all: &BTreeMap<OfdId, (&Socket, &UnixSocket)>, id: OfdId, peer: OfdId) -> bool {
    all.get(&peer)
        .is_some_and(|(_, unix)| unix.state == UnixState::Connected { peer: id })
}

fn new_socket(kind: ns::SockType) -> Result<OwnedFd, FilesError> {
    let flags = ns::SockFlag::SOCK_CLOEXEC;
    ns::socket(ns::AddressFamily::Unix, kind, flags, None).map_err(call("Unix socket", "socket"))
}

fn set_options(fd: &OwnedFd, described: &Socket) -> Result<(), FilesError> {
    for option in &described.options {
        set_option(fd.as_fd(), option.level, option.name, &option.value)
            .map_err(socket("Unix socket"))?;
    }
    Ok(())
}

fn encode(address: &UnixAddress) -> Result<ns::UnixAddr, FilesError> {
    match address {
        UnixAddress::Path(path) => ns::UnixAddr::new(Path::new(OsStr::from_bytes(path))),
        UnixAddress::Abstract(name) => ns::UnixAddr::new_abstract(name),
    }
    .map_err(call(display(address), "sockaddr_un"))
}

fn display(address: &UnixAddress) -> String {
    match address {
        UnixAddress::Path(path) => format!("Unix socket {}", String::from_utf8_lossy(path)),
        UnixAddress::Abstract(name) => format!("Unix socket @{}", String::from_utf8_lossy(name)),
    }
}

/// Two connected sockets with the names they had: an accepted one has that of
/// its listener, which cannot be had by bind(2), so it is accepted once more.
fn couple(
    all: &BTreeMap<OfdId, (&Socket, &UnixSocket)>,
    opened: &BTreeMap<OfdId, OwnedFd>,
    here: &UnixSocket,
    there: Option<&UnixSocket>,
) -> Result<(OwnedFd, OwnedFd), FilesError> {
    let kind = socket_type(here.socktype)?;
    let other = there.and_then(|unix| unix.address.as_ref());
    if kind == ns::SockType::Datagram || (here.address.is_none() && other.is_none()) {
        let (one, two) = pair(kind)?;
        for (fd, address) in [(&one, &here.address.as_ref()), (&two, &other)] {
            if let Some(address) = address {
                bind_name(fd, address)?;
            }
        }
        return Ok((one, two));
    }
    let listener = |address: Option<&UnixAddress>| {
        let listens = |unix: &UnixSocket| {
            matches!(unix.state, UnixState::Listening { .. }) && unix.address.as_ref() == address
        };
        let found = all.iter().find(|(_, (_, unix))| listens(unix));
        found.and_then(|(id, _)| opened.get(id))
    };
    let own = here.address.as_ref();
    // Of two named ends, the one named like a listener was accepted.
    let swap = own.is_none() || (other.is_some() && listener(other).is_some());
    let (accepted, connecting) = if swap { (other, own) } else { (own, other) };
    let Some(accepted) = accepted else {
        return pair(kind);
    };
    let client = new_socket(kind)?;
    if let Some(name) = connecting {
        bind_name(&client, name)?;
    }
    let server = match listener(Some(accepted)) {
        Some(listener) => meet(listener, &client, accepted)?,
        None => meet_at_former(&client, kind, accepted)?,
    };
    Ok(if swap {
        (client, server)
    } else {
        (server, client)
    })
}

fn meet(
    listener: &OwnedFd,
    client: &OwnedFd,
    address: &UnixAddress,
) -> Result<OwnedFd, FilesError> {
    let object = display(address);
    ns::connect(client.as_raw_fd(), &encode(address)?).map_err(call(&object, "connect"))?;
    accept(listener.as_fd()).map_err(socket(&object))
}

/// As [`meet`], for a listener that the application has closed since.
fn meet_at_former(
    client: &OwnedFd,
    kind: ns::SockType,
    address: &UnixAddress,
) -> Result<OwnedFd, FilesError> {
    let object = display(address);
    let listener = new_socket(kind)?;
    let path = match address {
        UnixAddress::Path(path) => Some(Path::new(OsStr::from_bytes(path))),
        UnixAddress::Abstract(_) => None,
    };
    // What has the name now, if anything, gets it back.
    let aside = path.map(|path| PathBuf::from(format!("{}.tracker-old", path.display())));
    let moved = match (path, &aside) {
        (Some(path), Some(aside)) => std::fs::rename(path, aside).is_ok(),
        _ => false,
    };
    let met = ns::bind(listener.as_raw_fd(), &encode(address)?)
        .and_then(|()| ns::listen(&listener, ns::Backlog::new(1)?))
        .map_err(call(&object, "bind"))
        .and_then(|()| meet(&listener, client, address));
    if let (Some(path), Some(aside)) = (path, &aside) {
        let _ = std::fs::remove_file(path);
        if moved {
            std::fs::rename(aside, path).map_err(super::error::io_call(&object, "rename"))?;
        }
    }
    met
}

fn bind_name(fd: &OwnedFd, address: &UnixAddress) -> Result<(), FilesError> {
    match address {
        UnixAddress::Abstract(_) => {
            ns::bind(fd.as_raw_fd(), &encode(address)?).map_err(call(display(address), "bind"))
        }
        UnixAddress::Path(path) => bind_path(fd, OsStr::from_bytes(path).as_ref()),
    }
}

fn socket_type(number: i32) -> Result<ns::SockType, FilesError> {
    ns::SockType::try_from(number)
        .map_err(|_| FilesError::Unsupported(format!("Unix socket of type {number}")))
}

fn pair(kind: ns::SockType) -> Result<(OwnedFd, OwnedFd), FilesError> {
    ns::socketpair(
        ns::AddressFamily::Unix,
        kind,
        None,
        ns::SockFlag::SOCK_CLOEXEC,
    )
    .map_err(call("Unix socket", "socketpair"))
}

fn name_and_listen(fd: &OwnedFd, unix: &UnixSocket) -> Result<(), FilesError> {
    if let Some(address) = &unix.address {
        bind_name(fd, address)?;
    }
    if let UnixState::Listening { backlog } = unix.state {
        let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
        let backlog = ns::Backlog::new(backlog).map_err(call("Unix listener", "listen"))?;
        ns::listen(fd, backlog).map_err(call("Unix listener", "listen"))?;
    }
    Ok(())
}

/// Binds to a name whose file may still lie there from before. It is replaced
/// in one step, with its owner and mode, so that it is never missing.
fn bind_path(fd: &OwnedFd, path: &Path) -> Result<(), FilesError> {
    let object = format!("Unix socket {}", path.display());
    let old = match stat(path) {
        Ok(old) if SFlag::from_bits_truncate(old.st_mode) & SFlag::S_IFMT == SFlag::S_IFSOCK => {
            Some(old)
        }
        Ok(_) => {
            return Err(FilesError::Changed {
                path: path.display().to_string(),
                reason: "it is no socket".into(),
            });
        }
        Err(Errno::ENOENT) => None,
        Err(errno) => return Err(call(&object, "stat")(errno)),
    };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(super::error::io_call(&object, "mkdir"))?;
    }
    // The socket's own name is the one it is bound to, so the old file makes way.
    let aside = PathBuf::from(format!("{}.tracker-old", path.display()));
    if old.is_some() {
        std::fs::rename(path, &aside).map_err(super::error::io_call(&object, "rename"))?;
    }
    let bound = ns::UnixAddr::new(path).and_then(|address| ns::bind(fd.as_raw_fd(), &address));
    if let Err(errno) = bound {
        if old.is_some() {
            let _ = std::fs::rename(&aside, path);
        }
        return Err(call(&object, "bind")(errno));
    }
    if let Some(old) = old {
        let _ = std::fs::remove_file(&aside);
        std::os::unix::fs::chown(path, Some(old.st_uid), Some(old.st_gid))
            .map_err(super::error::io_call(&object, "chown"))?;
        nix::sys::stat::fchmodat(
            nix::fcntl::AT_FDCWD,
            path,
            Mode::from_bits_truncate(old.st_mode),
            nix::sys::stat::FchmodatFlags::FollowSymlink,
        )
        .map_err(call(&object, "chmod"))?;
    }
    Ok(())
}

/// Queues what was not read: each message is sent by the other end.
///
/// # Errors
/// The image refers to a description it does not hold, or the kernel refuses.
pub fn fill_all(
    app: &Application,
    opened: &BTreeMap<OfdId, OwnedFd>,
    departed: BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    for (id, _, unix) in sockets(app) {
        if unix.queue.is_empty() {
            continue;
        }
        let stranger;
        let sender = match (unix.state, &unix.address) {
            (UnixState::Connected { peer }, _) => opened
                .get(&peer)
                .ok_or_else(|| FilesError::Missing(format!("peer {peer} of Unix socket {id}")))?,
            (UnixState::PeerClosed, _) => departed
                .get(&id)
                .ok_or_else(|| FilesError::Missing(format!("peer of Unix socket {id}")))?,
            // Who has sent these datagrams is not known; whoever did had no need to be connected.
            (UnixState::Unconnected, Some(address)) => {
                stranger = new_socket(socket_type(unix.socktype)?)?;
                ns::connect(stranger.as_raw_fd(), &encode(address)?)
                    .map_err(call(display(address), "connect"))?;
                &stranger
            }
            _ => {
                let what = format!("Unix socket {id} with unread data and no connected peer");
                return Err(FilesError::Unsupported(what));
            }
        };
        with_room(sender.as_fd(), unix, || {
            unix.queue
                .iter()
                .try_for_each(|message| send(sender.as_fd(), message, opened))
        })?;
    }
    drop(departed);
    for (id, _, unix) in sockets(app) {
        let how = match unix.shutdown & 3 {
            1 => ns::Shutdown::Read,
            2 => ns::Shutdown::Write,
            3 => ns::Shutdown::Both,
            _ => continue,
        };
        if matches!(unix.state, UnixState::Connected { .. }) {
            ns::shutdown(opened[&id].as_raw_fd(), how).map_err(call("Unix socket", "shutdown"))?;
        }
    }
    Ok(())
}

/// Runs `fill` while the sender's buffer holds all of the queue, however little
/// the sender's own size may be.
fn with_room(
    sender: BorrowedFd<'_>,
    unix: &UnixSocket,
    fill: impl FnOnce() -> Result<(), FilesError>,
) -> Result<(), FilesError> {
    const LEAST: usize = 64 << 10;
    let object = "Unix socket";
    let total: usize = unix.queue.iter().map(|m| m.data.len() + 1024).sum();
    if total < LEAST {
        return fill();
    }
    let level = libc::SOL_SOCKET;
    let size = int_option(sender, level, libc::SO_SNDBUF).map_err(socket(object))?;
    let lock = int_option(sender, level, libc::SO_BUF_LOCK).map_err(socket(object))?;
    let room = i32::try_from(LEAST + 2 * total).unwrap_or(i32::MAX / 2);
    set_int_option(sender, level, libc::SO_SNDBUFFORCE, room).map_err(socket(object))?;
    fill()?;
    set_int_option(sender, level, libc::SO_SNDBUFFORCE, size / 2).map_err(socket(object))?;
    set_int_option(sender, level, libc::SO_BUF_LOCK, lock).map_err(socket(object))
}

fn send(
    sender: BorrowedFd<'_>,
    message: &UnixMessage,
    opened: &BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    let fds = message
        .fds
        .iter()
        .map(|id| {
            opened
                .get(id)
                .map(AsRawFd::as_raw_fd)
                .ok_or_else(|| FilesError::Missing(format!("{id} in flight over a Unix socket")))
        })
        .collect::<Result<Vec<RawFd>, _>>()?;
    let rights = [ns::ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &[][..] } else { &rights[..] };
    let data = [IoSlice::new(&message.data)];
    let flags = ns::MsgFlags::MSG_DONTWAIT;
    let sent = ns::sendmsg::<()>(sender.as_raw_fd(), &data, control, flags, None)
        .map_err(call("Unix socket", "sendmsg"))?;
    if sent == message.data.len() {
        Ok(())
    } else {
        Err(call("Unix socket", "sendmsg")(Errno::EMSGSIZE))
    }
}
