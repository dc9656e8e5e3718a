//! Restores an application: the whole tree stands again, or nothing of it is left.
//!
//! The caller forks a *restorer*: one thread, all signals quiet, in the application's cgroup
//! and session. It opens every open file description, creates the processes with their PIDs
//! (`tree`), and as their tracer has each replace its own address space by a tape of system
//! calls (`tape`, `memory`, `execute`), which the caller fills (`fill`), become many threads
//! (`threads`, `creds`, `signals`) and go on (`ready`, `resume`). Nothing here consults BPF or a
//! running agent.

mod aio;
mod cgroups;
mod creds;
mod error;
mod execute;
pub mod files;
mod fill;
mod groups;
mod huge;
mod jobs;
mod layout;
mod memory;
mod message_queues;
mod mqueue;
mod namespaces;
pub(crate) mod orphans;
pub(crate) mod pids;
mod ready;
mod restorer;
mod resume;
mod rings;
mod semaphores;
mod signals;
mod silence;
mod sources;
mod supervisor;
mod sysv;
mod tape;
mod threads;
mod time;
mod tmpfs;
mod tree;
mod vdso;

pub use error::RestoreError;
pub use restorer::{RestoreOptions, Restored, restore};
