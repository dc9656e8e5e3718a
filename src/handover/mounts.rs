//! Filesystems that the real init would mount later and restored applications need now.

use nix::mount::{MsFlags, mount};
use nix::sys::statvfs::{FsFlags, statvfs};
use procfs::process::Process;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

struct Mount {
    target: &'static str,
    kind: &'static str,
    flags: MsFlags,
    options: &'static str,
}

const PLAIN: MsFlags = MsFlags::MS_NOSUID
    .union(MsFlags::MS_NODEV)
    .union(MsFlags::MS_NOEXEC);

const fn api(target: &'static str, kind: &'static str, options: &'static str) -> Mount {
    Mount {
        target,
        kind,
        flags: PLAIN,
        options,
    }
}

/// In the order they are needed, with the options systemd gives them, so that it finds
/// them as it would have made them.
const MOUNTS: [Mount; 9] = [
    api("/proc", "proc", ""),
    api("/sys", "sysfs", ""),
    Mount {
        target: "/dev",
        kind: "devtmpfs",
        flags: MsFlags::MS_NOSUID,
        options: "mode=0755",
    },
    Mount {
        target: "/dev/pts",
        kind: "devpts",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC),
        options: "mode=0620,gid=5",
    },
    Mount {
        target: "/dev/shm",
        kind: "tmpfs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        options: "mode=1777",
    },
    Mount {
        target: "/run",
        kind: "tmpfs",
        flags: MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV),
        options: "mode=0755",
    },
    api(
        "/sys/fs/cgroup",
        "cgroup2",
        "nsdelegate,memory_recursiveprot",
    ),
    api("/sys/fs/bpf", "bpf", "mode=0700"),
    api("/dev/mqueue", "mqueue", ""),
];

/// Whether a filesystem of this type is mounted there before the real init runs; `way` leads from
/// its root to what is wanted.
#[must_use]
pub fn is_early(point: &[u8], way: &[u8], kind: &str) -> bool {
    if kind == "tmpfs" && !way.is_empty() {
        // A new one is empty.
        return false;
    }
    let here = |mount: &Mount| mount.target.as_bytes() == point && mount.kind == kind;
    point == b"/" || MOUNTS.iter().any(here)
}

/// Mounts what is missing and makes root writable; what could not be done is returned.
#[must_use]
pub fn prepare() -> Vec<String> {
    let mut failures = Vec::new();
    let read_only = statvfs("/").is_ok_and(|root| root.flags().contains(FsFlags::ST_RDONLY));
    if read_only
        && let Err(errno) = mount(
            None::<&str>,
            "/",
            None::<&str>,
            MsFlags::MS_REMOUNT,
            None::<&str>,
        )
    {
        failures.push(format!("remount / writable: {errno}"));
    }
    for wanted in &MOUNTS {
        let target = Path::new(wanted.target);
        if mount_points().iter().any(|point| point == target) {
            continue;
        }
        // An existing directory is as good; a missing one shows in the mount's error.
        let _ = DirBuilder::new().mode(0o755).create(target);
        let options = Some(wanted.options).filter(|text| !text.is_empty());
        let kind = Some(wanted.kind);
        if let Err(errno) = mount(kind, target, kind, wanted.flags, options) {
            failures.push(format!(
                "mount {} on {}: {errno}",
                wanted.kind, wanted.target
            ));
        }
    }
    failures
}

/// Nothing before /proc is mounted.
fn mount_points() -> Vec<PathBuf> {
    let mounts = Process::myself().and_then(|process| process.mountinfo());
    mounts.map_or_else(
        |_| Vec::new(),
        |mounts| mounts.0.into_iter().map(|m| m.mount_point).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_early_is_known() {
        let is_early =
            |point: &str, way: &str, kind| is_early(point.as_bytes(), way.as_bytes(), kind);
        assert!(is_early("/", "srv/data", "ext4"));
        assert!(is_early("/dev", "null", "devtmpfs"));
        assert!(is_early("/run", "", "tmpfs"));
        assert!(!is_early("/run", "some/directory", "tmpfs"));
        assert!(!is_early("/sys/kernel/debug", "tracing", "debugfs"));
        assert!(!is_early("/dev/hugepages", "", "hugetlbfs"));
        assert!(!is_early("/srv", "", "ext4"));
    }
}
