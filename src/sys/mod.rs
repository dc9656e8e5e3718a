//! The system-call seam: everything unsafe that is not BPF.
//!
//! One file per kernel noun; every function here is a safe wrapper with the
//! errors of its system call.

pub mod area;
pub mod cgroup;
pub mod clock;
pub mod eventfile;
pub mod fanotify;
pub mod fd;
pub mod filesystem;
pub mod heap;
pub mod huge;
pub mod identity;
pub mod inode;
pub mod kexec;
pub mod mapped;
pub mod membarrier;
pub mod memory;
pub mod message;
pub mod mount;
pub mod mqueue;
pub mod pidfds;
pub mod precedence;
pub mod process;
pub mod ptrace;
pub mod seccomp;
pub mod signal;
pub mod socket;
pub mod sysv;
pub mod task;
pub mod tcp;
pub mod tty;
pub mod uring;
pub mod xstate;
