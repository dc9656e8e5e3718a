//! Unix domain sockets: listeners and connected pairs; `unix_queue` fills them.

use super::error::{FilesError, call, missing_part, socket};
use super::peer::{self, act_as};
use super::unix_accept::{self, Closed};
use crate::model::frozen::{
    Application, FileKind, PeerCredentials, Socket, SocketState, UnixAddress, UnixSocket, UnixState,
};
use crate::model::ids::OfdId;
use crate::sys::fd;
use crate::sys::socket::{accept, set_option};
use nix::errno::Errno;
use nix::sys::socket as ns;
use nix::sys::stat::{Mode, SFlag, stat};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The Unix sockets of an application.
pub(super) type Sockets<'a> = BTreeMap<OfdId, (&'a Socket, &'a UnixSocket)>;

/// Pairs by one of their ends, which comes first.
type Pairs = BTreeMap<OfdId, (OwnedFd, OwnedFd)>;

/// Every Unix socket of the application.
pub(super) fn sockets(app: &Application) -> Sockets<'_> {
    let unix = app.ofds.iter().filter_map(|(id, file)| match &file.kind {
        FileKind::Socket(socket) => match &socket.state {
            SocketState::Unix(unix) => Some((*id, (&**socket, unix))),
            _ => None,
        },
        _ => None,
    });
    unix.collect()
}

/// What is made of the Unix sockets.
#[derive(Debug, Default)]
pub struct UnixSockets {
    /// The application's.
    pub opened: BTreeMap<OfdId, OwnedFd>,
    /// Other ends that the application had closed, by the end that is left:
    /// they send what that has not read yet, and are closed then.
    pub departed: BTreeMap<OfdId, OwnedFd>,
    /// The same of those that a listener has not accepted.
    pub closed: Closed,
}

/// Makes every Unix socket; queues are filled once all files exist.
///
/// # Errors
/// An address is in use, or the kernel refuses a step.
pub fn open_all(app: &Application) -> Result<UnixSockets, FilesError> {
    let all = sockets(app);
    let mut made = UnixSockets::default();
    for (&id, &(described, unix)) in &all {
        let alone = match unix.state {
            UnixState::Unconnected | UnixState::Listening { .. } => true,
            UnixState::Connected { peer } => !is_mutual(&all, id, peer),
            UnixState::PeerClosed | UnixState::PeerReset | UnixState::Waiting { .. } => false,
        };
        if alone {
            let fd = new_socket(socket_type(unix.socktype)?)?;
            set_options(&fd, described)?;
            name_and_listen(&fd, unix)?;
            made.opened.insert(id, fd);
        }
    }
    let mut pairs = pairs(&all)?;
    for (&id, &(described, unix)) in &all {
        if made.opened.contains_key(&id) || matches!(unix.state, UnixState::Waiting { .. }) {
            continue;
        }
        let peer = match unix.state {
            UnixState::Connected { peer } => all.get(&peer).map(|(_, unix)| (peer, *unix)),
            _ => None,
        };
        let other = peer.map(|(_, unix)| unix);
        let (here, there) = match pairs.remove(&id) {
            Some(ends) => name_ends(ends, unix, other)?,
            None => couple(&all, &made.opened, unix, other)?,
        };
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
                .map_err(call(title(address), "connect"))?;
        }
    }
    unix_accept::connect_all(&all, &mut made)?;
    Ok(made)
}

/// Whether two sockets are connected to each other. Streams always are; a
/// datagram socket may send to one that knows nothing of it.
pub(super) fn is_mutual(all: &Sockets<'_>, id: OfdId, peer: OfdId) -> bool {
    all.get(&peer)
        .is_some_and(|(_, unix)| unix.state == UnixState::Connected { peer: id })
}

pub(super) fn new_socket(kind: ns::SockType) -> Result<OwnedFd, FilesError> {
    let flags = ns::SockFlag::SOCK_CLOEXEC;
    ns::socket(ns::AddressFamily::Unix, kind, flags, None).map_err(call("Unix socket", "socket"))
}

pub(super) fn set_options(fd: &OwnedFd, described: &Socket) -> Result<(), FilesError> {
    for option in &described.options {
        set_option(fd.as_fd(), option.level, option.name, &option.value)
            .map_err(socket("Unix socket"))?;
    }
    Ok(())
}

pub(super) fn encode(address: &UnixAddress) -> Result<ns::UnixAddr, FilesError> {
    match address {
        UnixAddress::Path(path) => ns::UnixAddr::new(Path::new(OsStr::from_bytes(path))),
        UnixAddress::Abstract(name) => ns::UnixAddr::new_abstract(name),
    }
    .map_err(call(title(address), "sockaddr_un"))
}

pub(super) fn title(address: &UnixAddress) -> String {
    match address {
        UnixAddress::Path(path) => format!("Unix socket {}", String::from_utf8_lossy(path)),
        UnixAddress::Abstract(name) => format!("Unix socket @{}", String::from_utf8_lossy(name)),
    }
}

/// Gives both ends of a pair the names they had.
fn name_ends(
    (one, two): (OwnedFd, OwnedFd),
    here: &UnixSocket,
    there: Option<&UnixSocket>,
) -> Result<(OwnedFd, OwnedFd), FilesError> {
    let other = there.and_then(|unix| unix.address.as_ref());
    for (fd, address) in [(&one, here.address.as_ref()), (&two, other)] {
        if let Some(address) = address {
            bind_name(fd, address)?;
        }
    }
    Ok((one, two))
}

/// Two connected sockets with the names they had: an accepted one has that of
/// its listener, which cannot be had by bind(2), so it is accepted once more.
fn couple(
    all: &Sockets<'_>,
    opened: &BTreeMap<OfdId, OwnedFd>,
    here: &UnixSocket,
    there: Option<&UnixSocket>,
) -> Result<(OwnedFd, OwnedFd), FilesError> {
    let kind = socket_type(here.socktype)?;
    let other = there.and_then(|unix| unix.address.as_ref());
    if kind == ns::SockType::Datagram {
        return each_other(here.address.as_ref(), other);
    }
    let listener = |address: Option<&UnixAddress>| {
        let listens = |unix: &UnixSocket| {
            matches!(unix.state, UnixState::Listening { .. }) && unix.address.as_ref() == address
        };
        let found = all.iter().find(|(_, (_, unix))| listens(unix));
        found.and_then(|(id, (_, unix))| Some((opened.get(id)?, *unix)))
    };
    let own = here.address.as_ref();
    // Of two named ends, the one named like a listener was accepted.
    let swap = own.is_none() || (other.is_some() && listener(other).is_some());
    let (accepted, connecting) = if swap { (other, own) } else { (own, other) };
    let Some(accepted) = accepted else {
        return pair(kind).map_err(call("Unix socket", "socketpair"));
    };
    let client = new_socket(kind)?;
    if let Some(name) = connecting {
        bind_name(&client, name)?;
    }
    // What each end was told of the other; an end that is closed tells nobody.
    let (here, there) = (
        here.peer.as_ref(),
        there.and_then(|unix| unix.peer.as_ref()),
    );
    let (listens, connects) = if swap { (here, there) } else { (there, here) };
    let roles = Roles { listens, connects };
    let server = match listener(Some(accepted)) {
        Some((listener, now)) => meet_again(listener, now, &client, accepted, roles)?,
        None => meet_at_former(&client, kind, accepted, roles)?,
    };
    Ok(if swap {
        (client, server)
    } else {
        (server, client)
    })
}

/// Two datagram sockets that have connected to each other by their names.
fn each_other(
    here: Option<&UnixAddress>,
    there: Option<&UnixAddress>,
) -> Result<(OwnedFd, OwnedFd), FilesError> {
    let names = here.zip(there);
    let (here, there) = names.ok_or_else(|| missing_part("Unix socket", "name"))?;
    let named = |address| {
        let fd = new_socket(ns::SockType::Datagram)?;
        bind_name(&fd, address)?;
        Ok::<_, FilesError>((fd, address))
    };
    let ends: [_; 2] = [named(here)?, named(there)?];
    for ((from, _), (_, to)) in ends.iter().zip(ends.iter().rev()) {
        ns::connect(from.as_raw_fd(), &encode(to)?).map_err(call(title(to), "connect"))?;
    }
    let [(here, _), (there, _)] = ends;
    Ok((here, there))
}

/// Who is on which side of a connection; nobody where nobody will ask.
#[derive(Clone, Copy, Debug)]
struct Roles<'a> {
    listens: Option<&'a PeerCredentials>,
    connects: Option<&'a PeerCredentials>,
}

/// [`meet`], at a listener that may have been another process's then.
fn meet_again(
    listener: &OwnedFd,
    now: &UnixSocket,
    client: &OwnedFd,
    address: &UnixAddress,
    roles: Roles<'_>,
) -> Result<OwnedFd, FilesError> {
    let UnixState::Listening { backlog } = now.state else {
        return Err(FilesError::Missing(title(address)));
    };
    let another = roles.listens.is_some() && roles.listens != now.peer.as_ref();
    if another {
        listen(listener, backlog, roles.listens)?;
    }
    let server = meet(listener, client, address, roles)?;
    if another {
        listen(listener, backlog, now.peer.as_ref())?;
    }
    Ok(server)
}

fn meet(
    listener: &OwnedFd,
    client: &OwnedFd,
    address: &UnixAddress,
    roles: Roles<'_>,
) -> Result<OwnedFd, FilesError> {
    let (object, to) = (title(address), encode(address)?);
    act_as(roles.connects, "connect", || {
        ns::connect(client.as_raw_fd(), &to).map(|()| Vec::new())
    })?;
    accept(listener.as_fd()).map_err(socket(&object))
}

/// As [`meet`], for a listener that the application has closed since.
fn meet_at_former(
    client: &OwnedFd,
    kind: ns::SockType,
    address: &UnixAddress,
    roles: Roles<'_>,
) -> Result<OwnedFd, FilesError> {
    let listener = new_socket(kind)?;
    with_name(&listener, address, || {
        listen(&listener, 1, roles.listens)?;
        meet(&listener, client, address, roles)
    })
}

/// Runs `act` while a socket has a name that something else may have now, and gets back.
pub(super) fn with_name<T>(
    fd: &OwnedFd,
    address: &UnixAddress,
    act: impl FnOnce() -> Result<T, FilesError>,
) -> Result<T, FilesError> {
    let (object, name) = (title(address), encode(address)?);
    let path = match address {
        UnixAddress::Path(path) => Some(Path::new(OsStr::from_bytes(path))),
        UnixAddress::Abstract(_) => None,
    };
    let aside = path.map(|path| PathBuf::from(format!("{}.tracker-old", path.display())));
    let moved = match (path, &aside) {
        (Some(path), Some(aside)) => std::fs::rename(path, aside).is_ok(),
        _ => false,
    };
    let bound = ns::bind(fd.as_raw_fd(), &name).map_err(call(&object, "bind"));
    let is_bound = bound.is_ok();
    let done = bound.and_then(|()| act());
    if let (Some(path), Some(aside)) = (path, &aside) {
        if is_bound {
            let _ = std::fs::remove_file(path);
        }
        if moved {
            std::fs::rename(aside, path).map_err(super::error::io_call(&object, "rename"))?;
        }
    }
    done
}

pub(super) fn bind_name(fd: &OwnedFd, address: &UnixAddress) -> Result<(), FilesError> {
    match address {
        UnixAddress::Abstract(_) => {
            ns::bind(fd.as_raw_fd(), &encode(address)?).map_err(call(title(address), "bind"))
        }
        UnixAddress::Path(path) => bind_path(fd, OsStr::from_bytes(path).as_ref()),
    }
}

pub(super) fn socket_type(number: i32) -> Result<ns::SockType, FilesError> {
    ns::SockType::try_from(number)
        .map_err(|_| FilesError::Unsupported(format!("Unix socket of type {number}")))
}

/// Pairs made as the same process, of one type.
type Makers<'a> = BTreeMap<(i32, Option<&'a PeerCredentials>), Vec<OfdId>>;

/// Makes the pairs of sockets that socketpair(2) made, by either end; datagram sockets with
/// names too, since what they remember of each other cannot be had otherwise.
fn pairs(all: &Sockets<'_>) -> Result<Pairs, FilesError> {
    let mut makers = Makers::default();
    for (id, (_, unix)) in all {
        let first = match unix.state {
            UnixState::Connected { peer } => is_mutual(all, *id, peer) && *id < peer,
            UnixState::PeerClosed | UnixState::PeerReset => true,
            _ => false,
        };
        if first && is_pair(all, unix) {
            let maker = (unix.socktype, unix.peer.as_ref());
            makers.entry(maker).or_default().push(*id);
        }
    }
    let mut pairs = Pairs::default();
    for ((kind, who), ids) in makers {
        let kind = socket_type(kind)?;
        for ids in ids.chunks(peer::MOST / 2) {
            let made = act_as(who, "socketpair", || {
                let mut ends = Vec::new();
                for _ in ids {
                    let (one, two) = pair(kind)?;
                    ends.extend([one.into_raw_fd(), two.into_raw_fd()]);
                }
                Ok(ends)
            })?;
            let ends = made.chunks_exact(2).map(|ends| {
                let [one, two] = [ends[0], ends[1]].map(fd::received);
                (one, two)
            });
            pairs.extend(ids.iter().copied().zip(ends));
        }
    }
    Ok(pairs)
}

fn pair(kind: ns::SockType) -> Result<(OwnedFd, OwnedFd), Errno> {
    let flags = ns::SockFlag::SOCK_CLOEXEC;
    ns::socketpair(ns::AddressFamily::Unix, kind, None, flags)
}

/// Whether a socket with a peer, or the memory of one, came from socketpair(2). One that was
/// accepted, or connected to a listener, has a name at one end; datagram sockets that connected
/// to each other remember nobody.
fn is_pair(all: &Sockets<'_>, unix: &UnixSocket) -> bool {
    let peer = match unix.state {
        UnixState::Connected { peer } => all.get(&peer),
        _ => None,
    };
    let unnamed = unix.address.is_none() && peer.is_none_or(|(_, peer)| peer.address.is_none());
    unnamed || (unix.socktype == ns::SockType::Datagram as i32 && unix.peer.is_some())
}

fn name_and_listen(fd: &OwnedFd, unix: &UnixSocket) -> Result<(), FilesError> {
    if let Some(address) = &unix.address {
        bind_name(fd, address)?;
    }
    if let UnixState::Listening { backlog } = unix.state {
        listen(fd, backlog, unix.peer.as_ref())?;
    }
    Ok(())
}

/// Listens as `who`, of which connecting sockets are told.
pub(super) fn listen(
    fd: &OwnedFd,
    backlog: u32,
    who: Option<&PeerCredentials>,
) -> Result<(), FilesError> {
    let backlog = i32::try_from(backlog).unwrap_or(i32::MAX);
    act_as(who, "listen", || {
        ns::listen(fd, ns::Backlog::new(backlog)?).map(|()| Vec::new())
    })
    .map(drop)
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
