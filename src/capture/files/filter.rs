//! Classic socket filters (`SO_ATTACH_FILTER`), which the kernel keeps as they were given to it.

use super::CollectError;
use super::borrow::Borrowed;
use crate::bpf::events::{SockFlag, SockRec};
use crate::model::frozen::SocketFilter;
use crate::sys::socket::{filter, int_option};
use nix::libc;
use serde_bytes::ByteBuf;

/// Reads the filter of a socket that is said to have one.
///
/// # Errors
/// A socket call fails.
pub fn read(from: &Borrowed, rec: &SockRec) -> Result<Option<SocketFilter>, CollectError> {
    if rec.flags & SockFlag::HAS_FILTER == 0 {
        return Ok(None);
    }
    let program = filter(from.as_fd()).map_err(from.socket_failed())?;
    let locked = int_option(from.as_fd(), libc::SOL_SOCKET, libc::SO_LOCK_FILTER)
        .map_err(from.socket_failed())?;
    Ok(Some(SocketFilter {
        program: ByteBuf::from(program),
        locked: locked != 0,
    }))
}
