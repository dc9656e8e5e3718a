//! Address spaces.

use super::PathRef;
use crate::model::ids::OfdId;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// Bytes in a page, and in a page slot of an image. x86-64 only.
pub const PAGE_SIZE: u64 = 4096;

/// One address space.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Mm {
    /// The bounds prctl(PR_SET_MM_MAP) takes.
    pub bounds: MmBounds,
    /// `AT_*` vector as /proc/PID/auxv gives it.
    #[serde(with = "serde_bytes")]
    pub auxv: Vec<u8>,
    /// Mappings in address order.
    pub vmas: Vec<Vma>,
    /// Private pages that differ from what the mapping alone would give.
    pub pages: Vec<PageRun>,
    /// The vDSO's code as it was mapped, which threads may be running in.
    pub vdso: Option<Vdso>,
    /// `MCL_FUTURE`/`MCL_ONFAULT` default flags (`mm->def_flags`), raw `VM_*`.
    pub def_flags: u64,
    /// Keys that pkey_alloc(2) gave: bit 1 is key 1.
    #[serde(default)]
    pub pkeys: u32,
    /// `PR_MDWE_*` of prctl(2).
    #[serde(default)]
    pub mdwe: u32,
    /// `PR_SET_MEMORY_MERGE`.
    #[serde(default)]
    pub merge_any: bool,
    /// What is registered for membarrier(2), as `MEMBARRIER_CMD_GET_REGISTRATIONS` tells it:
    /// the `MEMBARRIER_CMD_REGISTER_*` that were called.
    #[serde(default)]
    pub membarrier: u32,
}

/// `struct prctl_mm_map` without its auxv and descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct MmBounds {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// A NUMA policy, set_mempolicy(2) and mbind(2).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryPolicy {
    /// `MPOL_*` with the `MPOL_F_*` that those calls take.
    pub mode: u32,
    /// The nodes asked for: bit 0 is node 0.
    pub nodes: u64,
    /// set_mempolicy_home_node(2).
    pub home: Option<u16>,
}

/// One mapping.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Vma {
    /// First address.
    pub start: u64,
    /// Address behind the last byte.
    pub end: u64,
    /// `PROT_*`.
    pub prot: u32,
    /// `MAP_SHARED` rather than `MAP_PRIVATE`.
    pub shared: bool,
    /// `MAP_GROWSDOWN` (the main stack has it).
    pub growsdown: bool,
    /// `MAP_NORESERVE`.
    pub noreserve: bool,
    /// Locked by mlock(2).
    pub locked: bool,
    /// Locked as pages come (`MLOCK_ONFAULT`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub on_fault: bool,
    /// `MAP_DROPPABLE`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub droppable: bool,
    /// The key of pkey_mprotect(2); 0 is that of all other memory.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pkey: u8,
    /// mbind(2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<MemoryPolicy>,
    /// `MADV_*` values to replay, in order.
    pub advice: Vec<i32>,
    /// What is mapped.
    pub backing: Backing,
}

#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u8) -> bool {
    *number == 0
}

/// What a mapping shows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private anonymous memory (heap and stacks too).
    #[default]
    Anonymous,
    /// Private anonymous memory of huge pages (`MAP_HUGETLB`).
    AnonymousHuge {
        /// Bytes of one, a power of two.
        page: u64,
    },
    /// A file on disk.
    File {
        /// The file.
        file: FileIdentity,
        /// Offset of `start` in the file, bytes.
        offset: u64,
        /// Opened for writing (a shared mapping that may become writable).
        writable: bool,
    },
    /// Shared anonymous memory, a memfd or a deleted file.
    Content {
        /// Whose bytes.
        id: ContentId,
        /// Offset of `start` in the content, bytes.
        offset: u64,
    },
    /// A System V shared memory segment as a whole, attached by shmat(2).
    SysvShm {
        /// Its bytes.
        id: ContentId,
        /// Its id.
        segment: i32,
        /// `SHM_RDONLY`.
        readonly: bool,
    },
    /// The ring of completions of an AIO context.
    AioRing(AioRing),
    /// The rings or the requests of an io_uring instance.
    IoUring {
        /// The instance.
        ring: OfdId,
        /// `IORING_OFF_*`, which says what is mapped.
        offset: u64,
    },
    /// The vDSO's code.
    Vdso,
    /// The vDSO's data pages, which cannot be read.
    Vvar,
}

/// What a ring of AIO completions holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AioRing {
    /// The argument of io_setup(2). `None`: the context is a parent's, and the mapping, which a
    /// child inherits before Linux 6.13, is memory that shows what was there.
    pub max_reqs: Option<u32>,
    /// Slots.
    pub nr: u32,
    /// Slot of the oldest completion that was not read.
    pub head: u32,
    /// Completions that were not read, oldest first: `struct io_event` after `struct io_event`.
    pub events: ByteBuf,
}

impl AioRing {
    /// Bytes of `struct aio_ring`, which the slots follow.
    pub const HEADER: usize = 32;
    /// Bytes of a slot.
    pub const EVENT: usize = 32;

    /// Slots in a ring of so many bytes.
    #[must_use]
    pub fn slots_in(bytes: u64) -> u64 {
        bytes.saturating_sub(Self::HEADER as u64) / Self::EVENT as u64
    }

    /// Where a slot is, from the start of the ring.
    #[must_use]
    pub fn offset(slot: u32) -> u64 {
        Self::HEADER as u64 + u64::from(slot) * Self::EVENT as u64
    }

    /// All slots, from that of the oldest completion on.
    pub fn slots(&self) -> impl Iterator<Item = u32> + use<> {
        (self.head..self.nr).chain(0..self.head)
    }

    /// How many completions were not read.
    #[must_use]
    pub fn unread(&self) -> u32 {
        u32::try_from(self.events.len() / Self::EVENT).unwrap_or(u32::MAX)
    }

    /// Slot that the next completion goes to.
    #[must_use]
    pub fn tail(&self) -> u32 {
        let unread = self.unread() as usize;
        self.slots().nth(unread).unwrap_or(0)
    }

    /// Whether it fits a mapping of so many bytes, and its completions fit it: one slot is never
    /// used.
    #[must_use]
    pub fn fits(&self, bytes: u64) -> bool {
        let whole = self.events.len().is_multiple_of(Self::EVENT);
        let unread = self.events.len() / Self::EVENT;
        u64::from(self.nr) <= Self::slots_in(bytes)
            && self.head < self.nr
            && whole
            && unread < self.nr as usize
    }
}

/// A file together with what tells whether it has changed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    /// Name and inode.
    pub at: PathRef,
    /// Size in bytes.
    pub size: u64,
    /// Modification time, nanoseconds since the epoch.
    pub mtime: i64,
}

/// Pages that lie together both in an address space (or content) and in the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// Address of the first page (or offset within a content).
    pub addr: u64,
    /// Number of pages.
    pub pages: u64,
    /// First page slot in the image's page area.
    pub slot: u64,
}

/// Names one [`Content`] of an application: a number that the checkpoint gives it; of a System V
/// segment its id with bit 62 set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ContentId(pub u64);

/// Bytes that live only in memory and are reached through a file or a shared mapping.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Content {
    /// What it is.
    pub kind: ContentKind,
    /// Size in bytes.
    pub size: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
    /// Bytes of its huge pages, a power of two; 0 if it has none.
    #[serde(default)]
    pub huge_page: u64,
    /// Pages of [`PAGE_SIZE`] that are not zero.
    pub pages: Vec<PageRun>,
}

/// Where a [`Content`] came from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContentKind {
    /// mmap(MAP_SHARED | MAP_ANONYMOUS).
    #[default]
    SharedAnonymous,
    /// memfd_create(2) with this name and these `F_SEAL_*`.
    Memfd {
        /// Name without the `memfd:` prefix.
        name: String,
        /// `F_GET_SEALS`.
        seals: u32,
    },
    /// A System V shared memory segment.
    SysvShm(Segment),
    /// A file with no name left; made anew in the directory it was in, then unlinked.
    Deleted {
        /// Its last path.
        at: PathRef,
    },
}

/// What a System V shared memory segment has beside bytes, owner and permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// Id, which user space holds.
    pub id: i32,
    /// Key; 0 = `IPC_PRIVATE`.
    pub key: i32,
    /// Marked by `IPC_RMID`: it goes with the last who has it attached.
    pub destroyed: bool,
    /// Effective user of who made it.
    pub creator_uid: u32,
    /// Effective group of who made it.
    pub creator_gid: u32,
}

/// The vDSO of the kernel the application ran on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vdso {
    /// Where it was mapped (`AT_SYSINFO_EHDR`).
    pub addr: u64,
    /// Its bytes.
    #[serde(with = "serde_bytes")]
    pub code: Vec<u8>,
}
