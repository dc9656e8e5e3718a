//! The application's cgroup, and those that it made below.

use super::error::CheckpointError;
use crate::bpf::features::cgroup2_mount;
use crate::bpf::iter::Tasks;
use crate::model::frozen::{Blocker, CgroupBelow, Owner, Process};
use crate::model::ids::Pid;
use crate::sys::cgroup::{Cgroup, below, of_process};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Settings that every cgroup has, with what they are in a new one.
const DEFAULTS: &[(&str, &str)] = &[
    ("cgroup.type", "domain"),
    ("cgroup.freeze", "0"),
    ("cgroup.controllers", ""),
    ("cgroup.subtree_control", ""),
    ("cgroup.max.depth", "max"),
    ("cgroup.max.descendants", "max"),
];

/// What is set of an application's own cgroup, with what it is in a new one.
const SETTINGS: &[(&str, &str)] = &[
    ("cgroup.max.depth", "max"),
    ("cgroup.max.descendants", "max"),
    ("cgroup.pressure", "1"),
    ("cpuset.cpus", ""),
    ("cpuset.mems", ""),
    ("cpuset.cpus.exclusive", ""),
    ("cpuset.cpus.partition", "member"),
    ("cpu.weight", "100"),
    ("cpu.idle", "0"),
    ("cpu.max", "max 100000"),
    ("cpu.max.burst", "0"),
    ("cpu.uclamp.min", "0.00"),
    ("cpu.uclamp.max", "max"),
    ("memory.min", "0"),
    ("memory.low", "0"),
    ("memory.high", "max"),
    ("memory.max", "max"),
    ("memory.oom.group", "0"),
    ("memory.swap.high", "max"),
    ("memory.swap.max", "max"),
    ("memory.zswap.max", "max"),
    ("memory.zswap.writeback", "1"),
    ("pids.max", "max"),
    ("io.weight", "default 100"),
    ("io.bfq.weight", "default 100"),
    ("io.max", ""),
    ("io.latency", ""),
    ("io.prio.class", "no-change"),
    ("hugetlb.2MB.max", "max"),
    ("hugetlb.2MB.rsvd.max", "max"),
    ("hugetlb.1GB.max", "max"),
    ("hugetlb.1GB.rsvd.max", "max"),
];

/// What an application's own cgroup was told beside the defaults. Files are missing where their
/// controller is not enabled.
#[must_use]
pub fn settings(top: &Path) -> Vec<(String, String)> {
    let told = SETTINGS.iter().filter_map(|(file, default)| {
        let text = fs::read_to_string(top.join(file)).ok()?;
        let text = text.trim_end();
        (text != *default).then(|| ((*file).to_owned(), text.to_owned()))
    });
    let mut told: Vec<_> = told.collect();
    if told.iter().any(|(file, _)| file == "cpu.idle") {
        // That of what is idle follows from it.
        told.retain(|(file, _)| file != "cpu.weight");
    }
    told
}

/// Why cgroups below that of the application cannot be made again.
///
/// # Errors
/// They cannot be read.
pub fn blockers(top: &Cgroup, tasks: &Tasks) -> Result<Vec<Blocker>, CheckpointError> {
    let paths = below(top.path()).map_err(CheckpointError::io("read", top.path()))?;
    Ok(not_plain(top, tasks, &paths))
}

fn not_plain(top: &Cgroup, tasks: &Tasks, paths: &[String]) -> Vec<Blocker> {
    let Some(first) = tasks.processes.first() else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for path in paths {
        for (file, default) in DEFAULTS {
            let Ok(text) = fs::read_to_string(top.path().join(path).join(file)) else {
                continue;
            };
            if text.trim_end() != *default {
                found.push(Blocker {
                    pid: Pid(first.pid.cast_signed()),
                    fd: None,
                    object: format!("cgroup {path} below that of the application"),
                    reason: format!(
                        "its {file} is {:?}; only plain cgroups without controllers are carried \
                         yet",
                        text.trim_end()
                    ),
                });
            }
        }
    }
    found
}

/// Reads the cgroups of the frozen application and which of them each process is in.
///
/// # Errors
/// They cannot be read, or one is not carried.
pub fn read(
    top: &Cgroup,
    tasks: &Tasks,
    processes: &mut [Process],
) -> Result<Vec<CgroupBelow>, CheckpointError> {
    let paths = below(top.path()).map_err(CheckpointError::io("read", top.path()))?;
    let blockers = not_plain(top, tasks, &paths);
    if !blockers.is_empty() {
        return Err(CheckpointError::Blocked(blockers));
    }
    if paths.is_empty() {
        return Ok(Vec::new());
    }
    let mount = cgroup2_mount().map_err(CheckpointError::io("find", "cgroup2"))?;
    for process in processes {
        let path = of_process(process.pid)?;
        let path = mount.join(path.trim_start_matches('/'));
        let below = path.strip_prefix(top.path()).map_err(|_| {
            CheckpointError::Unstable(format!("PID {} left its cgroup", process.pid))
        })?;
        process.cgroup = below.to_string_lossy().into_owned();
    }
    let owner = |path: &Path| -> Result<Owner, CheckpointError> {
        let stat = fs::metadata(path).map_err(CheckpointError::io("stat", path))?;
        Ok(Owner {
            mode: stat.mode() & 0o7777,
            uid: stat.uid(),
            gid: stat.gid(),
        })
    };
    paths
        .into_iter()
        .map(|path| {
            let dir = top.path().join(&path);
            let files = ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control"];
            let files = files.map(|file| Ok((file.to_owned(), owner(&dir.join(file))?)));
            Ok(CgroupBelow {
                owner: owner(&dir)?,
                files: files.into_iter().collect::<Result<_, CheckpointError>>()?,
                path,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_set_is_told() {
        let top = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(top.path().join(file), text).unwrap();
        write("memory.max", "1073741824\n");
        write("memory.high", "max\n");
        write("cpu.weight", "100\n");
        write("io.max", "8:0 rbps=1 wbps=max\n8:16 rbps=max wbps=2\n");
        let own = |file: &str, text: &str| (file.to_owned(), text.to_owned());
        let limits = [
            own("memory.max", "1073741824"),
            own("io.max", "8:0 rbps=1 wbps=max\n8:16 rbps=max wbps=2"),
        ];
        assert_eq!(settings(top.path()), limits);
        write("cpu.weight", "3\n");
        write("cpu.idle", "1\n");
        assert_eq!(settings(top.path())[0], own("cpu.idle", "1"));
    }
}
