//! Unix domain sockets: listeners, connected pairs, and what is queued in them.

use super::error::{FilesError, call, socket};
use crate::model::frozen::{
    Application, FileKind, Socket, SocketState, UnixAddress, UnixMessage, UnixSocket, UnixState,
};
use crate::model::ids::OfdId;
use crate::sys::socket::set_option;
use nix::errno::Errno;
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

/// Makes every Unix socket; queues are filled by [`fill_all`] once all files exist.
///
/// # Errors
/// An address is in use, or the kernel refuses a step.
pub fn open_all(app: &Application) -> Result<BTreeMap<OfdId, OwnedFd>, FilesError> {
    let mut opened = BTreeMap::new();
    for (id, described, unix) in sockets(app) {
        if opened.contains_key(&id) {
            continue;
        }
        let kind = socket_type(unix.socktype)?;
        let fd = match unix.state {
            UnixState::Connected { peer } if peer != id => {
                let (here, there) = pair(kind)?;
                opened.insert(peer, there);
                here
            }
            UnixState::PeerClosed => pair(kind)?.0,
            UnixState::Connected { .. } | UnixState::Unconnected | UnixState::Listening { .. } => {
                let flags = ns::SockFlag::SOCK_CLOEXEC;
                ns::socket(ns::AddressFamily::Unix, kind, flags, None)
                    .map_err(call("Unix socket", "socket"))?
            }
        };
        for option in &described.options {
            set_option(fd.as_fd(), option.level, option.name, &option.value)
                .map_err(socket("Unix socket"))?;
        }
        opened.insert(id, fd);
    }
    for (id, _, unix) in sockets(app) {
        name_and_listen(&opened[&id], unix)?;
    }
    Ok(opened)
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
    let listening = matches!(unix.state, UnixState::Listening { .. });
    let bound = listening || unix.state == UnixState::Unconnected;
    match &unix.address {
        Some(UnixAddress::Abstract(name)) if bound => {
            let object = format!("Unix socket @{}", String::from_utf8_lossy(name));
            let address = ns::UnixAddr::new_abstract(name).map_err(call(&object, "bind"))?;
            ns::bind(fd.as_raw_fd(), &address).map_err(call(&object, "bind"))?;
        }
        Some(UnixAddress::Path(path)) if bound => bind_path(fd, OsStr::from_bytes(path).as_ref())?,
        _ => {}
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
pub fn fill_all(app: &Application, opened: &BTreeMap<OfdId, OwnedFd>) -> Result<(), FilesError> {
    for (id, _, unix) in sockets(app) {
        if unix.queue.is_empty() {
            continue;
        }
        let UnixState::Connected { peer } = unix.state else {
            let what = format!("Unix socket {id} with unread data and no connected peer");
            return Err(FilesError::Unsupported(what));
        };
        let sender = opened
            .get(&peer)
            .ok_or_else(|| FilesError::Missing(format!("peer {peer} of Unix socket {id}")))?;
        for message in &unix.queue {
            send(sender.as_fd(), message, opened)?;
        }
    }
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
