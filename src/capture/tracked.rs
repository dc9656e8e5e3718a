//! Which mappings are still those that they were when dirty tracking began.

use super::mm::vm;
use crate::bpf::events::{VmaKind, VmaRec};
use std::collections::HashMap;

/// What makes a mapping the same one as at an earlier moment, as far as it cannot be told from
/// its pages. Anonymous memory that is moved keeps the page offset of where it was first touched,
/// so two anonymous mappings that were exchanged differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Identity {
    end: u64,
    pgoff: u64,
    flags: u64,
    file: u64,
    ino: u64,
}

/// The mappings at the moment dirty tracking began, by first address.
#[derive(Clone, Debug, Default)]
pub struct Tracked(HashMap<u64, Identity>);

/// Private anonymous memory without a file.
pub(super) fn is_plain(vma: &VmaRec) -> bool {
    vma.file == 0 && vma.kind == VmaKind::ANON
}

/// Whether mremap(2) marks its pages when it moves them (move_soft_dirty_pte() in mm/mremap.c). It
/// does not when it moves whole page tables, which a mapping must reach the end of one for. Two
/// mappings of the same part of a file may be exchanged, and nothing else tells of it.
fn is_marked_when_moved(vma: &VmaRec) -> bool {
    /// What one page table is about (`PMD_SIZE`).
    const TABLE: u64 = 2 << 20;
    vma.start / TABLE == vma.end / TABLE
}

fn is_trackable(vma: &VmaRec) -> bool {
    is_plain(vma) || (vma.file != 0 && vma.kind != VmaKind::SPECIAL && is_marked_when_moved(vma))
}

fn identity_of(vma: &VmaRec) -> Identity {
    Identity {
        end: vma.end,
        pgoff: vma.pgoff,
        flags: vma.flags & !vm::SOFTDIRTY,
        file: vma.file,
        ino: vma.ino,
    }
}

impl Tracked {
    /// Notes the mappings of one address space.
    #[must_use]
    pub fn new(vmas: &[VmaRec]) -> Self {
        let some = vmas.iter().filter(|vma| is_trackable(vma));
        Self(some.map(|vma| (vma.start, identity_of(vma))).collect())
    }

    /// Whether a mapping is one of these still, so that a page that is not marked as written has
    /// not changed.
    #[must_use]
    pub fn holds(&self, vma: &VmaRec) -> bool {
        self.0.get(&vma.start) == Some(&identity_of(vma))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::PAGE_SIZE as P;

    #[test]
    fn an_exchanged_mapping_is_not_trusted() {
        let vma = |start: u64, pgoff: u64| VmaRec {
            start,
            end: start + P,
            pgoff,
            ..VmaRec::default()
        };
        let tracked = Tracked::new(&[vma(P, 1), vma(4 * P, 4)]);
        assert!(tracked.holds(&vma(P, 1)));
        assert!(!tracked.holds(&vma(P, 4)));
        assert!(!tracked.holds(&vma(2 * P, 2)));
    }

    #[test]
    fn a_mapping_of_a_file_is_trusted_unless_its_page_table_may_move() {
        const TABLE: u64 = 2 << 20;
        let file = |start: u64, end: u64| VmaRec {
            start,
            end,
            pgoff: 7,
            file: 1,
            ino: 2,
            kind: VmaKind::FILE,
            ..VmaRec::default()
        };
        let within = file(TABLE, TABLE + 5 * P);
        assert!(Tracked::new(&[within]).holds(&within));
        let others = [
            VmaRec { file: 3, ..within },
            VmaRec { ino: 3, ..within },
            VmaRec { pgoff: 8, ..within },
        ];
        for other in others {
            assert!(!Tracked::new(&[within]).holds(&other));
        }
        for whole in [
            file(TABLE, 2 * TABLE),
            file(2 * TABLE - P, 2 * TABLE),
            file(TABLE - P, TABLE + P),
        ] {
            assert!(!Tracked::new(&[whole]).holds(&whole));
        }
    }
}
