//! Why a restore failed.

use super::files::FilesError;
use super::tape::Refusal;
use super::vdso::VdsoError;
use crate::error::{ExitCode, HasExitCode};
use crate::fault::FaultHit;
use crate::image::{ImageError, StoreError};
use crate::model::ids::{Pid, Tid};
use crate::model::plan::PlanError;
use crate::sys::process::CallError;
use nix::errno::Errno;
use std::path::PathBuf;

/// Why an application could not be restored. Nothing of it is left running.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The image's carrier cannot be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image is damaged.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A test made it fail.
    #[error(transparent)]
    Fault(#[from] FaultHit),
    /// The image holds something else than one application.
    #[error(
        "The image holds {0} applications and one was expected; it was made for tracker update"
    )]
    NotOne(usize),
    /// The processes of the image contradict each other.
    #[error("The tree of processes cannot be made again: {0}")]
    Plan(#[from] PlanError),
    /// A number the application needs is taken.
    #[error("{kind} {number} is in use by {user}; end that process and try again")]
    NumberInUse {
        /// "PID" or "TID".
        kind: &'static str,
        /// Which.
        number: i32,
        /// Command name of its user.
        user: String,
    },
    /// A System V message queue cannot have its id or key.
    #[error(
        "System V message queue {id}, key {key:#x}: its id or its key is in use by another queue; \
         remove that one with ipcrm(1) and try again"
    )]
    QueueInUse {
        /// Id.
        id: i32,
        /// Key; 0 = `IPC_PRIVATE`.
        key: i32,
    },
    /// A file the application maps or lives in is gone.
    #[error("PID {pid} needs {path}: {errno}; put the file back")]
    FileGone {
        /// Who.
        pid: Pid,
        /// Which.
        path: PathBuf,
        /// Why not.
        errno: Errno,
    },
    /// A file the application maps or lives in is not the one it was.
    #[error(
        "PID {pid} needs {path} as it was, and its {what} is another now; start the application afresh"
    )]
    FileChanged {
        /// Who.
        pid: Pid,
        /// Which.
        path: PathBuf,
        /// "inode", "size" or "modification time".
        what: &'static str,
    },
    /// Not enough huge pages.
    #[error(
        "The application needs {needed} free huge pages of {kib} KiB, and there are {free}; raise \
         /sys/kernel/mm/hugepages/hugepages-{kib}kB/nr_hugepages"
    )]
    HugePages {
        /// KiB of one.
        kib: u64,
        /// How many it needs.
        needed: u64,
        /// How many there are.
        free: u64,
    },
    /// A mount of the application's own namespace.
    #[error(
        "The application's mount {point}: {call}: {errno}; see that what it shows is there as it was"
    )]
    Mount {
        /// Where it is.
        point: PathBuf,
        /// What was tried.
        call: &'static str,
        /// Why not.
        errno: Errno,
    },
    /// What a mount of the application's own namespace shows is not mounted.
    #[error("The application's mount {point} shows what was mounted on {at}; mount that again")]
    NotMounted {
        /// Where it is.
        point: PathBuf,
        /// Where the machine had it.
        at: PathBuf,
    },
    /// What is mounted on a mount of the machine would not reach the application any more.
    #[error("What is mounted below {0} no longer propagates; mount --make-shared {0}")]
    NotShared(PathBuf),
    /// A tmpfs that only the application had.
    #[error("The application's tmpfs {point} cannot be filled: {error}")]
    Tmpfs {
        /// Where it is.
        point: PathBuf,
        /// Why not.
        error: std::io::Error,
    },
    /// The machine's mounts, or those of the image.
    #[error(
        "The mounts of the machine cannot be read, or those of the image contradict each other"
    )]
    NoMounts,
    /// State this version does not put back.
    #[error("PID {pid}: {what} cannot be restored by this version")]
    Unsupported {
        /// Who.
        pid: Pid,
        /// What.
        what: String,
    },
    /// A call of the restorer itself on one of its tasks.
    #[error("{0}")]
    Call(#[from] CallError),
    /// The kernel refused a call of a process under restore.
    #[error("PID {pid} thread {tid}: {refusal}")]
    Refused {
        /// Process.
        pid: Pid,
        /// Thread.
        tid: Tid,
        /// Call and answer.
        refusal: Box<Refusal>,
    },
    /// A process under restore ended or stopped unexpectedly.
    #[error("PID {pid} {how} while it was restored{message}")]
    Lost {
        /// Which.
        pid: Pid,
        /// What the kernel reported.
        how: String,
        /// What it said before, with a leading ": ", or nothing.
        message: String,
    },
    /// The restorer's own surroundings.
    #[error("{what}: {errno}")]
    System {
        /// What was tried, with its object.
        what: String,
        /// Why not.
        errno: Errno,
    },
    /// Descriptors or sockets.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// The network lock a checkpoint left.
    #[error("The network lock of the checkpoint: {0}")]
    Lock(String),
    /// The two kernels' vDSOs.
    #[error("PID {pid}: {source}")]
    Vdso {
        /// Whose.
        pid: Pid,
        /// Why.
        source: VdsoError,
    },
    /// No hole in the address spaces for the tape.
    #[error("The application's address spaces leave no common hole for the restorer")]
    NoRoom,
    /// The caller did not let the application run, and says itself why.
    #[error("The application stood but was not let run")]
    Withheld,
    /// The stage of an update has ended meanwhile.
    #[error("The early-boot stage ended before the application was let run")]
    Abandoned,
    /// Reported by the restorer process.
    #[error("{message}")]
    Restorer {
        /// Its error.
        message: String,
        /// What it amounts to.
        code: u8,
    },
}

impl RestoreError {
    pub(crate) fn system(what: impl Into<String>) -> impl FnOnce(Errno) -> Self {
        let what = what.into();
        move |errno| Self::System { what, errno }
    }

    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        let what = what.into();
        move |error| Self::System {
            what,
            errno: Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO)),
        }
    }

    fn errno(&self) -> Option<Errno> {
        match self {
            Self::Call(error) => Some(error.errno),
            Self::System { errno, .. } | Self::Mount { errno, .. } => Some(*errno),
            Self::Refused { refusal, .. } => i32::try_from(-refusal.result)
                .ok()
                .filter(|errno| (1..4096).contains(errno))
                .map(Errno::from_raw),
            _ => None,
        }
    }
}

impl HasExitCode for RestoreError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Store(_) | Self::Image(_) | Self::NotOne(_) | Self::Plan(_) => {
                ExitCode::ImageInvalid
            }
            Self::Restorer { code, .. } if *code == ExitCode::Unsupported as u8 => {
                ExitCode::Unsupported
            }
            Self::Restorer { code, .. } if *code == ExitCode::ImageInvalid as u8 => {
                ExitCode::ImageInvalid
            }
            _ if matches!(self.errno(), Some(Errno::ENOSYS | Errno::EPERM)) => {
                ExitCode::Unsupported
            }
            _ => ExitCode::RestoreFailed,
        }
    }
}
