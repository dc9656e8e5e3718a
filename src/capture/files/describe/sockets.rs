//! Sockets, and what is in flight over them.

use super::Reader;
use crate::bpf::events::{SockRec, WaitingRec};
use crate::bpf::iter::{Detail, File, Files, Iterators, ReadError, Scope};
use crate::capture::files::borrow::place;
use crate::capture::files::{CollectError, connections, ended, filter, mqueue, socket, tcp, unix};
use crate::model::frozen::{
    Blocker, FileKind, Interfaces, Socket, SocketState, UnixMessage, UnixState,
};
use crate::model::ids::{Fd, OfdId, Pid};
use crate::model::map::{Map, Set};
use crate::sys::tcp::state::LISTEN;
use nix::libc;
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};

impl Reader<'_> {
    fn with_accept_queue(
        &self,
        file: &File,
        sock: &SockRec,
        mut socket: Socket,
    ) -> Result<FileKind, CollectError> {
        if let SocketState::TcpListen { waiting, .. } = &mut socket.state {
            *waiting = self.accept_queues.tcp(file, sock)?;
        }
        Ok(FileKind::Socket(Box::new(socket)))
    }

    pub(super) fn socket(
        &mut self,
        id: OfdId,
        file: &File,
        sock: &SockRec,
    ) -> Result<FileKind, CollectError> {
        let members = self.members.get(&sock.sock).map_or(&[][..], Vec::as_slice);
        let now = self.connections.get(&sock.sock);
        if let Some(reason) = now.and_then(socket::new_error) {
            let (pid, fd) = place(file);
            return Err(CollectError::Blocked(Blocker {
                pid,
                fd: Some(fd),
                object: "TCP socket".into(),
                reason,
            }));
        }
        if (sock.state == LISTEN || now.is_some())
            && members.is_empty()
            && let Some(options) = self.alike.options(sock)
            && let Some(socket) = socket::told(sock, now, options)
        {
            return self.with_accept_queue(file, sock, socket);
        }
        let from = self.lender.borrow(file)?;
        if i32::from(sock.family) != libc::AF_UNIX {
            let read = socket::read(from, sock, now, self.alike, members)?;
            self.repaired.0.extend(read.repaired);
            self.ended.extend(read.ended.map(|from| (id, from)));
            return self.with_accept_queue(file, sock, read.socket);
        }
        let owners = &self.survey.sockets;
        let state = match self.accept_queues.awaited(sock, owners) {
            Some(listener) => Ok(UnixState::Waiting { listener }),
            None => unix::state(sock, owners, &self.survey.meetings),
        };
        let state = state.map_err(|reason| {
            let (pid, fd) = place(file);
            CollectError::Blocked(Blocker {
                pid,
                fd: Some(fd),
                object: "Unix socket".into(),
                reason,
            })
        })?;
        let options = self.alike.defaults().read(&from, sock)?;
        let (mut unix, queue) = unix::read(&from, sock, state)?;
        if let UnixState::Listening { .. } = state {
            unix.waiting = self.accept_queues.unix(file, sock, owners)?;
        }
        if !queue.is_empty() {
            self.in_flight.push((id, queue));
        }
        Ok(FileKind::Socket(Box::new(Socket {
            inode: sock.ino,
            options,
            filter: filter::read(&from, sock)?,
            interfaces: Interfaces::default(),
            state: SocketState::Unix(unix),
        })))
    }

    /// Reads those connections again that are not what they were before they were read; returns
    /// whether there were any. `now` is a pass made since.
    pub(in crate::capture::files) fn read_moved(
        &mut self,
        found: &Files,
        now: Vec<WaitingRec>,
    ) -> Result<bool, CollectError> {
        let before = std::mem::take(&mut self.connections);
        let moved =
            |rec: &WaitingRec| !before.get(&rec.sock).is_some_and(|b| tcp::is_still(b, rec));
        let moved: Set<u64> = now
            .iter()
            .filter(|rec| moved(rec))
            .map(|r| r.sock)
            .collect();
        self.connections = now.into_iter().map(|rec| (rec.sock, rec)).collect();
        // One that has no record any more has moved, too.
        let stays = |sock| self.connections.contains_key(sock) && !moved.contains(sock);
        let again = connections(found).filter(|(_, sock)| !stays(&sock.sock));
        let again: Vec<_> = again.collect();
        for (file, sock) in &again {
            let id = OfdId(file.rec.file);
            self.repaired.leave(sock.sock);
            self.ended.retain(|(ended, _)| *ended != id);
            self.ofds.remove(&id);
        }
        // Each once, however many descriptors it has.
        for (file, _) in again {
            self.describe(file)?;
        }
        Ok(!moved.is_empty())
    }

    /// Whether any messages are known that have descriptors with them.
    pub(in crate::capture::files) fn has_in_flight(&self) -> bool {
        let mut messages = self.in_flight.iter().flat_map(|(_, queue)| queue);
        messages.any(|message| !message.fds.is_empty())
    }

    /// Descriptors in flight are in no table but, as duplicates, in ours: a pass
    /// over this process tells what they are. They may hold sockets with
    /// descriptors in flight themselves.
    pub(in crate::capture::files) fn describe_in_flight(
        &mut self,
        iterators: &mut Iterators,
    ) -> Result<(), CollectError> {
        while !self.in_flight.is_empty() {
            let batch = std::mem::take(&mut self.in_flight);
            let any = batch
                .iter()
                .flat_map(|(_, queue)| queue)
                .any(|m| !m.fds.is_empty());
            let own = if any {
                self.own_files(iterators)?
            } else {
                Map::default()
            };
            for (id, queue) in batch {
                let messages = queue
                    .into_iter()
                    .map(|message| self.message(message, &own))
                    .collect::<Result<Vec<_>, _>>()?;
                if let Some(FileKind::Socket(socket)) =
                    self.ofds.get_mut(&id).map(|file| &mut file.kind)
                    && let SocketState::Unix(unix) = &mut socket.state
                {
                    unix.queue = messages;
                }
            }
        }
        Ok(())
    }

    /// How connections ended that did so after their records were made: our duplicates are read
    /// again.
    pub(in crate::capture::files) fn describe_ended(
        &mut self,
        iterators: &mut Iterators,
    ) -> Result<(), CollectError> {
        if self.ended.is_empty() {
            return Ok(());
        }
        let own = self.own_files(iterators)?;
        for (id, from) in std::mem::take(&mut self.ended) {
            let Some(Detail::Socket(sock)) = own.get(&from.fd.as_raw_fd()).map(|file| &file.detail)
            else {
                return Err(from.failed("reading the socket again")(ErrorKind::NotFound));
            };
            if let Some(ended) = ended::read(&from, sock)?
                && let Some(FileKind::Socket(socket)) =
                    self.ofds.get_mut(&id).map(|file| &mut file.kind)
            {
                socket.state = SocketState::TcpEnded(Box::new(ended));
            }
        }
        Ok(())
    }

    fn own_files(&mut self, iterators: &mut Iterators) -> Result<Map<i32, File>, CollectError> {
        let failed = |e: ReadError| CollectError::File {
            pid: Pid(std::process::id().cast_signed()),
            fd: Fd(-1),
            call: "reading our own descriptors",
            source: std::io::Error::other(e),
        };
        let own = Scope::Process(std::process::id());
        let found = iterators.descriptors(own).map_err(failed)?;
        if mqueue::has_messages(&found) {
            self.messages
                .add(&iterators.messages(own, &[]).map_err(failed)?);
        }
        Ok(found
            .into_iter()
            .map(|file| (file.rec.fd.cast_signed(), file))
            .collect())
    }

    fn message(
        &mut self,
        peeked: unix::Peeked,
        own: &Map<i32, File>,
    ) -> Result<UnixMessage, CollectError> {
        let fds = peeked
            .fds
            .iter()
            .map(|fd: &OwnedFd| {
                let file = own.get(&fd.as_raw_fd()).ok_or_else(|| CollectError::File {
                    pid: Pid(std::process::id().cast_signed()),
                    fd: Fd(fd.as_raw_fd()),
                    call: "identifying a descriptor in flight",
                    source: std::io::ErrorKind::NotFound.into(),
                })?;
                self.describe(file)?;
                Ok(OfdId(file.rec.file))
            })
            .collect::<Result<Vec<_>, CollectError>>()?;
        Ok(UnixMessage {
            fds,
            ..peeked.message
        })
    }
}
