//! Checksums of page slots. Metadata has its own; pages lie apart from it, and a restored task
//! reads them itself.

use super::{Store, StoreError};
use crate::model::frozen::{Application, PAGE_SIZE, PageRun};
use crc32fast::hash;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

const PAGE: usize = 4096;

/// CRC-32 of each page slot, from slot 0 on. Slots that nothing points to have any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotSums(Vec<u32>);

impl SlotSums {
    /// How many slots there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.0.len() as u64
    }

    /// Whether the image has no pages.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Little-endian, one after the other.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|sum| sum.to_le_bytes()).collect()
    }

    /// What [`SlotSums::to_bytes`] made; `None` if a part of a sum is left over.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (sums, rest) = bytes.as_chunks();
        let sums = sums.iter().copied().map(u32::from_le_bytes);
        rest.is_empty().then(|| Self(sums.collect()))
    }

    /// Compares all pages of an application with their sums. Several threads read, as many as
    /// the machine has CPUs but one: the caller may have a restore going on meanwhile.
    ///
    /// # Errors
    /// The first slot found that differs or cannot be read.
    pub fn verify(&self, app: &Application, store: &dyn Store) -> Result<(), StoreError> {
        let parts = parts(app);
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), StoreError> {
            let mut buffer = vec![0; PART * PAGE + PAGE];
            // What a store that goes past the page cache reads without another copy.
            let start = buffer.as_ptr().align_offset(PAGE);
            while let Some(part) = parts.get(next.fetch_add(1, Ordering::Relaxed)) {
                let len = usize::try_from(part.pages * PAGE_SIZE).unwrap_or(0);
                let bytes = &mut buffer[start..start + len];
                let checked = store
                    .read_pages(part.slot, bytes)
                    .and_then(|()| self.compare(part.slot, bytes, store));
                if checked.is_err() {
                    // The others need not go on.
                    next.store(parts.len(), Ordering::Relaxed);
                    return checked;
                }
            }
            Ok(())
        };
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let helpers = (cpus - 1).clamp(1, MOST_THREADS).min(parts.len());
        thread::scope(|scope| {
            // A thread that cannot be had leaves its part to this one.
            let helpers: Vec<_> = (1..helpers)
                .filter_map(|_| Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            let mut result = work();
            for helper in helpers {
                // One that panicked has left pages unread.
                result = result.and(helper.join().unwrap_or_else(|panic| resume_unwind(panic)));
            }
            result
        })
    }

    fn compare(&self, first: u64, bytes: &[u8], store: &dyn Store) -> Result<(), StoreError> {
        for (slot, page) in (first..).zip(bytes.chunks(PAGE)) {
            let wanted = usize::try_from(slot).ok().and_then(|slot| self.0.get(slot));
            if wanted != Some(&hash(page)) {
                let offset = store.page_file().1 + slot * PAGE_SIZE;
                return Err(StoreError::Page { slot, offset });
            }
        }
        Ok(())
    }
}

/// Pages read at once.
const PART: usize = 256;

const MOST_THREADS: usize = 8;

fn parts(app: &Application) -> Vec<PageRun> {
    let private = app.mms.values().flat_map(|mm| &mm.pages);
    let shared = app.contents.values().flat_map(|content| &content.pages);
    let mut parts = Vec::new();
    for run in private.chain(shared) {
        let mut rest = *run;
        while rest.pages > 0 {
            let pages = rest.pages.min(PART as u64);
            parts.push(PageRun { pages, ..rest });
            rest.slot += pages;
            rest.pages -= pages;
        }
    }
    parts
}

/// The sums of what was written to a store so far.
#[derive(Debug, Default)]
pub struct Written(Mutex<Vec<u32>>);

impl Written {
    /// Notes the sums of the slots from `slot` on.
    pub fn note(&self, slot: u64, sums: &[u32]) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let first = usize::try_from(slot).unwrap_or(usize::MAX);
        let end = first + sums.len();
        if all.len() < end {
            all.resize(end, 0);
        }
        all[first..end].copy_from_slice(sums);
    }

    /// The sums of the first `slots` slots.
    #[must_use]
    pub fn first(&self, slots: u64) -> SlotSums {
        let mut sums = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        sums.resize(usize::try_from(slots).unwrap_or(usize::MAX), 0);
        SlotSums(sums)
    }
}

/// Sums up `pages` while `write` writes them. Another CPU sums where that pays: applications
/// may stand still meanwhile, and a thread of its own costs them less than the sums do.
///
/// # Errors
/// Those of `write`.
pub fn while_writing<E>(
    pages: &[u8],
    write: impl FnOnce() -> Result<(), E>,
) -> Result<Vec<u32>, E> {
    // A thread takes as long as some hundreds of pages.
    const PAYS: usize = 512 * PAGE;
    const STACK: usize = 64 << 10;
    let sums = || pages.chunks(PAGE).map(hash).collect();
    if pages.len() < PAYS {
        return write().map(|()| sums());
    }
    thread::scope(|scope| {
        // A small stack: all of tracker's memory may be locked, which makes it present.
        let other = Builder::new().stack_size(STACK).spawn_scoped(scope, sums);
        write()?;
        let found = other.ok().and_then(|other| other.join().ok());
        Ok(found.unwrap_or_else(sums))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_the_same_however_many_pages_are_summed() {
        let pages: Vec<u8> = (0..600 * PAGE).map(|n| n.to_le_bytes()[1]).collect();
        let all = while_writing::<()>(&pages, || Ok(())).unwrap();
        let one_by_one: Vec<u32> = pages.chunks(PAGE).map(hash).collect();
        assert_eq!(all, one_by_one);
        assert_eq!(
            while_writing::<()>(&pages[..PAGE], || Ok(())).unwrap(),
            all[..1]
        );
        assert_eq!(while_writing(&pages, || Err("full")), Err("full"));
    }

    #[test]
    fn a_slot_written_again_has_its_last_sum() {
        let written = Written::default();
        written.note(2, &[7, 8]);
        written.note(3, &[9]);
        assert_eq!(written.first(5), SlotSums(vec![0, 0, 7, 9, 0]));
        assert_eq!(written.first(3).len(), 3);
        let sums = written.first(5);
        assert_eq!(SlotSums::from_bytes(&sums.to_bytes()), Some(sums));
        assert_eq!(SlotSums::from_bytes(&[0; 5]), None);
    }
}
