//! Mappings as images carry them.

use super::contents::Contents;
use super::error::CheckpointError;
use super::files::UNREPORTED;
use super::view::{Place, View};
use super::{aio, attributes, huge, sysv, uring};
use crate::bpf::events::{AioRec, MmRec, VmaKind, VmaRec, VmaUnusual};
use crate::bpf::iter::user_dev;
use crate::model::frozen::{
    Backing, Blocker, ContentId, FileIdentity, MmBounds, PAGE_SIZE, PathRef, Vma,
};
use crate::model::ids::{InodeId, OfdId, Pid};
use nix::libc;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// `VM_*` of include/linux/mm.h, the same on all kernels supported (x86-64).
pub mod vm {
    #![allow(missing_docs)]
    pub const READ: u64 = 0x1;
    pub const WRITE: u64 = 0x2;
    pub const EXEC: u64 = 0x4;
    pub const MAYWRITE: u64 = 0x20;
    pub const MAYSHARE: u64 = 0x80;
    pub const GROWSDOWN: u64 = 0x100;
    pub const UFFD_MISSING: u64 = 0x200;
    pub const PFNMAP: u64 = 0x400;
    pub const UFFD_WP: u64 = 0x1000;
    pub const LOCKED: u64 = 0x2000;
    pub const IO: u64 = 0x4000;
    pub const LOCKONFAULT: u64 = 0x8_0000;
    pub const SEQ_READ: u64 = 0x8000;
    pub const RAND_READ: u64 = 0x1_0000;
    pub const DONTCOPY: u64 = 0x2_0000;
    pub const DONTEXPAND: u64 = 0x4_0000;
    pub const NORESERVE: u64 = 0x20_0000;
    pub const WIPEONFORK: u64 = 0x200_0000;
    pub const DONTDUMP: u64 = 0x400_0000;
    pub const SOFTDIRTY: u64 = 0x800_0000;
    pub const MIXEDMAP: u64 = 0x1000_0000;
    pub const HUGEPAGE: u64 = 0x2000_0000;
    pub const NOHUGEPAGE: u64 = 0x4000_0000;
    pub const MERGEABLE: u64 = 0x8000_0000;
    /// Since 6.11.
    pub const DROPPABLE: u64 = 1 << 40;
    /// `VM_PKEY_SHIFT`, four bits from here.
    pub const PKEYS: u64 = 0xf << 32;
}

/// `VM_*` and the `MADV_*` that sets it.
const ADVICE: [(u64, i32); 8] = [
    (vm::SEQ_READ, libc::MADV_SEQUENTIAL),
    (vm::RAND_READ, libc::MADV_RANDOM),
    (vm::DONTCOPY, libc::MADV_DONTFORK),
    (vm::WIPEONFORK, libc::MADV_WIPEONFORK),
    (vm::DONTDUMP, libc::MADV_DONTDUMP),
    (vm::HUGEPAGE, libc::MADV_HUGEPAGE),
    (vm::NOHUGEPAGE, libc::MADV_NOHUGEPAGE),
    (vm::MERGEABLE, libc::MADV_MERGEABLE),
];

/// The bounds of an address space.
#[must_use]
pub fn bounds(rec: &MmRec) -> MmBounds {
    MmBounds {
        start_code: rec.start_code,
        end_code: rec.end_code,
        start_data: rec.start_data,
        end_data: rec.end_data,
        start_brk: rec.start_brk,
        brk: rec.brk,
        start_stack: rec.start_stack,
        arg_start: rec.arg_start,
        arg_end: rec.arg_end,
        env_start: rec.env_start,
        env_end: rec.env_end,
    }
}

/// The auxiliary vector up to and with its terminator.
#[must_use]
pub fn auxv(rec: &MmRec) -> Vec<u8> {
    let words = &rec.auxv[..(rec.auxv_words as usize).min(rec.auxv.len())];
    let pairs = words.chunks_exact(2);
    let end = pairs.clone().position(|pair| pair[0] == 0);
    let used = end.map_or(words.len(), |at| 2 * (at + 1));
    words[..used].iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// `MEMBARRIER_STATE_*` of include/linux/sched/mm.h, and `MEMBARRIER_CMD_REGISTER_*` that sets
/// it: of private expedited, global expedited, private expedited for SYNC_CORE and for RSEQ.
/// The other bits (`*_READY`) say only that all CPUs know of it.
const REGISTRATIONS: [(u32, u32); 4] = [
    (1 << 1, 1 << 4),
    (1 << 3, 1 << 2),
    (1 << 5, 1 << 6),
    (1 << 7, 1 << 8),
];

/// The membarrier(2) registrations of an address space.
#[must_use]
pub fn membarrier(rec: &MmRec) -> u32 {
    let registered = REGISTRATIONS
        .iter()
        .filter(|(bit, _)| rec.membarrier & bit != 0);
    registered.fold(0, |all, (_, command)| all | command)
}

/// Why a mapping cannot be carried, from its record alone.
#[must_use]
pub fn refusal(rec: &VmaRec) -> Option<Blocker> {
    let name = rec.name();
    if let Some(blocker) = huge::refusal(rec) {
        return Some(blocker);
    }
    if uring::is_mapped(rec) {
        return uring::refusal(rec);
    }
    let (what, reason) = if rec.flags & (vm::UFFD_MISSING | vm::UFFD_WP) != 0 {
        (
            "userfaultfd",
            "a fault handler cannot be asked for pages while frozen",
        )
    } else if rec.kind == VmaKind::SPECIAL {
        let known = [
            "[vdso]",
            "[vvar]",
            "[vvar_vclock]",
            "[vsyscall]",
            "[uprobes]",
        ];
        if known[..4].contains(&name.as_str()) {
            return None;
        }
        ("special", "remove the probe or debugger that made it")
    } else if rec.flags & (vm::PFNMAP | vm::IO | vm::MIXEDMAP) != 0 && rec.file != 0 {
        ("device", "device memory stays with its kernel")
    } else if rec.flags >> 32 << 32 & !(vm::PKEYS | vm::DROPPABLE) != 0 {
        (
            "sealed or otherwise special",
            "shadow stacks, mseal(2) and what newer kernels have are not carried yet",
        )
    } else if rec.unusual & VmaUnusual::FAR_NODES != 0 {
        (
            "NUMA-bound",
            "policies with nodes from 64 on are not carried yet",
        )
    } else if rec.unusual & VmaUnusual::SHARED_POLICY != 0 {
        (
            "NUMA-bound shared",
            "mbind(2) on shared memory is not carried yet",
        )
    } else if rec.unusual & VmaUnusual::WRITE_ERROR != 0 {
        ("shared file", UNREPORTED)
    } else {
        return None;
    };
    Some(blocker(rec, &format!("{what} mapping"), &name, reason))
}

/// That a mapping is not carried: what it is, and what it is of.
pub(super) fn blocker(rec: &VmaRec, what: &str, of: &str, reason: &str) -> Blocker {
    Blocker {
        pid: Pid(rec.tgid.cast_signed()),
        fd: None,
        object: format!("{what} {:x}-{:x} {of}", rec.start, rec.end),
        reason: reason.to_owned(),
    }
}

/// Turns mapping records into mappings; remembers files it has looked at.
#[derive(Debug, Default)]
pub struct Mapper {
    files: HashMap<u64, Known>,
    segments: BTreeMap<i32, sysv::Segment>,
    contexts: Vec<AioRec>,
    view: Rc<View>,
}

#[derive(Clone, Debug)]
enum Known {
    Anonymous,
    File(FileIdentity),
    Content(ContentId),
}

impl Mapper {
    /// With the System V segments and AIO contexts that there are.
    pub fn new(
        segments: BTreeMap<i32, sysv::Segment>,
        contexts: Vec<AioRec>,
        view: Rc<View>,
    ) -> Self {
        Self {
            files: HashMap::new(),
            segments,
            contexts,
            view,
        }
    }

    /// One mapping. Content it shows is added to `contents` to be copied.
    ///
    /// # Errors
    /// It maps something that is not carried, or its file cannot be looked at.
    pub fn convert(
        &mut self,
        rec: &VmaRec,
        contents: &mut Contents,
    ) -> Result<Vma, CheckpointError> {
        if let Some(blocker) = refusal(rec) {
            return Err(CheckpointError::Blocked(vec![blocker]));
        }
        let backing = self.backing(rec, contents)?;
        let f = rec.flags;
        let prot = [
            (vm::READ, libc::PROT_READ),
            (vm::WRITE, libc::PROT_WRITE),
            (vm::EXEC, libc::PROT_EXEC),
        ];
        let prot = prot
            .iter()
            .filter(|(bit, _)| f & bit != 0)
            .fold(0, |all, (_, prot)| all | prot.cast_unsigned());
        // Of these the kernel set it, but for what keeps a ring from children.
        let kept = match backing {
            Backing::Vdso | Backing::Vvar | Backing::AioRing(_) => 0,
            Backing::IoUring { .. } => vm::DONTCOPY,
            _ => u64::MAX,
        };
        let advice = ADVICE.iter().filter(|(bit, _)| f & kept & bit != 0);
        Ok(Vma {
            start: rec.start,
            end: rec.end,
            prot,
            shared: f & vm::MAYSHARE != 0,
            growsdown: f & vm::GROWSDOWN != 0,
            noreserve: f & vm::NORESERVE != 0,
            locked: f & vm::LOCKED != 0,
            on_fault: f & vm::LOCKONFAULT != 0,
            droppable: f & vm::DROPPABLE != 0,
            pkey: pkey(f),
            policy: attributes::policy(&rec.numa),
            advice: advice.map(|(_, advice)| *advice).collect(),
            backing,
        })
    }

    fn backing(
        &mut self,
        rec: &VmaRec,
        contents: &mut Contents,
    ) -> Result<Backing, CheckpointError> {
        if rec.kind == VmaKind::SPECIAL {
            return Ok(if rec.name() == "[vdso]" {
                Backing::Vdso
            } else {
                Backing::Vvar
            });
        }
        if rec.file == 0 {
            return Ok(Backing::Anonymous);
        }
        if uring::is_mapped(rec) {
            return Ok(Backing::IoUring {
                ring: OfdId(rec.file),
                offset: offset(rec),
            });
        }
        if aio::is_ring(rec) {
            return aio::ring(rec, &self.contexts).map(Backing::AioRing);
        }
        if let Some(segment) = sysv::of(&self.segments, rec) {
            let id = contents.add_segment(segment, &map_file(rec))?;
            return Ok(Backing::SysvShm {
                id,
                segment: segment.id,
                readonly: rec.flags & vm::MAYWRITE == 0,
            });
        }
        if let Some(blocker) = huge::file_refusal(rec) {
            return Err(CheckpointError::Blocked(vec![blocker]));
        }
        let shared = rec.flags & vm::MAYSHARE != 0;
        if huge::is_anonymous(rec, shared) {
            let page = huge::page_at(&map_file(rec))?;
            return Ok(Backing::AnonymousHuge { page });
        }
        let known = match self.files.get(&rec.file) {
            Some(known) => known.clone(),
            None => {
                let known = look_at(rec, contents, &self.view)?;
                self.files.insert(rec.file, known.clone());
                known
            }
        };
        let offset = offset(rec);
        Ok(match known {
            Known::Anonymous if !shared => Backing::Anonymous,
            Known::Anonymous => {
                return Err(CheckpointError::Blocked(vec![blocker(
                    rec,
                    "shared device mapping",
                    &rec.name(),
                    "device memory stays with its kernel",
                )]));
            }
            Known::File(file) => Backing::File {
                file,
                offset,
                writable: shared && rec.flags & vm::MAYWRITE != 0,
            },
            // What it writes would not reach the file.
            Known::Content(_) if shared && rec.nlink > 0 => {
                return Err(CheckpointError::Blocked(vec![blocker(
                    rec,
                    "shared mapping",
                    &format!("of {}", rec.name()),
                    "the file's name does not lead to it any more",
                )]));
            }
            Known::Content(id) => Backing::Content { id, offset },
        })
    }
}

/// The protection key. What can only be executed gets its own from mprotect(2).
fn pkey(flags: u64) -> u8 {
    if flags & (vm::READ | vm::WRITE | vm::EXEC) == vm::EXEC {
        return 0;
    }
    u8::try_from((flags & vm::PKEYS) >> 32).unwrap_or(0)
}

/// Where in its file a mapping begins, bytes.
pub(super) fn offset(rec: &VmaRec) -> u64 {
    rec.pgoff * PAGE_SIZE
}

/// The link that leads to the file of a mapping.
pub(super) fn map_file(rec: &VmaRec) -> PathBuf {
    PathBuf::from(format!(
        "/proc/{}/map_files/{:x}-{:x}",
        rec.tgid, rec.start, rec.end
    ))
}

fn look_at(rec: &VmaRec, contents: &mut Contents, view: &View) -> Result<Known, CheckpointError> {
    let link = map_file(rec);
    let path = fs::read_link(&link).map_err(CheckpointError::io("readlink", &link))?;
    let mapped = fs::metadata(&link).map_err(CheckpointError::io("stat", &link))?;
    if mapped.file_type().is_char_device() && path == Path::new("/dev/zero") {
        return Ok(Known::Anonymous);
    }
    if !mapped.is_file() {
        return Err(CheckpointError::Blocked(vec![blocker(
            rec,
            "mapping",
            &format!("of {}", path.display()),
            "it is no regular file",
        )]));
    }
    let place = view.find(&link, &path);
    if let Some(file) = named(rec, &path, &mapped, place.as_ref())? {
        return Ok(Known::File(file));
    }
    let inode = InodeId {
        dev: rec.dev,
        ino: rec.ino,
    };
    let through = place.map(|place| place.through).unwrap_or_default();
    let added = contents.add_mapped(inode, &link, &path, through);
    added.map(Known::Content)
}

/// The file's identity if its path still leads to it.
fn named(
    rec: &VmaRec,
    path: &Path,
    mapped: &Metadata,
    place: Option<&Place>,
) -> Result<Option<FileIdentity>, CheckpointError> {
    if rec.nlink == 0 || !path.is_absolute() {
        return Ok(None);
    }
    let place = place.ok_or_else(|| {
        let reason = "it was opened through a mount that neither the application nor the machine \
                      has";
        let object = format!("of {}", path.display());
        CheckpointError::Blocked(vec![blocker(rec, "mapping", &object, reason)])
    })?;
    // As we see it, whatever the root directory of the process is.
    let Ok(found) = fs::metadata(&place.path) else {
        return Ok(None);
    };
    let same = found.dev() == user_dev(rec.dev) && found.ino() == rec.ino;
    // An overlay filesystem maps the file below it, which has other numbers.
    let alike = found.size() == mapped.size()
        && (found.mtime(), found.mtime_nsec()) == (mapped.mtime(), mapped.mtime_nsec());
    if !same && !alike {
        return Ok(None);
    }
    let mut identity = identity(path, &found);
    identity.at.through = place.through;
    Ok(Some(identity))
}

/// A file's name and what tells whether it has changed.
#[must_use]
pub fn identity(path: &Path, stat: &Metadata) -> FileIdentity {
    FileIdentity {
        at: path_ref(path, stat),
        size: stat.size(),
        mtime: stat.mtime() * 1_000_000_000 + stat.mtime_nsec(),
    }
}

/// A file's name and inode.
#[must_use]
pub fn path_ref(path: &Path, stat: &Metadata) -> PathRef {
    PathRef {
        path: path.as_os_str().as_bytes().to_vec(),
        inode: InodeId {
            dev: kernel_dev(stat.dev()),
            ino: stat.ino(),
        },
        ..PathRef::default()
    }
}

/// Turns a device number of stat(2) into the kernel's own (`MKDEV`).
#[must_use]
pub fn kernel_dev(dev: u64) -> u32 {
    let part = |value: u64| u32::try_from(value).unwrap_or(0);
    part(nix::sys::stat::major(dev)) << 20 | part(nix::sys::stat::minor(dev)) & 0xf_ffff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_auxiliary_vector_ends_with_its_terminator() {
        let mut rec = MmRec {
            auxv_words: 8,
            ..MmRec::default()
        };
        rec.auxv[..6].copy_from_slice(&[6, 4096, 0, 0, 9, 9]);
        assert_eq!(auxv(&rec).len(), 4 * 8);
    }

    #[test]
    fn membarrier_registrations_are_their_commands() {
        let registered = |state| {
            membarrier(&MmRec {
                membarrier: state,
                ..MmRec::default()
            })
        };
        assert_eq!(registered(0), 0);
        assert_eq!(registered(0b11), 1 << 4);
        assert_eq!(registered(0b1111_1111), 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8);
    }

    #[test]
    fn device_numbers_go_both_ways() {
        let dev = 259 << 20 | 77;
        assert_eq!(kernel_dev(user_dev(dev)), dev);
    }

    #[test]
    fn anonymous_memory_keeps_its_advice() {
        let rec = VmaRec {
            start: 0x1000,
            end: 0x3000,
            flags: vm::READ | vm::WRITE | vm::DONTCOPY | vm::NOHUGEPAGE,
            ..VmaRec::default()
        };
        let mut contents = Contents::default();
        let vma = Mapper::default().convert(&rec, &mut contents).unwrap();
        assert_eq!(vma.prot, 3);
        assert_eq!(vma.advice, [libc::MADV_DONTFORK, libc::MADV_NOHUGEPAGE]);
        assert_eq!(vma.backing, Backing::Anonymous);
        assert!(!vma.shared);
    }

    #[test]
    fn what_cannot_be_carried_is_named() {
        let watched = VmaRec {
            flags: vm::UFFD_WP,
            ..VmaRec::default()
        };
        assert!(refusal(&watched).unwrap().object.starts_with("userfaultfd"));
        assert_eq!(refusal(&VmaRec::default()), None);
    }
}
