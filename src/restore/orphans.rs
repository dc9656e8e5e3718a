//! TCP connections that an application has closed: made again, they are closed again, and the kernel
//! goes on with them.

use super::files::{FilesError, tcp};
use crate::model::frozen::{Interfaces, Socket, SocketState, TcpConnection};
use std::os::fd::{AsFd, OwnedFd};

/// Those that send nothing yet.
#[derive(Debug, Default)]
pub struct Orphans(Vec<(OwnedFd, Socket)>);

impl Orphans {
    /// Makes them. To be called when all listeners have their ports, since a connection that is
    /// not theirs may keep them from it. Those that cannot be made are left out; why is returned.
    pub fn make(connections: &[TcpConnection]) -> (Self, Vec<FilesError>) {
        let (mut made, mut errors) = (Vec::new(), Vec::new());
        for connection in connections {
            let described = Socket {
                state: SocketState::TcpConnection(Box::new(connection.clone())),
                inode: 0,
                options: Vec::new(),
                filter: None,
                interfaces: Interfaces::default(),
            };
            match tcp::open(&described) {
                Ok(fd) => made.push((fd, described)),
                Err(error) => errors.push(error),
            }
        }
        (Self(made), errors)
    }

    /// Lets them talk, and closes them. To be called when packets pass again.
    pub fn go_live(self) -> Vec<FilesError> {
        let live = |(fd, described): &(OwnedFd, Socket)| {
            tcp::go_live(fd.as_fd(), described)?;
            tcp::settle(fd.as_fd(), described)
        };
        self.0.iter().filter_map(|one| live(one).err()).collect()
    }
}
