//! Where page runs may lie. A run that points elsewhere would put one page in another's place.

use crate::model::frozen::{Backing, Content, Mm, PAGE_SIZE, PageRun, Vma};

/// The page slots of an image, and which of them are spoken for: each holds one page.
#[derive(Debug, Default)]
pub(super) struct Extents {
    slots: u64,
    /// One bit each.
    used: Vec<u64>,
}

impl Extents {
    /// Of so many slots, the checksums of which take more memory than this does.
    pub(super) fn of(slots: u64) -> Self {
        let words = usize::try_from(slots.div_ceil(64)).unwrap_or(0);
        Self {
            slots,
            used: vec![0; words],
        }
    }

    /// Takes the slots of an address space, whose runs lie in its mappings.
    pub(super) fn add_mm(&mut self, mm: &Mm) -> Result<(), String> {
        for run in &mm.pages {
            let end = self.add(run)?;
            if !mapped(&mm.vmas, run.addr, end) {
                return Err(format!("{} are outside of its mappings", told(run)));
            }
        }
        let unfit = mm.vmas.iter().find(|vma| match &vma.backing {
            Backing::AioRing(ring) => !ring.fits(vma.end.saturating_sub(vma.start)),
            _ => false,
        });
        if let Some(vma) = unfit {
            return Err(format!("the AIO ring at {:#x} does not fit it", vma.start));
        }
        apart(&mm.pages)
    }

    /// Takes the slots of a content, whose runs lie within its size.
    pub(super) fn add_content(&mut self, content: &Content) -> Result<(), String> {
        let last = content.size.checked_next_multiple_of(PAGE_SIZE);
        for run in &content.pages {
            let end = self.add(run)?;
            if last.is_none_or(|last| end > last) {
                return Err(format!("{} are beyond its end", told(run)));
            }
        }
        apart(&content.pages)
    }

    /// Takes the slots of a run; returns the address behind it.
    fn add(&mut self, run: &PageRun) -> Result<u64, String> {
        let bytes = run.pages.checked_mul(PAGE_SIZE);
        let end = bytes.and_then(|bytes| run.addr.checked_add(bytes));
        let (Some(end), true) = (end, run.pages > 0 && run.addr.is_multiple_of(PAGE_SIZE)) else {
            return Err(format!("{} are no range of pages", told(run)));
        };
        let behind = run.slot.checked_add(run.pages);
        let Some(behind) = behind.filter(|behind| *behind <= self.slots) else {
            let slots = self.slots;
            return Err(format!("{} are beyond the {slots} page slots", told(run)));
        };
        for slot in run.slot..behind {
            let word = usize::try_from(slot / 64).unwrap_or(usize::MAX);
            let bit = 1 << (slot % 64);
            if self.used[word] & bit != 0 {
                return Err(format!("{} share page slot {slot}", told(run)));
            }
            self.used[word] |= bit;
        }
        Ok(end)
    }
}

fn told(run: &PageRun) -> String {
    format!(
        "{} pages from {:#x} in slot {}",
        run.pages, run.addr, run.slot
    )
}

/// Whether mappings, in address order, cover all of `start..end`.
fn mapped(vmas: &[Vma], start: u64, end: u64) -> bool {
    let first = vmas.partition_point(|vma| vma.end <= start);
    let mut at = start;
    for vma in &vmas[first..] {
        if vma.start > at || at >= end {
            break;
        }
        at = vma.end;
    }
    at >= end
}

/// The order is that of addresses in what this program writes.
fn apart(runs: &[PageRun]) -> Result<(), String> {
    let overlapping = runs
        .windows(2)
        .find(|pair| pair[0].addr + pair[0].pages * PAGE_SIZE > pair[1].addr);
    match overlapping {
        Some(pair) => Err(format!("{} overlap those before them", told(&pair[1]))),
        None => Ok(()),
    }
}
