//! Anonymous memory: contents, protections, holes, advice, heap and stack.

use std::ffi::c_void;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::mman::{
    MapFlags, MmapAdvise, ProtFlags, madvise, mlock, mmap_anonymous, mprotect, munmap,
};

use super::probe::{check_pattern, fill, kernel_access, pattern, permissions_at, vm_flags_at};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("memory_private", private),
    Entry::carried("memory_64m", large),
    Entry::carried("memory_heap", heap),
    Entry::carried("memory_stack", stack),
    Entry::carried("memory_advice", advice),
    Entry::carried("memory_child", child),
];

/// Bytes of a page.
pub const PAGE: usize = 4096;

/// Pages of anonymous memory, unmapped on drop.
pub struct Pages {
    start: NonNull<c_void>,
    length: usize,
}

impl Pages {
    /// Maps readable and writable memory.
    pub fn new(length: usize, flags: MapFlags) -> Result<Pages> {
        let size = NonZeroUsize::new(length).context("No memory asked for")?;
        // SAFETY: the kernel chooses an unused place.
        let start = unsafe {
            mmap_anonymous(
                None,
                size,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                flags,
            )
        };
        Ok(Pages {
            start: start.with_context(|| format!("Map {length} bytes"))?,
            length,
        })
    }

    /// Address of a byte.
    pub fn address(&self, offset: usize) -> usize {
        self.start.as_ptr() as usize + offset
    }

    /// A part of it.
    pub fn at(&self, offset: usize) -> Result<NonNull<c_void>> {
        NonNull::new(self.address(offset) as *mut c_void).context("Null")
    }

    /// The bytes of a range, which must be mapped and readable.
    pub fn read(&self, offset: usize, length: usize) -> &[u8] {
        assert!(offset + length <= self.length);
        // SAFETY: inside the mapping; the caller asks for readable ranges only.
        unsafe { std::slice::from_raw_parts(self.address(offset) as *const u8, length) }
    }

    /// The bytes of a range, which must be mapped and writable.
    pub fn write(&mut self, offset: usize, length: usize) -> &mut [u8] {
        assert!(offset + length <= self.length);
        // SAFETY: inside the mapping; the caller asks for writable ranges only.
        unsafe { std::slice::from_raw_parts_mut(self.address(offset) as *mut u8, length) }
    }

    /// Changes the protection of a range.
    pub fn protect(&mut self, offset: usize, length: usize, flags: ProtFlags) -> Result<()> {
        // SAFETY: inside the mapping.
        unsafe { mprotect(self.at(offset)?, length, flags) }.context("mprotect")
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: ours, and no borrow outlives it.
        // It cannot fail for a range that was mapped.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

/// Patterns in memory of every protection, and a hole.
fn private(case: &Case) -> Result<()> {
    const PART: usize = 16 * PAGE;
    let mut memory = Pages::new(6 * PART, MapFlags::MAP_PRIVATE)?;
    for part in 0..6 {
        fill(part as u64, memory.write(part * PART, PART));
    }
    // Part 0 stays as it is; of part 4 only every other page is ever touched.
    memory.protect(PART, PART, ProtFlags::PROT_READ)?;
    memory.protect(2 * PART, PART, ProtFlags::PROT_NONE)?;
    memory.protect(3 * PART, PART, ProtFlags::PROT_READ | ProtFlags::PROT_EXEC)?;
    // SAFETY: a part of our own mapping that is not used again.
    unsafe { munmap(memory.at(5 * PART)?, PART)? };
    let mut sparse = Pages::new(64 * PAGE, MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE)?;
    for page in (0..64).step_by(2) {
        fill(page as u64, sparse.write(page * PAGE, PAGE));
    }

    case.ready()?;

    let expected = [
        Some("rw-p"),
        Some("r--p"),
        Some("---p"),
        Some("r-xp"),
        Some("rw-p"),
        None,
    ];
    for (part, want) in expected.into_iter().enumerate() {
        for offset in [0, PART - 1] {
            let have = permissions_at(memory.address(part * PART + offset))?;
            // Something else may have been mapped into the hole meanwhile.
            if want.is_some() {
                ensure!(
                    have.as_deref() == want,
                    "Part {part} is {have:?}, not {want:?}"
                );
            }
        }
    }
    for part in [0, 1, 3, 4] {
        check_pattern(
            &format!("part {part}"),
            part as u64,
            memory.read(part * PART, PART),
        )?;
    }
    ensure!(
        kernel_access(memory.address(PART), true)? == Err(Errno::EFAULT),
        "PROT_READ is writable"
    );
    ensure!(
        kernel_access(memory.address(2 * PART), false)? == Err(Errno::EFAULT),
        "PROT_NONE is readable"
    );
    memory.protect(2 * PART, PART, ProtFlags::PROT_READ)?;
    check_pattern("part 2", 2, memory.read(2 * PART, PART))?;
    memory.protect(PART, 3 * PART, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE)?;
    for part in 0..5 {
        fill(100 + part as u64, memory.write(part * PART, PART));
        check_pattern(
            "rewritten part",
            100 + part as u64,
            memory.read(part * PART, PART),
        )?;
    }
    for page in 0..64 {
        let bytes = sparse.read(page * PAGE, PAGE);
        if page % 2 == 0 {
            check_pattern(&format!("sparse page {page}"), page as u64, bytes)?;
        } else {
            ensure!(
                bytes.iter().all(|&byte| byte == 0),
                "Untouched page {page} is not zero"
            );
        }
    }
    // Dropped pages must come back as zeroes, not as they were in an image.
    // SAFETY: nothing refers to the range.
    unsafe { madvise(sparse.at(0)?, 64 * PAGE, MmapAdvise::MADV_DONTNEED)? };
    ensure!(
        sparse.read(0, 64 * PAGE).iter().all(|&byte| byte == 0),
        "Dropped pages are not zero"
    );
    Ok(())
}

/// 64 MiB, every page with contents of its own.
fn large(case: &Case) -> Result<()> {
    const LENGTH: usize = 64 << 20;
    let mut memory = Pages::new(LENGTH, MapFlags::MAP_PRIVATE)?;
    for page in 0..LENGTH / PAGE {
        fill(page as u64, memory.write(page * PAGE, PAGE));
    }
    case.ready()?;
    for page in 0..LENGTH / PAGE {
        check_pattern(
            &format!("page {page}"),
            page as u64,
            memory.read(page * PAGE, PAGE),
        )?;
    }
    fill(1, memory.write(LENGTH - PAGE, PAGE));
    check_pattern("rewritten page", 1, memory.read(LENGTH - PAGE, PAGE))
}

/// The program break: contents, position, and that it still moves.
fn heap(case: &Case) -> Result<()> {
    const PART: usize = 1 << 20;
    let grow = || -> Result<usize> {
        // SAFETY: only moves the break up; the allocator copes with that.
        let start = unsafe { libc::sbrk(PART.cast_signed()) };
        ensure!(start as isize != -1, "sbrk: {}", Errno::last());
        Ok(start as usize)
    };
    let start = grow()?;
    // SAFETY: the break has just moved over these bytes, nobody else has them.
    fill(1, unsafe {
        std::slice::from_raw_parts_mut(start as *mut u8, PART)
    });
    let blocks: Vec<Vec<u8>> = (0..1000).map(|seed| pattern(seed, 2000)).collect();
    // SAFETY: asks only.
    let end = unsafe { libc::sbrk(0) } as usize;

    case.ready()?;

    // SAFETY: asks only.
    let now = unsafe { libc::sbrk(0) } as usize;
    ensure!(now == end, "The break is {now:#x}, not {end:#x}");
    // SAFETY: as above.
    check_pattern("below the break", 1, unsafe {
        std::slice::from_raw_parts(start as *const u8, PART)
    })?;
    for (seed, block) in blocks.iter().enumerate() {
        check_pattern("heap block", seed as u64, block)?;
    }
    let more = grow()?;
    ensure!(more == end, "The break went on at {more:#x}, not {end:#x}");
    // SAFETY: as above.
    let fresh = unsafe { std::slice::from_raw_parts_mut(more as *mut u8, PART) };
    ensure!(fresh.iter().all(|&byte| byte == 0), "New heap is not zero");
    fill(2, fresh);
    check_pattern("new heap", 2, fresh)?;
    let line = std::fs::read_to_string("/proc/self/maps")?;
    ensure!(
        line.contains("[heap]") && line.contains("[stack]"),
        "maps shows no heap or stack"
    );
    drop(blocks);
    let again: Vec<Vec<u8>> = (0..1000).map(|seed| pattern(seed, 3000)).collect();
    for (seed, block) in again.iter().enumerate() {
        check_pattern("new heap block", seed as u64, block)?;
    }
    Ok(())
}

/// Uses about 1 KiB of stack per level and checks it on the way back.
fn descend(level: u64) -> Result<u64> {
    let mut frame = [0u8; 1024];
    fill(level, &mut frame);
    std::hint::black_box(&mut frame);
    let below = if level == 0 { 0 } else { descend(level - 1)? };
    check_pattern("stack frame", level, std::hint::black_box(&frame))?;
    Ok(below + 1)
}

/// The main thread's stack holds what it held and grows far below that.
fn stack(case: &Case) -> Result<()> {
    let mut frame = [0u8; 64 * 1024];
    fill(7, &mut frame);
    std::hint::black_box(&mut frame);
    case.ready()?;
    check_pattern("stack", 7, std::hint::black_box(&frame))?;
    let levels = descend(2000)?;
    ensure!(levels == 2001, "{levels} levels");
    check_pattern("stack", 7, std::hint::black_box(&frame))
}

/// Advice and locks that belong to a mapping.
fn advice(case: &Case) -> Result<()> {
    let kinds: &[(&str, MmapAdvise)] = &[
        ("dd", MmapAdvise::MADV_DONTDUMP),
        ("dc", MmapAdvise::MADV_DONTFORK),
        ("wf", MmapAdvise::MADV_WIPEONFORK),
        ("nh", MmapAdvise::MADV_NOHUGEPAGE),
        ("rr", MmapAdvise::MADV_RANDOM),
        ("sr", MmapAdvise::MADV_SEQUENTIAL),
    ];
    let mut regions = Vec::new();
    for (seed, &(flag, advice)) in kinds.iter().enumerate() {
        let mut memory = Pages::new(4 * PAGE, MapFlags::MAP_PRIVATE)?;
        fill(seed as u64, memory.write(0, 4 * PAGE));
        // SAFETY: none of these changes the contents here.
        match unsafe { madvise(memory.at(0)?, 4 * PAGE, advice) } {
            // Kernels may be built without huge pages.
            Err(Errno::EINVAL) if flag == "nh" => continue,
            result => result.with_context(|| format!("madvise {flag}"))?,
        }
        regions.push((flag, seed as u64, memory));
    }
    let mut locked = Pages::new(4 * PAGE, MapFlags::MAP_PRIVATE)?;
    fill(99, locked.write(0, 4 * PAGE));
    // SAFETY: our own memory.
    unsafe { mlock(locked.at(0)?, 4 * PAGE) }.context("mlock")?;
    regions.push(("lo", 99, locked));
    for (flag, _, memory) in &regions {
        ensure!(
            vm_flags_at(memory.address(0))?
                .iter()
                .any(|have| have == flag),
            "No {flag} before"
        );
    }

    case.ready()?;

    for (flag, seed, memory) in &regions {
        let flags = vm_flags_at(memory.address(0))?;
        ensure!(
            flags.iter().any(|have| have == flag),
            "{flag} is lost: {flags:?}"
        );
        check_pattern(&format!("region {flag}"), *seed, memory.read(0, 4 * PAGE))?;
    }
    Ok(())
}

/// A forked child shares pages copy-on-write; each side sees its own.
fn child(case: &Case) -> Result<()> {
    let mut memory = Pages::new(64 * PAGE, MapFlags::MAP_PRIVATE)?;
    fill(1, memory.write(0, 64 * PAGE));
    let dir = case.dir().to_owned();
    let child = super::child::Child::start(&dir, "memory", |turn| {
        fill(2, memory.write(0, 32 * PAGE));
        turn.wait();
        check_pattern("child's own pages", 2, memory.read(0, 32 * PAGE))?;
        let inherited = &pattern(1, 64 * PAGE)[32 * PAGE..];
        if memory.read(32 * PAGE, 32 * PAGE) != inherited {
            bail!("The inherited pages differ");
        }
        memory.write(32 * PAGE, 32 * PAGE).fill(3);
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    check_pattern("parent's pages", 1, memory.read(0, 64 * PAGE))?;
    child.finish()?;
    check_pattern(
        "parent's pages after the child",
        1,
        memory.read(0, 64 * PAGE),
    )
}
