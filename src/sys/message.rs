//! Messages of sockets with all that comes with them: recvmsg(2).

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Longest address of any family (`struct sockaddr_storage`).
const NAME: usize = size_of::<libc::sockaddr_storage>();

/// Bytes of control messages: the most descriptors a message can carry, credentials, and what
/// tells of the way of a datagram.
const CONTROL: usize = 4096;

/// Where messages are received.
#[derive(Debug)]
pub struct Room {
    data: Vec<u8>,
    /// Words, for the alignment of `struct cmsghdr`.
    control: Vec<u64>,
}

/// A message, whose bytes are in the [`Room`] it was received in.
#[derive(Debug)]
pub struct Received<'a> {
    /// Bytes.
    pub data: &'a [u8],
    /// The sender's `struct sockaddr`; empty if it has no name.
    pub name: Vec<u8>,
    /// Level, type and bytes of each control message.
    pub control: Vec<(i32, i32, Vec<u8>)>,
    /// `MSG_*`.
    pub flags: i32,
}

impl Room {
    /// For messages of at most so many bytes; of longer ones the rest is cut off.
    #[must_use]
    pub fn new(most: usize) -> Self {
        Self {
            data: vec![0; most],
            control: vec![0; CONTROL / 8],
        }
    }

    /// Looks at the next message and leaves it where it is; waits for none. Descriptors that
    /// come with it are new, and close on exec.
    ///
    /// # Errors
    /// As recvmsg(2); `EAGAIN`: there is none.
    pub fn peek(&mut self, fd: BorrowedFd<'_>) -> Result<Received<'_>, Errno> {
        let mut name = vec![0_u8; NAME];
        let mut part = libc::iovec {
            iov_base: self.data.as_mut_ptr().cast(),
            iov_len: self.data.len(),
        };
        // SAFETY: plain data, for which zero is nothing.
        let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
        header.msg_name = name.as_mut_ptr().cast();
        header.msg_namelen = libc::socklen_t::try_from(NAME).unwrap_or(0);
        header.msg_iov = &raw mut part;
        header.msg_iovlen = 1;
        header.msg_control = self.control.as_mut_ptr().cast();
        header.msg_controllen = CONTROL;
        let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
        // SAFETY: everything the header points at outlives the call, with the lengths told.
        let length = unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut header, flags) };
        let length = usize::try_from(length).map_err(|_| Errno::last())?;
        name.truncate(usize::try_from(header.msg_namelen).unwrap_or(0));
        Ok(Received {
            data: &self.data[..length.min(self.data.len())],
            name,
            control: control(&header),
            flags: header.msg_flags,
        })
    }
}

fn control(header: &libc::msghdr) -> Vec<(i32, i32, Vec<u8>)> {
    let mut found = Vec::new();
    // SAFETY: the kernel has filled in the header, whose control buffer lives; the macros stay
    // within it.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(header) };
    // SAFETY: as above: a header that is not null lies in the buffer as a whole.
    while let Some(message) = unsafe { at.as_ref() } {
        // SAFETY: takes an integer.
        let head = unsafe { libc::CMSG_LEN(0) } as usize;
        let length = message.cmsg_len.saturating_sub(head);
        // SAFETY: the kernel has written so many bytes behind the header.
        let bytes = unsafe { std::slice::from_raw_parts(libc::CMSG_DATA(at), length) };
        found.push((message.cmsg_level, message.cmsg_type, bytes.to_vec()));
        // SAFETY: as above.
        at = unsafe { libc::CMSG_NXTHDR(header, at) };
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixDatagram;

    #[test]
    fn nothing_queued_is_no_message() {
        let (socket, _other) = UnixDatagram::pair().unwrap();
        let error = Room::new(8).peek(socket.as_fd()).unwrap_err();
        assert_eq!(error, Errno::EAGAIN);
    }

    #[test]
    fn a_message_without_a_sender_stays() {
        let (socket, other) = UnixDatagram::pair().unwrap();
        other.send(b"message").unwrap();
        let mut room = Room::new(64);
        for _ in 0..2 {
            let message = room.peek(socket.as_fd()).unwrap();
            assert_eq!(message.data, b"message");
            assert!(message.name.is_empty() && message.control.is_empty());
        }
    }

    #[test]
    fn what_comes_with_a_datagram_is_told() {
        let to = UdpSocket::bind("127.0.0.1:0").unwrap();
        let from = UdpSocket::bind("127.0.0.1:0").unwrap();
        let (level, name) = (libc::IPPROTO_IP, libc::IP_RECVTTL);
        crate::sys::socket::set_int_option(to.as_fd(), level, name, 1).unwrap();
        from.send_to(b"longer than that", to.local_addr().unwrap())
            .unwrap();
        let mut room = Room::new(6);
        let message = room.peek(to.as_fd()).unwrap();
        assert_eq!(message.data, b"longer");
        assert_ne!(message.flags & libc::MSG_TRUNC, 0);
        let ttl = (level, libc::IP_TTL, 64_i32.to_ne_bytes().to_vec());
        assert_eq!(message.control, [ttl]);
        let port = from.local_addr().unwrap().port();
        assert_eq!(
            message.name[2..8],
            [&port.to_be_bytes()[..], &[127, 0, 0, 1]].concat()
        );
    }
}
