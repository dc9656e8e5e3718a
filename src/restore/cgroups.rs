//! The application's cgroup and those below it.

use super::{RestoreError, RestoreOptions};
use crate::model::frozen::{Application, CgroupBelow, Owner};
use crate::model::plan::Step;
use crate::sys::cgroup::{self, move_to};
use std::collections::BTreeSet;
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
    for (file, _) in &app.header.cgroup_settings {
        inside(&path, file)?;
    }
    enable(&path, app, options);
    for (file, text) in settings(app, Turn::First) {
        set(&path.join(file), text);
    }
    for below in &app.header.cgroups {
        make(&path, below)?;
    }
    File::open(&path).map(Some).map_err(told("open"))
}

/// When a setting of the application's own cgroup is put back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// Which CPUs and nodes it may use: before Linux 6.2 that undoes what its threads chose.
    First,
    /// Limits, which are not those of a restore.
    Last,
}

fn settings(app: &Application, turn: Turn) -> impl Iterator<Item = (&str, &str)> {
    let all = app.header.cgroup_settings.iter();
    let of = |file: &str| match file.starts_with("cpuset.") {
        true => Turn::First,
        false => Turn::Last,
    };
    all.filter(move |(file, _)| of(file) == turn)
        .map(|(file, text)| (file.as_str(), text.as_str()))
}

/// Enables the controllers of its settings above the application's cgroup. Whatever that gives,
/// setting them tells.
fn enable(top: &Path, app: &Application, options: &RestoreOptions) {
    let above: Vec<&Path> = top
        .ancestors()
        .skip(1)
        .take_while(|dir| dir.starts_with(&options.cgroup_root))
        .collect();
    let controllers = app.header.cgroup_settings.iter();
    let controllers = controllers.filter_map(|(file, _)| file.split_once('.'));
    let controllers: BTreeSet<&str> = controllers.map(|(controller, _)| controller).collect();
    for dir in above.into_iter().rev() {
        cgroup::enable(
            dir,
            controllers.iter().copied().filter(|name| *name != "cgroup"),
        );
    }
}

/// Puts back one setting, line by line as the kernel takes them. What it does not take is said, and
/// no reason to leave the application down.
fn set(file: &Path, text: &str) {
    // An empty text is a line, too.
    for line in text.split('\n') {
        if let Err(error) = fs::write(file, line) {
            let file = file.display();
            tracing::warn!("write {line:?} to {file}: {error}; set it by hand");
        }
    }
}

/// Limits the application as it was. To be called when it stands and the restorer, which is in its
/// cgroup, is gone: what a restore takes besides is not the application's.
pub fn limit(app: &Application, options: &RestoreOptions) {
    if let Some(top) = top(app, options) {
        settings(app, Turn::Last).for_each(|(file, text)| set(&top.join(file), text));
    }
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
    use crate::model::frozen::ApplicationHeader;

    #[test]
    fn settings_are_put_back_line_by_line() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("tracker/x");
        fs::create_dir_all(&own).unwrap();
        let app = Application {
            header: ApplicationHeader {
                cgroup: "tracker/x".into(),
                cgroup_settings: vec![
                    ("cpuset.cpus".into(), "0-1".into()),
                    ("io.max".into(), "8:0 rbps=1\n8:16 rbps=2".into()),
                ],
                ..ApplicationHeader::default()
            },
            ..Application::default()
        };
        let options = RestoreOptions {
            cgroup_root: root.path().to_owned(),
            network_lock: None,
            early: false,
            spare: 0..0,
            led_elsewhere: BTreeSet::new(),
        };
        make_all(&app, &options).unwrap();
        let read = |path: &str| fs::read_to_string(root.path().join(path)).ok();
        assert_eq!(read("tracker/x/cpuset.cpus").as_deref(), Some("0-1"));
        assert_eq!(read("tracker/x/io.max"), None);
        assert_eq!(
            read("tracker/cgroup.subtree_control").as_deref(),
            Some("+io")
        );
        limit(&app, &options);
        // A plain file keeps what was written last.
        assert_eq!(read("tracker/x/io.max").as_deref(), Some("8:16 rbps=2"));
    }

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
