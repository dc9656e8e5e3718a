//! One-pass readers of kernel state: tasks, descriptors and mappings, by BPF iterators.
//!
//! They need no agent and leave no trace in what they read. Loading takes the verifier a while
//! (more than a second under emulation) and is done before anything is frozen, or was done by
//! somebody who lends them; a pass in the frozen window costs about as much as copying the records.

use super::events::{
    MqueueDataRec, ProcessRec, RecKind, RegistersRec, TRK_WINDOW, VmaRec, WaitingRec,
};
pub use super::found::{Detail, File, Files, Tasks, ThreadRegisters, Waiting, user_dev};
pub use super::instance::LoadError;
use super::instance::{Instance, Pass};
use super::lent::Lent;
pub use super::lent::{Loan, LoanError};
use super::pass::{self, Buffer, Target};
use super::programs::Programs;
use super::record::{Malformed, Raw, records};
pub use super::scope::Scope;
use super::scope::{over_files, targets};
use crate::sys::xstate::Layout;
use libbpf_rs::{RingBuffer, RingBufferBuilder};
use serde::Serialize;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

/// Bits of the BPF variable `want`.
mod want {
    pub use crate::bpf::events::IterWant::{
        AIO, CHOICES, CONNECTIONS, EPOLL, LOCKS, MEMBERS, MQUEUE_DATA, REGISTERS, SEM_UNDO,
        SIGACTIONS, TASKS, TIMERS, TTY_DATA, WAITING, WATCHES,
    };
}

/// What [`Files`] has besides descriptors.
const ALL_OF_FILES: u32 =
    want::EPOLL | want::WATCHES | want::LOCKS | want::TTY_DATA | want::MEMBERS | want::CHOICES;

/// What [`Tasks`] has.
const ALL_OF_TASKS: u32 =
    want::TASKS | want::SIGACTIONS | want::TIMERS | want::AIO | want::SEM_UNDO;

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

/// Who loaded iterators.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Origin {
    /// This process.
    Loaded,
    /// Another one, which lends them.
    Lent,
}

/// The loaded iterators.
pub struct Iterators {
    // before the instance, whose map it reads
    ring: RingBuffer<'static>,
    side: Arc<Mutex<Vec<u8>>>,
    buffer: Buffer,
    instance: Instance,
}

impl std::fmt::Debug for Iterators {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iterators")
            .field("origin", &self.origin())
            .finish_non_exhaustive()
    }
}

impl Iterators {
    /// Loads the programs into the kernel.
    ///
    /// # Errors
    ///
    /// The kernel lacks BTF or refuses a program, or a capability is missing.
    pub fn load() -> Result<Self, LoadError> {
        Self::of(Instance::load()?).map_err(LoadError::at("ring"))
    }

    /// Those that were lent over this connection, which is held as long as they are used.
    ///
    /// # Errors
    ///
    /// They are of another build, gone, or cannot be opened by this process.
    pub fn borrowed(loan: &Loan, lease: UnixStream) -> Result<Self, LoanError> {
        Self::of(Instance::Lent(Lent::open(loan, lease)?)).map_err(LoanError::Ring)
    }

    fn of(instance: Instance) -> libbpf_rs::Result<Self> {
        let side = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&side);
        let mut builder = RingBufferBuilder::new();
        builder.add(instance.side(), move |bytes| {
            sink.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .extend_from_slice(bytes);
            0
        })?;
        let ring = builder.build()?;
        Ok(Self {
            ring,
            side,
            buffer: Buffer::default(),
            instance,
        })
    }

    /// Who loaded them.
    #[must_use]
    pub fn origin(&self) -> Origin {
        match self.instance {
            Instance::Own(_) => Origin::Loaded,
            Instance::Lent(_) => Origin::Lent,
        }
    }

    /// Has passes tell the sockets that were made outside these cgroups and what is below them
    /// ([`SockFlag::FOREIGN`](super::events)): cgroup id and depth below the root cgroup.
    pub fn tell_foreign(&mut self, roots: &[(u64, u32)]) {
        if let Some(vars) = self.instance.vars() {
            vars.root_count = 0;
            for (slot, (id, level)) in vars.roots.iter_mut().zip(roots) {
                slot.id = *id;
                slot.level = *level;
                vars.root_count += 1;
            }
        }
    }

    /// Bytes that the records of the largest pass so far take, or somewhat more.
    #[must_use]
    pub fn room(&self) -> usize {
        self.buffer.room()
    }

    /// Makes room for passes of so many bytes.
    pub fn make_room(&mut self, bytes: usize) {
        self.buffer.make_room(bytes);
    }

    /// The loaded programs.
    ///
    /// # Errors
    ///
    /// This process has no descriptors left.
    pub fn programs(&self) -> io::Result<Programs> {
        self.instance.programs()
    }

    /// Threads, processes and address spaces, without the dearer parts.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn threads(&mut self, scope: Scope) -> Result<Tasks, ReadError> {
        self.read_tasks(scope, want::TASKS)
    }

    /// The same of a frozen scope, with registers as [`Self::frozen_tasks`] has them.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn frozen_threads(&mut self, scope: Scope) -> Result<Tasks, ReadError> {
        self.read_tasks(scope, want::TASKS | want::REGISTERS)
    }

    /// Everything a [`Tasks`] holds but registers.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn tasks(&mut self, scope: Scope) -> Result<Tasks, ReadError> {
        self.read_tasks(scope, ALL_OF_TASKS)
    }

    /// The same of a frozen scope, with the registers of threads that stand still and have nothing
    /// out of the ordinary. Of others (one that is still on its way off a CPU, or is traced) they
    /// are left out.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn frozen_tasks(&mut self, scope: Scope) -> Result<Tasks, ReadError> {
        self.read_tasks(scope, ALL_OF_TASKS | want::REGISTERS)
    }

    /// Descriptors with their details, without what epoll, inotify and locks hold.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn descriptors(&mut self, scope: Scope) -> Result<Vec<File>, ReadError> {
        Ok(self.read_files(scope, 0)?.files)
    }

    /// The same of a scope that has these processes, as [`Self::files_of`].
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn descriptors_of(
        &mut self,
        scope: Scope,
        processes: &[ProcessRec],
    ) -> Result<Vec<File>, ReadError> {
        Ok(self.walk_files(scope, &targets(scope, processes), 0)?.files)
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
        self.read_files(scope, ALL_OF_FILES)
    }

    /// As [`Self::files`], of a scope that has these processes and no others. The kernel walks the
    /// descriptors of a few alone, and not those of the whole machine.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn files_of(&mut self, scope: Scope, processes: &[ProcessRec]) -> Result<Files, ReadError> {
        self.walk_files(scope, &targets(scope, processes), ALL_OF_FILES)
    }

    /// The messages in the POSIX message queues that are open, in the order in which each queue
    /// gives them. To be called while nobody uses these queues, for a scope of these processes.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn messages(
        &mut self,
        scope: Scope,
        processes: &[ProcessRec],
    ) -> Result<Vec<MqueueDataRec>, ReadError> {
        let mut found = Vec::new();
        let runs = over_files(scope, processes);
        self.windows("messages", scope, &runs, want::MQUEUE_DATA, |raw| {
            found.push(raw.decode()?);
            Ok(())
        })?;
        Ok(found)
    }

    /// The connections that wait in the accept queues of listeners, in the order in which each
    /// gives them, with what they have received. To be called while nobody accepts any and no
    /// packet comes, for a scope of these processes.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn waiting(
        &mut self,
        scope: Scope,
        processes: &[ProcessRec],
    ) -> Result<Vec<Waiting>, ReadError> {
        let runs = over_files(scope, processes);
        self.connections("connections to accept", scope, &runs)
    }

    /// The TCP sockets that descriptors lead to, but listeners: of connections what they need to go
    /// on, without what is in their queues. To be called while no packet comes, for a scope of
    /// these processes. One with several descriptors comes several times.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn tcp_connections(
        &mut self,
        scope: Scope,
        processes: &[ProcessRec],
    ) -> Result<Vec<WaitingRec>, ReadError> {
        let what = "connections";
        self.prepare(what, scope, want::CONNECTIONS)?;
        for target in targets(scope, processes) {
            self.run(Pass::Files, target, what)?;
        }
        records(self.buffer.filled())
            .map(|raw| Ok(raw?.decode()?))
            .collect()
    }

    /// The TCP connections of this network namespace that were closed and still send, with what
    /// the peer has not acknowledged. To be called while no packet comes; the scope is that of
    /// who made them, or of whose listener did.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn orphans(&mut self, scope: Scope) -> Result<Vec<Waiting>, ReadError> {
        self.connections("orphans", scope, &[(Pass::Orphans, Target::System)])
    }

    fn connections(
        &mut self,
        what: &'static str,
        scope: Scope,
        runs: &[(Pass, Target)],
    ) -> Result<Vec<Waiting>, ReadError> {
        let mut found: Vec<Waiting> = Vec::new();
        self.windows(what, scope, runs, want::WAITING, |raw| {
            if raw.kind == RecKind::WAITING {
                found.push(Waiting::new(raw.decode()?));
            } else if let Some(waiting) = found.last_mut() {
                // its own: they follow
                waiting.data.push(raw.decode()?);
            }
            Ok(())
        })?;
        Ok(found)
    }

    /// Passes that find more than fits the ring: each brings a window of it.
    fn windows(
        &mut self,
        what: &'static str,
        scope: Scope,
        runs: &[(Pass, Target)],
        want: u32,
        mut take: impl FnMut(&Raw<'_>) -> Result<(), Malformed>,
    ) -> Result<(), ReadError> {
        let mut first = 0;
        loop {
            self.prepare(what, scope, want)?;
            if let Some(vars) = self.instance.vars() {
                (vars.window_first, vars.window_count) = (first, 0);
            }
            for (pass, target) in runs {
                self.run(*pass, *target, what)?;
            }
            for raw in records(&self.take_side(what)?) {
                take(&raw?)?;
            }
            first += u64::from(TRK_WINDOW);
            let count = self.instance.vars().map_or(0, |vars| vars.window_count);
            if count <= first {
                return Ok(());
            }
        }
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
        match scope {
            Scope::Cgroup(_) => {
                let processes = self.threads(scope)?.processes;
                self.vmas_of(scope, &processes)
            }
            Scope::System | Scope::Process(_) => self.walk_vmas(scope, &[scope.target()]),
        }
    }

    /// As [`Self::vmas`], of a scope that has these processes and no others.
    ///
    /// # Errors
    ///
    /// See [`ReadError`].
    pub fn vmas_of(
        &mut self,
        scope: Scope,
        processes: &[ProcessRec],
    ) -> Result<Vec<VmaRec>, ReadError> {
        let targets: Vec<_> = processes.iter().map(Target::of).collect();
        self.walk_vmas(scope, &targets)
    }

    fn walk_vmas(&mut self, scope: Scope, targets: &[Target]) -> Result<Vec<VmaRec>, ReadError> {
        let what = "mappings";
        self.prepare(what, scope, 0)?;
        for target in targets {
            self.run(Pass::Vmas, *target, what)?;
        }
        records(self.buffer.filled())
            .map(|raw| Ok(raw?.decode()?))
            .collect()
    }

    fn read_tasks(&mut self, scope: Scope, want: u32) -> Result<Tasks, ReadError> {
        let what = "tasks";
        self.prepare(what, scope, want)?;
        self.run(Pass::Tasks, scope.target(), what)?;
        let mut found = Tasks::default();
        for raw in records(self.buffer.filled()) {
            let raw = raw?;
            match raw.kind {
                RecKind::PROCESS => found.processes.push(raw.decode()?),
                RecKind::MM => found.mms.push(raw.decode()?),
                RecKind::SIGACTIONS => found.sigactions.push(raw.decode()?),
                RecKind::REGISTERS => {
                    let rec: RegistersRec = raw.decode()?;
                    let read = Layout::ours().and_then(|layout| rec.read(layout));
                    found.registers.extend(read.map(|read| (rec.tid, read)));
                }
                _ => found.threads.push(raw.decode()?),
            }
        }
        for raw in records(&self.take_side(what)?) {
            let raw = raw?;
            match raw.kind {
                RecKind::AIO => found.aio.push(raw.decode()?),
                RecKind::SEM_UNDO => found.sem_undos.push(raw.decode()?),
                _ => found.timers.push(raw.decode()?),
            }
        }
        Ok(found)
    }

    fn read_files(&mut self, scope: Scope, want: u32) -> Result<Files, ReadError> {
        self.walk_files(scope, &[scope.target()], want)
    }

    fn walk_files(
        &mut self,
        scope: Scope,
        targets: &[Target],
        want: u32,
    ) -> Result<Files, ReadError> {
        let what = "descriptors";
        self.prepare(what, scope, want)?;
        for target in targets {
            self.run(Pass::Files, *target, what)?;
        }
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
                    let detail = Detail::decode(&raw)?;
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
                RecKind::MEMBER => found.members.push(raw.decode()?),
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
        if let Some(vars) = self.instance.vars() {
            (vars.scope_cgroup, vars.scope_pid) = match scope {
                Scope::System => (0, 0),
                Scope::Cgroup(id) => (id, 0),
                Scope::Process(pid) => (0, pid),
            };
            vars.want = want;
            vars.generation += 1;
            vars.verdict_task = 0;
            vars.foreign_cgroup = 0;
            vars.last_mm = 0;
        }
        Ok(())
    }

    /// Attaches a program, runs it once and detaches it.
    fn run(&mut self, pass: Pass, target: Target, what: &'static str) -> Result<(), ReadError> {
        pass::link(self.instance.program(pass), target)
            .and_then(|link| pass::run(link.as_fd(), &mut self.buffer))
            .map_err(|source| ReadError::Run { what, source })
    }

    fn take_side(&mut self, what: &'static str) -> Result<Vec<u8>, ReadError> {
        self.ring
            .consume()
            .map_err(|source| ReadError::Ring { what, source })?;
        let bytes = std::mem::take(&mut *self.side.lock().unwrap_or_else(PoisonError::into_inner));
        let vars = self.instance.vars();
        let lost = vars.map_or(0, |vars| std::mem::take(&mut vars.side_lost));
        if lost > 0 {
            return Err(ReadError::Overflow { what, lost });
        }
        Ok(bytes)
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
