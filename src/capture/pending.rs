//! Pages on their way into an image.

use super::error::CheckpointError;
use crate::image::{Store, StoreError, bytes, each, sums};
use crate::model::frozen::{PAGE_SIZE, PageRun};

/// Pages that were read and are to be written to an image later.
#[derive(Default)]
pub struct Pending {
    buffer: Vec<u8>,
    used: usize,
    kept: Vec<Kept>,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut shown = f.debug_struct("Pending");
        shown.field("bytes", &self.used).finish_non_exhaustive()
    }
}

/// Runs that were read one after the other, and where they begin.
#[derive(Debug)]
pub struct Kept {
    /// First byte, as [`Room::at`] says.
    pub at: usize,
    /// What they are.
    pub runs: Vec<PageRun>,
}

/// What is free, to be shared out.
#[derive(Debug)]
pub struct Free<'a> {
    at: usize,
    rest: &'a mut [u8],
}

/// Where bytes may be read to.
#[derive(Debug)]
pub struct Room<'a> {
    /// Which byte of all is the first.
    pub at: usize,
    /// As many as were asked for.
    pub bytes: &'a mut [u8],
}

impl<'a> Free<'a> {
    /// So many bytes, if there are as many.
    pub fn take(&mut self, bytes: usize) -> Option<Room<'a>> {
        let rest = std::mem::take(&mut self.rest);
        let Some((bytes, rest)) = rest.split_at_mut_checked(bytes) else {
            // Nor has anything else room.
            return None;
        };
        let at = self.at;
        *self = Self {
            at: at + bytes.len(),
            rest,
        };
        Some(Room { at, bytes })
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

    /// What room there is.
    pub fn free(&mut self) -> Free<'_> {
        Free {
            at: self.used,
            rest: &mut self.buffer[self.used..],
        }
    }

    /// Keeps what was read into such room.
    pub fn keep(&mut self, read: Vec<Kept>) {
        for kept in read {
            let end = kept.at + kept.runs.iter().map(len_of).sum::<usize>();
            self.used = self.used.max(end);
            self.kept.push(kept);
        }
    }

    /// Forgets what was kept.
    pub fn clear(&mut self) {
        self.used = 0;
        self.kept.clear();
    }

    /// Writes what was kept, by all CPUs.
    ///
    /// # Errors
    /// The carrier is full or refuses.
    pub fn write(self, store: &dyn Store) -> Result<(), CheckpointError> {
        each(&self.kept, |Kept { at, runs }, _| {
            write_summed(store, runs, &self.buffer[*at..])
        })
    }
}

/// Bytes of a run.
pub fn len_of(run: &PageRun) -> usize {
    bytes(run.pages)
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
    let mut rest = pages;
    for run in runs {
        let (own, others) = rest.split_at(len_of(run));
        store.written().note(run.slot, &sums(own));
        rest = others;
    }
    Ok(write(store, runs, pages)?)
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
        let mut pending = Pending::with_room(6);
        let run = |slot, pages| PageRun {
            addr: 0,
            pages,
            slot,
        };
        let mut free = pending.free();
        let mut kept = Vec::new();
        for (byte, read) in [(b'a', run(7, 2)), (b'b', run(3, 1)), (b'c', run(4, 2))] {
            let room = free.take(len_of(&read)).unwrap();
            room.bytes.fill(byte);
            kept.push(Kept {
                at: room.at,
                runs: vec![read],
            });
        }
        assert!(free.take(2 * 4096).is_none());
        pending.keep(kept);
        assert!(pending.free().take(4096).is_some());
        assert!(pending.free().take(2 * 4096).is_none());
        pending.write(&store).unwrap();
        for (slot, byte) in [(3, b'b'), (4, b'c'), (5, b'c'), (7, b'a'), (8, b'a')] {
            let mut page = [0; 4096];
            store.read_pages(slot, &mut page).unwrap();
            assert_eq!(page, [byte; 4096]);
        }
        assert_eq!(store.written().first(9).len(), 9);
    }
}
