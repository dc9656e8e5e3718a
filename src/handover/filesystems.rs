//! Nothing on disk is lost: kexec does not unmount, so filesystems are flushed and frozen.

use crate::sys::filesystem;
use nix::errno::Errno;
use procfs::process::{MountInfo, Process};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

/// Why the filesystems could not be brought to rest.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {source}; is the device healthy?")]
pub struct FilesystemError {
    operation: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// The writable filesystems on block devices, each once, those mounted last first: one
/// within an image file is frozen before the filesystem that holds the file.
#[derive(Debug)]
pub struct Filesystems {
    open: Vec<(PathBuf, File)>,
}

impl Filesystems {
    /// Finds and opens them.
    ///
    /// # Errors
    /// A mount point cannot be opened.
    pub fn find() -> Result<Self, FilesystemError> {
        let at = |operation, path: PathBuf| {
            move |source| FilesystemError {
                operation,
                path,
                source,
            }
        };
        let mounts = Process::myself()
            .and_then(|process| process.mountinfo())
            .map_err(io::Error::other)
            .map_err(at("read", "/proc/self/mountinfo".into()))?;
        let mut open = Vec::new();
        for path in writable(&mounts.0) {
            let file = File::open(&path).map_err(at("open", path.clone()))?;
            open.push((path, file));
        }
        Ok(Self { open })
    }

    /// Writes everything to the devices. To be called before the freeze too, so that
    /// little is left to do within it.
    ///
    /// # Errors
    /// syncfs(2) fails: data is lost already.
    pub fn flush(&self) -> Result<(), FilesystemError> {
        for (path, file) in &self.open {
            nix::unistd::syncfs(file).map_err(|errno| FilesystemError {
                operation: "syncfs",
                path: path.clone(),
                source: errno.into(),
            })?;
        }
        Ok(())
    }

    /// Flushes and freezes them. Until the guard is dropped, who writes to one of them
    /// sleeps, this process included.
    ///
    /// # Errors
    /// A filesystem cannot be flushed; those frozen so far are thawed.
    pub fn freeze(&self) -> Result<Frozen<'_>, FilesystemError> {
        let mut frozen = Frozen { open: Vec::new() };
        for (path, file) in &self.open {
            let at = |operation| {
                move |errno: Errno| FilesystemError {
                    operation,
                    path: path.clone(),
                    source: errno.into(),
                }
            };
            match filesystem::freeze(file.as_fd()) {
                Ok(()) => frozen.open.push(file),
                // Some cannot be frozen (vfat), or somebody else has frozen it.
                Err(Errno::EOPNOTSUPP | Errno::EBUSY) => {
                    nix::unistd::syncfs(file).map_err(at("syncfs"))?;
                }
                Err(errno) => return Err(at("FIFREEZE")(errno)),
            }
        }
        Ok(frozen)
    }
}

/// Devices (major << 20 | minor) of mounted filesystems whose files live in memory alone and are
/// gone with the kernel.
///
/// # Errors
/// /proc/self/mountinfo cannot be read.
pub fn volatile() -> Result<BTreeSet<u32>, FilesystemError> {
    let mounts = Process::myself().and_then(|this| this.mountinfo());
    let mounts = mounts.map_err(|error| FilesystemError {
        operation: "read",
        path: "/proc/self/mountinfo".into(),
        source: io::Error::other(error),
    })?;
    Ok(in_memory(&mounts.0))
}

fn in_memory(mounts: &[MountInfo]) -> BTreeSet<u32> {
    let kinds = ["tmpfs", "ramfs", "hugetlbfs"];
    let those = mounts
        .iter()
        .filter(|mount| kinds.contains(&mount.fs_type.as_str()));
    those
        .filter_map(|mount| {
            let (major, minor) = mount.majmin.split_once(':')?;
            Some(major.parse::<u32>().ok()? << 20 | minor.parse::<u32>().ok()?)
        })
        .collect()
}

/// Mount points of the writable filesystems on block devices.
fn writable(mounts: &[MountInfo]) -> Vec<PathBuf> {
    let mut seen = BTreeSet::new();
    let mut paths = Vec::new();
    for mount in mounts.iter().rev() {
        let on_device = mount
            .mount_source
            .as_ref()
            .is_some_and(|source| source.starts_with("/dev/"));
        let writable = mount.super_options.contains_key("rw");
        if on_device && writable && mount.fs_type != "devtmpfs" && seen.insert(&mount.majmin) {
            paths.push(mount.mount_point.clone());
        }
    }
    paths
}

/// Frozen filesystems; dropping this thaws them.
#[derive(Debug)]
pub struct Frozen<'a> {
    open: Vec<&'a File>,
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        for file in self.open.iter().rev() {
            // It fails only if somebody else has thawed it, which is as well.
            let _ = filesystem::thaw(file.as_fd());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filesystems_in_memory_are_found() {
        let lines = [
            "21 1 254:1 / / rw - ext4 /dev/vda1 rw",
            "23 21 0:21 / /run rw - tmpfs tmpfs rw",
            "24 21 0:6 / /dev rw - devtmpfs udev rw",
        ];
        let mounts: Vec<_> = lines
            .iter()
            .map(|line| MountInfo::from_line(line).unwrap())
            .collect();
        assert_eq!(in_memory(&mounts), BTreeSet::from([21]));
    }

    #[test]
    fn writable_block_filesystems_are_found_once_and_last_first() {
        let lines = [
            "21 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw",
            "22 21 0:20 / /proc rw shared:2 - proc proc rw",
            "23 21 0:21 / /run rw - tmpfs tmpfs rw",
            "24 21 254:2 / /boot ro - ext4 /dev/vda2 ro",
            "25 21 7:0 / /srv rw - ext4 /dev/loop0 rw",
            "26 21 254:1 /var /mnt ro - ext4 /dev/vda1 rw",
        ];
        let mounts: Vec<_> = lines
            .iter()
            .map(|line| MountInfo::from_line(line).unwrap())
            .collect();
        assert_eq!(
            writable(&mounts),
            [PathBuf::from("/mnt"), PathBuf::from("/srv")]
        );
    }
}
