//! Identities of kernel objects.
//!
//! Two families: numbers user space knows (PIDs, descriptors, inode numbers),
//! which survive a checkpoint, and addresses of kernel objects, which name an
//! object exactly while this kernel runs and mean nothing afterwards.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $fmt:literal) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $fmt, self.0)
            }
        }
    };
}

id!(
    /// A thread group id as the initial PID namespace numbers it: what user space calls a PID.
    Pid(i32),
    "{}"
);
id!(
    /// A thread id as the initial PID namespace numbers it.
    Tid(i32),
    "{}"
);
id!(
    /// A file descriptor number, valid within one files table.
    Fd(i32),
    "{}"
);
id!(
    /// An open file description: the address of its `struct file` on the live kernel.
    OfdId(u64),
    "ofd:{:x}"
);
id!(
    /// A descriptor table: the address of its `struct files_struct` on the live kernel.
    FilesId(u64),
    "files:{:x}"
);
id!(
    /// An address space: the address of its `struct mm_struct` on the live kernel.
    MmId(u64),
    "mm:{:x}"
);
id!(
    /// A thread: the address of its `struct task_struct` on the live kernel, which
    /// an exec by a thread that does not lead its group leaves alone while its TID changes.
    TaskId(u64),
    "task:{:x}"
);
id!(
    /// A socket: the address of its `struct sock` on the live kernel.
    SockId(u64),
    "sock:{:x}"
);
id!(
    /// Directories and umask: the address of a `struct fs_struct` on the live kernel.
    FsId(u64),
    "fs:{:x}"
);
id!(
    /// An inotify instance: the address of its `struct fsnotify_group` on the live kernel.
    GroupId(u64),
    "inotify:{:x}"
);
id!(
    /// A cgroup v2 id: the inode number of its directory (`kernfs_node.id`).
    CgroupId(u64),
    "cgroup:{}"
);

impl Pid {
    /// The thread that leads this thread group.
    #[must_use]
    pub fn leader(self) -> Tid {
        Tid(self.0)
    }
}

/// A file as its filesystem numbers it; `dev` is the kernel's encoding of
/// `st_dev` (major << 20 | minor, `MKDEV`).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct InodeId {
    /// Device, `MKDEV(major, minor)` of the superblock.
    pub dev: u32,
    /// Inode number.
    pub ino: u64,
}

impl fmt::Display for InodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.dev >> 20, self.dev & 0xf_ffff, self.ino)
    }
}
