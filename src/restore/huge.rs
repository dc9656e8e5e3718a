//! Huge pages: whether there are enough of them for what an application had.

use super::RestoreError;
use crate::model::frozen::{Application, Backing, Content, ContentKind, PAGE_SIZE, PageRun};
use crate::sys::huge::{DIR, Pool};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How many pages of each size (bytes) an application needs at least: those that have bytes, and
/// what its private mappings reserve.
fn needed(app: &Application) -> BTreeMap<u64, u64> {
    let mut needed = BTreeMap::new();
    for mm in app.mms.values() {
        for vma in &mm.vmas {
            let Backing::AnonymousHuge { page } = vma.backing else {
                continue;
            };
            let inside = |run: &&PageRun| vma.start <= run.addr && run.addr < vma.end;
            let count = if vma.noreserve {
                touched(mm.pages.iter().filter(inside), page)
            } else {
                vma.end.saturating_sub(vma.start) / page.max(1)
            };
            *needed.entry(page).or_default() += count;
        }
    }
    // A System V segment may have been left behind with its pages; shmget(2) reserves those of
    // a new one.
    let is_file = |c: &&Content| c.huge_page > 0 && !matches!(c.kind, ContentKind::SysvShm(_));
    for content in app.contents.values().filter(is_file) {
        let count = touched(content.pages.iter(), content.huge_page);
        *needed.entry(content.huge_page).or_default() += count;
    }
    needed
}

/// How many pages of so many bytes the runs lie in.
fn touched<'a>(runs: impl Iterator<Item = &'a PageRun>, page: u64) -> u64 {
    let page = page.max(1);
    let numbers = runs.flat_map(|run| {
        let last = run.addr + run.pages.max(1) * PAGE_SIZE - 1;
        run.addr / page..=last / page
    });
    numbers.collect::<BTreeSet<u64>>().len() as u64
}

/// Checks that the machine has as many as the application needs.
///
/// # Errors
/// [`RestoreError::HugePages`].
pub fn check(app: &Application) -> Result<(), RestoreError> {
    for (page, needed) in needed(app) {
        let free = Pool::of(Path::new(DIR), page).free().unwrap_or(0);
        if free < needed {
            return Err(RestoreError::HugePages {
                kib: page >> 10,
                needed,
                free,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::{ContentId, Mm, Vma};
    use crate::model::ids::MmId;

    const HUGE: u64 = 2 << 20;

    fn vma(start: u64, pages: u64, noreserve: bool) -> Vma {
        Vma {
            start: start * HUGE,
            end: (start + pages) * HUGE,
            prot: 3,
            noreserve,
            backing: Backing::AnonymousHuge { page: HUGE },
            ..Vma::default()
        }
    }

    #[test]
    fn what_is_reserved_or_has_bytes_is_needed() {
        let run = |addr, pages| PageRun {
            addr,
            pages,
            slot: 0,
        };
        let mm = Mm {
            vmas: vec![vma(10, 3, false), vma(20, 8, true)],
            pages: vec![run(10 * HUGE, 1), run(21 * HUGE, 512), run(25 * HUGE, 513)],
            ..Mm::default()
        };
        let content = Content {
            huge_page: HUGE,
            size: 9 * HUGE,
            pages: vec![run(4096, 1), run(8192, 2), run(3 * HUGE, 1)],
            ..Content::default()
        };
        let mut app = Application::default();
        app.mms.insert(MmId(1), mm);
        app.contents.insert(ContentId(0), content);
        app.contents.insert(ContentId(1), Content::default());
        assert_eq!(needed(&app), BTreeMap::from([(HUGE, 3 + 3 + 2)]));
    }
}
