//! Mounts and the namespaces they are in: what the libraries have no calls for, or misread.

use nix::errno::Errno;
use nix::libc;
use procfs::process::MountInfo;
use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

/// `MOUNT_ATTR_*` of include/uapi/linux/mount.h.
pub mod attr {
    #![allow(missing_docs)]
    pub const RDONLY: u64 = 0x1;
    pub const NOSUID: u64 = 0x2;
    pub const NODEV: u64 = 0x4;
    pub const NOEXEC: u64 = 0x8;
    /// The two below are values of this field, as relatime is with 0.
    pub const ATIME: u64 = 0x70;
    pub const NOATIME: u64 = 0x10;
    pub const STRICTATIME: u64 = 0x20;
    pub const NODIRATIME: u64 = 0x80;
    pub const NOSYMFOLLOW: u64 = 0x20_0000;
    /// All that mountinfo shows and mount_setattr(2) sets without further arguments.
    pub const ALL: u64 = RDONLY | NOSUID | NODEV | NOEXEC | ATIME | NODIRATIME | NOSYMFOLLOW;
}

/// Which mounts what is mounted there propagates to (`MS_*` of include/uapi/linux/mount.h).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u64)]
pub enum Propagation {
    /// None.
    Private = 1 << 18,
    /// None, and it cannot be bound elsewhere.
    Unbindable = 1 << 17,
    /// It gets what the peers it has get, which do not get what it gets.
    Slave = 1 << 19,
    /// A peer group of its own, unless it has one.
    Shared = 1 << 20,
}

/// `struct mount_attr`.
#[repr(C)]
#[derive(Default)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

fn set(mount: BorrowedFd<'_>, attributes: &MountAttr) -> Result<(), Errno> {
    let (path, size): (&CStr, _) = (c"", size_of::<MountAttr>());
    // SAFETY: the kernel reads the string and as many bytes of the structure as are told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            path.as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const *attributes,
            size,
        )
    };
    Errno::result(result).map(drop)
}

/// Gives the mount whose root `mount` is exactly these attributes ([`attr`]).
///
/// # Errors
/// `EPERM`: `CAP_SYS_ADMIN` is missing; `EINVAL`: not the root of a mount of this namespace or of
/// one that is not mounted yet.
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: u64) -> Result<(), Errno> {
    let attributes = MountAttr {
        set: attributes,
        clear: attr::ALL,
        ..MountAttr::default()
    };
    set(mount, &attributes)
}

/// Changes how mounts propagate from and to the mount whose root `mount` is.
///
/// # Errors
/// As [`set_attributes`].
pub fn set_propagation(mount: BorrowedFd<'_>, to: Propagation) -> Result<(), Errno> {
    let attributes = MountAttr {
        propagation: to as u64,
        ..MountAttr::default()
    };
    set(mount, &attributes)
}

/// Names the domain of the UTS namespace (setdomainname(2)).
///
/// # Errors
/// `EPERM`: `CAP_SYS_ADMIN` is missing; `EINVAL`: longer than 64 bytes.
pub fn set_domain_name(name: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads as many bytes as the slice has.
    Errno::result(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }).map(drop)
}

/// The id of the mount that a name leads through, following links.
#[must_use]
pub fn mount_id(path: &Path) -> Option<u64> {
    let found = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID);
    found.ok().map(|found| found.stx_mnt_id)
}

/// The mounts of a namespace by id, from a mountinfo of procfs (proc_pid_mountinfo(5)), with names
/// as they are.
///
/// # Errors
/// It cannot be read, or has something that is not understood.
pub fn mounts(mut file: File) -> io::Result<BTreeMap<u64, MountInfo>> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    text.lines().map(parse).collect()
}

fn parse(line: &str) -> io::Result<(u64, MountInfo)> {
    let mut mount = MountInfo::from_line(line).map_err(io::Error::other)?;
    mount.root = plain(&mount.root);
    mount.mount_point = PathBuf::from(plain(&mount.mount_point.to_string_lossy()));
    let id = u64::try_from(mount.mnt_id).map_err(io::Error::other)?;
    Ok((id, mount))
}

/// mountinfo writes blanks and the like as octal numbers (mangle_path()).
fn plain(text: &str) -> String {
    const ESCAPES: [(&str, &str); 5] = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\043", "#"),
        // The last: what it gives begins no other.
        ("\\134", "\\"),
    ];
    let replace = |text: String, (from, to): &(&str, &str)| text.replace(from, to);
    ESCAPES.iter().fold(text.to_owned(), replace)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_in_names_are_read() {
        let line = "36 35 98:0 /mnt\\0401 /mnt/a\\134040b rw,noatime master:1 - ext3 /dev/root rw";
        let (id, mount) = parse(line).unwrap();
        assert_eq!((id, mount.root.as_str()), (36, "/mnt 1"));
        assert_eq!(mount.mount_point, Path::new("/mnt/a\\040b"));
    }
}
