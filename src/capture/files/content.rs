//! Bytes that no filesystem keeps: memfds, shared anonymous memory, deleted files.

use super::borrow::Borrowed;
use super::{CollectError, Slots};
use crate::image::Store;
use crate::model::frozen::{Content, ContentKind, PAGE_SIZE, PageRun};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

/// Bytes copied at once.
const CHUNK_PAGES: u64 = 256;

/// Copies a file's bytes into page slots, leaving its holes out.
///
/// # Errors
/// It cannot be read, or the store is full.
pub fn read(
    from: &Borrowed,
    kind: ContentKind,
    store: &dyn Store,
    slots: &mut Slots,
) -> Result<Content, CollectError> {
    // A description of our own: the borrowed one may be write-only, and its offset is the owner's.
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    let fd =
        open(from.reopen_path().as_str(), flags, Mode::empty()).map_err(from.failed("open"))?;
    let found = fstat(&fd).map_err(from.failed("fstat"))?;
    let kind = match kind {
        ContentKind::Memfd { name, .. } => {
            let seals = fcntl(fd.as_fd(), FcntlArg::F_GET_SEALS)
                .map_err(from.failed("fcntl(F_GET_SEALS)"))?;
            ContentKind::Memfd {
                name,
                seals: seals.cast_unsigned(),
            }
        }
        other => other,
    };
    let size = u64::try_from(found.st_size).unwrap_or(0);
    let file = File::from(fd);
    let mut content = Content {
        kind,
        size,
        mode: found.st_mode & 0o7777,
        uid: found.st_uid,
        gid: found.st_gid,
        pages: Vec::new(),
    };
    let mut at = 0;
    while let Some((start, end)) = next_data(from, &file, at, size)? {
        copy(from, &file, start, end, store, slots, &mut content.pages)?;
        at = end;
    }
    Ok(content)
}

/// The next range with data, in whole pages.
fn next_data(
    from: &Borrowed,
    file: &File,
    at: u64,
    size: u64,
) -> Result<Option<(u64, u64)>, CollectError> {
    if at >= size {
        return Ok(None);
    }
    let offset = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let start = match lseek(file.as_fd(), offset(at), Whence::SeekData) {
        Ok(start) => u64::try_from(start).unwrap_or(0),
        Err(Errno::ENXIO) => return Ok(None),
        Err(e) => return Err(from.failed("lseek(SEEK_DATA)")(e)),
    };
    let end = lseek(file.as_fd(), offset(start), Whence::SeekHole)
        .map_err(from.failed("lseek(SEEK_HOLE)"))?;
    let end = u64::try_from(end).unwrap_or(size);
    Ok(Some((
        start - start % PAGE_SIZE,
        end.next_multiple_of(PAGE_SIZE),
    )))
}

fn copy(
    from: &Borrowed,
    file: &File,
    start: u64,
    end: u64,
    store: &dyn Store,
    slots: &mut Slots,
    runs: &mut Vec<PageRun>,
) -> Result<(), CollectError> {
    let mut buffer = Vec::new();
    let mut at = start;
    while at < end {
        let pages = CHUNK_PAGES.min((end - at) / PAGE_SIZE);
        buffer.clear();
        buffer.resize(usize::try_from(pages * PAGE_SIZE).unwrap_or(usize::MAX), 0);
        let mut filled = 0;
        while filled < buffer.len() {
            let offset = at + filled as u64;
            match file
                .read_at(&mut buffer[filled..], offset)
                .map_err(from.failed("pread"))?
            {
                // The last page reaches beyond the end of a file of odd length.
                0 => break,
                got => filled += got,
            }
        }
        let slot = slots.take(pages);
        store.write_pages(slot, &buffer)?;
        runs.push(PageRun {
            addr: at,
            pages,
            slot,
        });
        at += pages * PAGE_SIZE;
    }
    Ok(())
}
