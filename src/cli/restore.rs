//! `tracker restore`.

use crate::bpf::features::cgroup2_mount;
use crate::error::ExitCode;
use crate::image::{DirectoryStore, Pages, Store, decode};
use crate::model::ids::Pid;
use crate::restore::{RestoreError, RestoreOptions, pids, restore};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Where `tracker checkpoint` pins network locks, by the name of the application.
const NETWORK_LOCKS: &str = "/sys/fs/bpf/tracker";

/// Arguments of `tracker restore`.
#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    /// Image directory that tracker checkpoint made
    #[arg(long, value_name = "DIR")]
    image: PathBuf,

    /// Return as soon as the application runs
    #[arg(long, conflicts_with = "wait")]
    detach: bool,

    /// Stay until the application ends; exit 0 if it ended with 0, else 1 (default)
    #[arg(long)]
    wait: bool,
}

/// Restores the one application of an image.
///
/// # Errors
/// The image is invalid, or the application cannot be restored.
pub fn run(args: &RestoreArgs) -> Result<ExitCode, RestoreError> {
    let store = DirectoryStore::open(&args.image)?;
    let image = decode(&store.metadata()?)?;
    let [app] = image.applications.as_slice() else {
        return Err(RestoreError::NotOne(image.applications.len()));
    };
    let wait = !args.detach;
    if wait {
        // The restored processes become children of the nearest subreaper.
        nix::sys::prctl::set_child_subreaper(true)
            .map_err(RestoreError::system("prctl(PR_SET_CHILD_SUBREAPER)"))?;
    }
    let options = RestoreOptions {
        cgroup_root: cgroup2_mount().map_err(RestoreError::io("find cgroup2"))?,
        network_lock: Some(Path::new(NETWORK_LOCKS).join(&app.header.name)),
        early: false,
        led_elsewhere: BTreeSet::new(),
        spare: pids::all()?,
    };
    let restored = restore(app, Pages::new(&store, &image.slots), &options, || Ok(()))?;
    Ok(match restored.roots.first() {
        Some(first) if wait => wait_for_all(*first),
        _ => ExitCode::Done,
    })
}

/// Reaps what is reparented to this process until nothing is left; how `first` ended counts.
fn wait_for_all(first: Pid) -> ExitCode {
    let mut code = ExitCode::Difference;
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, 0)) if pid.as_raw() == first.0 => code = ExitCode::Done,
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return code,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::HasExitCode;

    #[test]
    fn an_image_that_is_not_there_is_no_crash() {
        let dir = tempfile::tempdir().unwrap();
        let args = RestoreArgs {
            image: dir.path().join("none"),
            detach: true,
            wait: false,
        };
        assert_eq!(run(&args).unwrap_err().exit_code(), ExitCode::ImageInvalid);
    }
}
