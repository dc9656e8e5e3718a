//! The cgroups that are tracked.

use crate::applications::PARENT_CGROUP;
use crate::bpf::features::cgroup2_mount;
use crate::model::ids::CgroupId;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A cgroup that is tracked with everything below it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    /// Its directory.
    pub path: PathBuf,
    /// Its id: the inode number of its directory.
    pub id: CgroupId,
    /// Depth below the root cgroup.
    pub level: u32,
}

/// A cgroup cannot be tracked.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// No cgroup v2.
    #[error("No cgroup v2 hierarchy is mounted; mount one at /sys/fs/cgroup")]
    NoCgroup2(#[source] io::Error),
    /// The directory cannot be used.
    #[error("Cgroup {path} cannot be opened; does it exist?")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not below the mount of cgroup v2.
    #[error("{path} is not below the cgroup v2 mount {mount}")]
    Outside {
        /// The directory.
        path: PathBuf,
        /// The mount.
        mount: PathBuf,
    },
}

impl Root {
    /// The parent of every cgroup that `tracker run` makes; created if it is missing.
    ///
    /// # Errors
    ///
    /// There is no cgroup v2, or the directory cannot be made.
    pub fn default_parent() -> Result<Self, RootError> {
        let path = cgroup2_mount()
            .map_err(RootError::NoCgroup2)?
            .join(PARENT_CGROUP);
        match fs::create_dir(&path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(RootError::Open { path, source })
            }
            _ => Self::open(&path),
        }
    }

    /// The cgroup at this directory.
    ///
    /// # Errors
    ///
    /// It does not exist or is no cgroup v2.
    pub fn open(path: &Path) -> Result<Self, RootError> {
        let mount = cgroup2_mount().map_err(RootError::NoCgroup2)?;
        let open = |source| RootError::Open {
            path: path.to_owned(),
            source,
        };
        let path = fs::canonicalize(path).map_err(open)?;
        let open = |source| RootError::Open {
            path: path.clone(),
            source,
        };
        let id = CgroupId(fs::metadata(&path).map_err(open)?.ino());
        let Ok(below) = path.strip_prefix(&mount) else {
            return Err(RootError::Outside { path, mount });
        };
        let level = u32::try_from(below.components().count()).unwrap_or(u32::MAX);
        Ok(Self { id, level, path })
    }

    /// Every cgroup of the subtree with its path below this one; empty for this one itself.
    #[must_use]
    pub fn subtree(&self) -> BTreeMap<CgroupId, PathBuf> {
        let mut found = BTreeMap::new();
        let mut todo = vec![self.path.clone()];
        while let Some(path) = todo.pop() {
            // A cgroup may go away at any time.
            let Ok(meta) = fs::metadata(&path) else {
                continue;
            };
            let below = path.strip_prefix(&self.path).unwrap_or(&path).to_owned();
            found.insert(CgroupId(meta.ino()), below);
            let Ok(entries) = fs::read_dir(&path) else {
                continue;
            };
            let dirs = entries
                .flatten()
                .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()));
            todo.extend(dirs.map(|entry| entry.path()));
        }
        found
    }
}
