//! A file that can be read or written only where it is mapped, as those of hugetlbfs and of
//! io_uring.

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicU32, Ordering};

/// A shared mapping of a file, without a reservation: what is written to must be allocated
/// (fallocate(2)), or the process ends by `SIGBUS`.
#[derive(Debug)]
pub struct MappedFile {
    memory: *mut u8,
    len: usize,
}

impl MappedFile {
    /// Maps `len` bytes from the beginning.
    ///
    /// # Errors
    /// As mmap(2): `EINVAL` if `len` is 0 or no multiple of the file's page size.
    pub fn new(fd: BorrowedFd<'_>, len: usize) -> Result<Self, Errno> {
        Self::at(fd, 0, len)
    }

    /// Maps `len` bytes from an offset.
    ///
    /// # Errors
    /// As [`MappedFile::new`].
    pub fn at(fd: BorrowedFd<'_>, offset: i64, len: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                offset,
            )
        };
        if memory == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self {
            memory: memory.cast(),
            len,
        })
    }

    /// Copies bytes in; those that do not fit are left out.
    pub fn write(&mut self, offset: usize, bytes: &[u8]) {
        let len = bytes.len().min(self.len.saturating_sub(offset));
        if len > 0 {
            // SAFETY: inside of the `len` bytes that are mapped; no reference to them exists.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.add(offset), len) };
        }
    }

    /// Copies all bytes out, whatever others write meanwhile.
    #[must_use]
    pub fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.len];
        // SAFETY: `len` bytes are mapped and as many are there; no reference to the former exists.
        unsafe { std::ptr::copy_nonoverlapping(self.memory, bytes.as_mut_ptr(), self.len) };
        bytes
    }

    /// A word that others may write at any time; `None` if it is not within, or not aligned.
    #[must_use]
    pub fn word(&self, offset: u32) -> Option<&AtomicU32> {
        let offset = offset as usize;
        let fits = offset.is_multiple_of(4) && offset + 4 <= self.len;
        // SAFETY: inside of what is mapped for as long as `self` lives, and aligned as that is;
        // others change it atomically if at all.
        fits.then(|| unsafe { AtomicU32::from_ptr(self.memory.add(offset).cast()) })
    }

    /// The value of a word, with all that was written before it; 0 if there is none.
    #[must_use]
    pub fn load(&self, offset: u32) -> u32 {
        self.word(offset)
            .map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// Sets a word, if there is one, after all that was written before.
    pub fn store(&self, offset: u32, value: u32) {
        if let Some(word) = self.word(offset) {
            word.store(value, Ordering::Release);
        }
    }
}

impl Drop for MappedFile {
    fn drop(&mut self) {
        // SAFETY: mapped by us; nothing borrowed from it is left.
        unsafe { libc::munmap(self.memory.cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::os::fd::AsFd;

    #[test]
    fn the_file_has_what_was_written() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let mut mapped = MappedFile::new(file.as_fd(), 8192).unwrap();
        mapped.write(4095, b"ab");
        mapped.write(8191, b"cd");
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!((&bytes[4095..4097], bytes[8191]), (&b"ab"[..], b'c'));
        assert_eq!(mapped.read(), bytes);
        mapped.store(8, 77);
        assert_eq!((mapped.load(8), mapped.read()[8]), (77, 77));
        assert!(mapped.word(8190).is_none() && mapped.word(8192).is_none());
        let second = MappedFile::at(file.as_fd(), 4096, 4096).unwrap();
        assert_eq!(second.read()[0], b'b');
        assert_eq!(MappedFile::new(file.as_fd(), 0).unwrap_err(), Errno::EINVAL);
    }
}
