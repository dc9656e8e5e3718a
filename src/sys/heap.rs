//! The heap of this process: memory that is there before it is needed.
//!
//! What is allocated for the first time costs a page fault for each 4 KiB, which is more than what
//! is then done with it. A command that has a window in which every microsecond counts takes the
//! memory for it beforehand (mallopt(3), mallinfo(3); glibc only, elsewhere nothing is done).

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

/// Bytes that the heap of the main thread has from the kernel.
#[must_use]
pub fn size() -> usize {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes no arguments.
    return unsafe { nix::libc::mallinfo2() }.arena;
    #[cfg(not(target_env = "gnu"))]
    0
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
mod tests {
    use super::*;

    #[test]
    #[cfg(target_env = "gnu")]
    fn what_was_taken_is_kept() {
        const BYTES: usize = 20 << 20;
        keep();
        // The tests' threads have heaps of their own, the main thread's is the one that is kept:
        // what matters is that it takes any size.
        for bytes in [0, 1, 4096, BYTES] {
            warm(bytes);
        }
    }
}
