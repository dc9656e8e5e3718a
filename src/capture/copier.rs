//! Pages of a process on their way into an image: read, summed up and written in parts that fit
//! into a CPU's cache, by all CPUs.

use super::error::CheckpointError;
use super::pages::{Piece, joined};
use super::pending::{Kept, Pending, len_of, write_summed};
use crate::fault::Fault;
use crate::image::{Buffer, PART, Store, bytes, each_with, threads};
use crate::model::frozen::{PAGE_SIZE, PageRun};
use crate::model::ids::Pid;
use crate::sys::memory::read_ranges;
use crate::sys::process::ProcMem;
use std::sync::{Mutex, PoisonError};

/// What became of a copy.
#[derive(Debug, Default)]
pub struct Copied {
    /// Pages read and written, or kept to be written.
    pub pages: u64,
    /// Where they are, in no order.
    runs: Vec<PageRun>,
}

impl Copied {
    fn note(&mut self, runs: &[PageRun]) {
        self.pages += runs.iter().map(|run| run.pages).sum::<u64>();
        self.runs.extend(runs);
    }

    /// Adds what was copied in another way.
    pub fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.runs.extend(other.runs);
    }

    /// All that is in the image now of these pieces, in address order.
    #[must_use]
    pub fn with_unchanged(mut self, pieces: &[Piece]) -> Vec<PageRun> {
        let unchanged = pieces.iter().filter(|piece| !piece.copy);
        self.runs.extend(unchanged.map(|piece| piece.run));
        self.runs.sort_unstable_by_key(|run| run.addr);
        joined(self.runs)
    }
}

/// Copies pages into images, through buffers that stay: in a frozen window there is no time for
/// new memory to be mapped.
#[derive(Default)]
pub struct Copier {
    buffers: Vec<Buffer>,
    /// What is not written yet, as far as there is room.
    pub pending: Pending,
}

impl std::fmt::Debug for Copier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copier").finish_non_exhaustive()
    }
}

/// Buffers for as many threads as are of use to copy memory.
pub fn buffers() -> Vec<Buffer> {
    /// More wait for memory rather than for each other.
    const MOST: usize = 8;
    (0..threads().min(MOST)).map(|_| Buffer::new()).collect()
}

/// Pages that are copied at once.
#[derive(Debug, Default, PartialEq, Eq)]
struct Part {
    runs: Vec<PageRun>,
    /// Of these.
    pages: u64,
    /// As in [`Piece`].
    readable: bool,
}

impl Part {
    fn new(readable: bool) -> Self {
        Self {
            readable,
            ..Self::default()
        }
    }

    fn push(&mut self, run: PageRun) {
        self.pages += run.pages;
        self.runs.push(run);
    }

    /// Whether its last slot is the last of a stripe: what goes beyond would be written to
    /// another file.
    fn ends_stripe(&self) -> bool {
        let last = self.runs.last();
        last.is_some_and(|run| (run.slot + run.pages).is_multiple_of(PART))
    }

    /// Addresses and bytes.
    fn ranges(&self) -> Vec<(u64, usize)> {
        let ranges = self.runs.iter().map(|run| (run.addr, len_of(run)));
        ranges.collect()
    }

    /// Some of its runs, to be copied still.
    fn pieces(&self, runs: &[PageRun]) -> impl Iterator<Item = Piece> {
        let readable = self.readable;
        runs.iter().map(move |run| Piece {
            run: *run,
            copy: true,
            readable,
        })
    }

    /// How many more pages there is room for.
    fn room(&self) -> u64 {
        if self.ends_stripe() {
            0
        } else {
            PART - self.pages
        }
    }
}

impl Copier {
    /// One with buffers for as many threads as are of use.
    #[must_use]
    pub fn new() -> Self {
        Self {
            buffers: buffers(),
            pending: Pending::default(),
        }
    }

    /// Reads what `pieces` ask for of a frozen process, as far as there is room for it to wait to
    /// be written. Returns what was read, and what is left for [`Copier::copy`].
    pub fn read(&mut self, pid: Pid, pieces: &[Piece]) -> (Copied, Vec<Piece>) {
        #[derive(Default)]
        struct Done {
            copied: Copied,
            kept: Vec<Kept>,
            rest: Vec<Piece>,
        }
        let mut free = self.pending.free();
        let (mut jobs, mut done) = (Vec::new(), Done::default());
        for part in parts(pieces) {
            let wanted = part.readable.then(|| free.take(bytes(part.pages)));
            match wanted.flatten() {
                Some(room) => jobs.push((part, room)),
                None => done.rest.extend(part.pieces(&part.runs)),
            }
        }
        // One CPU is for who reads all else.
        let most = self.buffers.len().saturating_sub(1);
        let threads = threads_for(jobs.iter().map(|(part, _)| part), most);
        let done = Mutex::new(done);
        each_with(&mut self.buffers[..threads], jobs, |(part, room), _| {
            let got = read_ranges(pid, &part.ranges(), room.bytes).unwrap_or(0);
            let (arrived, others) = part.runs.split_at(whole(&part.runs, got));
            let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
            done.copied.note(arrived);
            done.rest.extend(part.pieces(others));
            done.kept.push(Kept {
                at: room.at,
                runs: arrived.to_vec(),
            });
            Ok::<_, std::convert::Infallible>(())
        })
        .unwrap_or_else(|never| match never {});
        let done = done.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.pending.keep(done.kept);
        (done.copied, done.rest)
    }

    /// Copies what `pieces` ask for. While the process runs (`moving`), pages may vanish:
    /// they are left out of the result. In a frozen one that is an error.
    ///
    /// # Errors
    /// A page cannot be read, or the carrier is full.
    pub fn copy(
        &mut self,
        store: &dyn Store,
        pid: Pid,
        pieces: &[Piece],
        moving: bool,
    ) -> Result<Copied, CheckpointError> {
        let parts = parts(pieces);
        let threads = threads_for(&parts, self.buffers.len());
        let copied = Mutex::new(Copied::default());
        each_with(&mut self.buffers[..threads], parts, |part, buffer| {
            let done = copy_part(store, pid, &part, buffer, moving)?;
            let mut copied = copied.lock().unwrap_or_else(PoisonError::into_inner);
            copied.add(done);
            Ok::<_, CheckpointError>(())
        })?;
        Ok(copied.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// How many threads are of use to read these: to start another one takes as long as to read some
/// hundred pages.
fn threads_for<'a>(parts: impl IntoIterator<Item = &'a Part>, most: usize) -> usize {
    let pages: u64 = parts.into_iter().map(|part| part.pages).sum();
    let threads = usize::try_from(pages / PART).unwrap_or(usize::MAX);
    threads.min(most).max(1)
}

/// What is to be copied, in parts.
fn parts(pieces: &[Piece]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for piece in pieces.iter().filter(|piece| piece.copy) {
        let mut rest = piece.run;
        while rest.pages > 0 {
            let mut part = parts
                .pop_if(|last| last.readable == piece.readable && last.room() > 0)
                .unwrap_or_else(|| Part::new(piece.readable));
            let pages = rest.pages.min(part.room()).min(PART - rest.slot % PART);
            part.push(PageRun { pages, ..rest });
            parts.push(part);
            rest.addr += pages * PAGE_SIZE;
            rest.slot += pages;
            rest.pages -= pages;
        }
    }
    parts
}

/// Copies a part into the image.
fn copy_part(
    store: &dyn Store,
    pid: Pid,
    part: &Part,
    buffer: &mut [u8],
    moving: bool,
) -> Result<Copied, CheckpointError> {
    Fault::PageWrite.point()?;
    let mut done = Copied::default();
    let buffer = &mut buffer[..bytes(part.pages)];
    let got = match part.readable {
        true => read_ranges(pid, &part.ranges(), buffer).unwrap_or(0),
        false => 0,
    };
    let (arrived, others) = part.runs.split_at(whole(&part.runs, got));
    write_summed(store, arrived, buffer)?;
    done.note(arrived);
    for run in others {
        by_mem(store, pid, run, moving, &mut done)?;
    }
    Ok(done)
}

/// How many of these have arrived in whole with so many bytes.
fn whole(runs: &[PageRun], bytes: usize) -> usize {
    let mut end = 0;
    let ends = runs.iter().map(|run| {
        end += len_of(run);
        end
    });
    ends.take_while(|end| *end <= bytes).count()
}

/// Through `/proc/PID/mem`, which reads regardless of protection.
fn by_mem(
    store: &dyn Store,
    pid: Pid,
    run: &PageRun,
    moving: bool,
    done: &mut Copied,
) -> Result<(), CheckpointError> {
    let mem = ProcMem::open(pid)?;
    for page in 0..run.pages {
        let addr = run.addr + page * PAGE_SIZE;
        let mut bytes = [0_u8; 4096];
        match mem.read(addr, &mut bytes) {
            Err(_) if moving => continue,
            result => result?,
        }
        let copied = PageRun {
            addr,
            pages: 1,
            slot: run.slot + page,
        };
        write_summed(store, &[copied], &bytes)?;
        done.note(&[copied]);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DirectoryStore;

    fn run(page: u64, pages: u64, slot: u64) -> PageRun {
        PageRun {
            addr: page * PAGE_SIZE,
            pages,
            slot,
        }
    }

    fn piece(run: PageRun, readable: bool) -> Piece {
        Piece {
            run,
            copy: true,
            readable,
        }
    }

    #[test]
    fn parts_are_small_and_end_where_stripes_do() {
        let pieces = [
            piece(run(10, 3, 500), true),
            piece(run(20, 1, 7), true),
            piece(run(30, 2 * PART, PART - 2), true),
            piece(run(1000, 1, 3), false),
        ];
        let part = |readable, runs: &[PageRun]| {
            let mut part = Part::new(readable);
            runs.iter().for_each(|run| part.push(*run));
            part
        };
        let expected = [
            part(
                true,
                &[run(10, 3, 500), run(20, 1, 7), run(30, 2, PART - 2)],
            ),
            part(true, &[run(32, PART, PART)]),
            part(true, &[run(32 + PART, PART - 2, 2 * PART)]),
            part(false, &[run(1000, 1, 3)]),
        ];
        assert_eq!(parts(&pieces), expected);
    }

    #[test]
    fn what_is_not_to_be_copied_is_in_no_part() {
        let kept = Piece {
            copy: false,
            ..piece(run(1, 5, 0), true)
        };
        assert_eq!(parts(&[kept]), []);
    }

    #[test]
    fn a_run_counts_once_it_is_whole() {
        let runs = [run(0, 1, 0), run(5, 2, 1)];
        for (bytes, count) in [(0, 0), (4096, 1), (2 * 4096, 1), (3 * 4096, 2)] {
            assert_eq!(whole(&runs, bytes), count);
        }
    }

    /// Of our own memory, with a page that is not there.
    #[test]
    fn all_arrives_but_what_has_vanished() {
        const PAGES: usize = 600;
        let memory: Vec<u8> = (0..=250_u8)
            .cycle()
            .step_by(3)
            .take((PAGES + 1) * 4096)
            .collect();
        let skipped = memory.as_ptr().align_offset(4096);
        let pages = &memory[skipped..skipped + PAGES * 4096];
        let first = pages.as_ptr() as u64 / PAGE_SIZE;
        let pieces = [
            piece(run(1, 1, 0), true),
            piece(run(first, 500, 5), true),
            piece(run(first + 550, 50, 700), false),
        ];
        let this = Pid(std::process::id().cast_signed());
        for (room, moving) in [(0, true), (0, false), (300, false), (1000, false)] {
            let dir = tempfile::tempdir().unwrap();
            let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
            let mut copier = Copier::new();
            copier.pending = Pending::with_room(room);
            assert!(copier.copy(&store, this, &pieces, false).is_err());
            let (none, rest) = copier.read(this, &pieces[..1]);
            assert_eq!((none.pages, &rest[..]), (0, &pieces[..1]));
            let vanished = copier.copy(&store, this, &pieces[..1], true).unwrap();
            assert_eq!((vanished.pages, vanished.runs), (0, vec![]));
            let (mut copied, rest) = match moving {
                true => (Copied::default(), pieces[1..].to_vec()),
                false => copier.read(this, &pieces[1..]),
            };
            copied.add(copier.copy(&store, this, &rest, moving).unwrap());
            std::mem::take(&mut copier.pending).write(&store).unwrap();
            assert_eq!(copied.pages, 550);
            let runs = copied.with_unchanged(&pieces[1..]);
            assert_eq!(runs, [run(first, 500, 5), run(first + 550, 50, 700)]);
            let mut read = vec![0; 500 * 4096];
            store.read_pages(5, &mut read).unwrap();
            assert_eq!(read, pages[..500 * 4096]);
            store.read_pages(700, &mut read[..50 * 4096]).unwrap();
            assert_eq!(read[..50 * 4096], pages[550 * 4096..]);
        }
    }
}
