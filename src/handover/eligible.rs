//! What speaks against an update before anything is touched, beside what capture finds.

use crate::applications::NamedApplication;
use crate::model::frozen::{Blocker, PAGE_SIZE};
use crate::model::ids::Pid;
use std::fs;

/// PIDs below this belong to the kernel threads of the next kernel: 6.12 had up to 190 of
/// them when its init started.
pub(super) const FIRST_PID: i32 = 300;

/// What an image takes beside pages: metadata, queues, the superblock. In bytes.
const METADATA: u64 = 32 << 20;

/// What each page takes beside itself.
const CHECKSUM: u64 = 4;

/// Objects of one application that would not survive the kexec.
#[must_use]
pub fn blockers(pids: &[Pid]) -> Vec<Blocker> {
    let low = pids.iter().filter(|pid| pid.0 < FIRST_PID);
    low.map(|pid| Blocker {
        pid: *pid,
        fd: None,
        object: format!("PID {pid}"),
        reason: format!(
            "a kernel thread of the next kernel may hold it; start the application with PIDs \
             from {FIRST_PID} on (sysctl kernel.ns_last_pid)"
        ),
    })
    .collect()
}

/// Bytes the image of these applications takes at most; 0 per application whose cgroup has
/// no memory controller.
#[must_use]
pub fn needed(applications: &[NamedApplication]) -> u64 {
    let pages = applications.iter().map(|application| {
        let stat = application.cgroup().join("memory.stat");
        anonymous(&fs::read_to_string(stat).unwrap_or_default())
    });
    let pages = pages.sum::<u64>();
    METADATA + pages + pages / PAGE_SIZE * CHECKSUM
}

/// Bytes that exist in memory only, from a cgroup's memory.stat.
fn anonymous(stat: &str) -> u64 {
    let lines = stat.lines().filter_map(|line| line.split_once(' '));
    lines
        .filter(|(name, _)| ["anon", "shmem"].contains(name))
        .filter_map(|(_, bytes)| bytes.parse::<u64>().ok())
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn low_pids_block() {
        let found = blockers(&[20_000, 120, 300].map(Pid));
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, Pid(120));
    }

    #[test]
    fn memory_without_a_file_counts() {
        let stat = "anon 4096\nfile 1000000\nkernel 7\nshmem 8192\nanon_thp 4096\n";
        assert_eq!(anonymous(stat), 12288);
        assert_eq!(anonymous(""), 0);
    }
}
