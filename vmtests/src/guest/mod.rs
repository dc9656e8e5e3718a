//! The programs' side that runs inside the VM: init, control agent, cases.

pub mod agent;
pub mod case;
mod cgroup_bpf;
pub mod init;
pub mod kexec;
pub mod reaper;
mod waker;
