//! What is in a pipe, read without taking it out: tee(2) copies the buffers' references.

use super::CollectError;
use super::borrow::Borrowed;
use crate::bpf::events::PipeRec;
use crate::model::frozen::PipeState;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, open, tee};
use nix::sys::stat::Mode;
use nix::unistd::{pipe2, read};
use serde_bytes::ByteBuf;
use std::os::fd::AsFd;

/// Reads a pipe or FIFO through a borrowed descriptor of either end.
///
/// # Errors
/// A system call fails.
pub fn read_state(end: &Borrowed, rec: &PipeRec) -> Result<PipeState, CollectError> {
    let capacity =
        fcntl(end.as_fd(), FcntlArg::F_GETPIPE_SZ).map_err(end.failed("fcntl(F_GETPIPE_SZ)"))?;
    let state = PipeState {
        capacity: u32::try_from(capacity).unwrap_or(0),
        packets: Vec::new(),
    };
    if rec.bytes == 0 {
        return Ok(state);
    }
    // A reading description of our own: the borrowed end may be the writing one.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let reader = open(end.reopen_path().as_str(), flags, Mode::empty())
        .map_err(end.failed("open of the pipe"))?;
    let (copy, into) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(end.failed("pipe2"))?;
    fcntl(into.as_fd(), FcntlArg::F_SETPIPE_SZ(capacity))
        .map_err(end.failed("fcntl(F_SETPIPE_SZ)"))?;
    let wanted = usize::try_from(rec.bytes).unwrap_or(usize::MAX);
    let copied =
        tee(&reader, &into, wanted, SpliceFFlags::SPLICE_F_NONBLOCK).map_err(end.failed("tee"))?;
    let mut bytes = vec![0; copied];
    let mut filled = 0;
    // In packet mode each read gives one packet: their bounds are kept.
    let mut packets = Vec::new();
    while filled < copied {
        let got = read(&copy, &mut bytes[filled..]).map_err(end.failed("read"))?;
        packets.push(ByteBuf::from(&bytes[filled..filled + got]));
        filled += got;
    }
    if filled != wanted {
        let short = std::io::Error::new(
            std::io::ErrorKind::UnexpectedEof,
            format!("{filled} of {wanted} bytes"),
        );
        return Err(end.failed("tee")(short));
    }
    Ok(PipeState {
        packets: joined(packets, end)?,
        ..state
    })
}

/// One entry for a stream of bytes, one an entry for packets.
fn joined(packets: Vec<ByteBuf>, end: &Borrowed) -> Result<Vec<ByteBuf>, CollectError> {
    let flags = fcntl(end.as_fd(), FcntlArg::F_GETFL).map_err(end.failed("fcntl(F_GETFL)"))?;
    if OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT) {
        return Ok(packets);
    }
    let all: Vec<u8> = packets
        .iter()
        .flat_map(|packet| packet.iter().copied())
        .collect();
    Ok(vec![ByteBuf::from(all)])
}
