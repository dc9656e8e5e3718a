//! Memory that is written all the time, while it is copied too: no page may come back as it was
//! at another moment than the rest.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::mman::{MapFlags, MmapAdvise, madvise};

use super::memory::{PAGE, Pages};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[Entry::carried("memory_rewritten", rewritten)];

/// More than a checkpoint would copy in the frozen window without a second round before.
const PAGES: usize = 12 * 1024;

/// In a page.
const WORDS: usize = PAGE / 8;

/// All words of the memory.
fn words(memory: &Pages) -> &[AtomicU64] {
    // SAFETY: aligned, all of the mapping, valid whatever it holds, and accessed in no other way.
    unsafe { std::slice::from_raw_parts(memory.address(0) as *const AtomicU64, PAGES * WORDS) }
}

/// Each page gets the number of the pass, and must have that of the pass before until then.
fn rewritten(case: &Case) -> Result<()> {
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
