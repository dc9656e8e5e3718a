//! The address spaces of an application: copied once while it runs, then what changed.

use super::MemoryStats;
use super::attributes;
use super::contents::Contents;
use super::copier::Copier;
use super::error::CheckpointError;
use super::files::Slots;
use super::mm::{self, Mapper};
use super::pages::{Need, plan, select};
use super::pending::Pending;
use super::shared::Shared;
use super::spaces::{self, Beside, Done, Space, Work};
use super::tracked::Tracked;
use super::wakeups::Wakeups;
use crate::bpf::events::{MmRec, VmaKind, VmaRec};
use crate::bpf::iter::{Iterators, Scope, Tasks};
use crate::fault::Fault;
use crate::image::Store;
use crate::model::frozen::{Backing, Content, ContentId, Mm, PageRun, Vdso, Vma};
use crate::model::ids::{MmId, Pid};
use crate::sys::memory::{Pagemap, clear_soft_dirty, soft_dirty_works, zero_frame};
use crate::sys::process::read_memory_exact;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

/// An address space at a moment: the kernel may give its address to another one later.
type Key = (u64, u32, u64);

#[derive(Debug)]
struct Precopied {
    tracked: Arc<Tracked>,
    have: Arc<Vec<PageRun>>,
    /// What it had when it was looked at last, while frozen; to be copied.
    needs: Vec<Need>,
}

/// How many pages may wait in memory for being written, at most.
const MOST_PENDING: u64 = 16 * 1024;

/// Pages that have to be copied.
fn to_copy(needs: &[Need], have: &[PageRun]) -> u64 {
    let pieces = plan(needs, have, |_| 0);
    let copied = pieces.iter().filter(|piece| piece.copy);
    copied.map(|piece| piece.run.pages).sum()
}

/// What is known about the memory of an application across the rounds.
#[derive(Debug)]
pub struct Memory {
    precopied: HashMap<Key, Precopied>,
    zero_frame: Option<u64>,
    /// What only memory keeps of what the frozen application has.
    contents: Contents,
    shared: Shared,
    /// With what was read and is written once the application runs again.
    copier: Copier,
    /// Reads beside what else is read, if the application is left running.
    beside: Option<Beside>,
    /// Address spaces that are being read.
    spaces: Vec<(MmRec, Arc<Vec<VmaRec>>)>,
    /// What was read of these, if it is not done beside.
    done: Option<Done>,
    stats: MemoryStats,
}

impl Memory {
    /// Tests what the kernel can do.
    pub fn new() -> Self {
        Self {
            precopied: HashMap::new(),
            zero_frame: zero_frame(),
            contents: Contents::default(),
            shared: Shared::new(),
            copier: Copier::new(),
            beside: None,
            spaces: Vec::new(),
            done: None,
            stats: MemoryStats {
                dirty_tracking: soft_dirty_works(),
                ..MemoryStats::default()
            },
        }
    }

    pub fn stats(&self) -> MemoryStats {
        self.stats
    }

    /// Copies all private pages of the running application, and those that processes share. What
    /// is written after the soft-dirty bits are cleared here is copied again later.
    pub fn precopy(
        &mut self,
        iterators: &mut Iterators,
        scope: Scope,
        store: &dyn Store,
        slots: &mut Slots,
        wakeups: &Wakeups,
    ) -> Result<(), CheckpointError> {
        let tasks = iterators.threads(scope)?;
        if !self.stats.dirty_tracking {
            let vmas = iterators.vmas_of(scope, &tasks.processes)?;
            return self.shared.precopy(&vmas, store, slots);
        }
        let mms = address_spaces(&tasks);
        let mut tracked = Vec::new();
        for rec in mms {
            // A process that ends meanwhile is not in the frozen tree either.
            if clear_soft_dirty(pid(rec)).is_ok() {
                tracked.push(rec);
            }
        }
        let vmas = iterators.vmas_of(scope, &tasks.processes)?;
        let by_mm = grouped(ordinary(&vmas));
        for rec in tracked {
            wakeups.check()?;
            let vmas = of(&by_mm, rec);
            let Ok(mut pagemap) = Pagemap::open(pid(rec)) else {
                continue;
            };
            let needs = match select(&mut pagemap, vmas, None, self.zero_frame) {
                Err(CheckpointError::Call(_)) => continue,
                needs => needs?,
            };
            let pieces = plan(&needs, &[], |pages| slots.take(pages));
            let copied = match self.copier.copy(store, pid(rec), &pieces, true) {
                Err(CheckpointError::Call(_)) => continue,
                copied => copied?,
            };
            self.stats.precopied += copied.pages;
            let entry = Precopied {
                tracked: Arc::new(Tracked::new(vmas)),
                have: Arc::new(copied.with_unchanged(&pieces)),
                needs: Vec::new(),
            };
            self.precopied.insert(key(rec, &tasks), entry);
        }
        wakeups.check()?;
        self.shared.precopy(&vmas, store, slots)
    }

    /// How many pages of the running application would have to be copied by now, about.
    pub fn written(&self, iterators: &mut Iterators, scope: Scope) -> Result<u64, CheckpointError> {
        let tasks = iterators.threads(scope)?;
        let vmas = iterators.vmas_of(scope, &tasks.processes)?;
        let by_mm = grouped(ordinary(&vmas));
        let mut pages = 0;
        for rec in address_spaces(&tasks) {
            let vmas = of(&by_mm, rec);
            let before = self.precopied.get(&key(rec, &tasks));
            let tracked = before.map(|b| &*b.tracked);
            let have = before.map_or(&[][..], |b| b.have.as_slice());
            // One that ends meanwhile needs nothing.
            let Ok(mut pagemap) = Pagemap::open(pid(rec)) else {
                continue;
            };
            match select(&mut pagemap, vmas, tracked, self.zero_frame) {
                Err(CheckpointError::Call(_)) => {}
                needs => pages += to_copy(&needs?, have),
            }
        }
        Ok(pages)
    }

    /// Notes what of the frozen application has to be copied, and begins to track anew. The
    /// kernel cannot read and clear the soft-dirty bits in one step: while it runs, a page
    /// written between the two would be lost.
    pub fn harvest(
        &mut self,
        iterators: &mut Iterators,
        scope: Scope,
    ) -> Result<(), CheckpointError> {
        let tasks = iterators.threads(scope)?;
        let vmas = iterators.vmas_of(scope, &tasks.processes)?;
        let by_mm = grouped(ordinary(&vmas));
        for rec in address_spaces(&tasks) {
            let vmas = of(&by_mm, rec);
            // Whatever fails, it is as if nothing had been copied.
            let before = self.precopied.remove(&key(rec, &tasks));
            let mut pagemap = Pagemap::open(pid(rec))?;
            let tracked = before.as_ref().map(|b| &*b.tracked);
            let needs = select(&mut pagemap, vmas, tracked, self.zero_frame)?;
            clear_soft_dirty(pid(rec))?;
            let entry = Precopied {
                tracked: Arc::new(Tracked::new(vmas)),
                have: before.map(|b| b.have).unwrap_or_default(),
                needs,
            };
            self.precopied.insert(key(rec, &tasks), entry);
        }
        Ok(())
    }

    /// Copies what was noted, of the application that runs again.
    pub fn copy_harvested(
        &mut self,
        store: &dyn Store,
        slots: &mut Slots,
        wakeups: &Wakeups,
    ) -> Result<(), CheckpointError> {
        let mut gone = Vec::new();
        for (key, entry) in &mut self.precopied {
            wakeups.check()?;
            let needs = std::mem::take(&mut entry.needs);
            let pieces = plan(&needs, &entry.have, |pages| slots.take(pages));
            let pid = Pid(key.1.cast_signed());
            match self.copier.copy(store, pid, &pieces, true) {
                Err(CheckpointError::Call(_)) => gone.push(*key),
                copied => {
                    let copied = copied?;
                    self.stats.precopied += copied.pages;
                    entry.have = Arc::new(copied.with_unchanged(&pieces));
                }
            }
        }
        for key in gone {
            self.precopied.remove(&key);
        }
        Ok(())
    }

    /// Makes ready for an application that is left running: room for about so many pages, which
    /// [`Memory::finish`] leaves to [`Memory::write_pending`], and a thread that reads them, if
    /// that takes longer than to wake one.
    pub fn reserve(&mut self, pages: u64) {
        /// Pages to look at, and to copy, from which on that is so.
        const LOOKED_AT: u64 = 8192;
        const COPIED: u64 = 512;
        self.copier.pending = Pending::with_room((pages + pages / 4 + 512).min(MOST_PENDING));
        let have = self.precopied.values().flat_map(|before| &*before.have);
        if have.map(|run| run.pages).sum::<u64>() < LOOKED_AT && pages < COPIED {
            return;
        }
        match Beside::start(self.zero_frame) {
            Ok(beside) => self.beside = Some(beside),
            Err(error) => tracing::debug!(%error, "memory is not read beside the rest"),
        }
    }

    /// Writes what was read and not written.
    pub fn write_pending(&mut self, store: &dyn Store) -> Result<(), CheckpointError> {
        std::mem::take(&mut self.copier.pending).write(store)
    }

    /// Begins to read the private memory of the frozen application, and does all of it unless it
    /// is read beside the rest.
    ///
    /// # Errors
    /// A pagemap cannot be read.
    pub fn begin(
        &mut self,
        tasks: &Tasks,
        vmas: &[VmaRec],
        slots: Slots,
    ) -> Result<(), CheckpointError> {
        let mut by_mm = grouped(vmas);
        let mut spaces = Vec::new();
        self.spaces = Vec::new();
        for rec in address_spaces(tasks) {
            let vmas = Arc::new(by_mm.remove(&rec.mm).unwrap_or_default());
            let before = self.precopied.get(&key(rec, tasks));
            spaces.push(Space {
                pid: pid(rec),
                vmas: Arc::clone(&vmas),
                tracked: before.map(|b| Arc::clone(&b.tracked)),
                have: before.map(|b| Arc::clone(&b.have)).unwrap_or_default(),
            });
            self.spaces.push((*rec, vmas));
        }
        let copier = std::mem::take(&mut self.copier);
        let work = Work {
            spaces,
            copier,
            slots,
        };
        match &mut self.beside {
            Some(beside) => beside.begin(work),
            None => self.done = Some(spaces::read(work, self.zero_frame)?),
        }
        Ok(())
    }

    /// Takes back what was begun to be read beside the rest of an application that runs again, and
    /// is to be frozen once more.
    pub fn take_back(&mut self) {
        let begun = self.beside.as_mut().filter(|beside| beside.is_busy());
        let Some(done) = begun.map(Beside::done) else {
            return;
        };
        self.copier = match done {
            Ok(done) => done.copier,
            Err(error) => {
                tracing::debug!(%error, "memory was not read while it stood still");
                Copier::new()
            }
        };
        self.copier.pending.clear();
    }

    /// Whether memory is read beside the rest: [`Memory::begin`] had better come as soon as nothing
    /// writes to it any more, and [`Memory::finish`] when the rest was read.
    #[must_use]
    pub fn is_beside(&self) -> bool {
        self.beside.is_some()
    }

    /// Tells of all address spaces of the frozen application but for their pages.
    ///
    /// # Errors
    /// A mapping cannot be carried, or what is behind it cannot be read.
    pub fn describe(
        &mut self,
        mut mapper: Mapper,
        wakeups: &Wakeups,
    ) -> Result<BTreeMap<MmId, Mm>, CheckpointError> {
        self.contents = Contents::default();
        let mut found = BTreeMap::new();
        for (rec, vmas) in &self.spaces {
            wakeups.check()?;
            let vmas = vmas
                .iter()
                .map(|vma| mapper.convert(vma, &mut self.contents))
                .collect::<Result<Vec<_>, _>>()?;
            let mm = Mm {
                bounds: mm::bounds(rec),
                auxv: mm::auxv(rec),
                vdso: vdso_of(pid(rec), &vmas)?,
                vmas,
                pages: Vec::new(),
                def_flags: rec.def_flags,
                pkeys: rec.pkeys,
                mdwe: attributes::mdwe(rec),
                merge_any: attributes::merges_any(rec),
                membarrier: mm::membarrier(rec),
            };
            found.insert(MmId(rec.mm), mm);
        }
        Ok(found)
    }

    /// Copies what is left of the pages of address spaces that were described, whose slots are taken
    /// since [`Memory::begin`]; [`Memory::copy_contents`] follows once it is known what is open as
    /// well.
    ///
    /// # Errors
    /// A page cannot be read, or the carrier is full.
    pub fn finish(
        &mut self,
        mms: &mut BTreeMap<MmId, Mm>,
        store: &dyn Store,
        slots: &mut Slots,
        wakeups: &Wakeups,
    ) -> Result<(), CheckpointError> {
        let done = match (&mut self.beside, self.done.take()) {
            (Some(beside), _) => beside.done()?,
            (None, Some(done)) => done,
            (None, None) => return Ok(()),
        };
        self.copier = done.copier;
        *slots = done.slots;
        for ((rec, _), read) in self.spaces.drain(..).zip(done.read) {
            wakeups.check()?;
            Fault::Memory.point()?;
            let mut copied = read.copied;
            copied.add(self.copier.copy(store, pid(&rec), &read.rest, false)?);
            self.stats.copied_frozen += copied.pages;
            let runs = copied.with_unchanged(&read.pieces);
            self.stats.pages += runs.iter().map(|run| run.pages).sum::<u64>();
            if let Some(mm) = mms.get_mut(&MmId(rec.mm)) {
                mm.pages = runs;
            }
        }
        Ok(())
    }

    /// What the frozen application maps that only memory keeps; what it has open besides is to
    /// be added before [`Memory::copy_contents`].
    pub fn contents(&mut self) -> &mut Contents {
        &mut self.contents
    }

    /// Copies what only memory keeps.
    pub fn copy_contents(
        &mut self,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<BTreeMap<ContentId, Content>, CheckpointError> {
        std::mem::take(&mut self.contents).copy(&mut self.shared, store, slots)
    }
}

fn pid(rec: &MmRec) -> Pid {
    Pid(rec.tgid.cast_signed())
}

fn key(rec: &MmRec, tasks: &Tasks) -> Key {
    let leader = tasks.threads.iter().find(|thread| thread.tid == rec.tgid);
    let born = leader.map_or(0, |leader| leader.start_boottime_ns);
    (rec.mm, rec.tgid, born)
}

/// Every address space once.
fn address_spaces(tasks: &Tasks) -> Vec<&MmRec> {
    let mut seen = HashSet::new();
    let first = |rec: &&MmRec| seen.insert(rec.mm);
    tasks.mms.iter().filter(first).collect()
}

/// Those whose written pages the kernel tells: huge pages would be copied for nothing before
/// the application is frozen for good.
fn ordinary(vmas: &[VmaRec]) -> impl Iterator<Item = &VmaRec> {
    vmas.iter().filter(|vma| vma.kind != VmaKind::HUGETLB)
}

fn grouped<'a>(vmas: impl IntoIterator<Item = &'a VmaRec>) -> HashMap<u64, Vec<VmaRec>> {
    let mut by_mm: HashMap<u64, Vec<VmaRec>> = HashMap::new();
    for vma in vmas {
        by_mm.entry(vma.mm).or_default().push(*vma);
    }
    for vmas in by_mm.values_mut() {
        vmas.sort_unstable_by_key(|vma| vma.start);
        vmas.dedup_by_key(|vma| vma.start);
    }
    by_mm
}

/// The mappings of one of them.
fn of<'a>(by_mm: &'a HashMap<u64, Vec<VmaRec>>, rec: &MmRec) -> &'a [VmaRec] {
    by_mm.get(&rec.mm).map_or(&[], Vec::as_slice)
}

/// The vDSO's code as the process has it.
fn vdso_of(pid: Pid, vmas: &[Vma]) -> Result<Option<Vdso>, CheckpointError> {
    let Some(vma) = vmas.iter().find(|vma| vma.backing == Backing::Vdso) else {
        return Ok(None);
    };
    let mut code = vec![0; usize::try_from(vma.end - vma.start).unwrap_or(0)];
    read_memory_exact(pid, vma.start, &mut code)?;
    Ok(Some(Vdso {
        addr: vma.start,
        code,
    }))
}
