//! Page slots of a sealed image, as they are read: each is compared with its checksum, and all
//! CPUs read.

use super::sums::SlotSums;
use super::{Store, StoreError};
use crate::model::frozen::{Application, PAGE_SIZE, PageRun};
use std::panic::resume_unwind;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

/// Pages that are read at once: what fits into a CPU's cache until they are used.
pub const PART: u64 = 128;

/// What more threads than this read in a second, no memory delivers.
const MOST_THREADS: usize = 16;

/// The page slots of an image.
#[derive(Clone, Copy)]
pub struct Pages<'a> {
    store: &'a dyn Store,
    sums: &'a SlotSums,
}

impl<'a> Pages<'a> {
    /// Those in `store`, with the sums of its metadata.
    #[must_use]
    pub fn new(store: &'a dyn Store, sums: &'a SlotSums) -> Self {
        Self { store, sums }
    }

    /// Reads whole pages starting at `slot`.
    ///
    /// # Errors
    /// The carrier refuses, or one of them is not what was written.
    pub fn read(&self, slot: u64, bytes: &mut [u8]) -> Result<(), StoreError> {
        self.store.read_pages(slot, bytes)?;
        match self.sums.first_wrong(slot, bytes) {
            None => Ok(()),
            Some(slot) => {
                let offset = self.store.first_slot() + slot * PAGE_SIZE;
                Err(StoreError::Page { slot, offset })
            }
        }
    }

    /// Reads all pages of an application.
    ///
    /// # Errors
    /// The first slot found that differs or cannot be read.
    pub fn verify(&self, app: &Application) -> Result<(), StoreError> {
        let private = app.mms.values().flat_map(|mm| &mm.pages);
        let shared = app.contents.values().flat_map(|content| &content.pages);
        let parts: Vec<_> = private.chain(shared).flat_map(parts).collect();
        each(&parts, |part, buffer| {
            self.read(part.slot, &mut buffer[..bytes(part.pages)])
        })
    }
}

/// A run in pieces of at most [`PART`] pages.
pub fn parts(run: &PageRun) -> impl Iterator<Item = PageRun> + use<> {
    let run = *run;
    (0..run.pages.div_ceil(PART)).map(move |number| {
        let done = number * PART;
        PageRun {
            addr: run.addr + done * PAGE_SIZE,
            slot: run.slot + done,
            pages: PART.min(run.pages - done),
        }
    })
}

/// How many bytes a number of pages has.
#[must_use]
pub fn bytes(pages: u64) -> usize {
    usize::try_from(pages * PAGE_SIZE).unwrap_or(usize::MAX)
}

/// Room for [`PART`] pages at a multiple of their size, which a store that goes past the page
/// cache writes and reads without another copy.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// A new one. Its memory comes as it is used.
    #[must_use]
    pub fn new() -> Self {
        let page = bytes(1);
        let bytes = vec![0; bytes(PART) + page];
        let start = bytes.as_ptr().align_offset(page);
        Self { bytes, start }
    }

    fn pages(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + bytes(PART)]
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Self::new()
    }
}

/// As many threads as [`each`] runs.
#[must_use]
pub fn threads() -> usize {
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    cpus.min(MOST_THREADS)
}

/// Does `work` for each of `parts`, with a buffer of [`PART`] pages at a multiple of their size,
/// on as many threads as the machine has CPUs. After an error only what is under way is ended.
///
/// # Errors
/// One of those of `work`.
pub fn each<I, E>(
    parts: I,
    work: impl Fn(I::Item, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: IntoIterator<IntoIter: ExactSizeIterator + Send>,
    E: Send,
{
    let parts = parts.into_iter();
    let threads = threads().min(parts.len());
    let mut buffers: Vec<_> = (0..threads).map(|_| Buffer::new()).collect();
    each_with(&mut buffers, parts, work)
}

/// As [`each`], on as many threads as there are buffers.
///
/// # Errors
/// One of those of `work`.
pub fn each_with<I, E>(
    buffers: &mut [Buffer],
    parts: I,
    work: impl Fn(I::Item, &mut [u8]) -> Result<(), E> + Sync,
) -> Result<(), E>
where
    I: IntoIterator<IntoIter: ExactSizeIterator + Send>,
    E: Send,
{
    /// A small stack: all of tracker's memory may be locked, which makes it present.
    const STACK: usize = 256 << 10;
    let parts = parts.into_iter();
    let threads = buffers.len().min(parts.len());
    // Nothing is left to be taken once one has failed.
    let parts = Mutex::new(Some(parts));
    let next = || {
        parts
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .as_mut()?
            .next()
    };
    let take = |buffer: &mut Buffer| -> Result<(), E> {
        while let Some(part) = next() {
            let done = work(part, buffer.pages());
            if done.is_err() {
                *parts.lock().unwrap_or_else(PoisonError::into_inner) = None;
                return done;
            }
        }
        Ok(())
    };
    let Some((own, others)) = buffers[..threads].split_first_mut() else {
        return Ok(());
    };
    thread::scope(|scope| {
        // A thread that cannot be had leaves its part to this one.
        let start = |buffer| {
            let thread = Builder::new().stack_size(STACK);
            thread.spawn_scoped(scope, || take(buffer)).ok()
        };
        let others: Vec<_> = others.iter_mut().filter_map(start).collect();
        let mut result = take(own);
        for other in others {
            // One that panicked has left pages unread.
            result = result.and(other.join().unwrap_or_else(|panic| resume_unwind(panic)));
        }
        result
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn a_run_is_cut_into_parts() {
        let run = PageRun {
            addr: 0x10_0000,
            slot: 7,
            pages: 2 * PART + 1,
        };
        let cut: Vec<_> = parts(&run).collect();
        let pages = cut.iter().map(|part| part.pages);
        assert_eq!(pages.collect::<Vec<_>>(), [PART, PART, 1]);
        assert_eq!(cut[2].slot, 7 + 2 * PART);
        assert_eq!(cut[2].addr, 0x10_0000 + 2 * PART * PAGE_SIZE);
        assert_eq!(parts(&PageRun { pages: 0, ..run }).count(), 0);
    }

    #[test]
    fn every_part_is_worked_on_once() {
        let parts: Vec<u64> = (0..1_000).collect();
        let seen = Mutex::new(Vec::new());
        each::<_, ()>(&parts, |part, buffer| {
            assert_eq!(buffer.len(), bytes(PART));
            assert_eq!(buffer.as_ptr().align_offset(4096), 0);
            seen.lock().unwrap().push(*part);
            Ok(())
        })
        .unwrap();
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, parts);
    }

    #[test]
    fn an_error_ends_the_work() {
        let parts: Vec<u64> = (0..100_000).collect();
        let seen = AtomicUsize::new(0);
        let result = each(&parts, |part, _| {
            seen.fetch_add(1, Ordering::Relaxed);
            if *part == 3 { Err(*part) } else { Ok(()) }
        });
        assert_eq!(result, Err(3));
        assert!(seen.into_inner() < parts.len());
    }
}
