//! Which pages of another process exist and changed (proc(5), Documentation/admin-guide/mm/pagemap.rst),
//! and reading many of them at once.

use super::process::CallError;
use crate::model::frozen::PAGE_SIZE;
use crate::model::ids::Pid;
use nix::errno::Errno;
use nix::libc;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// One entry of `/proc/PID/pagemap`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry(pub u64);

impl Entry {
    const SOFT_DIRTY: u64 = 1 << 55;
    const FILE: u64 = 1 << 61;
    const SWAPPED: u64 = 1 << 62;
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;

    /// Whether it holds bytes that no file has: present or swapped out, and neither page
    /// cache nor shared memory. This also finds copies made in mappings that are read-only now.
    #[must_use]
    pub fn is_private(self) -> bool {
        self.0 & (Self::PRESENT | Self::SWAPPED) != 0 && self.0 & Self::FILE == 0
    }

    /// Whether it was written, or its mapping made, since the last [`clear_soft_dirty`].
    #[must_use]
    pub fn is_soft_dirty(self) -> bool {
        self.0 & Self::SOFT_DIRTY != 0
    }

    /// Page frame number; 0 when not present or the caller lacks `CAP_SYS_ADMIN`.
    #[must_use]
    pub fn frame(self) -> u64 {
        if self.0 & Self::PRESENT == 0 {
            return 0;
        }
        self.0 & Self::FRAME
    }
}

fn failed(call: &'static str, pid: Pid) -> impl FnOnce(io::Error) -> CallError {
    move |e| CallError {
        call,
        task: pid.0,
        errno: Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO)),
    }
}

/// Adjacent pages of another process that hold bytes no file has, all alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PrivatePages {
    /// First address.
    pub addr: u64,
    /// How many.
    pub pages: u64,
    /// As [`Entry::is_soft_dirty`].
    pub soft_dirty: bool,
    /// They are the page of zeroes.
    pub zero: bool,
}

/// `struct pm_scan_arg` and `struct page_region` of include/uapi/linux/fs.h, since Linux 6.7.
mod scan {
    /// Page cache or shared memory.
    pub const FILE: u64 = 1 << 2;
    pub const PRESENT: u64 = 1 << 3;
    pub const SWAPPED: u64 = 1 << 4;
    pub const ZERO: u64 = 1 << 5;
    /// Since Linux 6.8.
    pub const SOFT_DIRTY: u64 = 1 << 7;

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    pub struct Region {
        pub start: u64,
        pub end: u64,
        pub categories: u64,
    }

    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    pub struct Arguments {
        pub size: u64,
        pub flags: u64,
        pub start: u64,
        pub end: u64,
        pub walk_end: u64,
        pub vec: u64,
        pub vec_len: u64,
        pub max_pages: u64,
        pub category_inverted: u64,
        pub category_mask: u64,
        pub category_anyof_mask: u64,
        pub return_mask: u64,
    }

    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, Arguments);
}

/// `/proc/PID/pagemap`, open.
pub struct Pagemap {
    pid: Pid,
    file: File,
    buffer: Vec<u8>,
    regions: Vec<scan::Region>,
    /// Whether the kernel summarizes (`PAGEMAP_SCAN`), as far as is known.
    scans: bool,
}

impl std::fmt::Debug for Pagemap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pagemap")
            .field("pid", &self.pid)
            .finish_non_exhaustive()
    }
}

impl Pagemap {
    /// Entries read at once: 128 MiB of address space.
    const CHUNK: u64 = 32 * 1024;

    /// Regions one scan returns at most.
    const REGIONS: usize = 1024;

    /// Opens that of a process.
    ///
    /// # Errors
    /// It is gone, or may not be traced.
    pub fn open(pid: Pid) -> Result<Self, CallError> {
        let file = File::open(format!("/proc/{pid}/pagemap"))
            .map_err(failed("open(/proc/PID/pagemap)", pid))?;
        Ok(Self {
            pid,
            file,
            buffer: Vec::new(),
            regions: Vec::new(),
            scans: true,
        })
    }

    /// Calls `each` with the private pages in `start..end`, which must be mapped, in address order.
    /// The kernel tells them by ranges since Linux 6.8, else page by page; `zero_frame` is what the
    /// latter knows the page of zeroes by. Where there is no file (`anonymous`), all pages are
    /// private, and it takes the kernel half the time.
    ///
    /// # Errors
    /// ioctl(2) or read(2) fails.
    pub fn private_pages(
        &mut self,
        start: u64,
        end: u64,
        anonymous: bool,
        zero_frame: Option<u64>,
        mut each: impl FnMut(PrivatePages),
    ) -> Result<(), CallError> {
        if self.scans {
            match self.scan(start, end, anonymous, &mut each) {
                // Asked before anything was found.
                Err(Errno::ENOTTY | Errno::EINVAL) => self.scans = false,
                result => {
                    return result.map_err(|errno| CallError {
                        call: "ioctl(PAGEMAP_SCAN)",
                        task: self.pid.0,
                        errno,
                    });
                }
            }
        }
        self.walk(start, end, |addr, entry| {
            if entry.is_private() {
                each(PrivatePages {
                    addr,
                    pages: 1,
                    soft_dirty: entry.is_soft_dirty(),
                    zero: zero_frame.is_some_and(|zero| entry.frame() == zero),
                });
            }
        })
    }

    fn scan(
        &mut self,
        start: u64,
        end: u64,
        anonymous: bool,
        each: &mut impl FnMut(PrivatePages),
    ) -> Result<(), Errno> {
        use scan::{Arguments, FILE, PRESENT, SOFT_DIRTY, SWAPPED, ZERO};
        let question = match anonymous {
            // What is not told is there and was not written: as a rule nearly everything.
            true => Arguments {
                category_inverted: PRESENT,
                category_anyof_mask: PRESENT | SOFT_DIRTY | ZERO,
                ..Arguments::default()
            },
            false => Arguments {
                category_inverted: FILE,
                category_mask: FILE,
                category_anyof_mask: PRESENT | SWAPPED,
                ..Arguments::default()
            },
        };
        let mut tell = |start: u64, end: u64, categories: u64| {
            if start < end && categories & (PRESENT | SWAPPED) != 0 {
                each(PrivatePages {
                    addr: start,
                    pages: (end - start) / PAGE_SIZE,
                    soft_dirty: categories & SOFT_DIRTY != 0,
                    zero: categories & ZERO != 0,
                });
            }
        };
        let untold = if anonymous { PRESENT } else { 0 };
        self.regions.resize(Self::REGIONS, scan::Region::default());
        let mut at = start;
        while at < end {
            // No more than it can need: the kernel makes as much room of its own, and clears it.
            let regions = self.regions.len() as u64;
            let mut arguments = Arguments {
                size: size_of::<Arguments>() as u64,
                start: at,
                end,
                vec: self.regions.as_mut_ptr() as u64,
                vec_len: regions.min((end - at).div_ceil(PAGE_SIZE)),
                return_mask: PRESENT | SWAPPED | ZERO | SOFT_DIRTY,
                ..question
            };
            // SAFETY: the kernel reads and writes the arguments, whose size they name, and at
            // most vec_len regions at vec, which both live until it returns.
            let found = unsafe { scan::pagemap_scan(self.file.as_raw_fd(), &raw mut arguments) }?;
            let begun = at;
            let found = usize::try_from(found).unwrap_or(0);
            for region in self.regions.iter().take(found) {
                tell(at, region.start, untold);
                tell(region.start, region.end, region.categories);
                at = region.end;
            }
            // It may name an earlier place where it has only emptied a buffer of its own.
            tell(at, arguments.walk_end, untold);
            at = at.max(arguments.walk_end);
            if at == begun {
                break;
            }
        }
        Ok(())
    }

    /// Calls `each` with address and entry of every page in `start..end`.
    fn walk(
        &mut self,
        start: u64,
        end: u64,
        mut each: impl FnMut(u64, Entry),
    ) -> Result<(), CallError> {
        let mut page = start / PAGE_SIZE;
        let last = end / PAGE_SIZE;
        while page < last {
            let count = Self::CHUNK.min(last - page);
            self.buffer
                .resize(usize::try_from(count * 8).unwrap_or(0), 0);
            self.file
                .read_exact_at(&mut self.buffer, page * 8)
                .map_err(failed("pread(/proc/PID/pagemap)", self.pid))?;
            for (at, bytes) in self.buffer.chunks_exact(8).enumerate() {
                let entry = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
                if entry != 0 {
                    each((page + at as u64) * PAGE_SIZE, Entry(entry));
                }
            }
            page += count;
        }
        Ok(())
    }
}

/// Starts a new round of soft-dirty tracking for one process: no page is dirty any more.
///
/// # Errors
/// It is gone. A kernel built without the feature accepts it and tracks nothing:
/// [`soft_dirty_works`] tells.
pub fn clear_soft_dirty(pid: Pid) -> Result<(), CallError> {
    fs::write(format!("/proc/{pid}/clear_refs"), "4")
        .map_err(failed("write(/proc/PID/clear_refs)", pid))
}

/// A private anonymous page of our own.
struct Probe(*mut u8);

impl Probe {
    fn map() -> Option<Self> {
        // SAFETY: a new anonymous mapping at an address the kernel chooses.
        let addr = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        (addr != libc::MAP_FAILED).then_some(Self(addr.cast()))
    }

    fn read(&self) -> u8 {
        // SAFETY: the page is mapped readable for the life of self.
        unsafe { self.0.read_volatile() }
    }

    fn write(&self, value: u8) {
        // SAFETY: the page is mapped writable for the life of self.
        unsafe { self.0.write_volatile(value) }
    }

    fn entry(&self) -> Option<Entry> {
        let this = Pid(std::process::id().cast_signed());
        let start = self.0 as u64;
        let mut found = None;
        let mut pagemap = Pagemap::open(this).ok()?;
        pagemap
            .walk(start, start + PAGE_SIZE, |_, entry| found = Some(entry))
            .ok()?;
        found
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // SAFETY: our own mapping, to which no reference is left.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// Whether the kernel really tracks soft-dirty pages, found out on a page of our own.
#[must_use]
pub fn soft_dirty_works() -> bool {
    let this = Pid(std::process::id().cast_signed());
    let Some(page) = Probe::map() else {
        return false;
    };
    page.write(1);
    let dirty = || page.entry().is_some_and(Entry::is_soft_dirty);
    if clear_soft_dirty(this).is_err() || dirty() {
        return false;
    }
    page.write(2);
    dirty()
}

/// Frame number of the page of zeroes that backs anonymous memory which was only read;
/// `None` when frame numbers are hidden.
#[must_use]
pub fn zero_frame() -> Option<u64> {
    let page = Probe::map()?;
    let _ = page.read();
    page.entry().map(Entry::frame).filter(|frame| *frame != 0)
}

/// Reads several ranges (address, bytes) of another process one after the other into `buffer`
/// (process_vm_readv(2)); at most `IOV_MAX`, 1,024, ranges. Returns the bytes read: fewer than
/// asked for when a page in the middle cannot be read.
///
/// # Errors
/// `EFAULT`: not even the first page; `ESRCH`, `EPERM`.
pub fn read_ranges(
    pid: Pid,
    ranges: &[(u64, usize)],
    buffer: &mut [u8],
) -> Result<usize, CallError> {
    use nix::sys::uio::{RemoteIoVec, process_vm_readv};
    let remote: Vec<RemoteIoVec> = ranges
        .iter()
        .map(|&(addr, len)| RemoteIoVec {
            base: usize::try_from(addr).unwrap_or(usize::MAX),
            len,
        })
        .collect();
    let mut local = [io::IoSliceMut::new(buffer)];
    process_vm_readv(nix::unistd::Pid::from_raw(pid.0), &mut local, &remote).map_err(|errno| {
        CallError {
            call: "process_vm_readv",
            task: pid.0,
            errno,
        }
    })
}

/// The words at these addresses of another process.
///
/// # Errors
/// `EFAULT`: one of them cannot be read; `ESRCH`, `EPERM`.
pub fn read_words(pid: Pid, places: &[u64]) -> Result<Vec<u64>, CallError> {
    const IOV_MAX: usize = 1024;
    const WORD: usize = size_of::<u64>();
    let mut words = Vec::with_capacity(places.len());
    for some in places.chunks(IOV_MAX) {
        let ranges: Vec<_> = some.iter().map(|&addr| (addr, WORD)).collect();
        let mut bytes = vec![0; some.len() * WORD];
        if read_ranges(pid, &ranges, &mut bytes)? != bytes.len() {
            return Err(CallError {
                call: "process_vm_readv",
                task: pid.0,
                errno: Errno::EFAULT,
            });
        }
        let (read, _) = bytes.as_chunks::<WORD>();
        words.extend(read.iter().map(|word| u64::from_ne_bytes(*word)));
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
    use std::num::NonZero;

    #[test]
    fn a_written_page_is_private_and_a_read_one_is_the_zero_page() {
        let page = Probe::map().unwrap();
        let _ = page.read();
        if let Some(zero) = zero_frame() {
            assert_eq!(page.entry().unwrap().frame(), zero);
        }
        page.write(7);
        let entry = page.entry().unwrap();
        assert!(entry.is_private());
        assert_ne!(Some(entry.frame()), zero_frame());
    }

    /// What the kernel summarizes is what its entries say: of memory with pages written, read and
    /// not touched, in more pieces than it tells of at once.
    #[test]
    fn a_scan_says_the_same() {
        const PAGES: usize = 5000;
        let len = NonZero::new(PAGES * 4096).unwrap();
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address the kernel chooses.
        let memory = unsafe { mmap_anonymous(None, len, prot, MapFlags::MAP_PRIVATE) }.unwrap();
        let start = memory.as_ptr() as u64;
        for page in 0..PAGES {
            let byte = memory.as_ptr().cast::<u8>().wrapping_add(page * 4096);
            // Pieces of all sizes, and one that is long.
            match (page % 7, page % 1000 < 600) {
                (_, false) | (0..=2 | 5, _) => {
                    // SAFETY: a byte of the mapping.
                    unsafe { byte.write_volatile(1) }
                }
                (3, _) => {
                    // SAFETY: as above.
                    let _ = unsafe { byte.read_volatile() };
                }
                _ => {}
            }
        }
        let this = Pid(std::process::id().cast_signed());
        let pages = |scans, anonymous| {
            let mut pagemap = Pagemap::open(this).unwrap();
            pagemap.scans = scans;
            let mut found = Vec::new();
            let end = start + PAGES as u64 * PAGE_SIZE;
            pagemap
                .private_pages(start, end, anonymous, zero_frame(), |range| {
                    for page in 0..range.pages {
                        let addr = range.addr + page * PAGE_SIZE;
                        found.push((addr, range.soft_dirty, range.zero));
                    }
                })
                .unwrap();
            found
        };
        let walked = pages(false, true);
        assert!(walked.len() >= 4000);
        assert!(walked.is_sorted());
        for anonymous in [false, true] {
            assert!(pages(true, anonymous) == walked, "anonymous: {anonymous}");
        }
        // SAFETY: our own mapping, to which no reference is left.
        unsafe { munmap(memory, len.get()) }.unwrap();
    }

    #[test]
    fn ranges_are_read_in_order() {
        let (a, b) = (*b"first", *b"second");
        let ranges = [(a.as_ptr() as u64, 5), (b.as_ptr() as u64, 6)];
        let mut buffer = [0; 11];
        let this = Pid(std::process::id().cast_signed());
        assert_eq!(read_ranges(this, &ranges, &mut buffer).unwrap(), 11);
        assert_eq!(&buffer, b"firstsecond");
    }

    #[test]
    fn a_hole_cuts_the_read_short() {
        let a = *b"first";
        let ranges = [(a.as_ptr() as u64, 5), (4096, 6)];
        let mut buffer = [0; 11];
        let this = Pid(std::process::id().cast_signed());
        assert_eq!(read_ranges(this, &ranges, &mut buffer).unwrap(), 5);
    }
}
