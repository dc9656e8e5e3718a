//! Where the guest image, its kernels and initrds lie on the host.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// A kernel that the tests run on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// Debian 12's own, 6.1.
    V6_1,
    /// The newer one that Debian 12 offers, 6.12.
    V6_12,
}

impl Kernel {
    /// All of them, oldest first.
    pub const ALL: [Kernel; 2] = [Kernel::V6_1, Kernel::V6_12];

    /// Major and minor version, as in test names.
    pub fn version(self) -> &'static str {
        match self {
            Kernel::V6_1 => "6.1",
            Kernel::V6_12 => "6.12",
        }
    }

    /// The Debian package that brings it.
    pub fn package(self) -> &'static str {
        match self {
            Kernel::V6_1 => "linux-image-cloud-amd64",
            Kernel::V6_12 => "linux-image-6.12-cloud-amd64",
        }
    }

    /// The kernel's release, as `uname -r` in the guest.
    ///
    /// # Errors
    /// If the image has not been built.
    pub fn release(self) -> Result<String> {
        let prefix = format!("{}.", self.version());
        let image = Image::locate()?;
        for entry in std::fs::read_dir(image.boot())
            .context("The guest image is missing: run `cargo xtask setup`")?
        {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some(release) = name.strip_prefix("vmlinuz-")
                && release.starts_with(&prefix)
            {
                return Ok(release.to_owned());
            }
        }
        bail!(
            "The guest image has no kernel {}: run `cargo xtask setup`",
            self.version()
        )
    }

    /// Path of the kernel in the guest.
    ///
    /// # Errors
    /// If the image has not been built.
    pub fn guest_vmlinuz(self) -> Result<String> {
        Ok(format!("/boot/vmlinuz-{}", self.release()?))
    }

    /// Path of the initrd in the guest.
    ///
    /// # Errors
    /// If the image has not been built.
    pub fn guest_initrd(self) -> Result<String> {
        Ok(format!("/boot/initrd.img-{}", self.release()?))
    }
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.version())
    }
}

impl FromStr for Kernel {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        Kernel::ALL
            .into_iter()
            .find(|kernel| kernel.version() == text)
            .with_context(|| format!("No kernel {text}; there are 6.1 and 6.12"))
    }
}

/// The guest image on the host: `root.img` and a copy of its `/boot`.
#[derive(Debug, Clone)]
pub struct Image {
    dir: PathBuf,
}

impl Image {
    /// The image's place, whether it exists or not.
    ///
    /// # Errors
    /// If there is no home directory.
    pub fn locate() -> Result<Image> {
        Ok(Image {
            dir: cache_dir()?.join("image"),
        })
    }

    /// The directory of all of it; replaced as a whole by a rebuild.
    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }

    /// The root filesystem, ext4 in a sparse file.
    pub fn root(&self) -> PathBuf {
        self.dir.join("root.img")
    }

    /// Copy of the guest's `/boot`.
    pub fn boot(&self) -> PathBuf {
        self.dir.join("boot")
    }

    /// The kernel to boot first.
    ///
    /// # Errors
    /// If the image has not been built.
    pub fn vmlinuz(&self, kernel: Kernel) -> Result<PathBuf> {
        Ok(self.boot().join(format!("vmlinuz-{}", kernel.release()?)))
    }

    /// Its initrd.
    ///
    /// # Errors
    /// If the image has not been built.
    pub fn initrd(&self, kernel: Kernel) -> Result<PathBuf> {
        Ok(self
            .boot()
            .join(format!("initrd.img-{}", kernel.release()?)))
    }
}

/// `$TRACKER_CACHE`, else `$XDG_CACHE_HOME/tracker`, else `~/.cache/tracker`.
///
/// # Errors
/// If none of these variables and no `HOME` is set.
pub fn cache_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("TRACKER_CACHE") {
        return Ok(dir.into());
    }
    if let Some(dir) = std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
        return Ok(PathBuf::from(dir).join("tracker"));
    }
    let home =
        std::env::var_os("HOME").context("HOME is not set; set TRACKER_CACHE to a directory")?;
    Ok(PathBuf::from(home).join(".cache/tracker"))
}
