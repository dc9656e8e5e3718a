//! The old kernel's half of an update.
//!
//! Everything that can be done while the applications run is done first: checks, loading
//! the next kernel, copying memory, flushing filesystems. Any failure up to reboot(2) rolls
//! back: each step is a guard whose drop undoes it.

use super::arena::{Arena, ArenaError};
use super::cmdline::{self, EARLY, TooLong};
use super::eligible;
use super::filesystems::{FilesystemError, Filesystems};
use super::kexec::{self, KexecError};
use super::network::{self, NetworkError};
use super::report::{TscRate, step};
use super::sysctl;
use crate::applications::{ApplicationError, NamedApplication};
use crate::error::{ExitCode, HasExitCode};
use crate::image::{Image, RangeStore, Store, StoreError, encode};
use crate::model::frozen::{Milestone, Origin, System};
use crate::sys::{clock, kexec as sys};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{AccessFlags, access};
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What to update to.
#[derive(Clone, Debug)]
pub struct Request {
    /// Kernel image, a bzImage.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: Option<PathBuf>,
    /// More words for the kernel's command line.
    pub append: String,
    /// Frozen time to stay under, if it can be had.
    pub max_freeze: Duration,
}

/// Why an update did not happen.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError {
    /// The early-boot stage is missing.
    #[error("{EARLY} cannot be executed: {0}; install tracker there, or link it to the binary")]
    NoStage(Errno),
    /// No reserved memory.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// The applications' memory does not fit.
    #[error(
        "The applications may need {} MiB and the arena has {}; reserve a larger one with memmap=",
        .needed >> 20, .size >> 20
    )]
    TooSmall {
        /// Bytes at most.
        needed: u64,
        /// Bytes there.
        size: u64,
    },
    /// Objects that are not carried.
    #[error("{} objects cannot be carried; nothing was touched\n{}", .0.len(), .0.join("\n"))]
    Blocked(Vec<String>),
    /// The applications cannot be listed.
    #[error(transparent)]
    Applications(#[from] ApplicationError),
    /// The next kernel cannot be loaded or started.
    #[error(transparent)]
    Kexec(#[from] KexecError),
    /// The running kernel's command line cannot be read.
    #[error("read /proc/cmdline: {0}; mount /proc")]
    Cmdline(#[source] io::Error),
    /// The next command line is too long.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// A filesystem cannot be flushed or frozen.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    /// The network's state cannot be read.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// The image cannot be written.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The process' memory cannot be locked.
    #[error("mlockall: {0}; raise RLIMIT_MEMLOCK")]
    Memory(Errno),
    /// Signals cannot be watched.
    #[error("signalfd: {0}; this is a defect of tracker")]
    Signals(Errno),
    /// Somebody asked to stop.
    #[error("{0} received; nothing was changed")]
    Interrupted(Signal),
}

impl HasExitCode for UpdateError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::NoStage(_)
            | Self::Arena(_)
            | Self::TooLong(_)
            | Self::TooSmall { .. }
            | Self::Blocked(_)
            | Self::Kexec(KexecError::Open { .. } | KexecError::Nul) => ExitCode::NotEligible,
            Self::Kexec(KexecError::Load { .. }) | Self::Cmdline(_) | Self::Memory(_) => {
                ExitCode::Unsupported
            }
            _ => ExitCode::RolledBack,
        }
    }
}

/// Signals that abort an update; they are blocked while it runs.
struct Abort(SignalFd);

impl Abort {
    fn watch() -> Result<Self, UpdateError> {
        let mut signals = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            signals.add(signal);
        }
        signals.thread_block().map_err(UpdateError::Signals)?;
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd = SignalFd::with_flags(&signals, flags).map_err(UpdateError::Signals)?;
        Ok(Self(fd))
    }

    /// To be called wherever turning back is possible.
    fn check(&self) -> Result<(), UpdateError> {
        match self.0.read_signal() {
            Ok(Some(info)) => {
                let number = i32::try_from(info.ssi_signo).unwrap_or_default();
                let signal = Signal::try_from(number).unwrap_or(Signal::SIGTERM);
                Err(UpdateError::Interrupted(signal))
            }
            _ => Ok(()),
        }
    }
}

/// An update that can start: all checks passed, nothing changed but a loaded kernel.
pub struct Update {
    arena: Arena,
    applications: Vec<NamedApplication>,
    next: kexec::Loaded,
    command_line: String,
    filesystems: Filesystems,
    abort: Abort,
    rate: TscRate,
    timeline: Vec<Milestone>,
}

impl Update {
    /// Checks everything and loads the next kernel.
    ///
    /// # Errors
    /// The first obstacle.
    pub fn prepare(request: &Request) -> Result<Self, UpdateError> {
        let rate = TscRate::begin();
        let abort = Abort::watch()?;
        access(EARLY, AccessFlags::X_OK).map_err(UpdateError::NoStage)?;
        let arena = Arena::largest()?;
        let running = std::fs::read_to_string("/proc/cmdline").map_err(UpdateError::Cmdline)?;
        let command_line = cmdline::next(&running, arena.range, &request.append)?;
        let applications = running_applications()?;
        check_eligible(&applications, &arena)?;
        let filesystems = Filesystems::find()?;
        let next = kexec::load(&request.kernel, request.initrd.as_deref(), &command_line)?;
        let mut update = Self {
            arena,
            applications,
            next,
            command_line,
            filesystems,
            abort,
            rate,
            timeline: Vec::new(),
        };
        update.reached("next kernel loaded");
        Ok(update)
    }

    /// Applications that would be carried over.
    #[must_use]
    pub fn applications(&self) -> &[NamedApplication] {
        &self.applications
    }

    /// Command line of the next kernel.
    #[must_use]
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// Where the image will be.
    #[must_use]
    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    fn reached(&mut self, step: &str) {
        self.timeline.push(Milestone {
            step: step.to_owned(),
            at: clock::realtime(),
        });
    }

    /// Does it. Returns only if it failed; all is as before then.
    ///
    /// # Errors
    /// The step that failed.
    pub fn run(mut self) -> Result<Infallible, UpdateError> {
        let mut store = RangeStore::create(&self.arena.device)?;
        let mut system = system()?;
        self.filesystems.flush()?;
        self.reached("filesystems flushed");
        self.abort.check()?;
        self.reached(step::FROZEN);

        sys::lock_memory().map_err(UpdateError::Memory)?;
        // From here on nothing may be printed: stderr may be a file on a frozen filesystem.
        let filesystems = self.filesystems.freeze()?;
        self.timeline.push(Milestone {
            step: "filesystems frozen".to_owned(),
            at: clock::realtime(),
        });
        self.timeline.push(Milestone {
            step: step::KEXEC.to_owned(),
            at: clock::realtime(),
        });
        system.origin = Origin {
            kernel_release: kernel_release(),
            timeline: std::mem::take(&mut self.timeline),
            realtime: clock::realtime(),
            tsc: clock::tsc(),
            tsc_hz: self.rate.hertz(),
        };
        let image = Image {
            system: Some(system),
            applications: Vec::new(),
        };
        let sealed = store.commit(&encode(&image), 0);
        let sealed = sealed.map_err(UpdateError::from);
        if let Err(error) = sealed.and_then(|()| self.abort.check()) {
            drop(filesystems);
            store.erase()?;
            return Err(error);
        }
        let error = self.next.start();
        drop(filesystems);
        // The applications run on: an image of them must not be restored one day.
        store.erase()?;
        Err(error.into())
    }
}

fn running_applications() -> Result<Vec<NamedApplication>, ApplicationError> {
    let mut running = Vec::new();
    for application in NamedApplication::all()? {
        if !application.pids()?.is_empty() {
            running.push(application);
        }
    }
    Ok(running)
}

fn check_eligible(applications: &[NamedApplication], arena: &Arena) -> Result<(), UpdateError> {
    let needed = eligible::needed(applications);
    let size = arena.range.size;
    if needed > size {
        return Err(UpdateError::TooSmall { needed, size });
    }
    let mut blocked = Vec::new();
    for application in applications {
        let found = eligible::blockers(&application.pids()?);
        blocked.extend(
            found
                .iter()
                .map(|b| format!("  {}: {b}", application.name())),
        );
    }
    if blocked.is_empty() {
        Ok(())
    } else {
        Err(UpdateError::Blocked(blocked))
    }
}

fn kernel_release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

/// The machine's part of the image, but for its origin.
fn system() -> Result<System, UpdateError> {
    let (interfaces, routes) = network::collect()?;
    let hostname = nix::unistd::gethostname().unwrap_or_default();
    Ok(System {
        hostname: hostname.to_string_lossy().into_owned(),
        interfaces,
        routes,
        sysctls: sysctl::collect(Path::new("/proc/sys")),
        ..System::default()
    })
}
