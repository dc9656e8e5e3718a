//! The application's cgroup and those below it.

use super::{RestoreError, RestoreOptions};
use crate::model::frozen::{Application, CgroupBelow, Owner};
use crate::model::plan::Step;
use crate::sys::cgroup::move_to;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Component, Path, PathBuf};

fn top(app: &Application, options: &RestoreOptions) -> Option<PathBuf> {
    let cgroup = &app.header.cgroup;
    (!cgroup.is_empty()).then(|| options.cgroup_root.join(cgroup))
}

/// Opens the application's cgroup, which is made if it is not there and thawed if a
/// checkpoint left it frozen. Those below it are made too.
///
/// # Errors
/// A cgroup cannot be made.
pub fn make_all(app: &Application, options: &RestoreOptions) -> Result<Option<File>, RestoreError> {
    let Some(path) = top(app, options) else {
        return Ok(None);
    };
    let told = |what: &str| RestoreError::io(format!("{what} {}", path.display()));
    fs::create_dir_all(&path).map_err(told("mkdir"))?;
    fs::write(path.join("cgroup.freeze"), "0").map_err(told("thaw"))?;
    for below in &app.header.cgroups {
        make(&path, below)?;
    }
    File::open(&path).map(Some).map_err(told("open"))
}

fn make(top: &Path, below: &CgroupBelow) -> Result<(), RestoreError> {
    let path = inside(top, &below.path)?;
    fs::create_dir_all(&path).map_err(RestoreError::io(format!("mkdir {}", path.display())))?;
    give(&path, below.owner)?;
    for (file, owner) in &below.files {
        give(&inside(&path, file)?, *owner)?;
    }
    Ok(())
}

/// A path that leads nowhere else: images come from outside.
fn inside(top: &Path, path: &str) -> Result<PathBuf, RestoreError> {
    let path = Path::new(path);
    let plain = |part: Component<'_>| matches!(part, Component::Normal(_));
    if path.components().all(plain) {
        return Ok(top.join(path));
    }
    Err(RestoreError::System {
        what: format!("find cgroup {} below {}", path.display(), top.display()),
        errno: nix::errno::Errno::EINVAL,
    })
}

fn give(path: &Path, owner: Owner) -> Result<(), RestoreError> {
    let told = |what: &str| RestoreError::io(format!("{what} {}", path.display()));
    chown(path, Some(owner.uid), Some(owner.gid)).map_err(told("chown"))?;
    fs::set_permissions(path, Permissions::from_mode(owner.mode)).map_err(told("chmod"))
}

/// Moves every process that was born to the cgroup it was in.
///
/// # Errors
/// One cannot be moved.
pub fn move_all(
    app: &Application,
    options: &RestoreOptions,
    steps: &[Step],
) -> Result<(), RestoreError> {
    let Some(top) = top(app, options) else {
        return Ok(());
    };
    let born = |pid| {
        let is = |step: &Step| matches!(step, Step::Fork { child, .. } if *child == pid);
        steps.iter().any(is)
    };
    let moved = app.processes.iter().filter(|p| !p.cgroup.is_empty());
    for process in moved.filter(|p| born(p.pid)) {
        let path = inside(&top, &process.cgroup)?;
        move_to(&path, process.pid).map_err(|error| {
            let what = format!("move PID {} to {}", process.pid, path.display());
            RestoreError::io(what)(error.source)
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_cgroup_lies_outside() {
        let top = Path::new("/sys/fs/cgroup/tracker/x");
        assert_eq!(inside(top, "a/b").unwrap(), top.join("a/b"));
        assert_eq!(inside(top, "").unwrap(), top.join(""));
        for path in ["/etc", "../y", "a/../../y"] {
            assert!(inside(top, path).is_err(), "{path}");
        }
    }
}
