//! Memory that is written all the time, while it is copied too: no page may come back as it was
//! at another moment than the rest.

use std::fs::File;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap};

use super::memory::{PAGE, Pages};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("memory_rewritten", |case| rewritten(case, false)),
    Entry::carried("memory_rewritten_blocked", |case| rewritten(case, true)),
    Entry::carried("memory_exchanged", exchanged),
];

/// More than a checkpoint would copy in the frozen window without a second round before.
const PAGES: usize = 12 * 1024;

/// In a page.
const WORDS: usize = PAGE / 8;

/// All words of the memory.
fn words(memory: &Pages) -> &[AtomicU64] {
    // SAFETY: aligned, all of the mapping, valid whatever it holds, and accessed in no other way.
    unsafe { std::slice::from_raw_parts(memory.address(0) as *const AtomicU64, PAGES * WORDS) }
}

/// Each page gets the number of the pass, and must have that of the pass before until then. If it is
/// `blocked`, a third of the time there is something open that is not carried: memory begins to be
/// read before that is known, and is read once more when the application has been frozen again.
fn rewritten(case: &Case, blocked: bool) -> Result<()> {
    let memory = Pages::new(PAGES * PAGE, MapFlags::MAP_PRIVATE)?;
    // SAFETY: our own mapping; advice changes no content.
    unsafe { madvise(memory.at(0)?, PAGES * PAGE, MmapAdvise::MADV_NOHUGEPAGE) }
        .context("madvise")?;
    let words = words(&memory);
    let (stop, passes) = (AtomicBool::new(false), AtomicU64::new(0));
    let passes_until = |pass| {
        while passes.load(Ordering::Relaxed) < pass {
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let wrong = std::thread::scope(|scope| -> Result<Vec<String>> {
        let writer = scope.spawn(|| {
            let mut wrong = Vec::new();
            for pass in 1.. {
                for page in 0..PAGES {
                    for word in [0, WORDS - 1] {
                        let before = words[page * WORDS + word].swap(pass, Ordering::Relaxed);
                        if before != pass - 1 {
                            wrong
                                .push(format!("word {word} of page {page} was {before} at {pass}"));
                        }
                    }
                }
                passes.store(pass, Ordering::Relaxed);
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
            wrong
        });
        if blocked {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let device = File::open("/dev/kmsg");
                    std::thread::sleep(Duration::from_millis(1));
                    drop(device);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
        }
        passes_until(2);
        let ready = case.ready();
        // All that was restored is looked at once.
        passes_until(passes.load(Ordering::Relaxed) + 2);
        stop.store(true, Ordering::Relaxed);
        let wrong = writer.join();
        ready?;
        wrong.map_err(|_| anyhow!("The writer panicked"))
    })?;
    ensure!(
        wrong.is_empty(),
        "{} of {PAGES} pages are of another moment: {}",
        wrong.len(),
        wrong[..wrong.len().min(5)].join(", ")
    );
    Ok(())
}

/// Private mappings of the same part of a file, which change places all the time: by page, or as
/// a whole page table.
struct Exchanged {
    /// Where the two are, and room for one of them.
    places: [usize; 3],
    length: usize,
    swaps: u64,
}

impl Exchanged {
    /// Two mappings of `length` bytes at addresses that are multiples of `align`.
    fn new(file: &File, length: usize, align: usize) -> Result<Exchanged> {
        let room = Pages::new(4 * length.max(align) + align, MapFlags::MAP_PRIVATE)?;
        let first = room.address(0).next_multiple_of(align);
        let step = length.max(align);
        let places = [first, first + step, first + 2 * step];
        for (number, place) in places[..2].iter().enumerate() {
            let size = NonZeroUsize::new(length).context("Nothing to map")?;
            // SAFETY: replaces part of a mapping of our own.
            let mapped = unsafe {
                mmap(
                    NonZeroUsize::new(*place),
                    size,
                    ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                    MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED,
                    file,
                    0,
                )
            };
            mapped.context("Map the file")?;
            for page in (0..length).step_by(PAGE) {
                // SAFETY: mapped just now, accessed by nobody else.
                unsafe { *((*place + page) as *mut u64) = number as u64 + 1 };
            }
        }
        std::mem::forget(room);
        Ok(Exchanged {
            places,
            length,
            swaps: 0,
        })
    }

    /// Lets the two change places.
    fn swap(&mut self) {
        let [one, two, free] = self.places;
        for (from, to) in [(one, free), (two, one), (free, two)] {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: moves a mapping of our own over room that is ours as well.
            unsafe { libc::mremap(from as *mut _, self.length, self.length, flags, to) };
        }
        self.swaps += 1;
    }

    fn verify(&self) -> Result<()> {
        for (number, place) in self.places[..2].iter().enumerate() {
            let wanted = (number as u64 + self.swaps) % 2 + 1;
            for page in (0..self.length).step_by(PAGE) {
                // SAFETY: mapped, accessed by nobody else.
                let found = unsafe { *((place + page) as *const u64) };
                ensure!(
                    found == wanted,
                    "Page {} of mapping {number} has {found}, not {wanted}, after {} swaps",
                    page / PAGE,
                    self.swaps
                );
            }
        }
        Ok(())
    }
}

fn exchanged(case: &Case) -> Result<()> {
    const TABLE: usize = 2 << 20;
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(case.path("mapped"))?;
    file.set_len(TABLE as u64)?;
    let mut all = [
        Exchanged::new(&file, 20 * PAGE, PAGE)?,
        Exchanged::new(&file, TABLE, TABLE)?,
    ];
    case.ready_polling(Duration::from_millis(1), || {
        for one in &mut all {
            one.swap();
        }
    })?;
    for one in &all {
        ensure!(one.swaps > 0, "They never changed places");
        one.verify()?;
    }
    Ok(())
}
