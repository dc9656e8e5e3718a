//! Fault points: places where a test makes a checkpoint or an update fail.
//!
//! `TRACKER_FAULT=name` makes that place return an error, `TRACKER_FAULT=name:kill` makes
//! tracker kill itself there, which no error path can clean up after.

use nix::sys::signal::{Signal, raise};
use std::sync::OnceLock;

/// Where an operation can be made to fail. One call site each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Everything is loaded, nothing was touched.
    Prepare,
    /// Pages were copied while the application ran.
    Precopy,
    /// The network is locked.
    Lock,
    /// The application is frozen.
    Freeze,
    /// Its threads are stopped and their registers read.
    Threads,
    /// Its processes were read.
    Tasks,
    /// Its descriptors and sockets were read.
    Files,
    /// Page selection is done.
    Memory,
    /// A batch of pages is about to be written.
    PageWrite,
    /// Metadata is about to be encoded.
    Encode,
    /// The image is about to be sealed.
    Commit,
    /// The image is sealed, the application still there.
    Kill,
    /// The next kernel is about to be loaded.
    KexecLoad,
    /// The next kernel is about to be started.
    BeforeKexec,
}

/// A fault point did what it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Fault point {0:?} was hit; unset TRACKER_FAULT")]
pub struct FaultHit(pub Fault);

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Precopy => "precopy",
            Self::Lock => "lock",
            Self::Freeze => "freeze",
            Self::Threads => "threads",
            Self::Tasks => "tasks",
            Self::Files => "files",
            Self::Memory => "memory",
            Self::PageWrite => "page-write",
            Self::Encode => "encode",
            Self::Commit => "commit",
            Self::Kill => "kill",
            Self::KexecLoad => "kexec-load",
            Self::BeforeKexec => "before-kexec",
        }
    }

    /// Fails when the environment asks for it.
    ///
    /// # Errors
    /// [`FaultHit`].
    pub fn point(self) -> Result<(), FaultHit> {
        static WANTED: OnceLock<Option<String>> = OnceLock::new();
        let Some(wanted) = WANTED.get_or_init(|| std::env::var("TRACKER_FAULT").ok()) else {
            return Ok(());
        };
        let (name, kill) = match wanted.strip_suffix(":kill") {
            Some(name) => (name, true),
            None => (wanted.as_str(), false),
        };
        if name != self.name() {
            return Ok(());
        }
        if kill {
            // Does not return.
            let _ = raise(Signal::SIGKILL);
        }
        Err(FaultHit(self))
    }
}
