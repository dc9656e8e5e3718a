//! The heap of this process: memory that is there before it is needed.
//!
//! What is allocated for the first time costs a page fault for each 4 KiB, which is more than what
//! is then done with it. A command that has a window in which every microsecond counts takes the
//! memory for it beforehand (mallopt(3); glibc only, elsewhere nothing is kept).

use std::hint::black_box;

/// From now on what is freed is kept for what is allocated next, and is not given back.
pub fn keep() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the parameters are ones of mallopt(3), which locks what it changes.
    unsafe {
        use nix::libc;
        // The most that glibc takes (HEAP_MAX_SIZE / 2): beyond it, allocations are mappings.
        libc::mallopt(libc::M_MMAP_THRESHOLD, 32 << 20);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
    }
}

/// Has so many bytes in the heap that are free and backed by memory, after [`keep`].
pub fn warm(bytes: usize) {
    const PIECE: usize = 8 << 20;
    const PAGE: usize = 4096;
    // All of them before any is freed, or each would be the one before.
    let mut held: Vec<Vec<u8>> = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let mut piece = Vec::with_capacity(left.min(PIECE));
        for page in piece.spare_capacity_mut().chunks_mut(PAGE) {
            page[0].write(0);
        }
        left -= left.min(PIECE);
        held.push(black_box(piece));
    }
}

#[cfg(test)]
#[cfg(target_env = "gnu")]
mod tests {
    use super::*;
    use nix::sys::resource::{UsageWho, getrusage};

    fn faults() -> i64 {
        let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
        usage.minor_page_faults()
    }

    /// Some in pieces that glibc would map each for itself, and give back, as it comes.
    #[test]
    fn what_was_taken_is_there_when_it_is_needed() {
        const BYTES: usize = 20 << 20;
        keep();
        let before = faults();
        warm(BYTES);
        let warmed = faults();
        for size in [100 << 10, 1 << 20, 4 << 20] {
            let some: Vec<Vec<u8>> = (0..BYTES / 2 / size).map(|_| vec![1; size]).collect();
            black_box(some);
        }
        let (taken, needed) = (warmed - before, faults() - warmed);
        // Huge pages would take fewer.
        assert!(
            needed * 10 < taken.max(100),
            "{taken}, then {needed} faults"
        );
    }
}
