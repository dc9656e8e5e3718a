//! Cgroups that the application made below its own.

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
