//! Takes the state of a running application: prepare, pre-copy, freeze, collect, and then
//! either kill it or let it go on as if nothing had happened.

mod aio;
mod attributes;
mod cgroups;
mod clocks;
mod collect;
mod contents;
mod copier;
mod eligibility;
mod error;
mod examine;
pub mod files;
mod freeze;
mod guard;
mod huge;
mod known;
mod lock;
mod memory;
mod message_queues;
mod mm;
mod names;
mod namespaces;
mod pages;
mod pending;
mod refresh;
mod restart;
mod semaphores;
mod shared;
mod spaces;
mod sysv;
mod target;
mod tasks;
mod threads;
mod timeline;
mod timers;
mod tmpfs;
mod tracked;
mod uring;
mod vdso;
mod view;
mod wakeups;

pub use error::CheckpointError;
pub use examine::survey;
pub use files::Slots;
pub use known::Known;
pub use target::Selection;
pub use timeline::{Durations, Timeline};

use crate::agent::client::{SOCKET, borrow_iterators};
use crate::bpf::events::{RegistersRec, VmaRec};
use crate::bpf::iter::{Files, Iterators, LoadError, Scope, Tasks};
use crate::bpf::netlock::NetLock;
use crate::fault::Fault;
use crate::image::Store;
use crate::model::frozen::{
    ApplicationHeader, Blocker, Clocks, MessageQueue, Mm, Process, TcpConnection,
};
use crate::model::ids::MmId;
use crate::sys::cgroup::Event;
use crate::sys::fd;
use crate::sys::heap;
use crate::sys::precedence::Precedence;
use crate::sys::process::raise_descriptor_limit;
use crate::sys::xstate::Layout;
use clocks::Offsets;
use eligibility::Namespaces;
use files::{Alike, Repaired};
use guard::{Guard, Watch};
use memory::Memory;
use restart::Now;
use std::cell::{OnceCell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};
use target::Target;
use threads::Tracees;
use view::View;
use wakeups::Wakeups;

/// Where network locks wait for a restore, on the bpf filesystem.
pub const PIN_DIR: &str = "/sys/fs/bpf/tracker";

/// The iterators, the same for all captures of a command: loading is what takes time.
pub type SharedIterators = Rc<RefCell<Iterators>>;

/// Iterators for captures: the agent's spare ones, or loaded for want of these.
///
/// # Errors
/// The kernel lacks something, or a capability is missing.
pub fn shared_iterators() -> Result<SharedIterators, CheckpointError> {
    Ok(Rc::new(RefCell::new(iterators()?)))
}

fn iterators() -> Result<Iterators, LoadError> {
    match borrow_iterators(Path::new(SOCKET)) {
        Ok(iterators) => Ok(iterators),
        Err(error) => {
            let error: &dyn std::error::Error = &error;
            tracing::debug!(error, "iterators are loaded, not borrowed");
            Iterators::load()
        }
    }
}

/// How a capture goes about it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long freezing may take before it is given up.
    pub deadline: Duration,
    /// How long it may stand still before it is given up; checked after each step.
    pub max_freeze: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(10),
            max_freeze: None,
        }
    }
}

/// How much memory a capture copied, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryStats {
    /// Private pages in the image.
    pub pages: u64,
    /// Copied while the application ran.
    pub precopied: u64,
    /// Copied while it stood still.
    pub copied_frozen: u64,
    /// Whether the kernel tells which pages were written.
    pub dirty_tracking: bool,
}

struct Frozen {
    tasks: Tasks,
    open: Files,
    tracees: Tracees,
    repaired: Repaired,
    now: Now,
    clocks: Clocks,
    /// As the image carries them, once read.
    processes: Vec<Process>,
    message_queues: Vec<MessageQueue>,
    vmas: Vec<VmaRec>,
    mms: BTreeMap<MmId, Mm>,
}

/// One application under capture. All calls must come from one thread: a tracee belongs to the
/// thread that seized it. Dropping it undoes everything.
pub struct Capture {
    target: Target,
    options: Options,
    iterators: SharedIterators,
    wakeups: Wakeups,
    guard: Option<Guard>,
    lock: Option<NetLock>,
    alike: Alike,
    /// Why connections that nobody has accepted are not carried, if they are not; found out when
    /// there are any.
    accept_queues: OnceCell<Option<String>>,
    /// The lock stays behind for a restore.
    lock_left: bool,
    /// The lock has dropped what came for the application's connections.
    silenced: bool,
    code: vdso::Code,
    ours: Namespaces,
    view: Rc<View>,
    offsets: Offsets,
    blockers: Vec<Blocker>,
    memory: Memory,
    frozen: Option<Frozen>,
    /// Present while it freezes or is frozen: what has to be done until it runs again goes first.
    freezing: Option<Precedence>,
    timeline: Timeline,
}

impl std::fmt::Debug for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture")
            .field("name", &self.target.header.name)
            .field("frozen", &self.freezing.is_some())
            .finish_non_exhaustive()
    }
}

impl Capture {
    /// Loads everything and looks for what cannot be carried; the application is not touched,
    /// except that a process tree is moved into a cgroup of its own.
    ///
    /// # Errors
    /// Nothing runs there, or the kernel lacks something. Blockers are no error here:
    /// [`Capture::blockers`].
    pub fn prepare(
        selection: &Selection,
        options: Options,
        iterators: SharedIterators,
    ) -> Result<Self, CheckpointError> {
        let timeline = Timeline::new();
        heap::keep();
        // Connections are kept open all at once.
        raise_descriptor_limit()?;
        let wakeups = Wakeups::new()?;
        let target = Target::find(selection)?;
        let guard = Guard::start(&Watch {
            cgroup: target.cgroup.path().to_owned(),
            pins: pin_dir(&target.header),
            back_to: target.moved_from.clone(),
        })?;
        let mut this = Self {
            target,
            options,
            iterators,
            wakeups,
            guard: Some(guard),
            lock: None,
            alike: Alike::default(),
            accept_queues: OnceCell::new(),
            lock_left: false,
            silenced: false,
            code: vdso::Code::ours(),
            ours: Namespaces::ours(),
            view: Rc::default(),
            offsets: Offsets::default(),
            blockers: Vec::new(),
            memory: Memory::new(),
            frozen: None,
            freezing: None,
            timeline,
        };
        let shared = Rc::clone(&this.iterators);
        this.target.gather(selection, &mut shared.borrow_mut())?;
        this.examine()?;
        this.timeline.done("prepare");
        Fault::Prepare.point()?;
        Ok(this)
    }

    fn scope(&self) -> Scope {
        Scope::Cgroup(self.target.cgroup.id())
    }

    /// Fails once an abort was asked for, or the application stands still for too long.
    fn may_go_on(&self) -> Result<(), CheckpointError> {
        self.wakeups.check()?;
        self.timeline.within(self.options.max_freeze)
    }

    /// Fails if somebody else has let the application run: what was read of it is void.
    fn still_stands(&self) -> Result<(), CheckpointError> {
        if self.target.cgroup.holds(Event::Frozen)? {
            return Ok(());
        }
        Err(CheckpointError::Unstable(
            "Somebody else has thawed its cgroup".into(),
        ))
    }

    /// What cannot be carried.
    #[must_use]
    pub fn blockers(&self) -> &[Blocker] {
        &self.blockers
    }

    /// Name and cgroup of the application.
    #[must_use]
    pub fn header(&self) -> &ApplicationHeader {
        &self.target.header
    }

    /// When each step ended.
    #[must_use]
    pub fn timeline(&self) -> &Timeline {
        &self.timeline
    }

    /// Notes that a step of the caller's own has ended.
    pub fn reached(&mut self, step: &'static str) {
        self.timeline.done(step);
    }

    /// How much memory was copied.
    #[must_use]
    pub fn memory(&self) -> MemoryStats {
        self.memory.stats()
    }

    /// Copies memory while the application runs. Where the kernel does not tell which pages
    /// change afterwards this copies only what processes share, since all else would have to be
    /// copied again.
    ///
    /// # Errors
    /// The carrier is full, or tracker was asked to stop.
    pub fn precopy(&mut self, store: &dyn Store, slots: &mut Slots) -> Result<(), CheckpointError> {
        let scope = self.scope();
        self.memory.precopy(
            &mut self.iterators.borrow_mut(),
            scope,
            store,
            slots,
            &self.wakeups,
        )?;
        self.make_ready()?;
        self.timeline.done("precopy");
        Fault::Precopy.point()?;
        Ok(())
    }

    /// Takes what the frozen window will need while the application runs: memory, which is dear
    /// where it is touched for the first time, room for as many descriptors as it has, and what
    /// this processor tells of itself, for which a hypervisor may have to be asked.
    fn make_ready(&mut self) -> Result<(), CheckpointError> {
        /// What is put together of records takes a few times their room.
        const TIMES: usize = 4;
        /// An application so large stands still for longer anyway.
        const MOST: usize = 256 << 20;
        let _ = Layout::ours();
        let mut iterators = self.iterators.borrow_mut();
        let tasks = iterators.threads(self.scope())?;
        let open = iterators.descriptors_of(self.scope(), &tasks.processes)?;
        fd::make_room(open.len());
        let registers = tasks.threads.len() * size_of::<RegistersRec>();
        let room = iterators.room() + registers;
        iterators.make_room(room);
        drop((iterators, tasks));
        heap::warm((room * TIMES).min(MOST));
        Ok(())
    }

    /// TCP connections that this application, or one in a cgroup beside its own, has closed and
    /// that still send; and how many cannot be carried. To be called while the network is silent.
    ///
    /// # Errors
    /// The iterators cannot be read, or there is no such cgroup.
    pub fn orphans_of_all(&mut self) -> Result<(Vec<TcpConnection>, usize), CheckpointError> {
        let own = self.target.cgroup.path();
        let all = own.parent().unwrap_or(own);
        // A cgroup's id is its inode number.
        let id = fs::metadata(all).map_err(CheckpointError::io("stat", all))?;
        let scope = Scope::Cgroup(id.ino());
        Ok(files::orphans(&mut self.iterators.borrow_mut(), scope)?)
    }

    /// Ends the application: call it when the image is sealed. The network lock stays behind,
    /// pinned, until a restore or the next boot.
    ///
    /// # Errors
    /// Before the kill: everything is undone. The kill itself does not fail half-way.
    pub fn commit_and_kill(&mut self) -> Result<(), CheckpointError> {
        Fault::Kill.point()?;
        self.may_go_on()?;
        if let Some(frozen) = &mut self.frozen {
            files::silence(&frozen.open, &mut frozen.repaired)?;
        }
        self.still_stands()?;
        if let Some(lock) = &mut self.lock {
            std::fs::create_dir_all(PIN_DIR).map_err(CheckpointError::io("mkdir", PIN_DIR))?;
            lock.pin(&pin_dir(&self.target.header))?;
        }
        self.target.cgroup.kill()?;
        // From here on nobody may thaw, which would undo the lock: it belongs to the restore.
        self.lock_left = self.lock.take().is_some();
        if let Some(guard) = self.guard.take() {
            guard.done();
        }
        let mut silent = Vec::new();
        if let Some(frozen) = self.frozen.take() {
            frozen.tracees.abandon();
            silent = frozen.repaired.give_up();
        }
        let deadline = Instant::now() + self.options.deadline;
        self.target.cgroup.wait(Event::Empty, deadline, None)?;
        // The last reference to each connection: closed in repair mode, it sends nothing.
        drop(silent);
        self.timeline.release();
        self.freezing = None;
        // A frozen cgroup would freeze what is restored into it.
        self.target.cgroup.set_frozen(false)?;
        if self.target.moved_from.is_some() {
            let _ = crate::sys::cgroup::remove(self.target.cgroup.path());
        }
        self.timeline.done("kill");
        Ok(())
    }

    /// Lets the application go on as if nothing had happened.
    pub fn thaw(&mut self) {
        if let Err(e) = self.let_run() {
            tracing::warn!("{e}");
        }
        if let Some(mut lock) = self.lock.take()
            && let Err(e) = lock.release()
        {
            tracing::error!("{e}");
        }
    }

    /// Connections first, then system calls, then the freezer: from the moment it runs,
    /// everything must be as it was.
    ///
    /// # Errors
    /// It runs, but a thread of it is still traced until tracker ends.
    fn let_run(&mut self) -> Result<(), CheckpointError> {
        let had_tracees = self.frozen.is_some();
        if let Some(frozen) = self.frozen.take() {
            drop(frozen.repaired);
            drop(frozen.tracees);
        }
        let mut repaired = Ok(());
        if self.freezing.is_some() {
            if !had_tracees {
                repaired = self.repair_calls();
            }
            if let Err(e) = self.target.cgroup.set_frozen(false) {
                tracing::error!("{e}");
            }
            self.timeline.release();
            self.freezing = None;
        }
        repaired
    }

    /// The freezer alone ends some waits with `EINTR`: threads in such a wait that are frozen and
    /// were not stopped yet are stopped once, to set it to go on.
    fn repair_calls(&mut self) -> Result<(), CheckpointError> {
        /// For machines that are very busy: what is frozen and can stop at all does so at once.
        const LIMIT: Duration = Duration::from_secs(5);
        let mut tasks = self.iterators.borrow_mut().frozen_threads(self.scope())?;
        uring::leave_out_workers(&mut tasks);
        let (now, _) = clocks::read(self.offsets)?;
        Tracees::repair(&mut tasks, Some(&self.wakeups), LIMIT, &now)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.thaw();
        if let Some(guard) = self.guard.take() {
            self.target.put_back();
            guard.done();
        }
    }
}

fn pin_dir(header: &ApplicationHeader) -> PathBuf {
    Path::new(PIN_DIR).join(&header.name)
}
