//! A bare kexec, nothing saved: shows that disk, network forwarding and
//! control channel outlive a kernel, whatever `tracker update` does.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use nix::sys::reboot::{RebootMode, reboot};

/// Boots `kernel` with `initrd` and the command line `append`.
///
/// # Errors
/// If the kernel refuses the files; on success it does not return.
pub fn run(arguments: &[String]) -> Result<()> {
    let [kernel, initrd, append] = arguments else {
        bail!("Usage: guestd kexec KERNEL INITRD COMMAND-LINE");
    };
    let open = |path: &String| File::open(path).with_context(|| format!("Open {path}"));
    let (kernel, initrd) = (open(kernel)?, open(initrd)?);
    let append = CString::new(append.as_str())?;
    let length = append.as_bytes_with_nul().len();
    // SAFETY: kexec_file_load(2) reads `length` bytes of the string, which
    // live until it returns, and two open descriptors.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kexec_file_load,
            kernel.as_raw_fd(),
            initrd.as_raw_fd(),
            length,
            append.as_ptr(),
            0,
        )
    };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context("kexec_file_load");
    }
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_KEXEC);
    Err(error).context("reboot(RB_KEXEC)")
}
