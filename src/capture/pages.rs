//! Private memory: which pages an image needs, and which of them are copied.

use super::error::CheckpointError;
use super::mm::vm;
use super::tracked::{Tracked, is_plain};
use crate::bpf::events::{VmaKind, VmaRec};
use crate::model::frozen::{PAGE_SIZE, PageRun};
use crate::sys::memory::Pagemap;

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
        let anonymous = vma.kind == VmaKind::ANON;
        pagemap.private_pages(vma.start, vma.end, anonymous, zero_frame, |found| {
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
}
