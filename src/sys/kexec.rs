//! Loading and starting the next kernel: kexec_file_load(2), reboot(2).

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::reboot::{RebootMode, reboot};
use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

/// linux/kexec.h.
const KEXEC_FILE_UNLOAD: libc::c_ulong = 1;
const KEXEC_FILE_NO_INITRAMFS: libc::c_ulong = 4;

/// Makes the running kernel hold another one, ready to start.
///
/// # Errors
/// `EPERM`: no `CAP_SYS_BOOT`, or kexec disabled; `ENOEXEC`: not a kernel image;
/// `EKEYREJECTED`: lockdown wants a signature; `EADDRNOTAVAIL`, `ENOMEM`: no room.
pub fn load(
    kernel: BorrowedFd<'_>,
    initrd: Option<BorrowedFd<'_>>,
    command_line: &CStr,
) -> Result<(), Errno> {
    let flags = if initrd.is_some() {
        0
    } else {
        KEXEC_FILE_NO_INITRAMFS
    };
    // SAFETY: the string of the given length, NUL included, lives until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.map_or(-1, |fd| fd.as_raw_fd()),
            command_line.to_bytes_with_nul().len(),
            command_line.as_ptr(),
            flags,
        )
    };
    Errno::result(result).map(drop)
}

/// Lets go of a loaded kernel.
///
/// # Errors
/// `EPERM`, `EBUSY`.
pub fn unload() -> Result<(), Errno> {
    // SAFETY: no pointer is read with this flag.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            -1,
            -1,
            0,
            std::ptr::null::<libc::c_char>(),
            KEXEC_FILE_UNLOAD,
        )
    };
    Errno::result(result).map(drop)
}

/// Starts the loaded kernel. Nothing is unmounted or synchronised; it returns only on failure.
#[must_use]
pub fn start() -> Errno {
    let Err(errno) = reboot(RebootMode::RB_KEXEC);
    errno
}

/// Keeps this process' memory resident, so that it needs no disk from now on.
///
/// # Errors
/// `ENOMEM`: more than the machine has or `RLIMIT_MEMLOCK` allows.
pub fn lock_memory() -> Result<(), Errno> {
    mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE)
}
