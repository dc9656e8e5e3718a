//! TCP connections that are over, and that the application has not closed.

use super::borrow::Borrowed;
use super::{CollectError, socket};
use crate::bpf::events::{SockFlag, SockRec};
use crate::model::frozen::TcpEnded;
use crate::sys::socket::{Count, local_address, peek_exact, queued};
use nix::libc;
use serde_bytes::ByteBuf;

/// What is left of one; `None` if it was none. The socket is in `TCP_CLOSE`, where it stays, and
/// the record was made when it was there.
///
/// # Errors
/// How it ended cannot be made again, or a socket call fails.
pub fn read(from: &Borrowed, rec: &SockRec) -> Result<Option<TcpEnded>, CollectError> {
    let blocked = |reason: &str| {
        from.blocked(
            "TCP connection that is over",
            format!("{reason}; try again"),
        )
    };
    let (_, remote) = socket::addresses(rec);
    let error = rec.err.cast_signed();
    let Some(remote) = remote.filter(|_| rec.flags & SockFlag::WAS_CONNECTED != 0) else {
        return match error {
            0 => Ok(None),
            _ => Err(blocked(&format!(
                "the application was not told yet that connect(2) failed by error {error}"
            ))),
        };
    };
    let fin = rec.flags & SockFlag::GOT_FIN != 0;
    if !is_carried(fin, error) {
        return Err(blocked(&format!(
            "the application was not told yet that it ended by error {error}"
        )));
    }
    let unread = queued(from.as_fd(), Count::Unread).map_err(from.socket_failed())?;
    let received = peek_exact(from.as_fd(), unread).map_err(from.failed("recv"))?;
    // The port is not its own any more, but is still told.
    let local = local_address(from.as_fd()).map_err(from.failed("getsockname"))?;
    Ok(Some(TcpEnded {
        v6: socket::is_v6(rec),
        local,
        remote,
        received: ByteBuf::from(received),
        fin,
        error,
    }))
}

/// Whether a peer can bring it about: by a reset, which is `EPIPE` if it had closed its side and we
/// had not (tcp_reset()).
fn is_carried(fin: bool, error: i32) -> bool {
    matches!(
        (fin, error),
        (_, 0 | libc::ECONNRESET) | (true, libc::EPIPE)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_out_is_no_reset() {
        assert!(is_carried(false, 0));
        assert!(is_carried(true, libc::EPIPE));
        assert!(is_carried(true, libc::ECONNRESET));
        assert!(!is_carried(false, libc::EPIPE));
        assert!(!is_carried(false, libc::ETIMEDOUT));
    }
}
