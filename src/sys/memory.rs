//! Which pages of another process exist and changed (proc(5), Documentation/admin-guide/mm/pagemap.rst),
//! and reading many of them at once.

use super::process::CallError;
use crate::model::frozen::PAGE_SIZE;
use crate::model::ids::Pid;
use nix::errno::Errno;
use nix::libc;
use std::fs::{self, File};
use std::io;
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

/// `/proc/PID/pagemap`, open.
#[derive(Debug)]
pub struct Pagemap {
    pid: Pid,
    file: File,
    buffer: Vec<u8>,
}

impl Pagemap {
    /// Entries read at once: 128 MiB of address space.
    const CHUNK: u64 = 32 * 1024;

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
        })
    }

    /// Calls `each` with address and entry of every page in `start..end`.
    ///
    /// # Errors
    /// read(2) fails.
    pub fn walk(
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

/// Most ranges one call takes (`IOV_MAX`).
pub const MAX_RANGES: usize = 1024;

/// Reads several ranges (address, bytes) of another process one after the other into `buffer`
/// (process_vm_readv(2)). Returns the bytes read: fewer than asked for when a page in the
/// middle cannot be read.
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

#[cfg(test)]
mod tests {
    use super::*;

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
