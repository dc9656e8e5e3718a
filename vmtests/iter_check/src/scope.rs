//! Passes limited to a cgroup.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use tracker::bpf::features::cgroup2_mount;
use tracker::bpf::iter::{Iterators, Scope};

use crate::sys::fork_pause;

pub fn cgroup_scope(iterators: &mut Iterators) -> Result<()> {
    let outer = cgroup2_mount()?.join(format!("iter-check-{}", std::process::id()));
    let inner = outer.join("inner");
    let beside = outer.join("beside");
    for dir in [&outer, &inner, &beside] {
        fs::create_dir(dir).with_context(|| format!("Create {}", dir.display()))?;
    }
    let child = fork_pause()?;
    fs::write(inner.join("cgroup.procs"), child.0.to_string())?;
    let pid = child.0.cast_unsigned();
    let result = (|| {
        for (dir, expected) in [(&outer, Some(pid)), (&inner, Some(pid)), (&beside, None)] {
            let scope = Scope::Cgroup(fs::metadata(dir)?.ino());
            let tasks = iterators.tasks(scope)?;
            ensure!(
                tasks.threads.iter().map(|t| t.tid).eq(expected),
                "threads of {dir:?}"
            );
            ensure!(
                tasks.processes.iter().map(|p| p.pid).eq(expected),
                "processes of {dir:?}"
            );
            let files = iterators.files(scope)?.files;
            ensure!(
                files.is_empty() == expected.is_none(),
                "descriptors of {dir:?}"
            );
            ensure!(
                files.iter().all(|f| Some(f.rec.tgid) == expected),
                "foreign descriptors"
            );
            let vmas = iterators.vmas(scope)?;
            ensure!(vmas.is_empty() == expected.is_none(), "mappings of {dir:?}");
            ensure!(
                vmas.iter().all(|v| Some(v.tgid) == expected),
                "foreign mappings"
            );
        }
        let inner_id = fs::metadata(&inner)?.ino();
        let thread = iterators.threads(Scope::Process(pid))?.threads[0];
        ensure!(
            thread.cgroup_id == inner_id,
            "cgroup id {}",
            thread.cgroup_id
        );
        Ok(())
    })();
    drop(child);
    for dir in [&inner, &beside, &outer] {
        fs::remove_dir(dir).with_context(|| format!("Remove {}", dir.display()))?;
    }
    result
}
