//! Mappings of files and of shared memory.

use std::ffi::c_void;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, fork};

use super::child::Child;
use super::memory::{PAGE, Pages};
use super::probe::{check_pattern, eventually, fill, pattern, permissions_at};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("mapping_private", private),
    Entry::carried("mapping_shared", shared),
    Entry::carried("mapping_shared_anonymous", shared_anonymous),
    Entry::carried("mapping_shared_written", shared_written),
    Entry::carried("memfd_written", memfd_written),
    Entry::carried("memfd", memfd),
];

/// A mapped file, unmapped on drop.
pub struct Mapping {
    start: NonNull<c_void>,
    length: usize,
}

impl Mapping {
    /// Maps a part of a file.
    pub fn new(
        file: impl AsFd,
        offset: i64,
        length: usize,
        protection: ProtFlags,
        flags: MapFlags,
    ) -> Result<Mapping> {
        let size = NonZeroUsize::new(length).context("No memory asked for")?;
        // SAFETY: the kernel chooses an unused place.
        let start =
            unsafe { mmap(None, size, protection, flags, file, offset) }.context("Map a file")?;
        Ok(Mapping { start, length })
    }

    /// What it shows.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: mapped readable; changes by others are looked at only after
        // they have happened.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.length) }
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above; mapped writable by the callers.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: ours. It cannot fail for what was mapped.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

const BOTH: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

fn open(path: &std::path::Path) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path);
    file.with_context(|| format!("Create {}", path.display()))
}

/// A private mapping at an offset: clean pages are the file's, written pages
/// are the program's; also with write permission taken away again.
fn private(case: &Case) -> Result<()> {
    let path = case.dir().join("mapped");
    let mut file = open(&path)?;
    file.write_all(&pattern(1, 10 * PAGE))?;
    let mut mapping = Mapping::new(
        &file,
        i64::try_from(2 * PAGE)?,
        8 * PAGE,
        BOTH,
        MapFlags::MAP_PRIVATE,
    )?;
    drop(file);
    for page in [1, 2, 6] {
        fill(
            100 + page as u64,
            &mut mapping.bytes_mut()[page * PAGE..(page + 1) * PAGE],
        );
    }
    // Like the relocated part of a shared library.
    // SAFETY: our own mapping.
    unsafe { nix::sys::mman::mprotect(mapping.start, 4 * PAGE, ProtFlags::PROT_READ)? };

    case.ready()?;

    let original = pattern(1, 10 * PAGE);
    for page in 0..8 {
        let bytes = &mapping.bytes()[page * PAGE..(page + 1) * PAGE];
        if [1, 2, 6].contains(&page) {
            check_pattern(&format!("written page {page}"), 100 + page as u64, bytes)?;
        } else {
            ensure!(
                bytes == &original[(page + 2) * PAGE..(page + 3) * PAGE],
                "Clean page {page} differs"
            );
        }
    }
    ensure!(
        fs::read(&path)? == original,
        "The file was changed by private writes"
    );
    let permissions = permissions_at(mapping.start.as_ptr() as usize)?;
    ensure!(
        permissions.as_deref() == Some("r--p"),
        "The first part is {permissions:?}"
    );
    // A page not written yet shows what is written to the file now.
    let file = OpenOptions::new().write(true).open(&path)?;
    file.write_all_at(&[0x5a; 16], (9 * PAGE) as u64)?;
    ensure!(
        mapping.bytes()[7 * PAGE..7 * PAGE + 16] == [0x5a; 16],
        "A clean page is not the file's any more"
    );
    let maps = fs::read_to_string("/proc/self/maps")?;
    ensure!(
        maps.contains(&*path.to_string_lossy()),
        "maps does not name the file"
    );
    Ok(())
}

/// A shared mapping: both ways between memory and file.
fn shared(case: &Case) -> Result<()> {
    let path = case.dir().join("mapped");
    let mut file = open(&path)?;
    file.write_all(&pattern(1, 8 * PAGE))?;
    let mut mapping = Mapping::new(&file, 0, 8 * PAGE, BOTH, MapFlags::MAP_SHARED)?;
    fill(2, &mut mapping.bytes_mut()[PAGE..2 * PAGE]);
    let viewer = Mapping::new(
        &file,
        0,
        8 * PAGE,
        ProtFlags::PROT_READ,
        MapFlags::MAP_SHARED,
    )?;

    case.ready()?;

    let original = pattern(1, 8 * PAGE);
    check_pattern("written page", 2, &mapping.bytes()[PAGE..2 * PAGE])?;
    ensure!(
        mapping.bytes()[2 * PAGE..] == original[2 * PAGE..],
        "Clean pages differ"
    );
    let mut content = fs::read(&path)?;
    check_pattern("the file's page", 2, &content[PAGE..2 * PAGE])?;
    fill(3, &mut mapping.bytes_mut()[3 * PAGE..4 * PAGE]);
    content = fs::read(&path)?;
    check_pattern("page written afterwards", 3, &content[3 * PAGE..4 * PAGE])?;
    check_pattern(
        "the other mapping's page",
        3,
        &viewer.bytes()[3 * PAGE..4 * PAGE],
    )?;
    file.write_all_at(&[0x66; 64], (5 * PAGE) as u64)?;
    ensure!(
        mapping.bytes()[5 * PAGE..5 * PAGE + 64] == [0x66; 64],
        "A write to the file is not in the mapping"
    );
    Ok(())
}

/// Anonymous memory shared by parent and child.
fn shared_anonymous(case: &Case) -> Result<()> {
    let mut memory = Pages::new(16 * PAGE, MapFlags::MAP_SHARED)?;
    fill(1, memory.write(0, 8 * PAGE));
    let dir = case.dir().to_owned();
    let child = Child::start(&dir, "sharer", |turn| {
        fill(2, memory.write(8 * PAGE, 4 * PAGE));
        turn.wait();
        check_pattern("the parent's part", 1, memory.read(0, 8 * PAGE))?;
        eventually("the parent's new byte", || {
            Ok(std::hint::black_box(memory.read(12 * PAGE, 1))[0] == 0x42)
        })?;
        memory.write(13 * PAGE, 1)[0] = 0x43;
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    check_pattern("the parent's part", 1, memory.read(0, 8 * PAGE))?;
    check_pattern("the child's part", 2, memory.read(8 * PAGE, 4 * PAGE))?;
    memory.write(12 * PAGE, 1)[0] = 0x42;
    child.finish()?;
    ensure!(
        std::hint::black_box(memory.read(13 * PAGE, 1))[0] == 0x43,
        "The child's new byte did not arrive"
    );
    Ok(())
}

/// What short-lived processes write all the time, whose page tables say nothing any more.
fn shared_written(case: &Case) -> Result<()> {
    const COUNT: usize = 2048;
    let mut memory = Pages::new(COUNT * PAGE, MapFlags::MAP_SHARED)?;
    let mut expected = Pages::new(COUNT * PAGE, MapFlags::MAP_PRIVATE)?;
    for pages in [&mut memory, &mut expected] {
        fill(1, pages.write(0, COUNT / 2 * PAGE));
    }
    let (mut turns, mut failure) = (0_usize, None);
    case.ready_polling(Duration::from_millis(1), || {
        // All over it, and now and then where nothing was before, or what becomes zeroes.
        let page = turns.wrapping_mul(977) % COUNT;
        let byte = u8::try_from(turns % 256).unwrap_or(0);
        // SAFETY: the child writes to shared memory and ends.
        match unsafe { fork() } {
            Ok(ForkResult::Child) => {
                memory.write(page * PAGE, PAGE).fill(byte);
                // SAFETY: nothing of the parent's is to be run.
                unsafe { libc::_exit(0) }
            }
            Ok(ForkResult::Parent { child }) => {
                if let Err(errno) = waitpid(child, None) {
                    failure = Some(errno);
                }
            }
            Err(errno) => failure = Some(errno),
        }
        expected.write(page * PAGE, PAGE).fill(byte);
        turns += 1;
    })?;
    ensure!(failure.is_none(), "A child: {failure:?}");
    for page in 0..COUNT {
        let [found, wanted] = [&memory, &expected].map(|pages| pages.read(page * PAGE, PAGE));
        ensure!(found == wanted, "Page {page} is not what was written last");
    }
    Ok(())
}

/// A mapped memfd that is written, cut off and extended by system calls all the time.
fn memfd_written(case: &Case) -> Result<()> {
    const COUNT: usize = 512;
    let file = File::from(memfd_create(c"tracker-written", MFdFlags::MFD_CLOEXEC)?);
    file.write_all_at(&pattern(1, COUNT * PAGE), 0)?;
    let mapping = Mapping::new(&file, 0, PAGE, BOTH, MapFlags::MAP_SHARED)?;
    let mut expected = pattern(1, COUNT * PAGE);
    let (mut turns, mut failure) = (0_usize, None);
    case.ready_polling(Duration::from_millis(1), || {
        let at = turns.wrapping_mul(977) % COUNT * PAGE;
        let bytes = pattern(u64::try_from(turns).unwrap_or(0), PAGE);
        let written = file.write_all_at(&bytes, at as u64).and_then(|()| {
            let end = (COUNT - turns % 7) * PAGE + turns % 100;
            expected.resize(expected.len().max(at + PAGE), 0);
            expected[at..at + PAGE].copy_from_slice(&bytes);
            expected.resize(end, 0);
            file.set_len(end as u64)
        });
        failure = failure.take().or(written.err());
        turns += 1;
    })?;
    ensure!(failure.is_none(), "Writing: {failure:?}");
    let size = usize::try_from(file.metadata()?.len())?;
    ensure!(
        size == expected.len(),
        "It has {size} bytes, not {}",
        expected.len()
    );
    let mut found = vec![0; size];
    file.read_exact_at(&mut found, 0)?;
    ensure!(found == expected, "The bytes are not those written last");
    ensure!(
        mapping.bytes() == &expected[..PAGE],
        "What is mapped is another file"
    );
    Ok(())
}

/// A memfd: name, contents, size, offset, seals, and a mapping of it.
fn memfd(case: &Case) -> Result<()> {
    let fd = memfd_create(
        c"tracker-case",
        MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING,
    )?;
    let mut file = File::from(fd);
    file.write_all(&pattern(1, 8 * PAGE))?;
    file.set_len((10 * PAGE) as u64)?;
    let mut mapping = Mapping::new(&file, 0, 8 * PAGE, BOTH, MapFlags::MAP_SHARED)?;
    fill(2, &mut mapping.bytes_mut()[..PAGE]);
    fcntl(
        &file,
        FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW),
    )?;
    file.seek(SeekFrom::Start(PAGE as u64))?;
    // Only mapped, not open any more.
    let lost = File::from(memfd_create(c"tracker-lost", MFdFlags::MFD_CLOEXEC)?);
    lost.set_len((2 * PAGE) as u64)?;
    let mut only_mapped = Mapping::new(&lost, 0, 2 * PAGE, BOTH, MapFlags::MAP_SHARED)?;
    drop(lost);
    fill(3, only_mapped.bytes_mut());

    case.ready()?;

    let link = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    ensure!(
        link.to_string_lossy().contains("tracker-case"),
        "It is now {}",
        link.display()
    );
    ensure!(file.stream_position()? == PAGE as u64, "Wrong offset");
    ensure!(file.metadata()?.len() == (10 * PAGE) as u64, "Wrong size");
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    ensure!(
        rest[..7 * PAGE] == pattern(1, 8 * PAGE)[PAGE..],
        "Wrong contents"
    );
    ensure!(
        rest[7 * PAGE..].iter().all(|&byte| byte == 0),
        "The tail is not zero"
    );
    check_pattern("mapped page", 2, &mapping.bytes()[..PAGE])?;
    mapping.bytes_mut()[17] = 0xaa;
    let mut byte = [0];
    file.read_exact_at(&mut byte, 17)?;
    ensure!(byte == [0xaa], "Mapping and file have parted");
    ensure!(
        file.set_len(0).is_err(),
        "The seal against shrinking is lost"
    );
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS)?;
    ensure!(
        seals == (SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW).bits(),
        "Seals are {seals:#x}"
    );
    check_pattern("memfd that is only mapped", 3, only_mapped.bytes())
}
