//! TCP repair mode (net/ipv4/tcp.c, `do_tcp_setsockopt` and `tcp_repair_*`).
//!
//! A socket in repair mode sends nothing by itself when it connects, is filled
//! or is closed; it still acknowledges what arrives, so it is no network lock.

use super::socket::{SocketError, int_option, option, set_int_option, set_option};
use crate::model::frozen::{TcpOptions, TcpWindow};
use nix::libc::{
    IP_OPTIONS, IPPROTO_IP, IPPROTO_TCP, TCP_INFO, TCP_MAXSEG, TCP_QUEUE_SEQ, TCP_REPAIR,
    TCP_REPAIR_OPTIONS, TCP_REPAIR_QUEUE, TCP_TIMESTAMP,
};
use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

/// `TCP_*` of include/net/tcp_states.h, which sockets of other families use as well.
pub mod state {
    /// Both directions are open.
    pub const ESTABLISHED: u8 = 1;
    /// Our FIN is sent and not acknowledged.
    pub const FIN_WAIT1: u8 = 4;
    /// Our FIN is acknowledged.
    pub const FIN_WAIT2: u8 = 5;
    /// Over, or nothing yet.
    pub const CLOSE: u8 = 7;
    /// Their FIN was received.
    pub const CLOSE_WAIT: u8 = 8;
    /// Theirs was received before ours was sent.
    pub const LAST_ACK: u8 = 9;
    /// listen(2) was called.
    pub const LISTEN: u8 = 10;
    /// Theirs was received before ours was acknowledged.
    pub const CLOSING: u8 = 11;
    /// Those of connections, with both, one or no direction open.
    pub const CONNECTED: &[u8] = &[
        ESTABLISHED,
        FIN_WAIT1,
        FIN_WAIT2,
        CLOSE_WAIT,
        LAST_ACK,
        CLOSING,
    ];
}

const TCP_REPAIR_WINDOW: i32 = 29;

/// `TCP_REPAIR_OFF_NO_WP`: leave repair mode without a window probe.
const OFF_WITHOUT_PROBE: i32 = -1;

/// One of the two queues of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Queue {
    /// `TCP_NO_QUEUE`
    None = 0,
    /// `TCP_RECV_QUEUE`
    Receive = 1,
    /// `TCP_SEND_QUEUE`
    Send = 2,
}

/// Enters repair mode.
///
/// # Errors
/// `EPERM`: needs `CAP_NET_ADMIN`, or the socket is neither closed nor connected.
pub fn enter_repair(fd: BorrowedFd<'_>) -> Result<(), SocketError> {
    set_int_option(fd, IPPROTO_TCP, TCP_REPAIR, 1)
}

/// Leaves repair mode and has the peer say what it has received (`tcp_send_window_probe`), so
/// that what need not be sent again is not.
///
/// # Errors
/// As [`enter_repair`].
pub fn leave_repair_and_ask(fd: BorrowedFd<'_>) -> Result<(), SocketError> {
    set_int_option(fd, IPPROTO_TCP, TCP_REPAIR, 0)
}

/// Leaves repair mode without sending anything.
///
/// # Errors
/// As [`enter_repair`].
pub fn leave_repair(fd: BorrowedFd<'_>) -> Result<(), SocketError> {
    set_int_option(fd, IPPROTO_TCP, TCP_REPAIR, OFF_WITHOUT_PROBE)
}

/// Chooses the queue that reads, writes and sequence numbers are about.
///
/// # Errors
/// `EPERM`: not in repair mode.
pub fn select_queue(fd: BorrowedFd<'_>, queue: Queue) -> Result<(), SocketError> {
    set_int_option(fd, IPPROTO_TCP, TCP_REPAIR_QUEUE, queue as i32)
}

/// `write_seq` or `rcv_nxt`, by the queue chosen.
///
/// # Errors
/// `EINVAL`: no queue chosen.
pub fn sequence(fd: BorrowedFd<'_>) -> Result<u32, SocketError> {
    int_option(fd, IPPROTO_TCP, TCP_QUEUE_SEQ).map(i32::cast_unsigned)
}

/// Sets `write_seq` or `rcv_nxt` of a socket that is not connected yet.
///
/// # Errors
/// `EPERM`: connected already.
pub fn set_sequence(fd: BorrowedFd<'_>, seq: u32) -> Result<(), SocketError> {
    set_int_option(fd, IPPROTO_TCP, TCP_QUEUE_SEQ, seq.cast_signed())
}

/// `struct tcp_repair_window` of a socket in repair mode.
///
/// # Errors
/// `EPERM`: not in repair mode.
pub fn window(fd: BorrowedFd<'_>) -> Result<TcpWindow, SocketError> {
    let bytes = option(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, 20)?;
    let word = |at: usize| {
        bytes
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    Ok(TcpWindow {
        snd_wl1: word(0),
        snd_wnd: word(4),
        max_window: word(8),
        rcv_wnd: word(12),
        rcv_wup: word(16),
    })
}

/// Sets the window of a connected socket in repair mode.
///
/// # Errors
/// `EINVAL`: the numbers contradict the sequence numbers.
pub fn set_window(fd: BorrowedFd<'_>, window: &TcpWindow) -> Result<(), SocketError> {
    let words = [
        window.snd_wl1,
        window.snd_wnd,
        window.max_window,
        window.rcv_wnd,
        window.rcv_wup,
    ];
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    set_option(fd, IPPROTO_TCP, TCP_REPAIR_WINDOW, &bytes)
}

/// What `struct tcp_info` says of a socket (include/uapi/linux/tcp.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Info {
    /// `TCP_ESTABLISHED` = 1 …; 10 = listening.
    pub state: u8,
    /// `TCPI_OPT_*` bits.
    pub options: u8,
    /// Window scale (theirs, ours).
    pub wscale: (u8, u8),
    /// On a listener: length of the accept queue.
    pub unacked: u32,
    /// On a listener: its backlog.
    pub sacked: u32,
}

/// `TCP_INFO`.
///
/// # Errors
/// Not a TCP socket.
pub fn info(fd: BorrowedFd<'_>) -> Result<Info, SocketError> {
    let bytes = option(fd, IPPROTO_TCP, TCP_INFO, 64)?;
    let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
    let word = |at: usize| {
        bytes
            .get(at..at + 4)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u32::from_ne_bytes)
    };
    Ok(Info {
        state: byte(0),
        options: byte(5),
        wscale: (byte(6) & 0xf, byte(6) >> 4),
        unacked: word(24),
        sacked: word(28),
    })
}

const OPT_TIMESTAMPS: u8 = 1;
const OPT_SACK: u8 = 2;
const OPT_WSCALE: u8 = 4;

/// Since Linux 6.7 bit 0 of `TCP_TIMESTAMP` says that the clock counts microseconds
/// (net/ipv4/tcp.c, `tcp_usec_ts`); before, it is just a bit of a clock in milliseconds.
fn timestamps_tell_unit() -> bool {
    static TELL: OnceLock<bool> = OnceLock::new();
    *TELL.get_or_init(is_since_6_7)
}

fn is_since_6_7() -> bool {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_owned());
    let release = release.unwrap_or_default();
    let release = release.to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    version >= (6, 7)
}

/// A timestamp in milliseconds that a newer kernel does not take for microseconds. Rounded up: a
/// connection's clock never goes back.
#[must_use]
pub fn milliseconds(now: u32) -> u32 {
    now.wrapping_add(now & 1)
}

/// What was agreed in the handshake, of a connection in repair mode with this [`info`].
///
/// # Errors
/// `EPERM`: not in repair mode.
pub fn negotiated(fd: BorrowedFd<'_>, info: &Info) -> Result<TcpOptions, SocketError> {
    // In repair mode TCP_MAXSEG is the clamp that the peer's MSS option set.
    let mss_clamp = int_option(fd, IPPROTO_TCP, TCP_MAXSEG)?.cast_unsigned();
    let timestamp = if info.options & OPT_TIMESTAMPS == 0 {
        None
    } else {
        let now = int_option(fd, IPPROTO_TCP, TCP_TIMESTAMP)?.cast_unsigned();
        Some(if timestamps_tell_unit() {
            now
        } else {
            milliseconds(now)
        })
    };
    Ok(TcpOptions {
        mss_clamp,
        wscale: (info.options & OPT_WSCALE != 0).then_some(info.wscale),
        sack: info.options & OPT_SACK != 0,
        timestamp,
    })
}

/// Has the kernel compute the segment size anew. It did so on connect, before the peer's MSS
/// was known, and does not again while the path's MTU stays (tcp_current_mss()): clearing IP
/// options, of which there are none, calls `icsk_sync_mss`. Over IPv6 that has no effect.
///
/// It depends on the peer's largest window, so [`set_window`] comes first.
///
/// # Errors
/// As setsockopt(2).
pub fn sync_mss(fd: BorrowedFd<'_>) -> Result<(), SocketError> {
    set_option(fd, IPPROTO_IP, IP_OPTIONS, &[])
}

/// Sets what was agreed in the handshake. Window scaling is set even when there
/// was none: the kernel would otherwise scale by what it would have offered.
///
/// # Errors
/// `EPERM`: not a connection in repair mode.
pub fn set_negotiated(fd: BorrowedFd<'_>, options: &TcpOptions) -> Result<(), SocketError> {
    const MSS: u32 = 2;
    const WINDOW: u32 = 3;
    const SACK_PERMITTED: u32 = 4;
    const TIMESTAMP: u32 = 8;
    let (theirs, ours) = options.wscale.unwrap_or((0, 0));
    let mut list = vec![
        (MSS, options.mss_clamp),
        (WINDOW, u32::from(theirs) | u32::from(ours) << 16),
    ];
    if options.sack {
        list.push((SACK_PERMITTED, 0));
    }
    if options.timestamp.is_some() {
        list.push((TIMESTAMP, 0));
    }
    let bytes: Vec<u8> = list
        .iter()
        .flat_map(|(code, value)| [code.to_ne_bytes(), value.to_ne_bytes()].concat())
        .collect();
    set_option(fd, IPPROTO_TCP, TCP_REPAIR_OPTIONS, &bytes)?;
    if let Some(value) = options.timestamp {
        set_int_option(fd, IPPROTO_TCP, TCP_TIMESTAMP, value.cast_signed())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::milliseconds;

    #[test]
    fn milliseconds_are_even() {
        assert_eq!(milliseconds(7), 8);
        assert_eq!(milliseconds(8), 8);
        assert_eq!(milliseconds(u32::MAX), 0);
    }
}
