//! Huge pages: memory of `MAP_HUGETLB`, private and shared, and memfds of `MFD_HUGETLB`.

use std::fs;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::path::Path;
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::stat::fstat;
use nix::unistd::ftruncate;

use super::child::Child;
use super::memory::Pages;
use super::probe::{check_pattern, fill, smaps_at, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("huge_private", private),
    Entry::carried("huge_shared", shared),
    Entry::carried("huge_memfd", memfd),
    Entry::carried("huge_sysv", sysv),
    Entry::refused("refused_hugetlbfs", "on hugetlbfs", hugetlbfs),
    Entry::refused(
        "refused_hugetlbfs_mapped",
        "hugetlb mapping",
        hugetlbfs_mapped,
    ),
];

/// Bytes of a huge page.
const HUGE: usize = 2 << 20;

/// Where the VM has hugetlbfs.
const HUGETLBFS: &str = "/dev/hugepages";

/// Makes sure that the machine has huge pages, enough for all cases at the same time.
fn pool() -> Result<()> {
    const PAGES: u32 = 24;
    let path = "/proc/sys/vm/nr_hugepages";
    let there: u32 = fs::read_to_string(path)?.trim().parse()?;
    if there < PAGES {
        fs::write(path, PAGES.to_string()).context("Ask for huge pages")?;
        let there: u32 = fs::read_to_string(path)?.trim().parse()?;
        ensure!(there >= PAGES, "The kernel found {there} huge pages");
    }
    Ok(())
}

/// That the mapping at an address is of huge pages, and how many bytes of it are there.
fn check_huge(address: usize, touched: usize) -> Result<()> {
    let of = |name: &str| -> Result<usize> {
        let kib = smaps_at(address, name)?;
        Ok(kib.trim_end_matches(" kB").parse()?)
    };
    let page = of("KernelPageSize:")?;
    ensure!(page == HUGE >> 10, "Its pages have {page} KiB");
    let there = of("Shared_Hugetlb:")? + of("Private_Hugetlb:")?;
    ensure!(there == touched >> 10, "{there} KiB of it are there");
    Ok(())
}

/// Three pages, of which one is never touched; one is written again after the checkpoint has
/// begun to copy, one is read-only. A child has a copy of its own.
fn private(case: &Case) -> Result<()> {
    pool()?;
    let mut memory = Pages::new(3 * HUGE, MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB)?;
    fill(1, memory.write(0, HUGE));
    fill(2, memory.write(2 * HUGE, HUGE));
    memory.protect(2 * HUGE, HUGE, ProtFlags::PROT_READ)?;
    let child = Child::start(case.dir(), "huge", |turn| {
        fill(3, memory.write(0, 5000));
        turn.wait();
        check_pattern("the child's own page", 3, memory.read(0, 5000))
    })?;

    case.ready_polling(std::time::Duration::from_millis(20), || {
        let count = memory.read(HUGE - 1, 1)[0];
        memory.write(HUGE - 1, 1)[0] = count.wrapping_add(1);
    })?;

    child.go()?;
    child.join()?;
    check_huge(memory.address(0), HUGE)?;
    check_huge(memory.address(2 * HUGE), HUGE)?;
    fill(1, memory.write(HUGE - 8, 8));
    check_pattern("page 0", 1, memory.read(0, HUGE - 8))?;
    check_pattern("page 2", 2, memory.read(2 * HUGE, HUGE))?;
    let fresh = memory.read(HUGE, HUGE);
    ensure!(fresh.iter().all(|byte| *byte == 0), "Page 1 is not zero");
    fill(4, memory.write(HUGE, HUGE));
    Ok(())
}

/// Shared with a child, without a file.
fn shared(case: &Case) -> Result<()> {
    pool()?;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_HUGETLB;
    let mut memory = Pages::new(3 * HUGE, flags)?;
    fill(1, memory.write(HUGE, HUGE));
    let child = Child::start(case.dir(), "huge", |turn| {
        turn.wait();
        check_pattern("what the child sees", 1, memory.read(HUGE, HUGE))?;
        fill(2, memory.write(0, HUGE));
        Ok(())
    })?;

    case.ready()?;

    check_pattern("page 1", 1, memory.read(HUGE, HUGE))?;
    check_huge(memory.address(0), HUGE)?;
    child.go()?;
    child.join()?;
    check_pattern("what the child has written", 2, memory.read(0, HUGE))
}

/// A memfd of huge pages with a seal: mapped shared, mapped privately, and read.
fn memfd(case: &Case) -> Result<()> {
    pool()?;
    let flags = MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB | MFdFlags::MFD_ALLOW_SEALING;
    let file = memfd_create("huge", flags).context("memfd_create")?;
    ftruncate(&file, i64::try_from(2 * HUGE)?)?;
    let map = |flags| -> Result<&'static mut [u8]> {
        let size = NonZeroUsize::new(2 * HUGE).context("Nothing")?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the kernel chooses an unused place; unmapped below, or with the process.
        let start = unsafe { mmap(None, size, prot, flags, &file, 0) }.context("Map it")?;
        // SAFETY: mapped for as long as the process lives.
        Ok(unsafe { std::slice::from_raw_parts_mut(start.as_ptr().cast(), 2 * HUGE) })
    };
    let shared = map(MapFlags::MAP_SHARED)?;
    fill(1, &mut shared[..HUGE]);
    let private = map(MapFlags::MAP_PRIVATE)?;
    fill(2, &mut private[HUGE..HUGE + 5000]);
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK))?;

    case.ready()?;

    check_pattern("the file", 1, &shared[..HUGE])?;
    check_pattern("the private page", 2, &private[HUGE..HUGE + 5000])?;
    check_pattern("the file seen privately", 1, &private[..HUGE])?;
    ensure!(
        shared[HUGE..].iter().all(|byte| *byte == 0),
        "It was written through"
    );
    let stat = fstat(&file)?;
    ensure!(
        stat.st_size == i64::try_from(2 * HUGE)?,
        "Size {}",
        stat.st_size
    );
    ensure!(
        usize::try_from(stat.st_blksize)? == HUGE,
        "Blocks of {}",
        stat.st_blksize
    );
    let seals = fcntl(file.as_fd(), FcntlArg::F_GET_SEALS)?;
    ensure!(seals == SealFlag::F_SEAL_SHRINK.bits(), "Seals {seals:x}");
    fill(3, shared);
    check_pattern("the file seen privately", 3, &private[..HUGE])?;
    Ok(())
}

/// A System V segment that ends in the middle of a page, attached by a child too.
fn sysv(case: &Case) -> Result<()> {
    const LEN: usize = HUGE + HUGE / 2;
    pool()?;
    let flags = libc::IPC_CREAT | libc::SHM_HUGETLB | 0o600;
    // SAFETY: takes integers.
    let id = sys("shmget", unsafe {
        libc::shmget(libc::IPC_PRIVATE, LEN, flags).into()
    })?;
    let id = i32::try_from(id)?;
    // SAFETY: attached at an address of the kernel's choice.
    let start = unsafe { libc::shmat(id, std::ptr::null(), 0) };
    ensure!(start.addr() != usize::MAX, "shmat: {}", Errno::last());
    // SAFETY: attached for as long as the process lives.
    let memory = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), LEN) };
    fill(1, &mut memory[HUGE..]);
    // SAFETY: marks it, to go with the process.
    sys("shmctl", unsafe {
        libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()).into()
    })?;
    let child = Child::start(case.dir(), "huge", |turn| {
        turn.wait();
        check_pattern("what the child sees", 1, &memory[HUGE..])?;
        fill(2, &mut memory[..HUGE]);
        Ok(())
    })?;

    case.ready()?;

    check_pattern("the second page", 1, &memory[HUGE..])?;
    check_huge(start.addr(), HUGE)?;
    child.go()?;
    child.join()?;
    check_pattern("what the child has written", 2, &memory[..HUGE])
}

/// A file on hugetlbfs that is open.
fn hugetlbfs(case: &Case) -> Result<()> {
    let path = Path::new(HUGETLBFS).join("open");
    let file = fs::File::create(&path).context("Create a file on hugetlbfs")?;
    case.ready()?;
    ensure!(file.metadata()?.len() == 0, "It has changed");
    Ok(fs::remove_file(path)?)
}

/// One that is mapped only.
fn hugetlbfs_mapped(case: &Case) -> Result<()> {
    pool()?;
    let path = Path::new(HUGETLBFS).join("mapped");
    let file = fs::File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)
        .context("Create a file on hugetlbfs")?;
    let size = NonZeroUsize::new(HUGE).context("Nothing")?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: the kernel chooses an unused place.
    let start: NonNull<_> =
        unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, &file, 0) }.context("Map it")?;
    drop(file);
    case.ready()?;
    // SAFETY: mapped above, nothing refers to it.
    unsafe { munmap(start, HUGE) }?;
    Ok(fs::remove_file(path)?)
}
