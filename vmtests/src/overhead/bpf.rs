//! The kernel's statistics of the BPF programs that are loaded, by bpf(2).

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result};
use nix::errno::Errno;

use crate::bpf::{bpf, pair};

/// Runs and nanoseconds by program name, of all programs of that name.
pub(super) type Sums = BTreeMap<String, (u64, u64)>;

/// Descriptors of all loaded programs.
pub(super) struct Programs(Vec<OwnedFd>);

/// Commands of bpf(2).
const PROG_GET_NEXT_ID: libc::c_int = 11;
const PROG_GET_FD_BY_ID: libc::c_int = 13;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// Places in `struct bpf_prog_info` of linux/bpf.h, in bytes.
const NAME: usize = 64;
const NAME_LEN: usize = 16;
const RUN_TIME: usize = 192;
const RUN_COUNT: usize = 200;
const INFO_LEN: usize = 208;

impl Programs {
    /// Opens all that are loaded now. To ask them later makes no descriptor,
    /// which a hook might see.
    pub fn open() -> Result<Programs> {
        let mut programs = Vec::new();
        let mut id = 0u32;
        loop {
            let mut next = [id.into(), 0];
            match bpf(PROG_GET_NEXT_ID, &mut next) {
                Ok(_) => id = u32::try_from(next[0] >> 32)?,
                Err(Errno::ENOENT) => return Ok(Programs(programs)),
                Err(errno) => return Err(errno).context("bpf(BPF_PROG_GET_NEXT_ID)"),
            }
            match bpf(PROG_GET_FD_BY_ID, &mut [id.into(), 0]) {
                // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
                Ok(fd) => programs.push(unsafe { OwnedFd::from_raw_fd(fd) }),
                // It was unloaded meanwhile.
                Err(Errno::ENOENT) => {}
                Err(errno) => return Err(errno).context("bpf(BPF_PROG_GET_FD_BY_ID)"),
            }
        }
    }

    /// What they have done since `kernel.bpf_stats_enabled` was set.
    pub fn sums(&self) -> Result<Sums> {
        let mut sums = Sums::new();
        for program in &self.0 {
            let mut info = [0u64; INFO_LEN / 8];
            let place = info.as_mut_ptr() as u64;
            let fd = program.as_raw_fd().unsigned_abs();
            bpf(
                OBJ_GET_INFO_BY_FD,
                &mut [pair(fd, u32::try_from(INFO_LEN)?), place],
            )
            .context("bpf(BPF_OBJ_GET_INFO_BY_FD)")?;
            let name: Vec<u8> = info[NAME / 8..(NAME + NAME_LEN) / 8]
                .iter()
                .flat_map(|word| word.to_ne_bytes())
                .take_while(|&byte| byte != 0)
                .collect();
            let sum = sums
                .entry(String::from_utf8_lossy(&name).into_owned())
                .or_default();
            sum.0 += info[RUN_COUNT / 8];
            sum.1 += info[RUN_TIME / 8];
        }
        Ok(sums)
    }
}
