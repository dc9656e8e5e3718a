//! Pages on their way into an image.

use super::error::CheckpointError;
use super::pages::{Copier, len_of};
use crate::image::{Store, StoreError, while_writing};
use crate::model::frozen::{PAGE_SIZE, PageRun};

/// Pages that were read and are to be written to an image later.
#[derive(Default)]
pub struct Pending {
    buffer: Vec<u8>,
    used: usize,
    runs: Vec<PageRun>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Pending");
        shown.field("bytes", &self.used).finish_non_exhaustive()
    }
}

impl Pending {
    /// Room for so many pages, in memory that is there when it is needed.
    pub fn with_room(pages: u64) -> Self {
        Self {
            // Not zeroes: those would be mapped only when they are written to.
            buffer: vec![1; usize::try_from(pages * PAGE_SIZE).unwrap_or(0)],
            ..Self::default()
        }
    }

    /// Where so many bytes may be read to, if there is room.
    pub fn room(&mut self, bytes: usize) -> Option<&mut [u8]> {
        self.buffer.get_mut(self.used..self.used + bytes)
    }

    /// Notes what was read there, one run after the other.
    pub fn note(&mut self, runs: &[PageRun]) {
        self.used += runs.iter().map(len_of).sum::<usize>();
        self.runs.extend(runs);
    }

    /// Writes them.
    ///
    /// # Errors
    /// The carrier is full or refuses.
    pub fn write(self, store: &dyn Store) -> Result<(), CheckpointError> {
        let mut rest = &self.buffer[..self.used];
        let mut runs = &self.runs[..];
        while !runs.is_empty() {
            let (mut count, mut bytes) = (0, 0);
            for run in runs {
                if count > 0 && bytes + len_of(run) > Copier::BATCH {
                    break;
                }
                count += 1;
                bytes += len_of(run);
            }
            let (batch, after) = runs.split_at(count);
            let (pages, others) = rest.split_at(bytes);
            write_summed(store, batch, pages)?;
            (runs, rest) = (after, others);
        }
        Ok(())
    }
}

/// Writes pages that were read one after the other, and notes their sums.
///
/// # Errors
/// The carrier is full or refuses.
pub fn write_summed(
    store: &dyn Store,
    runs: &[PageRun],
    pages: &[u8],
) -> Result<(), CheckpointError> {
    let sums = while_writing(pages, || write(store, runs, pages))?;
    let mut rest = &sums[..];
    for run in runs {
        let (own, others) = rest.split_at(len_of(run) / 4096);
        store.written().note(run.slot, own);
        rest = others;
    }
    Ok(())
}

/// Slots of neighbours are written together.
fn write(store: &dyn Store, runs: &[PageRun], pages: &[u8]) -> Result<(), StoreError> {
    let mut start = 0;
    let mut first = 0;
    while first < runs.len() {
        let mut last = first;
        let mut end = start + len_of(&runs[first]);
        while last + 1 < runs.len() && runs[last].slot + runs[last].pages == runs[last + 1].slot {
            last += 1;
            end += len_of(&runs[last]);
        }
        store.write_unsummed(runs[first].slot, &pages[start..end])?;
        start = end;
        first = last + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DirectoryStore;

    #[test]
    fn what_was_read_is_written_where_it_belongs() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
        let mut pending = Pending::with_room(5);
        let run = |slot, pages| PageRun {
            addr: 0,
            pages,
            slot,
        };
        for (byte, read) in [(b'a', run(7, 2)), (b'b', run(3, 1)), (b'c', run(4, 2))] {
            pending.room(len_of(&read)).unwrap().fill(byte);
            pending.note(&[read]);
        }
        assert!(pending.room(4096).is_none());
        pending.write(&store).unwrap();
        for (slot, byte) in [(3, b'b'), (4, b'c'), (5, b'c'), (7, b'a'), (8, b'a')] {
            let mut page = [0; 4096];
            store.read_pages(slot, &mut page).unwrap();
            assert_eq!(page, [byte; 4096]);
        }
        assert_eq!(store.written().first(9).len(), 9);
    }
}
