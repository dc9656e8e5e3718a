//! Memory shared with forked children at one fixed address, and the two ways a child and its
//! tracer meet there: a futex word and an `int3`.

use nix::errno::Errno;
use nix::libc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A shared, executable mapping. Children forked afterwards see the same bytes at the same
/// address, whatever else becomes of their address space.
#[derive(Debug)]
pub struct Area {
    addr: u64,
    len: usize,
}

impl Area {
    /// Maps `len` bytes at exactly `addr`.
    ///
    /// # Errors
    /// `EEXIST`: something is mapped there; `EACCES`: executable memory is forbidden by policy.
    pub fn map(addr: u64, len: usize) -> Result<Self, Errno> {
        let target = std::ptr::without_provenance_mut(usize::try_from(addr).unwrap_or(0));
        // SAFETY: a new mapping which cannot replace an existing one.
        let got = unsafe {
            libc::mmap(
                target,
                len,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if got == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        Ok(Self { addr, len })
    }

    /// Where it lies, here and in the children.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.addr
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no room at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn pointer(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset} lie outside of an area of {}",
            self.len
        );
        let base = usize::try_from(self.addr).unwrap_or(0);
        std::ptr::with_exposed_provenance_mut(base + offset)
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// They do not fit.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        let to = self.pointer(offset, bytes.len());
        // SAFETY: inside the mapping, which lives as long as `self`; no Rust reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// Copies bytes out.
    ///
    /// # Panics
    /// They lie outside.
    pub fn read(&self, offset: usize, bytes: &mut [u8]) {
        let from = self.pointer(offset, bytes.len());
        // SAFETY: inside the mapping, which lives as long as `self`; writers are stopped tracees.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        assert!(offset.is_multiple_of(4));
        let pointer = self.pointer(offset, 4).cast::<AtomicU32>();
        // SAFETY: aligned, inside the mapping, and only used as a futex word.
        unsafe { &*pointer }
    }

    /// Sleeps until the word at `offset` is not zero.
    ///
    /// # Panics
    /// It lies outside or is not aligned.
    pub fn wait(&self, offset: usize) {
        let word = self.word(offset);
        while word.load(Ordering::Acquire) == 0 {
            let null = std::ptr::null::<libc::timespec>();
            // SAFETY: the word outlives the call; no timeout. Spurious returns are looped over.
            unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAIT, 0, null) };
        }
    }

    /// Sets the word at `offset` and wakes who waits for it.
    ///
    /// # Panics
    /// It lies outside or is not aligned.
    pub fn wake(&self, offset: usize) {
        let word = self.word(offset);
        word.store(1, Ordering::Release);
        // SAFETY: the word outlives the call.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        let addr = self.pointer(0, 0);
        // SAFETY: our own mapping; nothing borrowed from it is left.
        unsafe { libc::munmap(addr.cast(), self.len) };
    }
}

/// Stops the calling thread under its tracer until that lets it go on; without a tracer
/// `SIGTRAP` ends the process.
pub fn meet_tracer() {
    // SAFETY: raises SIGTRAP and touches nothing.
    unsafe { std::arch::asm!("int3") };
}

/// Stops the calling thread under its tracer, which replaces what it executes; without a
/// tracer `SIGTRAP` ends the process. Never returns.
pub fn park() -> ! {
    loop {
        meet_tracer();
    }
}

/// Ends the process at once: no exit handlers, no buffers flushed.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: takes an integer and does not return.
    unsafe { libc::_exit(status) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_in_and_out() {
        let area = Area::map(0x2000_0000_0000, 8192).unwrap();
        area.write(5000, b"tape");
        let mut back = [0; 4];
        area.read(5000, &mut back);
        assert_eq!(&back, b"tape");
        assert_eq!(
            Area::map(area.addr(), 4096).unwrap_err(),
            Errno::EEXIST,
            "an area never replaces a mapping"
        );
    }

    #[test]
    #[should_panic(expected = "lie outside")]
    fn bytes_outside_are_refused() {
        Area::map(0x2100_0000_0000, 4096)
            .unwrap()
            .write(4090, &[0; 7]);
    }

    #[test]
    fn a_word_that_is_set_does_not_wait() {
        let area = Area::map(0x2200_0000_0000, 4096).unwrap();
        area.wake(64);
        area.wait(64);
    }
}
