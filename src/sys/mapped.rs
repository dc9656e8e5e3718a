//! A file that can be written only where it is mapped, as those of hugetlbfs.

use nix::errno::Errno;
use nix::libc;
use std::os::fd::{AsRawFd, BorrowedFd};

/// A shared mapping of a file from its beginning, without a reservation: what is written to must
/// be allocated (fallocate(2)), or the process ends by `SIGBUS`.
#[derive(Debug)]
pub struct MappedFile {
    memory: *mut u8,
    len: usize,
}

impl MappedFile {
    /// Maps `len` bytes.
    ///
    /// # Errors
    /// As mmap(2): `EINVAL` if `len` is 0 or no multiple of the file's page size.
    pub fn new(fd: BorrowedFd<'_>, len: usize) -> Result<Self, Errno> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_NORESERVE,
                fd.as_raw_fd(),
                0,
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
        assert_eq!(MappedFile::new(file.as_fd(), 0).unwrap_err(), Errno::EINVAL);
    }
}
