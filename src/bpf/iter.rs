//! One-pass readers of kernel state: tasks, descriptors and mappings, by BPF iterators.
//!
//! They need no agent and leave no trace in what they read. Loading takes the verifier a while
//! (a quarter of a second under emulation) and is done before anything is frozen; a pass in the
//! frozen window costs about as much as copying the records.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{ProgramInput, RingBuffer, RingBufferBuilder};

use super::events::{
    self, AioRec, EpollItemRec, EventfdRec, FileRec, LockRec, MmRec, PidfdRec, PipeRec, ProcessRec,
    RecKind, SigactionsRec, SignalfdRec, SockRec, ThreadRec, TimerRec, TimerfdRec, TtyDataRec,
    TtyRec, VmaRec, WatchRec,
};
use super::pass::{self, Buffer, Target};
use super::programs::Programs;
use super::record::{Malformed, Raw, records};
use super::skeleton::iter::{IterSkel, IterSkelBuilder};

/// Bits of the BPF variable `want`.
mod want {
    pub use crate::bpf::events::IterWant::{
        AIO, EPOLL, FINGERPRINTS, LOCKS, SIGACTIONS, TASKS, TIMERS, TTY_DATA, WATCHES,
    };
}

/// Why the iterators could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error(
    "Loading the BPF iterators failed at {step}; they need Linux 6.1 or newer with BTF, and CAP_BPF with CAP_PERFMON or root"
)]
pub struct LoadError {
    step: &'static str,
    source: libbpf_rs::Error,
}

/// Why a pass failed. Nothing was changed, and another pass may be tried.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// `BPF_LINK_CREATE`, `BPF_ITER_CREATE` or read(2) failed.
    #[error("Running the BPF iterator over {what} failed; is the process out of descriptors?")]
    Run {
        /// What is iterated over.
        what: &'static str,
        /// From the kernel.
        source: io::Error,
    },
    /// The ring could not be read.
    #[error("Reading the ring of the BPF iterator over {what} failed")]
    Ring {
        /// What is iterated over.
        what: &'static str,
        /// From libbpf.
        source: libbpf_rs::Error,
    },
    /// The ring of epoll items, watches, timers and locks was too small.
    #[error(
        "At least {lost} records of {what} did not fit the ring of the BPF iterator; read them from /proc/PID/fdinfo"
    )]
    Overflow {
        /// What is iterated over.
        what: &'static str,
        /// Number of records known to be missing: the walk ends at the first.
        lost: u64,
    },
    /// The kernel side wrote something this side does not know: a bug of ours.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Which tasks a pass reports. Kernel threads are never reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    System,
    /// Those in the cgroup v2 with this id (its inode number) and below.
    Cgroup(u64),
    /// The threads of the process with this PID in the initial PID namespace.
    Process(u32),
}

/// What a pass over the tasks found. Zombies are included.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    /// Every thread.
    pub threads: Vec<ThreadRec>,
    /// Every process.
    pub processes: Vec<ProcessRec>,
    /// Every address space; one shared by several processes (`CLONE_VM`) is repeated.
    pub mms: Vec<MmRec>,
    /// The signal actions of every process that still has any (zombies do not).
    pub sigactions: Vec<SigactionsRec>,
    /// Every POSIX timer.
    pub timers: Vec<TimerRec>,
    /// Every AIO context.
    pub aio: Vec<AioRec>,
}

/// An open descriptor.
#[derive(Clone, Copy, Debug)]
pub struct File {
    /// What all descriptors have.
    pub rec: FileRec,
    /// What its kind has besides.
    pub detail: Detail,
}

/// The state of some kinds of files, read in the same pass.
#[derive(Clone, Copy, Debug)]
pub enum Detail {
    /// Nothing beyond the [`FileRec`].
    None,
    /// An eventfd.
    Eventfd(EventfdRec),
    /// A pipe or an open FIFO.
    Pipe(PipeRec),
    /// A timerfd.
    Timerfd(TimerfdRec),
    /// A signalfd.
    Signalfd(SignalfdRec),
    /// A pidfd.
    Pidfd(PidfdRec),
    /// A socket.
    Socket(SockRec),
    /// Either end of a pseudo-terminal.
    Tty(TtyRec),
}

/// What a pass over the descriptors found.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// Every descriptor of every descriptor table. A table shared by several processes
    /// (`CLONE_FILES`) is reported once per process: [`FileRec::files`] tells.
    pub files: Vec<File>,
    /// What the epoll instances among them watch.
    pub epoll_items: Vec<EpollItemRec>,
    /// What the inotify instances among them watch.
    pub watches: Vec<WatchRec>,
    /// Locks and leases on the files among them, whoever holds them.
    pub locks: Vec<LockRec>,
    /// What is queued in the pseudo-terminals among them, in order for each.
    pub tty_data: Vec<TtyDataRec>,
}

/// The loaded iterators.
pub struct Iterators {
    // before the skeleton, whose map it reads
    ring: RingBuffer<'static>,
    side: Arc<Mutex<Vec<u8>>>,
    buffer: Buffer,
    skel: IterSkel<'static>,
}

impl std::fmt::Debug for Iterators {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iterators").finish_non_exhaustive()
    }
}

impl Iterators {
    /// Loads the programs into the kernel.
    ///
    /// # Errors
    ///
    /// The kernel lacks BTF or refuses a program, or a capability is missing.
    pub fn load() -> Result<Self, LoadError> {
        let at = |step| move |source| LoadError { step, source };
        super::redirect_libbpf_log();
        // The skeleton borrows this storage. A few words stay behind per load, of which there is
        // one in the life of a process; what it points at is freed with the skeleton.
        let storage = Box::leak(Box::new(MaybeUninit::uninit()));
        let open = IterSkelBuilder::default()
            .open(storage)
            .map_err(at("open"))?;
        let mut skel = open.load().map_err(at("load"))?;
        let found = skel.progs.find_symbols.test_run(ProgramInput::default());
        found.map_err(at("looking for symbols"))?;
        let cpus = libbpf_rs::num_possible_cpus().map_err(at("counting the CPUs"))?;
        if let Some(vars) = skel.maps.bss_data.as_deref_mut() {
            vars.possible_cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        }

        // a kernel may accept a program and refuse to attach it: better learnt now
        for program in [
            &skel.progs.iter_tasks,
            &skel.progs.iter_files,
            &skel.progs.iter_vmas,
        ] {
            pass::link(program.as_fd(), Target::Process(std::process::id()))
                .map_err(|source| at("attach")(source.into()))?;
        }

        let side = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&side);
        let mut builder = RingBufferBuilder::new();
        builder
            .add(&skel.maps.side, move |bytes| {
                sink.lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .extend_from_slice(bytes);
                0
            })
            .map_err(at("ring"))?;
        let ring = builder.build().map_err(at("ring"))?;
        Ok(Self {
            ring,
            side,
            buffer: Buffer::default(),
            skel,
        })
    }

    /// Has passes tell the sockets that were made outside these cgroups and what is below them
    /// ([`SockFlag::FOREIGN`](super::events)): cgroup id and depth below the root cgroup.
    pub fn tell_foreign(&mut self, roots: &[(u64, u32)]) {
        if let Some(vars) = self.skel.maps.bss_data.as_deref_mut() {
            vars.root_count = 0;
            for (slot, (id, level)) in vars.roots.iter_mut().zip(roots) {
                slot.id = *id;
                slot.level = *level;
                vars.root_count += 1;
            }
        }
    }

    /// The loaded programs.
    ///
    /// # Errors
    ///
    /// This process has no descriptors left.
    pub fn programs(&self) -> io::Result<Programs> {
        Programs::of(self.skel.object())
    }

    /// Threads, processes and address spaces, without the dearer parts.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn threads(&mut self, scope: Scope) -> Result<Tasks, ReadError> {
        self.read_tasks(scope, want::TASKS)
    }

    /// Everything a [`Tasks`] holds.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn tasks(&mut self, scope: Scope) -> Result<Tasks, ReadError> {
        let want = want::TASKS | want::SIGACTIONS | want::TIMERS | want::AIO;
        self.read_tasks(scope, want)
    }

    /// Descriptors with their details, without what epoll, inotify and locks hold.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn descriptors(&mut self, scope: Scope) -> Result<Vec<File>, ReadError> {
        Ok(self.read_files(scope, 0)?.files)
    }

    /// The same with the fingerprints of TCP listeners.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn fingerprinted(&mut self, scope: Scope) -> Result<Vec<File>, ReadError> {
        Ok(self.read_files(scope, want::FINGERPRINTS)?.files)
    }

    /// Descriptors with what epoll and inotify instances hold, without locks and bytes of
    /// terminals: what is followed while applications run.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn files_and_sets(&mut self, scope: Scope) -> Result<Files, ReadError> {
        self.read_files(scope, want::EPOLL | want::WATCHES)
    }

    /// Everything a [`Files`] holds.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn files(&mut self, scope: Scope) -> Result<Files, ReadError> {
        self.read_files(
            scope,
            want::EPOLL | want::WATCHES | want::LOCKS | want::TTY_DATA | want::FINGERPRINTS,
        )
    }

    /// Every mapping, in ascending order per process. One address space shared by several
    /// processes is repeated: [`VmaRec::mm`] tells.
    ///
    /// The kernel takes the mmap lock of what it walks, so only processes in scope are walked:
    /// a process elsewhere that holds its lock for long cannot stall a frozen window.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn vmas(&mut self, scope: Scope) -> Result<Vec<VmaRec>, ReadError> {
        let what = "mappings";
        let targets: Vec<Target> = match scope {
            Scope::System => vec![Target::System],
            Scope::Process(pid) => vec![Target::Process(pid)],
            Scope::Cgroup(_) => {
                let processes = self.threads(scope)?.processes;
                processes
                    .iter()
                    .map(|process| Target::Process(process.pid))
                    .collect()
            }
        };
        self.prepare(what, scope, 0)?;
        for target in targets {
            run(
                self.skel.progs.iter_vmas.as_fd(),
                target,
                what,
                &mut self.buffer,
            )?;
        }
        records(self.buffer.filled())
            .map(|raw| Ok(raw?.decode()?))
            .collect()
    }

    fn read_tasks(&mut self, scope: Scope, want: u32) -> Result<Tasks, ReadError> {
        let what = "tasks";
        self.prepare(what, scope, want)?;
        run(
            self.skel.progs.iter_tasks.as_fd(),
            scope.target(),
            what,
            &mut self.buffer,
        )?;
        let mut found = Tasks::default();
        for raw in records(self.buffer.filled()) {
            let raw = raw?;
            match raw.kind {
                RecKind::PROCESS => found.processes.push(raw.decode()?),
                RecKind::MM => found.mms.push(raw.decode()?),
                RecKind::SIGACTIONS => found.sigactions.push(raw.decode()?),
                _ => found.threads.push(raw.decode()?),
            }
        }
        for raw in records(&self.take_side(what)?) {
            let raw = raw?;
            match raw.kind {
                RecKind::AIO => found.aio.push(raw.decode()?),
                _ => found.timers.push(raw.decode()?),
            }
        }
        Ok(found)
    }

    fn read_files(&mut self, scope: Scope, want: u32) -> Result<Files, ReadError> {
        let what = "descriptors";
        self.prepare(what, scope, want)?;
        run(
            self.skel.progs.iter_files.as_fd(),
            scope.target(),
            what,
            &mut self.buffer,
        )?;
        let mut found = Files::default();
        for raw in records(self.buffer.filled()) {
            let raw = raw?;
            match raw.kind {
                RecKind::FILE => {
                    found.files.push(File {
                        rec: raw.decode()?,
                        detail: Detail::None,
                    });
                }
                _ => {
                    let detail = decode_detail(&raw)?;
                    // a detail always follows its file
                    if let Some(file) = found.files.last_mut() {
                        file.detail = detail;
                    }
                }
            }
        }
        for raw in records(&self.take_side(what)?) {
            let raw = raw?;
            match raw.kind {
                RecKind::EPOLL_ITEM => found.epoll_items.push(raw.decode()?),
                RecKind::WATCH => found.watches.push(raw.decode()?),
                RecKind::TTY_DATA => found.tty_data.push(raw.decode()?),
                _ => found.locks.push(raw.decode()?),
            }
        }
        Ok(found)
    }

    /// Sets the variables of the BPF programs for the next pass and empties the ring.
    fn prepare(&mut self, what: &'static str, scope: Scope, want: u32) -> Result<(), ReadError> {
        self.take_side(what).or_else(|error| match error {
            // a failed pass left records behind: they are what is thrown away here
            ReadError::Overflow { .. } => Ok(Vec::new()),
            other => Err(other),
        })?;
        self.buffer.clear();
        if let Some(vars) = self.skel.maps.bss_data.as_deref_mut() {
            (vars.scope_cgroup, vars.scope_pid) = match scope {
                Scope::System => (0, 0),
                Scope::Cgroup(id) => (id, 0),
                Scope::Process(pid) => (0, pid),
            };
            vars.want = want;
            vars.generation += 1;
            vars.verdict_task = 0;
            vars.last_mm = 0;
        }
        Ok(())
    }

    fn take_side(&mut self, what: &'static str) -> Result<Vec<u8>, ReadError> {
        self.ring
            .consume()
            .map_err(|source| ReadError::Ring { what, source })?;
        let bytes = std::mem::take(&mut *self.side.lock().unwrap_or_else(PoisonError::into_inner));
        let lost = self
            .skel
            .maps
            .bss_data
            .as_deref_mut()
            .map_or(0, |vars| std::mem::take(&mut vars.side_lost));
        if lost > 0 {
            return Err(ReadError::Overflow { what, lost });
        }
        Ok(bytes)
    }
}

impl Scope {
    /// What the kernel has to walk for it.
    fn target(self) -> Target {
        match self {
            Self::System | Self::Cgroup(_) => Target::System,
            Self::Process(pid) => Target::Process(pid),
        }
    }
}

/// Attaches an iterator program, runs it once and detaches it.
fn run(
    program: BorrowedFd<'_>,
    target: Target,
    what: &'static str,
    buffer: &mut Buffer,
) -> Result<(), ReadError> {
    pass::link(program, target)
        .and_then(|link| pass::run(link.as_fd(), buffer))
        .map_err(|source| ReadError::Run { what, source })
}

fn decode_detail(raw: &Raw<'_>) -> Result<Detail, Malformed> {
    Ok(match raw.kind {
        RecKind::EVENTFD => Detail::Eventfd(raw.decode()?),
        RecKind::PIPE => Detail::Pipe(raw.decode()?),
        RecKind::TIMERFD => Detail::Timerfd(raw.decode()?),
        RecKind::SIGNALFD => Detail::Signalfd(raw.decode()?),
        RecKind::PIDFD => Detail::Pidfd(raw.decode()?),
        RecKind::TTY => Detail::Tty(raw.decode()?),
        _ => Detail::Socket(raw.decode()?),
    })
}

impl ThreadRec {
    /// The thread's name.
    #[must_use]
    pub fn comm(&self) -> String {
        super::record::c_text(&self.comm)
    }

    /// Whether the thread has exited and waits to be reaped.
    #[must_use]
    pub fn is_zombie(&self) -> bool {
        self.exit_state != 0
    }
}

impl FileRec {
    /// The start of the name the file has in its directory, or the kernel's name for its kind.
    #[must_use]
    pub fn name(&self) -> String {
        super::record::c_text(&self.name)
    }

    /// Device number of the filesystem as stat(2) encodes it.
    #[must_use]
    pub fn st_dev(&self) -> u64 {
        user_dev(self.dev)
    }

    /// Number of the device, for device files, as stat(2) encodes it.
    #[must_use]
    pub fn st_rdev(&self) -> u64 {
        user_dev(self.rdev)
    }
}

impl VmaRec {
    /// The name of a special or named anonymous mapping, or the start of the file's name.
    #[must_use]
    pub fn name(&self) -> String {
        super::record::c_text(&self.name)
    }

    /// Device number of the file as stat(2) encodes it.
    #[must_use]
    pub fn st_dev(&self) -> u64 {
        user_dev(self.dev)
    }
}

impl SockRec {
    /// The address of a Unix socket: empty if unnamed, starting with NUL if abstract.
    #[must_use]
    pub fn unix_path(&self) -> Vec<u8> {
        let len = (self.path_len as usize).min(self.path.len());
        self.path[..len]
            .iter()
            .map(|c| c.to_ne_bytes()[0])
            .collect()
    }
}

/// Turns the kernel's own device number (major << 20 | minor) into the one user space sees.
#[must_use]
pub fn user_dev(dev: u32) -> u64 {
    nix::sys::stat::makedev(u64::from(dev >> 20), u64::from(dev & 0xf_ffff))
}

impl events::ProcessRec {
    /// Whether this process leads its session.
    #[must_use]
    pub fn is_session_leader(&self) -> bool {
        self.flags & events::ProcessFlag::SESSION_LEADER != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The agent resyncs from a thread of its own.
    #[test]
    fn iterators_can_move_between_threads() {
        fn is_send<T: Send>() {}
        is_send::<Iterators>();
    }
}
