//! Keeps programs attached to a cgroup of their own.
//!
//! With the first program of a kind the kernel patches its own code where packets go in and out
//! (`cgroup_bpf_enabled_key`), and again when the last one goes. QEMU's TCG now and then
//! executes the breakpoint that stands there meanwhile once more, when nobody knows of it any
//! longer, and the guest panics. With these here `tracker`'s network lock patches nothing.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};

use crate::bpf::{bpf, pair};

/// The cgroup, which nothing is ever in.
const CGROUP: &str = "/sys/fs/cgroup/harness";

// linux/bpf.h
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_SKB: u32 = 8;
const CGROUP_INET_INGRESS: u32 = 0;
const CGROUP_INET_EGRESS: u32 = 1;
const F_ALLOW_MULTI: u32 = 2;

/// `r0 = 1; exit`: the packet may pass.
const PASS: [u64; 2] = [0x0000_0001_0000_00b7, 0x95];

/// Attaches them; they stay with the cgroup.
///
/// # Errors
/// If the kernel refuses.
pub fn keep_enabled() -> Result<()> {
    fs::create_dir_all(CGROUP).with_context(|| format!("Create {CGROUP}"))?;
    let cgroup = File::open(CGROUP).with_context(|| format!("Open {CGROUP}"))?;
    let license = c"GPL";
    // prog_type and insn_cnt, insns, license
    let mut load = [
        pair(PROG_TYPE_CGROUP_SKB, u32::try_from(PASS.len())?),
        PASS.as_ptr() as u64,
        license.as_ptr() as u64,
    ];
    let program = bpf(PROG_LOAD, &mut load).context("bpf(BPF_PROG_LOAD)")?;
    for kind in [CGROUP_INET_INGRESS, CGROUP_INET_EGRESS] {
        let mut attach = [
            pair(cgroup.as_raw_fd().unsigned_abs(), program.unsigned_abs()),
            pair(kind, F_ALLOW_MULTI),
        ];
        bpf(PROG_ATTACH, &mut attach).context("bpf(BPF_PROG_ATTACH)")?;
    }
    nix::unistd::close(program).context("Close the program")
}
