//! Files of pseudo filesystems (procfs, sysfs, cgroup2): the kernel makes their text up as it
//! is read, so a name and an offset is all there is to carry. Inode numbers and sizes are the
//! running kernel's own and say nothing in the next one.

use crate::bpf::events::{FileRec, PressureRec};
use crate::model::frozen::{PressureTrigger, proc_owner};

/// Superblock magic numbers (include/uapi/linux/magic.h).
const PROC: u64 = 0x9fa0;
const SYSFS: u64 = 0x6265_6572;
const CGROUP2: u64 = 0x6367_7270;

const S_IFMT: u32 = 0o170_000;
const S_IFREG: u32 = 0o100_000;

/// Files of /proc/PID that hold on to the address space they were opened on
/// (`proc_mem_open()`), which a restored process replaces.
const OF_ADDRESS_SPACE: &[&str] = &[
    "auxv",
    "clear_refs",
    "environ",
    "map_files",
    "maps",
    "mem",
    "numa_maps",
    "pagemap",
    "smaps",
    "smaps_rollup",
];

/// Whether a file lies on a pseudo filesystem whose files are known by name alone.
pub fn is_pseudo(magic: u64) -> bool {
    [PROC, SYSFS, CGROUP2].contains(&magic)
}

/// Why a pseudo file at `path` is not carried; `None` when it is.
pub fn refusal(path: &[u8], rec: &FileRec) -> Option<&'static str> {
    let text = String::from_utf8_lossy(path);
    let owner = proc_owner(path)?;
    if owner.0.cast_unsigned() != rec.tgid {
        return Some("it shows another process; close it before the update");
    }
    if rec.refs > 1 {
        return Some(
            "it is open under more than one descriptor, which is not carried yet for files of \
             /proc/PID; close it before the update",
        );
    }
    if rec.pos > 0 && rec.mode & S_IFMT == S_IFREG {
        // Moving to an offset has the kernel make the text up to there at once (traverse()),
        // of a process that is not what it was yet.
        return Some("it has been read in part; close it before the update");
    }
    let rest = text.splitn(4, '/').nth(3).unwrap_or_default();
    if rest.split('/').any(|part| OF_ADDRESS_SPACE.contains(&part)) {
        return Some("it shows an address space; close it before the update");
    }
    // Another thread does not exist yet when the process opens its files.
    let thread = rest.strip_prefix("task/")?.split('/').next()?;
    let own = thread.is_empty() || thread.parse() == Ok(rec.tgid);
    (!own).then_some("it shows a thread; close it before the update")
}

/// What was written to a file of pressure stall information.
pub fn trigger(rec: &PressureRec) -> PressureTrigger {
    PressureTrigger {
        // Of interrupts there is `full` alone, PSI_IRQ_FULL, which is even.
        full: rec.state & 1 == 1 || rec.state == 6,
        threshold: rec.threshold_ns / 1000,
        window: rec.window_ns / 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> FileRec {
        FileRec {
            tgid: 77,
            mode: S_IFREG | 0o444,
            refs: 1,
            ..FileRec::default()
        }
    }

    fn carried(path: &str, rec: &FileRec) -> bool {
        refusal(path.as_bytes(), rec).is_none()
    }

    #[test]
    fn what_is_read_by_name_is_carried() {
        for path in [
            "/proc/meminfo",
            "/proc/77/stat",
            "/proc/77/task",
            "/proc/77/task/77/stat",
            "/proc/77/net/tcp",
            "/sys/fs/cgroup/tracker/redis/memory.current",
            "/proc/pressure/cpu",
        ] {
            assert!(carried(path, &open()), "{path}");
        }
    }

    #[test]
    fn what_has_state_or_another_owner_is_not() {
        for path in [
            "/proc/77/mem",
            "/proc/77/task/77/maps",
            "/proc/77/map_files/1000-2000",
            "/proc/77/task/78/stat",
            "/proc/78/stat",
        ] {
            assert!(!carried(path, &open()), "{path}");
        }
        let shared = FileRec { refs: 2, ..open() };
        assert!(!carried("/proc/77/stat", &shared));
        assert!(carried("/proc/meminfo", &shared));
        let read = FileRec { pos: 9, ..open() };
        assert!(!carried("/proc/77/stat", &read));
        assert!(carried("/proc/meminfo", &read));
    }
}
