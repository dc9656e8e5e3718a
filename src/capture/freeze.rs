//! Stopping an application at a moment in which all of it can be carried.

use super::eligibility;
use super::error::CheckpointError;
use super::files::{self, Repaired, Slots};
use super::threads::Tracees;
use super::timers;
use super::vdso::Standing;
use super::{Capture, Frozen, clocks, uring};
use crate::bpf::events::{ThreadFlag, ThreadRec};
use crate::bpf::iter::{Files, Tasks};
use crate::fault::Fault;
use crate::model::frozen::Blocker;
use crate::model::ids::Tid;
use crate::sys::cgroup::{Event, Waited};
use crate::sys::precedence::Precedence;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// How often a freeze is repeated for an object that is not carried and that the application
/// holds for a moment only; it gets more time after each, 310 ms in all and what
/// the looks in between take: where processors are scarce it may be that long until it gets one.
const BLOCKED_ATTEMPTS: u32 = 16;

/// How often for connections that it is about to accept.
const CLIENTS_ATTEMPTS: u32 = 10;

/// How often for a thread that stands in the vDSO. Some threads do little else than read clocks:
/// most of their time is spent there, and all of them must be outside at once.
const VDSO_ATTEMPTS: u32 = 300;

/// Between two attempts: long enough for a thread to return from a clock function.
const PAUSE: Duration = Duration::from_millis(1);

/// After so many attempts to meet an application without what keeps it from being carried: on a
/// busy machine it holds that for as long as it has to wait for a CPU.
pub(super) fn longer(attempt: u32) -> Duration {
    PAUSE * (attempt * attempt / 4).max(1)
}

impl Capture {
    /// Asks the kernel to freeze the application, which it does as the threads come by;
    /// [`Self::freeze`] follows. Of many applications those that are asked keep out of the way of
    /// the others.
    ///
    /// # Errors
    /// The cgroup cannot be written. Drop or [`Capture::thaw`] lets it go on.
    pub fn begin_freeze(&mut self) -> Result<(), CheckpointError> {
        if self.freezing.is_none() {
            self.timeline.freeze();
            self.freezing = Some(Precedence::take());
            self.target.cgroup.set_frozen(true)?;
        }
        Ok(())
    }

    /// Freezes the application and stops its threads where their registers can be read. Memory
    /// that is read beside the rest begins to be read, into `slots`.
    ///
    /// # Errors
    /// It does not freeze before the deadline, or something that cannot be carried has
    /// appeared. Drop or [`Capture::thaw`] lets it go on.
    pub fn freeze(&mut self, slots: Slots) -> Result<(), CheckpointError> {
        for attempt in 1.. {
            let blockers = self.freeze_once(slots)?;
            let settled = !self.awaits_clients() || attempt >= CLIENTS_ATTEMPTS;
            if blockers.is_empty() && settled && self.worst_standing() == Standing::Outside {
                break;
            }
            self.let_run()?;
            self.memory.take_back();
            if !blockers.is_empty() && attempt >= BLOCKED_ATTEMPTS {
                self.thaw();
                return Err(CheckpointError::Blocked(blockers));
            }
            if attempt >= VDSO_ATTEMPTS {
                self.thaw();
                return Err(CheckpointError::Unstable(
                    "A thread stands in a vDSO function each time it is frozen".into(),
                ));
            }
            std::thread::sleep(if blockers.is_empty() && settled {
                // Not always the same, or it may be found in the same place.
                PAUSE * (attempt % 4 + 1)
            } else {
                longer(attempt)
            });
            if !blockers.is_empty() {
                self.await_better()?;
            }
        }
        self.timeline.done("freeze");
        Fault::Threads.point()?;
        self.may_go_on()
    }

    /// With new connections held off, an application that runs on accepts those it has soon, and
    /// they are carried as any other. A handshake that does not end soon has nobody behind it; one
    /// that ends while memory is read leaves a connection to accept.
    fn awaits_clients(&self) -> bool {
        let frozen = self.frozen.as_ref();
        frozen.is_some_and(|frozen| {
            files::handshakes(&frozen.open) || files::any_unaccepted(&frozen.open)
        })
    }

    /// Freezes it, and says whether that took no longer than `limit`.
    pub(super) fn freezes_within(&mut self, limit: Duration) -> Result<bool, CheckpointError> {
        let deadline = Instant::now() + limit;
        self.begin_freeze()?;
        let stop = Some(self.wakeups.stop_fd());
        match self.target.cgroup.wait(Event::Frozen, deadline, stop)? {
            Waited::Reached => Ok(true),
            Waited::Late => Ok(false),
            Waited::Interrupted => Err(CheckpointError::Interrupted),
        }
    }

    /// What is not carried of processes and their requests.
    fn blockers_among(&self, tasks: &Tasks) -> Vec<Blocker> {
        let mut blockers = eligibility::blockers(tasks, &[], &self.ours);
        blockers.extend(uring::in_flight(tasks));
        blockers
    }

    /// Waits a while for a moment in which the application, which runs, has nothing of what kept
    /// it from being carried: one that has a child by vfork(2) most of the time is hardly met
    /// without by chance.
    fn await_better(&self) -> Result<(), CheckpointError> {
        const LOOKS: u32 = 20;
        for _ in 0..LOOKS {
            self.wakeups.check()?;
            let tasks = self.iterators.borrow_mut().tasks(self.scope())?;
            if self.blockers_among(&tasks).is_empty() {
                break;
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Freezes and stops it; returns what is not carried and has appeared since it was examined.
    fn freeze_once(&mut self, slots: Slots) -> Result<Vec<Blocker>, CheckpointError> {
        let limit = self.options.deadline;
        if !self.freezes_within(limit)? {
            return Err(self.late());
        }
        Fault::Freeze.point()?;
        let mut tasks = self.settled_tasks()?;
        let blockers = self.blockers_among(&tasks);
        if !blockers.is_empty() {
            return Ok(blockers);
        }
        let (now, clocks) = clocks::read(self.offsets)?;
        let tracees = Tracees::stop(&mut tasks, &self.wakeups, limit, &now)?;
        self.frozen = Some(Frozen {
            tasks,
            open: Files::default(),
            tracees,
            repaired: Repaired::default(),
            now,
            clocks,
            processes: Vec::new(),
            message_queues: Vec::new(),
            vmas: Vec::new(),
            mms: BTreeMap::new(),
        });
        if self.worst_standing() == Standing::Inside {
            // To be tried again, maybe often.
            return Ok(Vec::new());
        }
        self.read_mappings(slots)?;
        let mut blockers = self.not_64_bit();
        blockers.extend(self.read_open()?);
        Ok(blockers)
    }

    /// Notes what the stopped application has mapped, and has it read if that is done beside the
    /// rest: it takes longest.
    fn read_mappings(&mut self, slots: Slots) -> Result<(), CheckpointError> {
        let scope = self.scope();
        let Some(frozen) = &mut self.frozen else {
            return Ok(());
        };
        let mut iterators = self.iterators.borrow_mut();
        frozen.vmas = iterators.vmas_of(scope, &frozen.tasks.processes)?;
        if self.memory.is_beside() {
            self.memory.begin(&frozen.tasks, &frozen.vmas, slots)?;
        }
        Ok(())
    }

    /// Reads the frozen tasks: again if requests are on their way, which a disk ends without them.
    fn settled_tasks(&mut self) -> Result<Tasks, CheckpointError> {
        const LOOKS: u32 = 20;
        let mut iterators = self.iterators.borrow_mut();
        let mut tasks = iterators.frozen_tasks(self.scope())?;
        for _ in 0..LOOKS {
            if !uring::are_in_flight(&tasks) {
                break;
            }
            std::thread::sleep(PAUSE);
            tasks = iterators.frozen_tasks(self.scope())?;
        }
        uring::leave_out_workers(&mut tasks);
        timers::note_queued(&mut tasks);
        Ok(tasks)
    }

    /// Notes what the stopped application has open; returns what of it is not carried.
    fn read_open(&mut self) -> Result<Vec<Blocker>, CheckpointError> {
        let scope = self.scope();
        let Some(frozen) = &mut self.frozen else {
            return Ok(Vec::new());
        };
        let (tasks, mut iterators) = (&frozen.tasks, self.iterators.borrow_mut());
        let accept_queues = &self.accept_queues;
        // Whatever else the machine has open must not keep the application waiting.
        let mut open = iterators.files_of(scope, &tasks.processes)?;
        let mut blockers = files::blockers(&open, tasks);
        if files::any_unaccepted(&open)
            && let Some(reason) = accept_queues.get_or_init(files::accept_queues_refusal)
        {
            blockers.extend(files::unaccepted(&open, reason));
        }
        blockers.extend(files::controlling(tasks, &open));
        if blockers.is_empty() && files::has_terminals(&open) {
            let again = iterators.files_of(scope, &tasks.processes)?;
            blockers.extend(files::unsettled(&open, &again));
        }
        if blockers.is_empty() && files::has_messages(&open.files) {
            open.messages = iterators.messages(scope, &tasks.processes)?;
        }
        frozen.open = open;
        Ok(blockers)
    }

    fn not_64_bit(&self) -> Vec<Blocker> {
        /// `__USER_CS` of x86-64.
        const USER_CS: u64 = 0x33;
        let threads = self
            .frozen
            .iter()
            .flat_map(|frozen| &frozen.tracees.threads);
        let other = threads.filter(|thread| thread.regs.cs != USER_CS);
        other
            .map(|thread| Blocker {
                pid: thread.pid,
                fd: None,
                object: "32-bit code".to_owned(),
                reason: "only 64-bit programs are carried yet".to_owned(),
            })
            .collect()
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
        let mms = &frozen.tasks.mms;
        let threads = frozen.tasks.threads.iter().filter_map(|rec| {
            let thread = frozen.tracees.of(Tid(rec.tid.cast_signed()))?;
            let mm = mms.iter().find(|mm| mm.mm == rec.mm);
            Some(
                self.code
                    .standing(mm.map_or(0, |mm| mm.vdso), thread.regs.rip),
            )
        });
        threads.max().unwrap_or(Standing::Outside)
    }
}
