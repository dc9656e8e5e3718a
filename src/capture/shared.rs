//! Memory that several processes may write, and files that only memory keeps: copied while the
//! application runs, and compared while it stands still.
//!
//! Soft-dirty bits do not tell who has written such a page: they go with a process that ends, and
//! with a page that is reclaimed. So every page is read again in the frozen window, and only one
//! with another sum is written to the image once more. That takes a third of what copying it does.

use super::copier::buffers;
use super::error::CheckpointError;
use super::files::Slots;
use super::mm::{map_file, vm};
use super::pages::joined;
use crate::bpf::events::{VmaKind, VmaRec};
use crate::image::{Buffer, PART, Store, bytes, each_with, page_sum, short_sum};
use crate::model::frozen::{PAGE_SIZE, PageRun};
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::collections::HashMap;
use std::fs::{File, read_link};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::{Mutex, PoisonError};

/// A page in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Page {
    /// Its number in the file.
    number: u64,
    slot: u64,
    /// All 64 bits: of an image's sums, half as long, there are too few to tell that a page has
    /// not changed.
    sum: u64,
}

/// What was copied of a file. It stays open, so that no other one gets its number.
#[derive(Debug)]
struct Before {
    _file: File,
    /// In the order of their numbers.
    pages: Vec<Page>,
}

/// A file that is read.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    /// Opened for reading.
    pub file: &'a File,
    /// Bytes.
    pub size: u64,
    /// Whether it may change meanwhile, and become shorter.
    pub moving: bool,
}

/// What is known of shared memory across the rounds, and buffers to copy it through.
pub struct Shared {
    /// By device and inode.
    before: HashMap<(u64, u64), Before>,
    buffers: Vec<Buffer>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Shared");
        shown.field("before", &self.before).finish_non_exhaustive()
    }
}

impl Shared {
    /// Nothing is known.
    #[must_use]
    pub fn new() -> Self {
        Self {
            before: HashMap::new(),
            buffers: buffers(),
        }
    }

    /// Copies what these mappings of running processes share and no name leads to. What cannot be
    /// read, since a process ends or unmaps it, is copied later.
    ///
    /// # Errors
    /// The carrier is full.
    pub fn precopy(
        &mut self,
        vmas: &[VmaRec],
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<(), CheckpointError> {
        for vma in vmas.iter().filter(|vma| is_shared(vma)) {
            let Some((file, key, size)) = open(vma) else {
                continue;
            };
            if self.before.contains_key(&key) {
                continue;
            }
            let source = Source {
                file: &file,
                size,
                moving: true,
            };
            let pages = match self.pages(source, &[], store, slots) {
                Err(CheckpointError::Io { .. }) => continue,
                pages => pages?,
            };
            self.before.insert(key, Before { _file: file, pages });
        }
        Ok(())
    }

    /// Copies the pages of a file that are not all zeroes, and were not copied before as they are.
    ///
    /// # Errors
    /// It cannot be read, or the carrier is full.
    pub fn copy(
        &mut self,
        source: Source<'_>,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<Vec<PageRun>, CheckpointError> {
        let stat = source.file.metadata().map_err(failed)?;
        // For one file only, as its slots are: inodes of System V segments have the segments'
        // numbers, which others may have as well.
        let before = self.before.remove(&(stat.dev(), stat.ino()));
        let before = before.map(|before| before.pages).unwrap_or_default();
        let pages = self.pages(source, &before, store, slots)?;
        let runs = pages.into_iter().map(|page| PageRun {
            addr: page.number * PAGE_SIZE,
            pages: 1,
            slot: page.slot,
        });
        Ok(joined(runs))
    }

    fn pages(
        &mut self,
        source: Source<'_>,
        before: &[Page],
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<Vec<Page>, CheckpointError> {
        let (found, slots) = (Mutex::new(Vec::new()), Mutex::new(slots));
        let parts = parts(source);
        each_with(&mut self.buffers, parts, |(first, count), buffer| {
            let buffer = &mut buffer[..bytes(count)];
            read(source, first * PAGE_SIZE, buffer).map_err(failed)?;
            let mut pages = sift(first, buffer, before, |count| {
                let mut slots = slots.lock().unwrap_or_else(PoisonError::into_inner);
                slots.take(count)
            });
            write(store, first, &pages, buffer)?;
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            found.extend(pages.drain(..).map(|(page, _)| page));
            Ok::<_, CheckpointError>(())
        })?;
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        found.sort_unstable_by_key(|page| page.number);
        Ok(found)
    }
}

fn failed(source: io::Error) -> CheckpointError {
    CheckpointError::io("read", "shared memory or a deleted file")(source)
}

fn is_shared(vma: &VmaRec) -> bool {
    vma.file != 0
        && vma.flags & vm::MAYSHARE != 0
        && vma.flags & (vm::PFNMAP | vm::IO | vm::MIXEDMAP) == 0
        && ![VmaKind::HUGETLB, VmaKind::SPECIAL].contains(&vma.kind)
}

/// A mapped file that has no name, with its device, inode and size.
fn open(vma: &VmaRec) -> Option<(File, (u64, u64), u64)> {
    let link = map_file(vma);
    // Files with a name are only mapped again.
    let target = read_link(&link).ok()?;
    if !target.as_os_str().as_bytes().ends_with(b" (deleted)") {
        return None;
    }
    let file = File::open(&link).ok()?;
    let stat = file.metadata().ok()?;
    let plain = stat.is_file() && stat.nlink() == 0;
    plain.then(|| (file, (stat.dev(), stat.ino()), stat.size()))
}

/// Where a file has data, in parts: the number of the first page, and how many there are.
fn parts(source: Source<'_>) -> Vec<(u64, u64)> {
    let mut parts = Vec::new();
    let mut at = 0;
    while let Some((data, hole)) = next_data(source.file, at, source.size) {
        let (mut first, end) = (data / PAGE_SIZE, hole.div_ceil(PAGE_SIZE));
        while first < end {
            let count = (PART - first % PART).min(end - first);
            parts.push((first, count));
            first += count;
        }
        at = end * PAGE_SIZE;
    }
    parts
}

/// Next range with data at or behind `at`; a filesystem without holes has one.
fn next_data(file: &File, at: u64, size: u64) -> Option<(u64, u64)> {
    if at >= size {
        return None;
    }
    let seek = |from: u64, whence| lseek(file, from.cast_signed(), whence);
    match seek(at, Whence::SeekData) {
        Ok(data) if data.cast_unsigned() >= size => None,
        Ok(data) => {
            let data = data.cast_unsigned();
            let hole = seek(data, Whence::SeekHole).map_or(size, i64::cast_unsigned);
            Some((data, hole.min(size)))
        }
        Err(Errno::ENXIO) => None,
        Err(_) => Some((at, size)),
    }
}

/// Reads whole pages; what is behind the end of the file is zero.
fn read(source: Source<'_>, at: u64, buffer: &mut [u8]) -> io::Result<()> {
    let inside = source.size.saturating_sub(at);
    let inside = buffer
        .len()
        .min(usize::try_from(inside).unwrap_or(usize::MAX));
    let (inside, behind) = buffer.split_at_mut(inside);
    behind.fill(0);
    match source.file.read_exact_at(inside, at) {
        Err(error) if source.moving && error.kind() == io::ErrorKind::UnexpectedEof => {
            inside.fill(0);
            Ok(())
        }
        read => read,
    }
}

/// The pages that are not all zeroes, and whether each is to be written. A page that had a slot
/// keeps it; for those that had none `take` gives slots in a row.
fn sift(
    first: u64,
    buffer: &[u8],
    before: &[Page],
    take: impl FnOnce(u64) -> u64,
) -> Vec<(Page, bool)> {
    let from = before.partition_point(|page| page.number < first);
    let mut known = before[from..].iter().peekable();
    let mut pages = Vec::new();
    let mut new = 0;
    for (number, bytes) in (first..).zip(buffer.chunks_exact(bytes(1))) {
        while known.next_if(|page| page.number < number).is_some() {}
        if is_zero(bytes) {
            continue;
        }
        let sum = page_sum(bytes);
        let had = known.next_if(|page| page.number == number);
        let slot = had.map(|page| page.slot);
        new += u64::from(slot.is_none());
        pages.push((number, slot, sum, had.is_none_or(|page| page.sum != sum)));
    }
    let mut next = if new > 0 { take(new) } else { 0 };
    let mut slot_of = |had: Option<u64>| {
        had.unwrap_or_else(|| {
            next += 1;
            next - 1
        })
    };
    let with_slots = pages.into_iter().map(|(number, had, sum, changed)| {
        let slot = slot_of(had);
        (Page { number, slot, sum }, changed)
    });
    with_slots.collect()
}

/// Writes those pages of a part that are to be written, neighbours at once.
fn write(
    store: &dyn Store,
    first: u64,
    pages: &[(Page, bool)],
    buffer: &[u8],
) -> Result<(), CheckpointError> {
    let changed: Vec<_> = pages.iter().filter(|(_, changed)| *changed).collect();
    let follow = |one: &&(Page, bool), next: &&(Page, bool)| {
        (one.0.number + 1, one.0.slot + 1) == (next.0.number, next.0.slot)
    };
    for run in changed.chunk_by(follow) {
        let page = run[0].0;
        let at = bytes(page.number - first);
        let sums: Vec<u32> = run.iter().map(|(page, _)| short_sum(page.sum)).collect();
        store.write_unsummed(page.slot, &buffer[at..at + bytes(run.len() as u64)])?;
        store.written().note(page.slot, &sums);
    }
    Ok(())
}

fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DirectoryStore;
    use std::io::{Seek, SeekFrom, Write};

    const P: usize = 4096;

    fn source(file: &File, moving: bool) -> Source<'_> {
        Source {
            file,
            size: file.metadata().unwrap().len(),
            moving,
        }
    }

    fn run(page: u64, pages: u64, slot: u64) -> PageRun {
        PageRun {
            addr: page * PAGE_SIZE,
            pages,
            slot,
        }
    }

    fn put(file: &mut File, at: u64, bytes: &[u8]) {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(bytes).unwrap();
    }

    /// What the image has of a file, zeroes where it has nothing.
    fn read_back(store: &dyn Store, runs: &[PageRun], pages: usize) -> Vec<u8> {
        let mut all = vec![0; pages * P];
        for run in runs {
            let at = usize::try_from(run.addr).unwrap();
            let end = at + bytes(run.pages);
            store.read_pages(run.slot, &mut all[at..end]).unwrap();
        }
        all
    }

    #[test]
    fn only_pages_with_bytes_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        put(&mut file, 4096, &[7; 5000]);
        let mut slots = Slots::default();
        let runs = Shared::new().copy(source(&file, false), &store, &mut slots);
        assert_eq!(runs.unwrap(), [run(1, 2, 0)]);
        let back = read_back(&store, &[run(1, 2, 0)], 3);
        assert!(back[4096..9096].iter().all(|b| *b == 7));
        assert!(is_zero(&back[9096..]));
    }

    /// Pages changed, added, cleared and left alone since the first copy; all slots are right,
    /// and those that were given stay.
    #[test]
    fn what_was_written_since_is_written_again() {
        const PAGES: usize = 300;
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let fill = |n: usize| [u8::try_from(n % 251).unwrap() + 1; P];
        for page in 10..PAGES {
            put(&mut file, (page * P) as u64, &fill(page));
        }
        let (mut slots, mut shared) = (Slots::default(), Shared::new());
        let pages = shared.pages(source(&file, true), &[], &store, &mut slots);
        let pages = pages.unwrap();
        assert_eq!(slots.used(), 290);
        let stat = file.metadata().unwrap();
        let key = (stat.dev(), stat.ino());
        let before = Before {
            _file: file.try_clone().unwrap(),
            pages: pages.clone(),
        };
        shared.before.insert(key, before);

        put(&mut file, 5 * PAGE_SIZE, &fill(5));
        put(&mut file, 20 * PAGE_SIZE, b"changed");
        put(&mut file, 200 * PAGE_SIZE, &[0; P]);
        put(&mut file, 300 * PAGE_SIZE, b"appended");
        let runs = shared.copy(source(&file, false), &store, &mut slots);
        let runs = runs.unwrap();
        assert_eq!(slots.used(), 292, "Slots only for what is new");
        let mut now = vec![0; (PAGES + 1) * P];
        let length = usize::try_from(file.metadata().unwrap().len()).unwrap();
        file.read_exact_at(&mut now[..length], 0).unwrap();
        assert!(read_back(&store, &runs, PAGES + 1) == now);
        let kept = pages.iter().find(|page| page.number == 20).unwrap().slot;
        let holds = |run: &&PageRun| {
            let first = run.addr / PAGE_SIZE;
            (first..first + run.pages).contains(&20)
        };
        let found = runs.iter().find(holds).unwrap();
        assert_eq!(found.slot + 20 - found.addr / PAGE_SIZE, kept);
        // Its slots are another file's no more.
        assert!(shared.before.is_empty());
    }

    #[test]
    fn a_file_that_becomes_shorter_is_an_error_only_if_it_stands_still() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        put(&mut file, 0, &[1; 2 * P]);
        let longer = |moving| Source {
            file: &file,
            size: 3 * PAGE_SIZE,
            moving,
        };
        let mut slots = Slots::default();
        let read = |moving| read(longer(moving), PAGE_SIZE, &mut [0; 2 * P]);
        assert!(read(false).is_err());
        read(true).unwrap();
        let mut shared = Shared::new();
        shared.copy(longer(true), &store, &mut slots).unwrap();
    }
}
