//! Sockets as sock_diag(7) shows them.

use netlink_packet_core::{
    NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_sock_diag::SockDiagMessage;
use netlink_packet_sock_diag::inet::{self, ExtensionFlags, InetRequest, SocketId};
use netlink_packet_sock_diag::unix::{self, ShowFlags, UnixRequest};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use std::collections::BTreeMap;
use std::io;

/// What of a socket is in no file of /proc.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Diag {
    /// `TCP_*`, also of Unix sockets.
    pub state: u8,
    /// Receive side 1, send side 2.
    pub shutdown: Option<u8>,
    /// Inode of the other end of a Unix connection; 0 for one that has none.
    pub peer: Option<u64>,
    /// As listen(2) was told.
    pub backlog: Option<u32>,
}

const TCP_LISTEN: u8 = 10;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const PROTOCOLS: [u8; 2] = [6, 17];

/// TCP, UDP and Unix sockets of this thread's network namespace by inode.
pub fn dump() -> io::Result<BTreeMap<u64, Diag>> {
    let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    let mut found = BTreeMap::new();
    for (family, protocol) in [AF_INET, AF_INET6]
        .into_iter()
        .flat_map(|family| PROTOCOLS.map(|protocol| (family, protocol)))
    {
        let socket_id = match family {
            AF_INET => SocketId::new_v4(),
            _ => SocketId::new_v6(),
        };
        let request = SockDiagMessage::InetRequest(InetRequest {
            family,
            protocol,
            extensions: ExtensionFlags::empty(),
            states: inet::StateFlags::all(),
            socket_id,
        });
        call(&socket, request, &mut found)?;
    }
    let request = SockDiagMessage::UnixRequest(UnixRequest {
        // Also those that are not connected.
        state_flags: unix::StateFlags::from_bits_retain(u32::MAX),
        inode: 0,
        show_flags: ShowFlags::PEER | ShowFlags::RQLEN,
        cookie: [0; 8],
    });
    call(&socket, request, &mut found)?;
    Ok(found)
}

/// Sends one request and takes in all its answers.
fn call(
    socket: &Socket,
    request: SockDiagMessage,
    found: &mut BTreeMap<u64, Diag>,
) -> io::Result<()> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    loop {
        let (datagram, _) = socket.recv_from_full()?;
        let mut rest = &datagram[..];
        while !rest.is_empty() {
            let message = NetlinkMessage::<SockDiagMessage>::deserialize(rest)
                .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
            // Messages are aligned to four bytes (NLMSG_ALIGN).
            let length = usize::try_from(message.header.length).unwrap_or(usize::MAX);
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            match message.payload {
                NetlinkPayload::InnerMessage(answer) => found.extend(take(answer)),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(error.to_io());
                }
                NetlinkPayload::Done(_) | NetlinkPayload::Error(_) => return Ok(()),
                _ => {}
            }
        }
    }
}

fn take(answer: SockDiagMessage) -> Option<(u64, Diag)> {
    match answer {
        SockDiagMessage::InetResponse(answer) => {
            let header = &answer.header;
            let shutdown = answer.nlas.iter().find_map(|nla| match nla {
                inet::nlas::Nla::Shutdown(shutdown) => Some(*shutdown),
                _ => None,
            });
            let diag = Diag {
                state: header.state,
                shutdown,
                peer: None,
                backlog: (header.state == TCP_LISTEN).then_some(header.send_queue),
            };
            // Those that wait for their end have none.
            (header.inode != 0).then_some((u64::from(header.inode), diag))
        }
        SockDiagMessage::UnixResponse(answer) => {
            let diag = Diag {
                state: answer.header.state,
                shutdown: answer.shutdown_state(),
                peer: Some(answer.peer().map_or(0, u64::from)),
                backlog: answer.max_number_of_pending_connection(),
            };
            (answer.header.inode != 0).then_some((u64::from(answer.header.inode), diag))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{Shutdown, TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    fn inode(socket: &impl AsFd) -> u64 {
        nix::sys::stat::fstat(socket).expect("open").st_ino
    }

    /// Skipped where the kernel has no sock_diag(7): the audit does without it, too.
    #[test]
    fn our_own_sockets_are_found() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback");
        let address = listener.local_addr().expect("bound");
        let client = TcpStream::connect(address).expect("listening");
        client.shutdown(Shutdown::Write).expect("connected");
        let (a, b) = UnixStream::pair().expect("descriptors");
        a.shutdown(Shutdown::Read).expect("connected");
        let Ok(found) = dump() else { return };
        assert_eq!(found[&inode(&listener)].state, TCP_LISTEN);
        assert_ne!(found[&inode(&listener)].backlog, None);
        let shut = found[&inode(&client)].shutdown.expect("always said");
        assert_eq!(shut & 2, 2);
        let of_b = found[&inode(&b)];
        assert_eq!((of_b.peer, of_b.shutdown), (Some(inode(&a)), Some(2)));
    }
}
