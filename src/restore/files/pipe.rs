//! Pipes and FIFOs: the ends that belong together, with what was written and not read.

use super::error::{FilesError, call, missing_part};
use super::regular;
use crate::model::frozen::{Application, FileKind, OpenFile, PathRef, PipeId, PipeState};
use crate::model::ids::OfdId;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::Mode;
use nix::unistd::{pipe2, write};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

/// Ends of one pipe.
struct Pipe<'a> {
    /// Name of a FIFO.
    at: Option<&'a PathRef>,
    state: Option<&'a PipeState>,
    ends: Vec<(OfdId, &'a OpenFile)>,
}

/// Makes every pipe and FIFO of the application.
///
/// # Errors
/// The kernel refuses a step, or the image lacks a pipe's content.
pub fn open_all(app: &Application) -> Result<BTreeMap<OfdId, OwnedFd>, FilesError> {
    let mut opened = BTreeMap::new();
    for pipe in pipes(app).into_values() {
        make(&pipe, &mut opened)?;
    }
    Ok(opened)
}

fn pipes(app: &Application) -> BTreeMap<PipeId, Pipe<'_>> {
    let mut pipes = BTreeMap::new();
    for (&id, file) in &app.ofds {
        let (at, state) = match &file.kind {
            FileKind::Pipe { state, .. } => (None, state),
            FileKind::Fifo { at, state } => (Some(at), state),
            _ => continue,
        };
        let Some(name) = file.kind.pipe() else {
            continue;
        };
        let pipe = pipes.entry(name).or_insert(Pipe {
            at,
            state: None,
            ends: Vec::new(),
        });
        pipe.state = pipe.state.or(state.as_ref());
        pipe.ends.push((id, file));
    }
    pipes
}

fn make(pipe: &Pipe<'_>, opened: &mut BTreeMap<OfdId, OwnedFd>) -> Result<(), FilesError> {
    let object = match pipe.at {
        Some(at) => format!("FIFO {}", String::from_utf8_lossy(&at.path)),
        None => "pipe".to_owned(),
    };
    let state = pipe.state.ok_or_else(|| missing_part(&object, "content"))?;
    let (reader, writer) = match pipe.at {
        None => pipe2(OFlag::O_CLOEXEC).map_err(call(&object, "pipe2"))?,
        Some(at) => {
            // Opened for both, a FIFO does not wait for its other end (fifo(7)).
            let both = open(
                &regular::here(at),
                OFlag::O_RDWR | OFlag::O_CLOEXEC,
                Mode::empty(),
            )
            .map_err(call(&object, "open"))?;
            let writer = both
                .try_clone()
                .map_err(super::error::io_call(&object, "dup"))?;
            (both, writer)
        }
    };
    let capacity = i32::try_from(state.capacity).unwrap_or(i32::MAX);
    fcntl(writer.as_fd(), FcntlArg::F_SETPIPE_SZ(capacity))
        .map_err(call(&object, "fcntl(F_SETPIPE_SZ)"))?;
    for packet in &state.packets {
        fill(&object, writer.as_fd(), packet, state.packets.len() > 1)?;
    }
    for (id, file) in &pipe.ends {
        opened.insert(*id, open_end(&object, &reader, &writer, file.flags)?);
    }
    Ok(())
}

fn fill(
    object: &str,
    writer: BorrowedFd<'_>,
    bytes: &[u8],
    packet: bool,
) -> Result<(), FilesError> {
    let mode = if packet {
        OFlag::O_DIRECT
    } else {
        OFlag::empty()
    };
    fcntl(writer, FcntlArg::F_SETFL(mode | OFlag::O_NONBLOCK))
        .map_err(call(object, "fcntl(F_SETFL)"))?;
    let mut rest = bytes;
    while !rest.is_empty() {
        let written = write(writer, rest).map_err(call(object, "write"))?;
        rest = &rest[written..];
    }
    Ok(())
}

/// A description of its own, so that two ends of one direction do not share flags.
fn open_end(
    object: &str,
    reader: &OwnedFd,
    writer: &OwnedFd,
    flags: u32,
) -> Result<OwnedFd, FilesError> {
    let mut flags = OFlag::from_bits_retain(flags.cast_signed());
    // open(2) would set the flag and have nobody told.
    flags.remove(OFlag::O_ASYNC);
    let reads = flags & OFlag::O_ACCMODE == OFlag::O_RDONLY;
    let end = if reads { reader } else { writer };
    let path = PathBuf::from(format!("/proc/self/fd/{}", end.as_raw_fd()));
    // Without O_NONBLOCK this open would wait for the other direction.
    let fd = open(
        &path,
        flags | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .map_err(call(object, "open"))?;
    fcntl(fd.as_fd(), FcntlArg::F_SETFL(flags)).map_err(call(object, "fcntl(F_SETFL)"))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::FileHints;
    use crate::model::ids::InodeId;

    #[test]
    fn one_inode_number_may_be_that_of_three_pipes() {
        let fifo = |dev| FileKind::Fifo {
            at: PathRef {
                path: format!("/{dev}/fifo").into_bytes(),
                inode: InodeId { dev, ino: 7 },
                ..PathRef::default()
            },
            state: None,
        };
        let kinds = [FileKind::Pipe { id: 7, state: None }, fifo(1), fifo(2)];
        let mut app = Application::default();
        for (id, kind) in (0..).map(OfdId).zip(kinds.iter().chain(&kinds)) {
            let end = OpenFile {
                flags: 0,
                pos: 0,
                owner: None,
                locks: Vec::new(),
                lease: None,
                hints: FileHints::default(),
                kind: kind.clone(),
            };
            app.ofds.insert(id, end);
        }
        let found = pipes(&app);
        assert_eq!(found.len(), 3);
        assert!(found.values().all(|pipe| pipe.ends.len() == 2));
    }
}
