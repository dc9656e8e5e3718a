//! Keeps programs attached to a cgroup of their own.
//!
//! With the first program of a kind the kernel patches its own code where packets go in and out
//! (`cgroup_bpf_enabled_key`), and again when the last one goes. QEMU's TCG now and then
//! executes the breakpoint that stands there meanwhile once more, when nobody knows of it any
//! longer, and the guest panics. With these here `tracker`'s network lock patches nothing.

use std::fs::{self, File};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use nix::errno::Errno;

/// The cgroup, which nothing is ever in.
const CGROUP: &str = "/sys/fs/cgroup/harness";

// linux/bpf.h
const PROG_LOAD: libc::c_int = 5;
const PROG_ATTACH: libc::c_int = 8;
const PROG_TYPE_CGROUP_SKB: u64 = 8;
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
    let load = [
        PROG_TYPE_CGROUP_SKB | (PASS.len() as u64) << 32,
        PASS.as_ptr() as u64,
        license.as_ptr() as u64,
    ];
    let program = bpf(PROG_LOAD, &load).context("bpf(BPF_PROG_LOAD)")?;
    for kind in [CGROUP_INET_INGRESS, CGROUP_INET_EGRESS] {
        let target = u64::from(cgroup.as_raw_fd().unsigned_abs());
        let attach = [
            target | u64::from(program.unsigned_abs()) << 32,
            u64::from(kind) | u64::from(F_ALLOW_MULTI) << 32,
        ];
        bpf(PROG_ATTACH, &attach).context("bpf(BPF_PROG_ATTACH)")?;
    }
    nix::unistd::close(program).context("Close the program")
}

/// bpf(2) with the first words of its argument; the rest counts as zero.
fn bpf(command: libc::c_int, attr: &[u64]) -> nix::Result<libc::c_int> {
    // SAFETY: the argument is as long as said, and so is all that its addresses name.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    Errno::result(result).map(|fd| libc::c_int::try_from(fd).unwrap_or(-1))
}
