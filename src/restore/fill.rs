//! Private memory filled from outside, when all processes have mapped what they had: by all CPUs,
//! and each page from the very bytes that were compared with its checksum.

use super::RestoreError;
use crate::image::{PART, Pages, bytes, each};
use crate::model::frozen::{Application, PAGE_SIZE, PageRun};
use crate::model::ids::Pid;
use crate::sys::process::scatter_memory;

/// Page slots that are read at once, and where they go.
#[derive(Debug, PartialEq, Eq)]
struct Part {
    pid: Pid,
    slot: u64,
    /// (address, pages), in the order of the slots.
    pieces: Vec<(u64, u64)>,
}

impl Part {
    fn pages(&self) -> u64 {
        self.pieces.iter().map(|(_, pages)| pages).sum()
    }

    /// Where it ends.
    fn end(&self) -> u64 {
        let last = self.pieces.last();
        last.map_or(0, |(addr, pages)| addr + pages * PAGE_SIZE)
    }

    /// Which huge page it begins in.
    fn huge_page(&self) -> u64 {
        self.pieces.first().map_or(0, |(addr, _)| addr / HUGE_PAGE)
    }
}

/// What a huge page has room for. Two CPUs that touched a new one at the same time would both
/// clear one, and the kernel throw one of them away.
const HUGE_PAGE: u64 = 2 << 20;

/// Fills the memory of all processes. They stand, and what has pages is writable.
///
/// # Errors
/// A page is not what was written, or the kernel has no memory for it.
pub fn fill(app: &Application, image: Pages<'_>) -> Result<(), RestoreError> {
    let living = app.processes.iter().filter(|p| p.zombie.is_none());
    let memory = living.filter_map(|p| Some((p.pid, app.mms.get(&p.mm)?)));
    let parts: Vec<_> = memory.flat_map(|(pid, mm)| parts(pid, &mm.pages)).collect();
    let is_near = |a: &Part, b: &Part| (a.pid, a.huge_page()) == (b.pid, b.huge_page());
    let nearby: Vec<_> = parts.chunk_by(is_near).collect();
    each(&nearby, |parts, buffer| {
        for part in *parts {
            let buffer = &mut buffer[..bytes(part.pages())];
            image.read(part.slot, buffer)?;
            let pieces = part.pieces.iter();
            let pieces = pieces.map(|(addr, pages)| (*addr, bytes(*pages)));
            scatter_memory(part.pid, buffer, &pieces.collect::<Vec<_>>())?;
        }
        Ok(())
    })
}

/// Runs whose slots follow one another are read together, wherever their pages go, but for what
/// goes beyond the end of a huge page.
fn parts(pid: Pid, runs: &[PageRun]) -> Vec<Part> {
    let mut runs = runs.to_vec();
    runs.sort_unstable_by_key(|run| run.slot);
    let mut parts: Vec<Part> = Vec::new();
    for mut run in runs {
        while run.pages > 0 {
            let room = parts.last_mut().and_then(|part| {
                let pages = part.pages();
                let follows =
                    part.slot + pages == run.slot && !part.end().is_multiple_of(HUGE_PAGE);
                (follows && pages < PART).then_some((part, PART - pages))
            });
            let in_huge_page = (HUGE_PAGE - run.addr % HUGE_PAGE) / PAGE_SIZE;
            let pages = room.as_ref().map_or(PART, |(_, room)| *room);
            let pages = run.pages.min(pages).min(in_huge_page);
            let piece = (run.addr, pages);
            match room {
                Some((part, _)) => part.pieces.push(piece),
                None => parts.push(Part {
                    pid,
                    slot: run.slot,
                    pieces: vec![piece],
                }),
            }
            run.addr += pages * PAGE_SIZE;
            run.slot += pages;
            run.pages -= pages;
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(addr: u64, slot: u64, pages: u64) -> PageRun {
        PageRun { addr, pages, slot }
    }

    #[test]
    fn slots_that_follow_one_another_are_read_together() {
        let runs = [
            run(0x9000, 2, 1),
            run(0x1000, 0, 2),
            run(0x20_0000, 10, 1),
            run(0x40_0000, 3, 1),
        ];
        let part = |slot, pieces: &[(u64, u64)]| Part {
            pid: Pid(7),
            slot,
            pieces: pieces.to_vec(),
        };
        assert_eq!(
            parts(Pid(7), &runs),
            [
                part(0, &[(0x1000, 2), (0x9000, 1), (0x40_0000, 1)]),
                part(10, &[(0x20_0000, 1)]),
            ]
        );
    }

    #[test]
    fn no_part_goes_beyond_a_huge_page() {
        let (first, rest) = (HUGE_PAGE - 3 * PAGE_SIZE, 3 * PART);
        let parts = parts(Pid(7), &[run(first, 0, rest)]);
        let pages: Vec<_> = parts.iter().map(Part::pages).collect();
        assert_eq!(pages, [3, PART, PART, PART - 3]);
        let nearby = parts.chunk_by(|a, b| a.huge_page() == b.huge_page());
        assert_eq!(nearby.map(<[_]>::len).collect::<Vec<_>>(), [1, 3]);
    }

    #[test]
    fn no_part_is_larger_than_the_buffer() {
        let end = 0x1000 + (2 * PART + 5) * PAGE_SIZE;
        let runs = [run(0x1000, 0, 2 * PART + 5), run(end, 2 * PART + 5, PART)];
        let parts = parts(Pid(7), &runs);
        let pages: Vec<_> = parts.iter().map(Part::pages).collect();
        assert_eq!(pages, [PART, PART, PART, 5]);
        // Every page once, from its own slot.
        let addresses = parts.iter().flat_map(|part| {
            let mut slot = part.slot;
            part.pieces.iter().map(move |(addr, pages)| {
                let at = slot;
                slot += pages;
                (at, *addr)
            })
        });
        for (slot, addr) in addresses {
            assert_eq!(addr, 0x1000 + slot * PAGE_SIZE);
        }
    }
}
