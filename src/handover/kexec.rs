//! The next kernel, loaded and waiting.

use crate::sys::kexec as sys;
use nix::errno::Errno;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

/// Why the next kernel could not be loaded or started.
#[derive(Debug, thiserror::Error)]
pub enum KexecError {
    /// A file cannot be read.
    #[error("open {path}: {source}; name a readable kernel image and its initrd")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The command line has a NUL byte.
    #[error("The kernel command line contains a NUL byte; check --append")]
    Nul,
    /// The kernel refuses the image.
    #[error(
        "kexec_file_load {kernel}: {errno}; is it a kernel for this machine, is kexec allowed \
         (sysctl kernel.kexec_load_disabled, lockdown, CAP_SYS_BOOT), is there memory?"
    )]
    Load {
        /// The image.
        kernel: PathBuf,
        /// What the kernel answered.
        errno: Errno,
    },
    /// reboot(2) returned.
    #[error("reboot(KEXEC): {0}; the running kernel goes on")]
    Start(Errno),
}

/// A loaded kernel. Dropping it without starting it lets go of it.
#[derive(Debug)]
pub struct Loaded(());

/// Loads a kernel with its initrd and command line.
///
/// # Errors
/// [`KexecError`].
pub fn load(
    kernel: &Path,
    initrd: Option<&Path>,
    command_line: &str,
) -> Result<Loaded, KexecError> {
    let open = |path: &Path| {
        File::open(path).map_err(|source| KexecError::Open {
            path: path.to_owned(),
            source,
        })
    };
    let image = open(kernel)?;
    let initrd = initrd.map(open).transpose()?;
    let command_line = CString::new(command_line).map_err(|_| KexecError::Nul)?;
    let initrd = initrd.as_ref().map(AsFd::as_fd);
    sys::load(image.as_fd(), initrd, &command_line).map_err(|errno| KexecError::Load {
        kernel: kernel.to_owned(),
        errno,
    })?;
    Ok(Loaded(()))
}

impl Loaded {
    /// Starts it; returns only if that fails.
    #[must_use]
    pub fn start(&self) -> KexecError {
        KexecError::Start(sys::start())
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        if let Err(errno) = sys::unload() {
            tracing::warn!("The loaded kernel could not be unloaded: {errno}");
        }
    }
}
