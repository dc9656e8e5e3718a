//! What a checkpoint carries: one application's kernel state at one instant.
//!
//! Written by `capture/`, encoded by `image/`, consumed by `restore/`. Kernel
//! addresses serve as identities only (`OfdId`, `MmId`, …): two descriptors
//! with one `OfdId` share one open file description. All times are nanoseconds.

mod file;
mod mm;
mod mqueue;
mod namespaces;
mod pty;
mod socket;
mod system;
mod task;
mod uring;

pub use file::*;
pub use mm::*;
pub use mqueue::*;
pub use namespaces::*;
pub use pty::*;
pub use socket::*;
pub use system::*;
pub use task::*;
pub use uring::*;

use super::ids::{Fd, FilesId, MmId, OfdId, Pid};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;
use std::fmt;

/// One application: everything in its cgroup subtree.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Application {
    /// What kind of application this is and how it is started afresh.
    pub header: ApplicationHeader,
    /// Processes, parents before their children.
    pub processes: Vec<Process>,
    /// Address spaces by identity (more than one process with `CLONE_VM`).
    pub mms: BTreeMap<MmId, Mm>,
    /// Descriptor tables by identity (shared with `CLONE_FILES`).
    pub files: BTreeMap<FilesId, FilesTable>,
    /// Open file descriptions by identity.
    pub ofds: BTreeMap<OfdId, OpenFile>,
    /// Contents that exist nowhere on disk: shared anonymous memory, memfds,
    /// files that are deleted but open.
    pub contents: BTreeMap<ContentId, Content>,
}

/// The part of an application that is known without looking at its tasks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ApplicationHeader {
    /// Name given to `tracker run --name`, or made from the PID.
    pub name: String,
    /// Cgroup path below the cgroup2 mount, without leading slash.
    pub cgroup: String,
    /// Command that starts it afresh when a restore fails; empty when unknown.
    pub command: Vec<String>,
    /// Working directory of that command.
    pub directory: String,
    /// `uname -r` of the kernel it was captured on.
    pub kernel_release: String,
    /// The application's clocks at the moment of capture.
    pub clocks: Clocks,
    /// Cgroups below its own, parents before children.
    #[serde(default)]
    pub cgroups: Vec<CgroupBelow>,
    /// What its own cgroup was told beside the defaults: files of it and their lines
    /// (Documentation/admin-guide/cgroup-v2.rst).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroup_settings: Vec<(String, String)>,
    /// System V semaphore sets it uses.
    #[serde(default)]
    pub semaphores: Vec<SemaphoreSet>,
    /// System V message queues it uses.
    #[serde(default)]
    pub message_queues: Vec<MessageQueue>,
    /// Namespaces of its own, which all its processes share.
    #[serde(default, skip_serializing_if = "Namespaces::are_the_machines")]
    pub namespaces: Namespaces,
}

/// A System V semaphore set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreSet {
    /// Id, which user space holds.
    pub id: i32,
    /// Key; 0 = `IPC_PRIVATE`.
    pub key: i32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
    /// Effective user of who made it.
    pub creator_uid: u32,
    /// Effective group of who made it.
    pub creator_gid: u32,
    /// Value of each semaphore and who did the last operation on it; 0 = nobody.
    pub semaphores: Vec<(u16, Pid)>,
    /// What is added to a semaphore when a process ends (`SEM_UNDO`): (who, which, how much).
    #[serde(default)]
    pub adjustments: Vec<(Pid, u16, i16)>,
}

/// A System V message queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    /// Id, which user space holds.
    pub id: i32,
    /// Key; 0 = `IPC_PRIVATE`.
    pub key: i32,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
    /// Effective user of who made it.
    pub creator_uid: u32,
    /// Effective group of who made it.
    pub creator_gid: u32,
    /// Bytes that all messages may have; less than they have, if it was changed meanwhile.
    pub qbytes: u64,
    /// Who sent last; 0 = nobody.
    pub sender: Pid,
    /// Who received last; 0 = nobody.
    pub receiver: Pid,
    /// What was sent and not received, oldest first.
    pub messages: Vec<Message>,
}

/// A message in a System V message queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Type, above 0.
    pub mtype: i64,
    /// Text.
    pub mtext: ByteBuf,
}

/// A cgroup below that of the application, without controllers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CgroupBelow {
    /// Path below the application's, without slashes at the ends.
    pub path: String,
    /// Whose its directory is.
    pub owner: Owner,
    /// Whose those of its files are that are handed over with it (cgroup delegation).
    pub files: Vec<(String, Owner)>,
}

/// Owner and mode of a file or directory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// Permission bits.
    pub mode: u32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// Clocks as the application saw them when it was frozen, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// `CLOCK_MONOTONIC`, time namespace offset included.
    pub monotonic: u64,
    /// `CLOCK_BOOTTIME`, time namespace offset included.
    pub boottime: u64,
    /// `CLOCK_REALTIME`.
    pub realtime: u64,
}

/// One object that keeps an application from being checkpointed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// The process that holds the object.
    pub pid: Pid,
    /// Its descriptor, where the object has one.
    pub fd: Option<Fd>,
    /// The object in the kernel's terms, e.g. `io_uring` or `mapping 7f..-7f.. of /dev/dri/card0`.
    pub object: String,
    /// Why it cannot be carried and what the operator can do.
    pub reason: String,
}

impl fmt::Display for Blocker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PID {}", self.pid)?;
        if let Some(fd) = self.fd {
            write!(f, " fd {fd}")?;
        }
        write!(f, ": {}: {}", self.object, self.reason)
    }
}
