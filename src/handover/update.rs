//! The old kernel's half of an update.
//!
//! Everything that can be done while the applications run is done first: checks, loading
//! the next kernel, copying memory, flushing filesystems. Any failure up to reboot(2) rolls
//! back: each step is a guard whose drop undoes it.

use super::arena::{Arena, ArenaError};
use super::cmdline::{self, Deadlines, EARLY, TooLong};
use super::eligible;
use super::filesystems::{self, FilesystemError, Filesystems};
use super::huge;
use super::kexec::{self, KexecError};
use super::mounts;
use super::network::{self, NetworkError};
use super::next;
use super::report::{TscRate, step};
use super::sysctl;
use crate::applications::{ApplicationError, NamedApplication};
use crate::bpf::netlock::{LockError, NetLock};
use crate::capture::{
    Capture, CheckpointError, Known, Options, Selection, Slots, shared_iterators,
};
use crate::error::{ExitCode, HasExitCode};
use crate::fault::{Fault, FaultHit};
use crate::image::{Image, RangeStore, Store, StoreError, encode};
use crate::model::frozen::{Milestone, Origin, System, TcpConnection};
use crate::sys::huge::DIR;
use crate::sys::{clock, kexec as sys};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{AccessFlags, access};
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

/// What to update to.
#[derive(Clone, Debug)]
pub struct Request {
    /// Kernel image, a bzImage.
    pub kernel: PathBuf,
    /// Its initrd.
    pub initrd: Option<PathBuf>,
    /// More words for the kernel's command line.
    pub append: String,
    /// Roll back rather than have the applications stand still for longer before the kexec.
    pub max_freeze: Option<Duration>,
    /// Seconds after which the next kernel gives up restoring one application.
    pub restore_deadline: u32,
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
    /// An application cannot be captured.
    #[error("{name}: {source}")]
    Capture {
        /// Its name.
        name: String,
        /// Why not.
        source: CheckpointError,
    },
    /// The network lock.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// It would have taken longer than the operator allows.
    #[error(
        "The applications stood still for {0:?} and were not captured yet; all is as before, \
         allow more with --max-freeze"
    )]
    TooSlow(Duration),
    /// A test made it fail.
    #[error(transparent)]
    Fault(#[from] FaultHit),
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
            Self::Kexec(KexecError::Load { .. })
            | Self::Cmdline(_)
            | Self::Memory(_)
            | Self::Lock(LockError::Load { .. }) => ExitCode::Unsupported,
            Self::Capture { source, .. } => source.exit_code(),
            _ => ExitCode::RolledBack,
        }
    }
}

/// Signals that abort an update; they are blocked while it runs.
#[derive(Debug)]
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
#[derive(Debug)]
pub struct Update {
    arena: Arena,
    captures: Vec<Capture>,
    next: kexec::Loaded,
    command_line: String,
    filesystems: Filesystems,
    abort: Abort,
    clock: Clock,
    max_freeze: Option<Duration>,
}

/// Steps so far, and how fast the time stamp counter runs.
#[derive(Debug)]
struct Clock {
    rate: TscRate,
    timeline: Vec<Milestone>,
}

impl Clock {
    fn reached(&mut self, step: &str) {
        self.timeline.push(Milestone {
            step: step.to_owned(),
            at: clock::realtime(),
        });
    }

    /// All of it, as the next kernel goes on with it.
    fn origin(&self) -> Origin {
        Origin {
            kernel_release: kernel_release(),
            timeline: self.timeline.clone(),
            realtime: clock::realtime(),
            tsc: clock::tsc(),
            tsc_hz: self.rate.hertz(),
        }
    }
}

impl Update {
    /// Checks everything and loads the next kernel.
    ///
    /// # Errors
    /// The first obstacle; all objects that cannot be carried together.
    pub fn prepare(request: &Request) -> Result<Self, UpdateError> {
        let rate = TscRate::begin();
        let abort = Abort::watch()?;
        access(EARLY, AccessFlags::X_OK).map_err(UpdateError::NoStage)?;
        let arena = Arena::largest()?;
        let running = std::fs::read_to_string("/proc/cmdline").map_err(UpdateError::Cmdline)?;
        let applications = running_applications()?;
        let deadlines = Deadlines::of(request.restore_deadline, applications.len());
        let command_line = cmdline::next(&running, arena.range, deadlines, &request.append)?;
        check_size(&applications, &arena)?;
        let mut captures = prepare_captures(&applications)?;
        let volatile = filesystems::volatile()?;
        for capture in &mut captures {
            on(capture, |capture| capture.refuse_devices(&volatile))?;
            on(capture, |capture| {
                capture.refuse_mounts_unless(mounts::is_early)
            })?;
        }
        if let Some(reason) = next::refuses_rings(&request.kernel) {
            for capture in &mut captures {
                on(capture, |capture| capture.refuse_rings(&reason))?;
            }
        }
        let accept_queues = next::refuses_accept_queues(&request.kernel);
        for capture in &mut captures {
            capture.set_accept_queues(accept_queues.clone());
        }
        check_blockers(&applications, &captures)?;
        let filesystems = Filesystems::find()?;
        Fault::KexecLoad.point()?;
        let next = kexec::load(&request.kernel, request.initrd.as_deref(), &command_line)?;
        let mut clock = Clock {
            rate,
            timeline: Vec::new(),
        };
        clock.reached("next kernel loaded");
        Ok(Self {
            arena,
            captures,
            next,
            command_line,
            filesystems,
            abort,
            clock,
            max_freeze: request.max_freeze,
        })
    }

    /// Names of the applications that would be carried over.
    #[must_use]
    pub fn applications(&self) -> Vec<&str> {
        let headers = self.captures.iter().map(Capture::header);
        headers.map(|header| header.name.as_str()).collect()
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

    /// Does it. Returns only if it failed; all is as before then.
    ///
    /// # Errors
    /// The step that failed.
    pub fn run(mut self) -> Result<Infallible, UpdateError> {
        let mut store = RangeStore::create(&self.arena.device)?;
        let mut slots = Slots::default();
        let system = system()?;
        for capture in &mut self.captures {
            on(capture, |capture| capture.precopy(&store, &mut slots))?;
        }
        // What is written back now need not be in the frozen window.
        store.flush()?;
        self.clock.reached("memory copied");
        self.filesystems.flush()?;
        self.clock.reached("filesystems flushed");
        let known = Known::fetch();
        self.clock.reached("model fetched");
        sys::lock_memory().map_err(UpdateError::Memory)?;
        self.abort.check()?;
        let mut sockets = 0;
        for capture in &mut self.captures {
            sockets += on(capture, Capture::prepare_sockets)?;
        }
        let mut lock = NetLock::load(sockets)?;
        // Attached without entries it holds off nothing yet, see Capture::load_lock.
        lock.hold_new()?;
        lock.engage()?;
        for capture in &mut self.captures {
            on(capture, |capture| {
                capture.refresh(&store, &mut slots, false)
            })?;
        }
        store.flush()?;
        self.clock.reached("memory copied again");

        self.hold_off(&mut lock)?;
        self.clock.reached("new connections held off");
        let result = self.leave(&mut store, &mut slots, &mut lock, known, system);
        // It failed, or it would not have returned: first let the applications run.
        for capture in &mut self.captures {
            capture.thaw();
        }
        let released = lock.release();
        // An image of applications that run on must not be restored one day.
        store.erase()?;
        released?;
        result
    }

    /// One lock over all applications.
    fn hold_off(&mut self, lock: &mut NetLock) -> Result<(), UpdateError> {
        for capture in &mut self.captures {
            on(capture, |capture| capture.add_to_lock(lock))?;
        }
        Fault::Lock.point()?;
        Ok(())
    }

    /// The frozen window, up to the next kernel.
    fn leave(
        &mut self,
        store: &mut RangeStore,
        slots: &mut Slots,
        lock: &mut NetLock,
        known: Known,
        mut system: System,
    ) -> Result<Infallible, UpdateError> {
        self.clock.reached(step::FROZEN);
        let begun = Instant::now();
        let limit = self.max_freeze;
        let in_time = || match limit {
            Some(limit) if begun.elapsed() > limit => Err(UpdateError::TooSlow(begun.elapsed())),
            _ => Ok(()),
        };
        // What runs on takes the CPU from those that are to stop.
        for capture in &mut self.captures {
            on(capture, Capture::begin_freeze)?;
        }
        for capture in &mut self.captures {
            on(capture, |capture| capture.freeze(*slots))?;
        }
        in_time()?;
        self.clock.reached("all stopped");
        let comparison = known.compare(|| self.captures.iter().map(Capture::found).collect());
        for capture in &mut self.captures {
            on(capture, |capture| capture.collect_memory(store, slots))?;
            in_time()?;
        }
        self.clock.reached("memory read");
        for capture in &mut self.captures {
            on(capture, |capture| capture.add_frozen_to_lock(lock))?;
        }
        lock.silence()?;
        Fault::Silence.point()?;
        system.orphans = self.orphans()?;
        let mut applications = Vec::new();
        for capture in &mut self.captures {
            applications.push(on(capture, |capture| capture.collect_files(store, slots))?);
            in_time()?;
        }
        self.clock.reached("descriptors read");
        system.verification = comparison.result();
        self.clock.reached("model compared");

        // From here on nothing may be printed: stderr may be on a frozen filesystem.
        let _frozen = self.filesystems.freeze()?;
        self.clock.reached("filesystems frozen");
        in_time()?;
        Fault::Encode.point()?;
        self.clock.reached(step::KEXEC);
        system.origin = self.clock.origin();
        let metadata = encode(&Image {
            system: Some(system),
            slots: store.written().first(slots.used()),
            applications,
        });
        Fault::Commit.point()?;
        store.commit(&metadata, slots.used())?;
        self.abort.check()?;
        Fault::BeforeKexec.point()?;
        Err(self.next.start().into())
    }

    /// Connections that the applications have closed, all in one look.
    fn orphans(&mut self) -> Result<Vec<TcpConnection>, UpdateError> {
        let Some(capture) = self.captures.first_mut() else {
            return Ok(Vec::new());
        };
        let (orphans, lost) = on(capture, |capture| capture.orphans_of_all())?;
        if lost > 0 {
            tracing::warn!(
                "{lost} connections that applications have closed will be reset: what they still \
                 send cannot be carried"
            );
        }
        Ok(orphans)
    }
}

/// One step of one application's capture.
fn on<T>(
    capture: &mut Capture,
    step: impl FnOnce(&mut Capture) -> Result<T, CheckpointError>,
) -> Result<T, UpdateError> {
    step(capture).map_err(|source| UpdateError::Capture {
        name: capture.header().name.clone(),
        source,
    })
}

fn prepare_captures(applications: &[NamedApplication]) -> Result<Vec<Capture>, UpdateError> {
    let failed = |application: &NamedApplication| {
        let name = application.name().to_owned();
        move |source| UpdateError::Capture { name, source }
    };
    let Some(first) = applications.first() else {
        return Ok(Vec::new());
    };
    let iterators = shared_iterators().map_err(failed(first))?;
    let prepare = |application: &NamedApplication| {
        let selection = Selection::Name(application.name().to_owned());
        Capture::prepare(&selection, Options::default(), Rc::clone(&iterators))
            .map_err(failed(application))
    };
    applications.iter().map(prepare).collect()
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

fn check_size(applications: &[NamedApplication], arena: &Arena) -> Result<(), UpdateError> {
    let needed = eligible::needed(applications);
    let size = arena.range.size;
    if needed > size {
        return Err(UpdateError::TooSmall { needed, size });
    }
    Ok(())
}

fn check_blockers(
    applications: &[NamedApplication],
    captures: &[Capture],
) -> Result<(), UpdateError> {
    let mut blocked = Vec::new();
    for (application, capture) in applications.iter().zip(captures) {
        let low = eligible::blockers(&application.pids()?);
        let all = capture.blockers().iter().chain(&low);
        blocked.extend(all.map(|b| format!("  {}: {b}", application.name())));
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
        huge_pages: huge::collect(Path::new(DIR)),
        ..System::default()
    })
}
