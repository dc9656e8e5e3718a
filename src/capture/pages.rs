//! Private memory: which pages an image needs, and copying them.

use super::error::CheckpointError;
use super::mm::vm;
use super::pending::{Pending, write_summed};
use super::tracked::{Tracked, is_plain};
use crate::bpf::events::{VmaKind, VmaRec};
use crate::fault::Fault;
use crate::image::Store;
use crate::model::frozen::{PAGE_SIZE, PageRun};
use crate::model::ids::Pid;
use crate::sys::memory::{MAX_RANGES, Pagemap, read_ranges};
use crate::sys::process::ProcMem;

/// Adjacent pages an image needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Need {
    /// First address.
    pub addr: u64,
    /// How many.
    pub pages: u64,
    /// Whether a copy made before may be out of date.
    pub dirty: bool,
    /// Whether process_vm_readv(2) can read it.
    pub readable: bool,
}

/// Adjacent pages and the slots they have or get.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Where they are and go.
    pub run: PageRun,
    /// Whether they must be copied.
    pub copy: bool,
    /// As in [`Need`].
    pub readable: bool,
}

/// Decides, for pages in address order, which keep the copy they have (`have`, in address
/// order) and which are copied; pages never copied before get new slots.
pub fn plan(needs: &[Need], have: &[PageRun], mut take: impl FnMut(u64) -> u64) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut next = 0;
    for need in needs {
        let end = need.addr + need.pages * PAGE_SIZE;
        let mut at = need.addr;
        while at < end {
            while have.get(next).is_some_and(|run| run_end(run) <= at) {
                next += 1;
            }
            let (until, slot) = match have.get(next) {
                Some(run) if run.addr <= at => (
                    run_end(run).min(end),
                    Some(run.slot + (at - run.addr) / PAGE_SIZE),
                ),
                Some(run) => (run.addr.min(end), None),
                None => (end, None),
            };
            let pages = (until - at) / PAGE_SIZE;
            pieces.push(Piece {
                copy: need.dirty || slot.is_none(),
                run: PageRun {
                    addr: at,
                    pages,
                    slot: slot.unwrap_or_else(|| take(pages)),
                },
                readable: need.readable,
            });
            at = until;
        }
    }
    pieces
}

fn run_end(run: &PageRun) -> u64 {
    run.addr + run.pages * PAGE_SIZE
}

/// Runs that are adjacent both in memory and in the image made one.
#[must_use]
pub fn joined(runs: impl IntoIterator<Item = PageRun>) -> Vec<PageRun> {
    let mut out: Vec<PageRun> = Vec::new();
    for run in runs {
        match out.last_mut() {
            Some(last) if run_end(last) == run.addr && last.slot + last.pages == run.slot => {
                last.pages += run.pages;
            }
            _ => out.push(run),
        }
    }
    out
}

/// Finds the private pages of one address space. With `tracked`, pages of unchanged
/// mappings that were not written since count as clean.
///
/// # Errors
/// The pagemap cannot be read.
pub fn select(
    pagemap: &mut Pagemap,
    vmas: &[VmaRec],
    tracked: Option<&Tracked>,
    zero_frame: Option<u64>,
) -> Result<Vec<Need>, CheckpointError> {
    let mut needs: Vec<Need> = Vec::new();
    for vma in vmas {
        // Without an anon_vma the mapping has never had a page of its own.
        if vma.flags & vm::MAYSHARE != 0 || vma.kind == VmaKind::SPECIAL || vma.has_anon == 0 {
            continue;
        }
        let plain = is_plain(vma);
        // A mapping made since dirty tracking began has not one clean page.
        let trusted =
            tracked.is_some_and(|tracked| tracked.holds(vma)) && vma.flags & vm::SOFTDIRTY == 0;
        let readable = vma.flags & vm::READ != 0;
        pagemap.private_pages(vma.start, vma.end, zero_frame, |found| {
            if found.zero && plain {
                return;
            }
            let dirty = !trusted || found.soft_dirty;
            match needs.last_mut() {
                Some(last)
                    if last.addr + last.pages * PAGE_SIZE == found.addr
                        && last.dirty == dirty
                        && last.readable == readable =>
                {
                    last.pages += found.pages;
                }
                _ => needs.push(Need {
                    addr: found.addr,
                    pages: found.pages,
                    dirty,
                    readable,
                }),
            }
        })?;
    }
    Ok(needs)
}

/// What became of a copy.
#[derive(Debug, Default)]
pub struct Copied {
    /// Pages read and written.
    pub pages: u64,
    /// Pieces that are whole in the image now.
    pub runs: Vec<PageRun>,
}

/// Copies pages of one process into an image, with one reused buffer.
pub struct Copier<'a> {
    /// The image.
    pub store: &'a dyn Store,
    /// How many threads read at once, as many as there are CPUs.
    readers: usize,
    /// What is not written yet, as far as there is room.
    pub pending: Pending,
    buffer: Vec<u8>,
}

impl std::fmt::Debug for Copier<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Copier").finish_non_exhaustive()
    }
}

impl<'a> Copier<'a> {
    /// Bytes read at once.
    pub(super) const BATCH: usize = 4 << 20;

    /// A copier for this image with the buffer of an earlier one: in a frozen window there is
    /// no time for new memory to be mapped.
    #[must_use]
    pub fn new(store: &'a dyn Store, buffer: Vec<u8>, readers: usize) -> Self {
        Self {
            store,
            readers,
            pending: Pending::default(),
            buffer,
        }
    }

    /// Gives back the buffer.
    #[must_use]
    pub fn into_buffer(self) -> Vec<u8> {
        self.buffer
    }

    /// Copies what `pieces` ask for. While the process runs (`moving`), pages may vanish:
    /// they are left out of the result. In a frozen one that is an error.
    ///
    /// # Errors
    /// A page cannot be read, or the carrier is full.
    pub fn copy(
        &mut self,
        pid: Pid,
        pieces: &[Piece],
        moving: bool,
    ) -> Result<Copied, CheckpointError> {
        let mut copied = Copied::default();
        let mut batch: Vec<PageRun> = Vec::new();
        let mut bytes = 0;
        for piece in pieces {
            if !piece.copy {
                copied.runs.push(piece.run);
                continue;
            }
            if !piece.readable {
                self.flush(pid, &mut batch, moving, &mut copied)?;
                bytes = 0;
                self.by_mem(pid, piece.run, moving, &mut copied)?;
                continue;
            }
            let mut rest = piece.run;
            while rest.pages > 0 {
                let room = (Self::BATCH - bytes) as u64 / PAGE_SIZE;
                if room == 0 || batch.len() == MAX_RANGES {
                    self.flush(pid, &mut batch, moving, &mut copied)?;
                    bytes = 0;
                    continue;
                }
                let pages = rest.pages.min(room);
                batch.push(PageRun { pages, ..rest });
                bytes += usize::try_from(pages * PAGE_SIZE).unwrap_or(0);
                rest.addr += pages * PAGE_SIZE;
                rest.slot += pages;
                rest.pages -= pages;
            }
        }
        self.flush(pid, &mut batch, moving, &mut copied)?;
        copied.runs.sort_unstable_by_key(|run| run.addr);
        copied.runs = joined(std::mem::take(&mut copied.runs));
        Ok(copied)
    }

    fn flush(
        &mut self,
        pid: Pid,
        batch: &mut Vec<PageRun>,
        moving: bool,
        copied: &mut Copied,
    ) -> Result<(), CheckpointError> {
        if batch.is_empty() {
            return Ok(());
        }
        Fault::PageWrite.point()?;
        let ranges: Vec<(u64, usize)> = batch.iter().map(|run| (run.addr, len_of(run))).collect();
        let total: usize = ranges.iter().map(|(_, len)| len).sum();
        let room = self.pending.room(total);
        let later = room.is_some();
        let buffer = match room {
            Some(room) => room,
            None => {
                self.buffer.resize(total.max(self.buffer.len()), 0);
                &mut self.buffer[..total]
            }
        };
        let got = read_shared(pid, &ranges, buffer, self.readers);
        // Whole runs that arrived.
        let mut at = 0;
        let mut whole = 0;
        for run in batch.iter() {
            if at + len_of(run) > got {
                break;
            }
            at += len_of(run);
            whole += 1;
        }
        let arrived = &batch[..whole];
        if later {
            self.pending.note(arrived);
        } else {
            write_summed(self.store, arrived, &self.buffer[..at])?;
        }
        copied.pages += arrived.iter().map(|run| run.pages).sum::<u64>();
        copied.runs.extend(arrived);
        for run in batch.drain(..).skip(whole) {
            self.by_mem(pid, run, moving, copied)?;
        }
        Ok(())
    }

    /// Through `/proc/PID/mem`, which reads regardless of protection.
    fn by_mem(
        &mut self,
        pid: Pid,
        run: PageRun,
        moving: bool,
        copied: &mut Copied,
    ) -> Result<(), CheckpointError> {
        let mem = ProcMem::open(pid)?;
        for page in 0..run.pages {
            let addr = run.addr + page * PAGE_SIZE;
            let mut bytes = [0_u8; 4096];
            match mem.read(addr, &mut bytes) {
                Err(_) if moving => continue,
                result => result?,
            }
            self.store.write_pages(run.slot + page, &bytes)?;
            copied.pages += 1;
            copied.runs.push(PageRun {
                addr,
                pages: 1,
                slot: run.slot + page,
            });
        }
        Ok(())
    }
}

/// Reads ranges (address, bytes) one after the other into `buffer`, in several threads if there
/// are many bytes. Returns how many have arrived before the first that did not.
fn read_shared(pid: Pid, ranges: &[(u64, usize)], buffer: &mut [u8], readers: usize) -> usize {
    /// Fewer are read sooner than a thread is started.
    const WORTHWHILE: usize = 128 * PAGE;
    const PAGE: usize = 4096;
    let share = buffer
        .len()
        .div_ceil(readers.max(1))
        .next_multiple_of(PAGE)
        .max(WORTHWHILE);
    let parts: Vec<_> = split(ranges, share)
        .into_iter()
        .zip(buffer.chunks_mut(share))
        .collect();
    let read = |(ranges, buffer): (Vec<(u64, usize)>, &mut [u8])| {
        let whole = buffer.len();
        let got = read_ranges(pid, &ranges, buffer).unwrap_or(0);
        (got, got == whole)
    };
    let mut parts = parts.into_iter();
    let Some(first) = parts.next() else { return 0 };
    std::thread::scope(|scope| {
        let others: Vec<_> = parts.map(|part| scope.spawn(move || read(part))).collect();
        let (mut got, mut whole) = read(first);
        for other in others {
            let (more, all) = other.join().unwrap_or((0, false));
            if whole {
                got += more;
            }
            whole &= all;
        }
        got
    })
}

/// Ranges cut so that each part but the last has so many bytes.
fn split(ranges: &[(u64, usize)], share: usize) -> Vec<Vec<(u64, usize)>> {
    let mut parts = vec![Vec::new()];
    let mut room = share;
    for &(mut addr, mut len) in ranges {
        while len > 0 {
            if room == 0 {
                parts.push(Vec::new());
                room = share;
            }
            let now = len.min(room);
            if let Some(part) = parts.last_mut() {
                part.push((addr, now));
            }
            (addr, len, room) = (addr + now as u64, len - now, room - now);
        }
    }
    parts
}

/// Bytes of a run.
pub(super) fn len_of(run: &PageRun) -> usize {
    usize::try_from(run.pages * PAGE_SIZE).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const P: u64 = PAGE_SIZE;

    fn need(page: u64, pages: u64, dirty: bool) -> Need {
        Need {
            addr: page * P,
            pages,
            dirty,
            readable: true,
        }
    }

    fn run(page: u64, pages: u64, slot: u64) -> PageRun {
        PageRun {
            addr: page * P,
            pages,
            slot,
        }
    }

    fn planned(needs: &[Need], have: &[PageRun]) -> Vec<(PageRun, bool)> {
        let mut slots = super::super::files::Slots::from(100);
        plan(needs, have, |pages| slots.take(pages))
            .iter()
            .map(|piece| (piece.run, piece.copy))
            .collect()
    }

    #[test]
    fn clean_pages_keep_their_copy_and_dirty_ones_their_slot() {
        let have = [run(10, 4, 0)];
        let needs = [need(10, 2, false), need(12, 2, true)];
        let expected = [(run(10, 2, 0), false), (run(12, 2, 2), true)];
        assert_eq!(planned(&needs, &have), expected);
    }

    #[test]
    fn pages_without_a_copy_are_copied_even_if_clean() {
        let have = [run(12, 1, 5)];
        let expected = [
            (run(10, 2, 100), true),
            (run(12, 1, 5), false),
            (run(13, 1, 102), true),
        ];
        assert_eq!(planned(&[need(10, 4, false)], &have), expected);
    }

    #[test]
    fn pages_that_are_gone_leave_the_index() {
        let have = [run(1, 9, 0), run(20, 2, 9)];
        assert_eq!(
            planned(&[need(21, 1, false)], &have),
            [(run(21, 1, 10), false)]
        );
    }

    fn page_set() -> impl Strategy<Value = Vec<(u64, bool)>> {
        proptest::collection::btree_map(0_u64..40, any::<bool>(), 0..30)
            .prop_map(|map| map.into_iter().collect())
    }

    proptest! {
        #[test]
        fn every_needed_page_has_one_slot_and_no_stale_copy(
            needed in page_set(),
            copied in page_set(),
        ) {
            let needs: Vec<Need> = needed.iter().map(|&(p, dirty)| need(p, 1, dirty)).collect();
            let have = joined(copied.iter().enumerate().map(|(s, &(p, _))| run(p, 1, s as u64)));
            let pieces = planned(&needs, &have);
            let mut slots = std::collections::HashSet::new();
            let mut pages = Vec::new();
            for (run, copy) in pieces {
                for page in 0..run.pages {
                    let number = run.addr / P + page;
                    prop_assert!(slots.insert(run.slot + page));
                    let dirty = needed.iter().any(|&(p, dirty)| p == number && dirty);
                    let had = copied.iter().position(|&(p, _)| p == number);
                    prop_assert_eq!(copy, dirty || had.is_none());
                    if let Some(slot) = had {
                        prop_assert_eq!(run.slot + page, slot as u64);
                    }
                    pages.push(number);
                }
            }
            let expected: Vec<u64> = needed.iter().map(|&(p, _)| p).collect();
            prop_assert_eq!(pages, expected);
        }
    }

    #[test]
    fn ranges_are_shared_out() {
        let parts = split(&[(10, 3), (20, 4), (30, 2)], 4);
        let expected = [
            vec![(10, 3), (20, 1)],
            vec![(21, 3), (30, 1)],
            vec![(31, 1)],
        ];
        assert_eq!(parts, expected);
    }

    #[test]
    fn threads_read_what_one_reads() {
        let memory: Vec<u8> = (0..=u8::MAX).cycle().step_by(3).take(400 * 4096).collect();
        let start = memory.as_ptr() as u64;
        let ranges = [(start, 300 * 4096), (start + 350 * 4096, 50 * 4096)];
        let this = Pid(std::process::id().cast_signed());
        let mut buffer = vec![0; 350 * 4096];
        assert_eq!(read_shared(this, &ranges, &mut buffer, 4), buffer.len());
        assert_eq!(buffer[..300 * 4096], memory[..300 * 4096]);
        assert_eq!(buffer[300 * 4096..], memory[350 * 4096..]);
        // What comes behind a hole does not count.
        let ranges = [(start, 200 * 4096), (4096, 50 * 4096), (start, 100 * 4096)];
        assert_eq!(read_shared(this, &ranges, &mut buffer, 4), 200 * 4096);
    }
}
