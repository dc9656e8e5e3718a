//! Checksums of page slots. Metadata has its own; pages lie apart from it, and a restored task
//! reads them itself.

use rapidhash::v3::rapidhash_v3;
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

const PAGE: usize = 4096;

/// The lower half of rapidhash version 3 with its default secrets. A CRC-32 is as fast on a
/// processor that multiplies without carry, and many times slower on one that is emulated.
fn sum(page: &[u8]) -> u32 {
    short_sum(page_sum(page))
}

/// The sum of a page of which a slot has the lower half.
#[must_use]
pub fn page_sum(page: &[u8]) -> u64 {
    rapidhash_v3(page)
}

/// The lower half.
#[must_use]
pub fn short_sum(sum: u64) -> u32 {
    let [a, b, c, d, ..] = sum.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// The checksum of each of some whole pages.
#[must_use]
pub fn sums(pages: &[u8]) -> Vec<u32> {
    pages.chunks(PAGE).map(sum).collect()
}

/// Checksum of each page slot, from slot 0 on. Slots that nothing points to have any.
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

    /// The first slot from `first` on whose page in `bytes` has another sum.
    pub(super) fn first_wrong(&self, first: u64, bytes: &[u8]) -> Option<u64> {
        let wanted = usize::try_from(first).ok().and_then(|at| self.0.get(at..));
        let mut wanted = wanted.unwrap_or_default().iter();
        let mut pages = (first..).zip(bytes.chunks(PAGE));
        pages.find_map(|(slot, page)| (wanted.next() != Some(&sum(page))).then_some(slot))
    }
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
    let sums = || sums(pages);
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
        assert_eq!(all, sums(&pages));
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
