//! Huge pages of hugetlbfs: memory of `MAP_HUGETLB` and memfds of `MFD_HUGETLB`. The kernel does
//! not tell which of them are written, so they are copied in the frozen window, all of them.

use super::error::CheckpointError;
use super::mm::blocker;
use super::sysv;
use crate::bpf::events::{VmaKind, VmaRec};
use crate::model::frozen::Blocker;
use nix::sys::statfs::{FsType, HUGETLBFS_MAGIC, Statfs, fstatfs, statfs};
use std::fs::File;
use std::io;
use std::path::Path;

/// Name of the file behind memory that is mapped without one (hugetlb_file_setup()).
const ANONYMOUS: &str = "anon_hugepage";

/// Whether a file is on hugetlbfs, by its superblock's magic number.
#[must_use]
pub fn is_magic(magic: u64) -> bool {
    i64::try_from(magic).is_ok_and(|magic| FsType(magic) == HUGETLBFS_MAGIC)
}

/// Whether a mapping is of memory that no other mapping shows: private, and of no file.
#[must_use]
pub fn is_anonymous(rec: &VmaRec, shared: bool) -> bool {
    rec.kind == VmaKind::HUGETLB && !shared && rec.name() == ANONYMOUS
}

/// Whether this is the path of shared memory that was mapped without a file.
#[must_use]
pub fn is_shared_anonymous(path: &[u8]) -> bool {
    path.strip_prefix(b"/") == Some(ANONYMOUS.as_bytes())
}

/// Why a mapping of huge pages cannot be carried; what is named like a System V segment may be
/// one.
#[must_use]
pub fn refusal(rec: &VmaRec) -> Option<Blocker> {
    if sysv::is_named_like_one(rec) {
        return None;
    }
    file_refusal(rec)
}

/// The same of what is no System V segment.
#[must_use]
pub fn file_refusal(rec: &VmaRec) -> Option<Blocker> {
    let name = rec.name();
    if rec.kind != VmaKind::HUGETLB || name == ANONYMOUS || name.starts_with("memfd:") {
        return None;
    }
    let reason = "files on hugetlbfs are not carried yet";
    Some(blocker(rec, "hugetlb mapping", &name, reason))
}

fn page_on(filesystem: &Statfs) -> u64 {
    if filesystem.filesystem_type() == HUGETLBFS_MAGIC {
        u64::try_from(filesystem.block_size()).unwrap_or(0)
    } else {
        0
    }
}

/// Bytes of the huge pages that a file consists of; 0 if it is not on hugetlbfs.
///
/// # Errors
/// fstatfs(2) fails.
pub fn page_of(file: &File) -> io::Result<u64> {
    Ok(page_on(&fstatfs(file)?))
}

/// Bytes of the huge pages of a mapping, by its link of `/proc/PID/map_files`.
///
/// # Errors
/// statfs(2) fails.
pub fn page_at(link: &Path) -> Result<u64, CheckpointError> {
    let found = statfs(link).map_err(|errno| CheckpointError::io("statfs", link)(errno.into()))?;
    Ok(page_on(&found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> VmaRec {
        let mut rec = VmaRec {
            kind: VmaKind::HUGETLB,
            ..VmaRec::default()
        };
        for (to, from) in rec.name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        rec
    }

    #[test]
    fn only_files_are_refused() {
        assert_eq!(refusal(&named("anon_hugepage")), None);
        assert_eq!(refusal(&named("memfd:heap")), None);
        let blocker = refusal(&named("buffers")).unwrap();
        assert!(blocker.object.starts_with("hugetlb mapping"), "{blocker}");
        let segment = named("SYSV00000000");
        assert_eq!(refusal(&segment), None);
        assert!(file_refusal(&segment).is_some());
        assert_eq!(refusal(&VmaRec::default()), None);
    }

    #[test]
    fn shared_memory_is_not_the_mappings_own() {
        let rec = named("anon_hugepage");
        assert!(is_anonymous(&rec, false));
        assert!(!is_anonymous(&rec, true));
        assert!(!is_anonymous(&named("memfd:heap"), false));
    }
}
