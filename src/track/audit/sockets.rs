//! Sockets.

use super::Audit;
use super::kernel::sockets::{End, ProcSocket};
use crate::model::event::SockInfo;
use crate::model::ids::{Fd, Pid};
use crate::model::state::Socket;

const TCP_LISTEN: u8 = 10;

impl Audit<'_> {
    pub(super) fn socket(&mut self, (pid, fd): (Pid, Fd), socket: &Socket, truth: &ProcSocket) {
        self.compared.sockets += 1;
        let (mut model, mut kernel) = match &truth.end {
            End::Inet {
                local,
                remote,
                state,
            } => inet(&socket.info, (local, remote, *state)),
            End::Unix { listening, name } => unix(&socket.info, *listening, name),
        };
        let info = &socket.info;
        let mut both = |what: &str, ours: u64, theirs: u64| {
            model += &format!(" {what} {ours}");
            kernel += &format!(" {what} {theirs}");
        };
        if let Some(diag) = truth.diag {
            both("state", info.state.into(), diag.state.into());
            if let Some(shutdown) = diag.shutdown {
                both("shutdown", info.shutdown.into(), shutdown.into());
            }
            if let Some(backlog) = diag.backlog {
                both("backlog", info.options.backlog.into(), backlog.into());
            }
            // The inode of one that no descriptor refers to is known to neither side.
            let peer = match info.peer {
                None => Some(0),
                Some(peer) if self.held.contains(&peer) => {
                    self.state.sockets.get(&peer).map(|peer| peer.info.ino)
                }
                Some(_) => None,
            };
            if let (Some(known), Some(found)) = (peer, diag.peer)
                && (known == 0 || found != 0)
            {
                both("peer", known, found);
            }
        }
        self.differ(pid, format!("socket of fd {fd}"), model, kernel);
    }
}

type Endpoint = (Vec<u8>, u16);

fn inet(info: &SockInfo, (local, remote, state): (&Endpoint, &Endpoint, u8)) -> (String, String) {
    let end = |address: &[u8], port: u16| format!("{address:02x?}:{port}");
    let width = local.0.len().min(16);
    let model = format!(
        "{} -> {} state {}",
        end(&info.local_addr[..width], info.local_port),
        end(&info.remote_addr[..width], info.remote_port),
        info.state
    );
    let (local, remote) = (end(&local.0, local.1), end(&remote.0, remote.1));
    (model, format!("{local} -> {remote} state {state}"))
}

fn unix(info: &SockInfo, listening: bool, name: &[u8]) -> (String, String) {
    // /proc shows NUL as @ and stops at the end of a path.
    let mut bound: Vec<u8> = info
        .name
        .iter()
        .map(|byte| if *byte == 0 { b'@' } else { *byte })
        .collect();
    if info.name.first().is_some_and(|byte| *byte != 0) {
        let path = info.name.split(|byte| *byte == 0).next();
        bound = path.unwrap_or_default().to_vec();
    }
    let text = |listening: bool, name: &[u8]| {
        let name = String::from_utf8_lossy(name);
        let listening = if listening { "listening " } else { "" };
        format!("unix {listening}{name}")
    };
    (
        text(info.state == TCP_LISTEN, &bound),
        text(listening, name),
    )
}
