//! Why a checkpoint did not happen.

use super::files::CollectError;
use crate::applications::ApplicationError;
use crate::bpf::iter::{LoadError, ReadError};
use crate::bpf::netlock::LockError;
use crate::error::{ExitCode, HasExitCode};
use crate::fault::FaultHit;
use crate::image::StoreError;
use crate::model::frozen::Blocker;
use crate::model::ids::Pid;
use crate::sys::cgroup::CgroupError;
use crate::sys::process::CallError;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why a checkpoint did not happen. The application runs on as if nothing had been tried.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// Nothing to checkpoint.
    #[error("Nothing runs as {0}; tracker status lists what does")]
    NotRunning(String),
    /// Objects that are not carried.
    #[error("{}", blocked(.0))]
    Blocked(Vec<Blocker>),
    /// Tracker would freeze itself.
    #[error("PID {0} is tracker itself or contains it; run tracker from elsewhere")]
    Ourselves(Pid),
    /// A tree that could not be put back as it was.
    #[error(
        "PID {pid} is in the cgroup {cgroup} and the process it descends from is in another; \
         start the application with tracker run"
    )]
    Scattered {
        /// The descendant.
        pid: Pid,
        /// Its cgroup below the mount.
        cgroup: String,
    },
    /// The name or its record.
    #[error(transparent)]
    Application(#[from] ApplicationError),
    /// BPF programs.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// A pass of the iterators.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The network lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A cgroup.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A call on one task.
    #[error("{0}; the application runs on")]
    Call(#[from] CallError),
    /// The image's carrier.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A file of /proc or one the application uses.
    #[error("{operation} {path}: {source}; the application runs on")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The freeze took too long.
    #[error("{task} did not stop within {limit:?}; {hint}")]
    Deadline {
        /// Who.
        task: String,
        /// `--deadline`.
        limit: Duration,
        /// What to do.
        hint: &'static str,
    },
    /// The rest took too long.
    #[error(
        "It stood still for {0:?} and was not captured yet; it runs on, allow more with \
         --max-freeze"
    )]
    TooSlow(Duration),
    /// `SIGINT` or `SIGTERM`.
    #[error("Interrupted; the application runs on")]
    Interrupted,
    /// Threads are changed by others while we read them.
    #[error("{0}; the application runs on, try again")]
    Unstable(String),
    /// A descriptor or socket.
    #[error("{0}")]
    Files(String),
    /// A test made it fail.
    #[error(transparent)]
    Fault(#[from] FaultHit),
}

fn blocked(blockers: &[Blocker]) -> String {
    let lines: Vec<String> = blockers.iter().map(|b| format!("  {b}")).collect();
    format!(
        "{} objects cannot be carried; nothing was touched\n{}",
        blockers.len(),
        lines.join("\n")
    )
}

impl CheckpointError {
    pub(super) fn io(
        operation: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            operation,
            path,
            source,
        }
    }
}

impl HasExitCode for CheckpointError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::NotRunning(_) | Self::Ourselves(_) => ExitCode::Usage,
            Self::Application(ApplicationError::Name(_) | ApplicationError::Unknown(_)) => {
                ExitCode::Usage
            }
            Self::Store(StoreError::Exists(_)) => ExitCode::Usage,
            Self::Blocked(_) | Self::Scattered { .. } => ExitCode::NotEligible,
            Self::Application(_) | Self::Load(_) | Self::Lock(LockError::Load { .. }) => {
                ExitCode::Unsupported
            }
            _ => ExitCode::RolledBack,
        }
    }
}

impl From<CollectError> for CheckpointError {
    fn from(error: CollectError) -> Self {
        match error {
            CollectError::Blocked(blocker) => Self::Blocked(vec![blocker]),
            error => Self::Files(error.to_string()),
        }
    }
}
