//! Takes the state of a running application: prepare, pre-copy, freeze, collect, and then
//! either kill it or let it go on as if nothing had happened.

mod clocks;
mod contents;
mod eligibility;
mod error;
mod fault;
pub mod files;
mod guard;
mod lock;
mod memory;
mod mm;
mod pages;
mod restart;
mod target;
mod tasks;
mod threads;
mod timeline;
mod vdso;
mod wakeups;

pub use error::CheckpointError;
pub use fault::{Fault, FaultHit};
pub use files::Slots;
pub use target::Selection;
pub use timeline::{Durations, Timeline};

use crate::bpf::events::{ThreadFlag, ThreadRec};
use crate::bpf::iter::{Iterators, Scope, Tasks};
use crate::bpf::netlock::NetLock;
use crate::image::Store;
use crate::model::frozen::{Application, ApplicationHeader, Blocker, Clocks};
use crate::model::ids::Pid;
use crate::sys::cgroup::{Event, Waited};
use clocks::Offsets;
use eligibility::Namespaces;
use files::Repaired;
use guard::{Guard, Watch};
use memory::Memory;
use restart::Now;
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};
use target::Target;
use threads::Tracees;
use vdso::Standing;
use wakeups::Wakeups;

/// Where network locks wait for a restore, on the bpf filesystem.
pub const PIN_DIR: &str = "/sys/fs/bpf/tracker";

/// The iterators, loaded once for all captures of a command: loading is what takes time.
pub type SharedIterators = Rc<RefCell<Iterators>>;

/// Loads the iterators.
///
/// # Errors
/// The kernel lacks something, or a capability is missing.
pub fn load_iterators() -> Result<SharedIterators, CheckpointError> {
    Ok(Rc::new(RefCell::new(Iterators::load()?)))
}

/// How often a freeze is repeated for a thread that stands in the vDSO.
const FREEZE_ATTEMPTS: u32 = 12;

/// How a capture goes about it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How long freezing may take before it is given up.
    pub deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(10),
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
    tracees: Tracees,
    repaired: Repaired,
    now: Now,
    clocks: Clocks,
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
    code: vdso::Code,
    ours: Namespaces,
    offsets: Offsets,
    blockers: Vec<Blocker>,
    memory: Memory,
    frozen: Option<Frozen>,
    freezing: bool,
    timeline: Timeline,
}

impl std::fmt::Debug for Capture {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Capture")
            .field("name", &self.target.header.name)
            .field("frozen", &self.freezing)
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
            code: vdso::Code::ours(),
            ours: Namespaces::ours(),
            offsets: Offsets::default(),
            blockers: Vec::new(),
            memory: Memory::new(),
            frozen: None,
            freezing: false,
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

    fn examine(&mut self) -> Result<(), CheckpointError> {
        let scope = self.scope();
        let name = &self.target.header.name;
        if self.target.cgroup.holds(Event::Frozen)? {
            return Err(CheckpointError::Unstable(format!(
                "The cgroup of {name} is frozen already by somebody else"
            )));
        }
        let tasks = self.iterators.borrow_mut().tasks(scope)?;
        let Some(first) = tasks.processes.first() else {
            return Err(CheckpointError::NotRunning(name.clone()));
        };
        let ourselves = std::process::id();
        if tasks.processes.iter().any(|p| p.pid == ourselves) {
            return Err(CheckpointError::Ourselves(Pid(ourselves.cast_signed())));
        }
        self.offsets = Offsets::of(Pid(first.pid.cast_signed()));
        let vmas = self.iterators.borrow_mut().vmas(scope)?;
        self.blockers = eligibility::blockers(&tasks, &vmas, &self.ours);
        for child in self.target.cgroup.children()? {
            self.blockers.push(Blocker {
                pid: Pid(first.pid.cast_signed()),
                fd: None,
                object: format!("cgroup {child} below that of the application"),
                reason: "nested cgroups are not carried yet".to_owned(),
            });
        }
        let open = self.iterators.borrow_mut().files(scope)?;
        self.blockers.extend(files::blockers(&open));
        Ok(())
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

    /// How much memory was copied.
    #[must_use]
    pub fn memory(&self) -> MemoryStats {
        self.memory.stats()
    }

    /// Copies memory while the application runs. Where the kernel does not tell which pages
    /// change afterwards this does nothing, since all would have to be copied again.
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
        self.timeline.done("precopy");
        Fault::Precopy.point()?;
        Ok(())
    }

    /// Adds all sockets of the application to a network lock; returns how many there are.
    ///
    /// # Errors
    /// The lock takes no more entries.
    pub fn add_to_lock(&mut self, lock: &mut NetLock) -> Result<usize, CheckpointError> {
        let scope = self.scope();
        let count = lock::add_sockets(lock, &self.iterators.borrow_mut().descriptors(scope)?)?;
        lock.add_cgroup(self.target.cgroup.id())?;
        Ok(count)
    }

    /// Locks the application's network, if it has any.
    ///
    /// # Errors
    /// The lock cannot be loaded or attached.
    pub fn lock_network(&mut self) -> Result<(), CheckpointError> {
        let mut lock = NetLock::load()?;
        if self.add_to_lock(&mut lock)? > 0 {
            lock.engage()?;
            self.lock = Some(lock);
        }
        self.timeline.done("lock");
        Fault::Lock.point()?;
        Ok(())
    }

    /// Whether packets are being dropped.
    #[must_use]
    pub fn is_locked(&self) -> bool {
        self.lock.is_some()
    }

    /// Freezes the application and stops its threads where their registers can be read.
    ///
    /// # Errors
    /// It does not freeze before the deadline, or something that cannot be carried has
    /// appeared. Drop or [`Capture::thaw`] lets it go on.
    pub fn freeze(&mut self) -> Result<(), CheckpointError> {
        for attempt in 1..=FREEZE_ATTEMPTS {
            self.freeze_once()?;
            let worst = self.worst_standing();
            let last = attempt == FREEZE_ATTEMPTS;
            match worst {
                Standing::Outside => break,
                Standing::Inside if last => break,
                _ if last => {
                    self.thaw();
                    return Err(CheckpointError::Unstable(
                        "A thread stands in the first bytes of a vDSO function each time it is \
                         frozen"
                            .into(),
                    ));
                }
                _ => {
                    self.let_run();
                    // Long enough for it to return from a clock function.
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
        self.timeline.done("freeze");
        Fault::Threads.point()?;
        self.wakeups.check()?;
        Ok(())
    }

    fn freeze_once(&mut self) -> Result<(), CheckpointError> {
        let limit = self.options.deadline;
        let deadline = Instant::now() + limit;
        self.timeline.freeze();
        self.freezing = true;
        self.target.cgroup.set_frozen(true)?;
        let stop = self.wakeups.stop_fd();
        match self
            .target
            .cgroup
            .wait(Event::Frozen, deadline, Some(stop))?
        {
            Waited::Reached => {}
            Waited::Interrupted => return Err(CheckpointError::Interrupted),
            Waited::Late => return Err(self.late()),
        }
        Fault::Freeze.point()?;
        let tasks = self.iterators.borrow_mut().tasks(self.scope())?;
        let blockers = eligibility::blockers(&tasks, &[], &self.ours);
        if !blockers.is_empty() {
            return Err(CheckpointError::Blocked(blockers));
        }
        let (now, clocks) = clocks::read(self.offsets)?;
        let shared = |tgid| {
            let process = tasks.processes.iter().find(|p| p.pid == tgid);
            process.map_or(0, |p| p.shared_pending)
        };
        let tracees = Tracees::stop(&tasks.threads, &self.wakeups, limit, &now, shared)?;
        self.frozen = Some(Frozen {
            tasks,
            tracees,
            repaired: Repaired::default(),
            now,
            clocks,
        });
        self.only_64_bit()
    }

    fn only_64_bit(&self) -> Result<(), CheckpointError> {
        /// `__USER_CS` of x86-64.
        const USER_CS: u64 = 0x33;
        let threads = self
            .frozen
            .iter()
            .flat_map(|frozen| &frozen.tracees.threads);
        let other = threads.filter(|thread| thread.regs.cs != USER_CS);
        let blockers: Vec<Blocker> = other
            .map(|thread| Blocker {
                pid: thread.pid,
                fd: None,
                object: "32-bit code".to_owned(),
                reason: "only 64-bit programs are carried yet".to_owned(),
            })
            .collect();
        if blockers.is_empty() {
            return Ok(());
        }
        Err(CheckpointError::Blocked(blockers))
    }

    fn late(&mut self) -> CheckpointError {
        let scope = self.scope();
        let running = |rec: &&ThreadRec| rec.flags & ThreadFlag::FROZEN == 0 && !rec.is_zombie();
        let tasks = self
            .iterators
            .borrow_mut()
            .threads(scope)
            .unwrap_or_default();
        let task = tasks.threads.iter().find(running).map_or_else(
            || self.target.header.name.clone(),
            |rec| format!("Thread {} ({})", rec.tid, rec.comm()),
        );
        CheckpointError::Deadline {
            task,
            limit: self.options.deadline,
            hint: "it waits for a device or in vfork(2): try again later",
        }
    }

    fn worst_standing(&self) -> Standing {
        let Some(frozen) = &self.frozen else {
            return Standing::Outside;
        };
        let of = |thread: &threads::Stopped| {
            let rec = frozen.tasks.mms.iter();
            let mm = frozen
                .tasks
                .threads
                .iter()
                .find(|rec| rec.tid == thread.tid.0.cast_unsigned())
                .map_or(0, |rec| rec.mm);
            let base = rec.clone().find(|rec| rec.mm == mm).map_or(0, |mm| mm.vdso);
            self.code.standing(base, thread.regs.rip)
        };
        let threads = frozen.tracees.threads.iter();
        threads.map(of).max().unwrap_or(Standing::Outside)
    }

    /// Reads everything. The application stays frozen, its TCP connections in repair mode.
    ///
    /// # Errors
    /// Something cannot be read or carried, or tracker was asked to stop.
    pub fn collect(
        &mut self,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<Application, CheckpointError> {
        let scope = self.scope();
        let Some(frozen) = &mut self.frozen else {
            return Err(CheckpointError::Unstable("It is not frozen".into()));
        };
        let processes = tasks::processes(&frozen.tasks, &frozen.tracees, &frozen.now)?;
        self.timeline.done("tasks");
        Fault::Tasks.point()?;
        self.wakeups.check()?;

        let open = self.iterators.borrow_mut().files(scope)?;
        if let Some(lock) = &mut self.lock {
            lock::add_sockets(lock, &open.files)?;
        }
        let read = files::collect(
            &open,
            &mut self.iterators.borrow_mut(),
            &frozen.now,
            store,
            slots,
        )
        .map_err(|e| CheckpointError::Files(e.to_string()))?;
        frozen.repaired = read.repaired;
        self.timeline.done("files");
        Fault::Files.point()?;
        self.wakeups.check()?;

        let vmas = self.iterators.borrow_mut().vmas(scope)?;
        let mut contents = read.contents;
        let mms = self.memory.collect(
            &frozen.tasks,
            &vmas,
            store,
            slots,
            &mut contents,
            &self.wakeups,
        )?;
        self.timeline.done("memory");

        let release = nix::sys::utsname::uname().map(|u| u.release().to_owned());
        Ok(Application {
            header: ApplicationHeader {
                kernel_release: release.unwrap_or_default().to_string_lossy().into_owned(),
                clocks: frozen.clocks,
                ..self.target.header.clone()
            },
            processes,
            mms,
            files: read.files,
            ofds: read.ofds,
            contents,
        })
    }

    /// Ends the application: call it when the image is sealed. The network lock stays behind,
    /// pinned, until a restore or the next boot.
    ///
    /// # Errors
    /// Before the kill: everything is undone. The kill itself does not fail half-way.
    pub fn commit_and_kill(&mut self) -> Result<(), CheckpointError> {
        Fault::Kill.point()?;
        self.wakeups.check()?;
        if let Some(lock) = &mut self.lock {
            std::fs::create_dir_all(PIN_DIR).map_err(CheckpointError::io("mkdir", PIN_DIR))?;
            lock.pin(&pin_dir(&self.target.header))?;
        }
        self.target.cgroup.kill()?;
        // From here on nobody may thaw: the guard would undo the lock.
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
        self.freezing = false;
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
        self.let_run();
        if let Some(mut lock) = self.lock.take()
            && let Err(e) = lock.release()
        {
            tracing::error!("{e}");
        }
    }

    /// Connections first, then system calls, then the freezer: from the moment it runs,
    /// everything must be as it was.
    fn let_run(&mut self) {
        let had_tracees = self.frozen.is_some();
        if let Some(frozen) = self.frozen.take() {
            drop(frozen.repaired);
            drop(frozen.tracees);
        }
        if self.freezing {
            if !had_tracees {
                self.repair_calls();
            }
            if let Err(e) = self.target.cgroup.set_frozen(false) {
                tracing::error!("{e}");
            }
            self.freezing = false;
            self.timeline.release();
        }
    }

    /// The freezer alone ends some waits with `EINTR`: threads that are frozen and were not
    /// stopped yet are stopped once, to set those waits to go on.
    fn repair_calls(&mut self) {
        let Ok(tasks) = self.iterators.borrow_mut().threads(self.scope()) else {
            return;
        };
        let Ok((now, _)) = clocks::read(self.offsets) else {
            return;
        };
        let shared = |tgid| {
            let process = tasks.processes.iter().find(|p| p.pid == tgid);
            process.map_or(0, |p| p.shared_pending)
        };
        let limit = Duration::from_millis(200);
        // Dropping them is what repairs.
        if let Err(e) = Tracees::repair(&tasks.threads, limit, &now, shared) {
            tracing::debug!("{e}");
        }
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
