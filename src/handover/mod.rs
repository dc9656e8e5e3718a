//! From one kernel to the next: the arena, kexec, early boot.
//!
//! [`update`] runs on the old kernel, [`early`] on the new one as its PID 1. All they
//! share is the image in the arena and two words of the command line ([`cmdline`]).

pub mod arena;
pub mod cmdline;
pub mod early;
pub mod eligible;
pub mod filesystems;
pub mod huge;
mod kexec;
pub mod modules;
pub mod mounts;
pub mod network;
mod next;
pub mod report;
mod rtnetlink;
mod stage;
pub mod sysctl;
pub mod update;
mod worker;
