//! Reading a frozen application: processes and memory first, then what it has open.

use super::error::CheckpointError;
use super::files::{FrozenFiles, Network, Slots, Still};
use super::mm::Mapper;
use super::view::View;
use super::{
    Capture, aio, cgroups, files, message_queues, namespaces, semaphores, sysv, tasks, uring,
};
use crate::fault::Fault;
use crate::image::Store;
use crate::model::frozen::{Application, ApplicationHeader};
use std::rc::Rc;

impl Capture {
    /// Reads processes and memory. The application stays frozen; what its peers send is taken
    /// in and acknowledged until [`Capture::silence`].
    ///
    /// # Errors
    /// Something cannot be read or carried, or tracker was asked to stop.
    pub fn collect_memory(
        &mut self,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<(), CheckpointError> {
        let frozen = self.frozen.as_mut().ok_or_else(not_frozen)?;
        let vmas = std::mem::take(&mut frozen.vmas);
        if !self.memory.is_beside() {
            self.memory.begin(&frozen.tasks, &vmas, *slots)?;
        }
        self.view = Rc::new(View::of(&frozen.tasks, &self.ours)?);
        self.target.header.namespaces = namespaces::read(&frozen.tasks, &self.ours, &self.view)?;
        frozen.processes =
            tasks::processes(&frozen.tasks, &mut frozen.tracees, &frozen.now, &self.view)?;
        let top = &self.target.cgroup;
        self.target.header.cgroups = cgroups::read(top, &frozen.tasks, &mut frozen.processes)?;
        self.target.header.semaphores = semaphores::read(&frozen.tasks)?;
        let waits = message_queues::frozen_waits(&frozen.processes);
        let queues = message_queues::read(&frozen.tasks, &waits)?;
        self.timeline.done("tasks");
        Fault::Tasks.point()?;
        self.wakeups.check()?;
        self.timeline.within(self.options.max_freeze)?;

        let segments = sysv::segments()?;
        let mut blockers = sysv::blockers(&segments, &vmas, &frozen.tasks);
        blockers.extend(aio::unmapped(&frozen.tasks, &vmas));
        blockers.extend(files::leased_and_mapped(&frozen.open, &vmas));
        blockers.extend(uring::unopened(&vmas, &frozen.open));
        let sets = &self.target.header.semaphores;
        blockers.extend(semaphores::blockers(&frozen.tasks, sets));
        blockers.extend(message_queues::blockers(&frozen.tasks, &queues));
        if !blockers.is_empty() {
            return Err(CheckpointError::Blocked(blockers));
        }
        frozen.message_queues = message_queues::carried(queues)?;
        let mapper = Mapper::new(segments, frozen.tasks.aio.clone(), Rc::clone(&self.view));
        frozen.mms = self.memory.describe(mapper, &self.wakeups)?;
        if !self.memory.is_beside() {
            self.memory
                .finish(&mut frozen.mms, store, slots, &self.wakeups)?;
        }
        self.timeline.done("memory");
        self.may_go_on()
    }

    /// Reads the descriptors, with the network silent, and returns all there is. The
    /// application stays frozen.
    ///
    /// # Errors
    /// Something cannot be read or carried, or tracker was asked to stop.
    pub fn collect_files(
        &mut self,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<Application, CheckpointError> {
        let restless = || CheckpointError::Unstable("Its connections do not come to rest".into());
        let read = self.read_files(Network::Silent)?.ok_or_else(restless)?;
        self.put_together(read, store, slots)
    }

    /// The same of an application that is to run on: the network is silenced only if it has to be.
    /// A packet that is dropped is sent again by its sender, but after a fifth of a second or more,
    /// which would be longer than all of the frozen window.
    ///
    /// # Errors
    /// Something cannot be read or carried, or tracker was asked to stop.
    pub fn collect_talking_files(
        &mut self,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<Application, CheckpointError> {
        match self.read_files(Network::Talking)? {
            Some(read) => {
                Fault::Silence.point()?;
                self.put_together(read, store, slots)
            }
            None => {
                self.silence()?;
                self.collect_files(store, slots)
            }
        }
    }

    fn read_files(&mut self, network: Network) -> Result<Option<FrozenFiles>, CheckpointError> {
        let frozen = self.frozen.as_ref().ok_or_else(not_frozen)?;
        let still = Still {
            found: &frozen.open,
            tasks: &frozen.tasks,
            scope: self.scope(),
            now: &frozen.now,
            view: &self.view,
        };
        Ok(files::collect(
            still,
            &mut self.iterators.borrow_mut(),
            self.memory.contents(),
            &mut self.alike,
            network,
        )?)
    }

    fn put_together(
        &mut self,
        read: FrozenFiles,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<Application, CheckpointError> {
        let frozen = self.frozen.as_mut().ok_or_else(not_frozen)?;
        frozen.repaired = read.repaired;
        self.timeline.done("files");
        Fault::Files.point()?;
        if self.memory.is_beside() {
            self.memory
                .finish(&mut frozen.mms, store, slots, &self.wakeups)?;
            self.timeline.done("pages");
        }
        self.may_go_on()?;

        let contents = self.memory.copy_contents(store, slots)?;
        self.timeline.done("contents");
        self.still_stands()?;

        let frozen = self.frozen.as_mut().ok_or_else(not_frozen)?;
        let release = nix::sys::utsname::uname().map(|u| u.release().to_owned());
        Ok(Application {
            header: ApplicationHeader {
                kernel_release: release.unwrap_or_default().to_string_lossy().into_owned(),
                clocks: frozen.clocks,
                message_queues: std::mem::take(&mut frozen.message_queues),
                ..self.target.header.clone()
            },
            processes: std::mem::take(&mut frozen.processes),
            mms: std::mem::take(&mut frozen.mms),
            files: read.files,
            ofds: read.ofds,
            contents,
        })
    }

    /// Writes what was left to be written later.
    ///
    /// # Errors
    /// The carrier is full.
    pub fn write_rest(&mut self, store: &dyn Store) -> Result<(), CheckpointError> {
        self.memory.write_pending(store)?;
        self.timeline.done("write");
        Ok(())
    }
}

fn not_frozen() -> CheckpointError {
    CheckpointError::Unstable("It is not frozen".into())
}
