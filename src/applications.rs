//! Applications by name: their cgroup, and the record of how they were started.
//!
//! `tracker run --name N` uses the cgroup `tracker/N` below the cgroup2 mount
//! and leaves `/run/tracker/N.json`, from which a checkpoint learns the command
//! that starts the application afresh should a restore ever fail.

use crate::bpf::features::cgroup2_mount;
use crate::model::ids::Pid;
use crate::sys::cgroup::{Cgroup, CgroupError, enable};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Parent of the cgroups of all applications, below the cgroup2 mount.
pub const PARENT_CGROUP: &str = "tracker";

/// Where run records lie.
pub const STATE_DIR: &str = "/run/tracker";

/// Why an application's cgroup or record could not be used.
#[derive(Debug, thiserror::Error)]
pub enum ApplicationError {
    /// Not a name.
    #[error(
        "{0:?} is no application name; use 1 to 64 letters, digits, '.', '_' or '-', not starting with '.' or '-'"
    )]
    Name(String),
    /// Nothing of this name.
    #[error("No application is named {0}; tracker status lists those that run")]
    Unknown(String),
    /// The operating system refused.
    #[error("{operation} {path}: {source}; run as root with cgroup2 mounted")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The cgroup cannot be read.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A record that cannot be read.
    #[error("{path} is damaged: {source}; remove it")]
    Record {
        /// The record.
        path: PathBuf,
        /// What is wrong with it.
        source: serde_json::Error,
    },
}

fn io_error<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> ApplicationError + 'a {
    move |source| ApplicationError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// How an application was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunRecord {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Working directory.
    pub directory: String,
    /// Cgroup path below the cgroup2 mount.
    pub cgroup: String,
}

/// An application by name; it need not run.
#[derive(Clone, Debug)]
pub struct NamedApplication {
    name: String,
    cgroup: PathBuf,
}

impl NamedApplication {
    /// Names an application.
    ///
    /// # Errors
    /// The name is not valid, or cgroup2 is not mounted.
    pub fn new(name: &str) -> Result<Self, ApplicationError> {
        let valid = !name.is_empty()
            && name.len() <= 64
            && !name.starts_with(['.', '-'])
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
        if !valid {
            return Err(ApplicationError::Name(name.into()));
        }
        let mount = cgroup2_mount().map_err(io_error("find", Path::new("cgroup2")))?;
        Ok(Self {
            name: name.into(),
            cgroup: mount.join(PARENT_CGROUP).join(name),
        })
    }

    /// Every application that has a cgroup.
    ///
    /// # Errors
    /// cgroup2 is not mounted or cannot be read.
    pub fn all() -> Result<Vec<Self>, ApplicationError> {
        let mount = cgroup2_mount().map_err(io_error("find", Path::new("cgroup2")))?;
        let parent = mount.join(PARENT_CGROUP);
        let entries = match fs::read_dir(&parent) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_error("read", &parent))?,
        };
        let mut names: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect();
        names.sort_unstable();
        names.iter().map(|name| Self::new(name)).collect()
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Absolute path of its cgroup.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Its cgroup as a path below the mount, as images carry it.
    #[must_use]
    pub fn cgroup_below_mount(&self) -> String {
        format!("{PARENT_CGROUP}/{}", self.name)
    }

    /// Processes in its cgroup and below; none when it does not run.
    ///
    /// # Errors
    /// The cgroup cannot be read.
    pub fn pids(&self) -> Result<Vec<Pid>, ApplicationError> {
        match Cgroup::open(&self.cgroup).and_then(|cgroup| cgroup.members()) {
            Err(e) if e.source.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            pids => Ok(pids?),
        }
    }

    /// Makes its cgroup, with the memory and pids controllers where the machine has them.
    ///
    /// # Errors
    /// mkdir(2) fails.
    pub fn make_cgroup(&self) -> Result<(), ApplicationError> {
        let parent = self.cgroup.parent().unwrap_or(Path::new("/"));
        for (dir, above) in [(parent, parent.parent()), (&self.cgroup, Some(parent))] {
            if let Some(above) = above {
                // Accounting is welcome, not needed.
                enable(above, ["memory", "pids"]);
            }
            match DirBuilder::new().mode(0o755).create(dir) {
                Err(e) if e.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(io_error("mkdir", dir)(e));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Moves a process into its cgroup; 0 means the caller.
    ///
    /// # Errors
    /// The process is gone or the cgroup refuses it.
    pub fn add_process(&self, pid: i32) -> Result<(), ApplicationError> {
        let path = self.cgroup.join("cgroup.procs");
        fs::write(&path, pid.to_string()).map_err(io_error("write", &path))
    }

    /// Waits until no process is left in its cgroup (cgroup.events, `populated 0`).
    ///
    /// # Errors
    /// The cgroup cannot be read or polled.
    pub fn wait_until_empty(&self) -> Result<(), ApplicationError> {
        let path = self.cgroup.join("cgroup.events");
        let mut file = match File::open(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            file => file.map_err(io_error("open", &path))?,
        };
        loop {
            let mut text = String::new();
            file.rewind().map_err(io_error("seek", &path))?;
            match file.read_to_string(&mut text) {
                // ENODEV: the cgroup itself was removed.
                Err(e) if e.raw_os_error() == Some(Errno::ENODEV as i32) => return Ok(()),
                result => result.map_err(io_error("read", &path))?,
            };
            if text.lines().any(|line| line == "populated 0") {
                return Ok(());
            }
            let mut fds = [PollFd::new(file.as_fd(), PollFlags::POLLPRI)];
            match poll(&mut fds, PollTimeout::NONE) {
                Err(Errno::EINTR) | Ok(_) => {}
                Err(e) => return Err(io_error("poll", &path)(e.into())),
            }
        }
    }

    fn record_path(&self) -> PathBuf {
        Path::new(STATE_DIR).join(format!("{}.json", self.name))
    }

    /// How it was started; `None` when `tracker run` did not start it.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn record(&self) -> Result<Option<RunRecord>, ApplicationError> {
        let path = self.record_path();
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .map_err(|source| ApplicationError::Record { path, source }),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error("read", &path)(e)),
        }
    }

    /// Leaves a record, whole or not at all.
    ///
    /// # Errors
    /// The state directory cannot be written.
    pub fn write_record(&self, record: &RunRecord) -> Result<(), ApplicationError> {
        let dir = Path::new(STATE_DIR);
        fs::create_dir_all(dir).map_err(io_error("mkdir", dir))?;
        let path = self.record_path();
        let part = path.with_extension("part");
        let bytes =
            serde_json::to_vec_pretty(record).map_err(|source| ApplicationError::Record {
                path: path.clone(),
                source,
            })?;
        OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&part)
            .and_then(|mut file| file.write_all(&bytes))
            .map_err(io_error("write", &part))?;
        fs::rename(&part, &path).map_err(io_error("rename", &path))
    }
}
