//! The tracking hooks: which of them the kernel takes, their rings and counters.

use super::adopted::Adopted;
use super::events::EventClass;
use super::fill::Fills;
use super::hooks::When::{Always, Fallback, Fentry, Mappings};
use super::hooks::{INSTEAD, MAPPINGS, NEEDED, PROGRAMS, Target, When, exists, functions};
use super::programs::Programs;
use super::rings::Rings;
use super::skeleton::track::{OpenTrackSkel, TrackSkel, TrackSkelBuilder};
use super::wire;
use crate::model::event::{Event, Object};
use libbpf_rs::btf::Btf;
use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, MapMut, OpenProgramMut, RingBufferBuilder};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::AsFd;

/// Which set of hooks is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HookSet {
    /// fentry and fexit inside the kernel's functions: exact.
    Fentry,
    /// Tracepoints only: descriptor tables are marked and read again.
    Fallback,
}

/// How the hooks are set up.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// The set to use; `None` takes the better one the kernel accepts.
    pub set: Option<HookSet>,
    /// Bytes of each ring, a power of two and a multiple of the page size.
    pub ring_bytes: u32,
    /// Rings, a power of two up to 8.
    pub shards: u32,
}

impl Default for Options {
    fn default() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let shards = u32::try_from(cpus.next_power_of_two()).unwrap_or(8).min(8);
        Self {
            set: None,
            ring_bytes: 4 << 20,
            shards,
        }
    }
}

/// The tracking hooks could not be set up.
#[derive(Debug, thiserror::Error)]
#[error(
    "Setting up the tracking hooks failed at {step}; they need Linux 6.1 or newer with BTF, and CAP_BPF with CAP_PERFMON or root"
)]
pub struct LoadError {
    step: &'static str,
    source: libbpf_rs::Error,
}

/// Reading or writing a map of the tracking hooks failed.
#[derive(Debug, thiserror::Error)]
#[error("Accessing the BPF map {map} failed")]
pub struct MapError {
    pub(super) map: &'static str,
    pub(super) source: libbpf_rs::Error,
}

/// A cgroup that does not exist, for a look at the programs: without any the verifier would
/// leave most of them out.
pub const NO_ROOT: [(u64, u32); 1] = [(u64::MAX, 1)];

/// The loaded and attached hooks. Dropping it detaches them.
pub struct Hooks {
    links: Vec<Link>,
    skel: TrackSkel<'static>,
    /// The set in use.
    pub set: HookSet,
    /// Why the fentry set is not in use, if it was tried.
    pub refused: Option<String>,
    /// Programs attached.
    pub attached: Vec<&'static str>,
    /// Programs that were loaded and could not be attached, and why.
    pub not_attached: Vec<(&'static str, String)>,
    /// Programs of the set whose function or tracepoint the kernel does not have.
    pub absent: Vec<&'static str>,
    programs: Programs,
    shards: u32,
}

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hooks")
            .field("set", &self.set)
            .finish_non_exhaustive()
    }
}

impl Hooks {
    /// Loads and attaches the better set that the kernel accepts, or the one asked for. They
    /// track these cgroups with everything below them, from [`Hooks::start`] on: cgroup id and
    /// depth below the root cgroup. At most [`events::TRK_MAX_ROOTS`](super::events) count.
    /// Without any the programs return at once, and cost what no hook can cost less than.
    ///
    /// # Errors
    ///
    /// The kernel refused every set that was allowed.
    pub fn load(options: &Options, roots: &[(u64, u32)]) -> Result<Self, LoadError> {
        super::redirect_libbpf_log();
        let load_set = |set| Self::load_set(options, set, roots);
        match options.set {
            Some(set) => load_set(set),
            None => load_set(HookSet::Fentry).or_else(|refusal| {
                let mut hooks = load_set(HookSet::Fallback)?;
                let reason = format!("{}: {}", refusal.step, refusal.source);
                tracing::info!(reason, "the fentry hooks were refused");
                hooks.refused = Some(reason);
                Ok(hooks)
            }),
        }
    }

    /// Loads a set and attaches what the kernel attaches of it, even if that is too little to
    /// track with: for a look at the programs.
    ///
    /// # Errors
    ///
    /// The kernel refused to load a program.
    pub fn load_anyhow(set: HookSet) -> Result<Self, LoadError> {
        super::redirect_libbpf_log();
        Ok(Self::load_some(&Options::default(), set, &NO_ROOT)?.0)
    }

    fn load_set(options: &Options, set: HookSet, roots: &[(u64, u32)]) -> Result<Self, LoadError> {
        let (hooks, refusal) = Self::load_some(options, set, roots)?;
        let missing = |group: &&[&str]| !group.iter().any(|name| hooks.attached.contains(name));
        // The tracepoint was left out because these were there.
        let marks = hooks
            .attached
            .iter()
            .any(|name| name.starts_with("mmap_lock"));
        let needed = NEEDED.iter().chain(if marks { &[] } else { MAPPINGS });
        if set == HookSet::Fentry && needed.clone().any(missing) {
            let source = refusal.unwrap_or_else(|| {
                std::io::Error::new(std::io::ErrorKind::NotFound, "a function is inlined").into()
            });
            return Err(LoadError {
                step: "attach",
                source,
            });
        }
        Ok(hooks)
    }

    /// Also the last reason for which a program was not attached.
    fn load_some(
        options: &Options,
        set: HookSet,
        roots: &[(u64, u32)],
    ) -> Result<(Self, Option<libbpf_rs::Error>), LoadError> {
        let at = |step| move |source| LoadError { step, source };
        let btf = Btf::from_vmlinux().map_err(at("reading the kernel's BTF"))?;
        let of_set = PROGRAMS.iter().filter(|(_, _, when)| match when {
            Always => true,
            Fentry => set == HookSet::Fentry,
            Fallback => set == HookSet::Fallback,
            Mappings => set == HookSet::Fallback || !functions(&btf, MAPPINGS),
        });
        let (wanted, absent): (Vec<_>, Vec<_>) =
            of_set.partition(|(_, target, _)| exists(&btf, *target));
        let names = |programs: Vec<&(&'static str, Target, When)>| {
            let names = programs.into_iter().map(|(name, _, _)| *name);
            names.collect::<Vec<&'static str>>()
        };
        let (mut wanted, mut absent) = (names(wanted), names(absent));
        for group in INSTEAD {
            let first = group.iter().find(|name| wanted.contains(name));
            let spare = |name: &&str| group.contains(name) && Some(name) != first;
            absent.extend(wanted.extract_if(.., |name| spare(name)));
        }
        // The skeleton borrows this storage; a few words stay behind per load.
        let storage = Box::leak(Box::new(MaybeUninit::uninit()));
        let mut open = TrackSkelBuilder::default()
            .open(storage)
            .map_err(at("open"))?;
        for mut program in programs(&mut open) {
            let load = wanted.iter().any(|name| program.name() == *name);
            program.set_autoload(load);
        }
        if let Some(rodata) = open.maps.rodata_data.as_deref_mut() {
            rodata.shard_mask = options.shards - 1;
            for (slot, (id, level)) in rodata.roots.iter_mut().zip(roots) {
                // The generated type is another than the one of events.h, with the same fields.
                slot.id = *id;
                slot.level = *level;
                rodata.root_count += 1;
            }
        }
        let page = 4096;
        let maps = &mut open.maps;
        let rings = [
            &mut maps.ring0,
            &mut maps.ring1,
            &mut maps.ring2,
            &mut maps.ring3,
            &mut maps.ring4,
            &mut maps.ring5,
            &mut maps.ring6,
            &mut maps.ring7,
        ];
        for (shard, ring) in (0..).zip(rings) {
            let bytes = if shard < options.shards {
                options.ring_bytes
            } else {
                page
            };
            ring.set_max_entries(bytes)
                .map_err(at("sizing the rings"))?;
        }
        let skel = open.load().map_err(at("load"))?;
        let mut links = Vec::new();
        let mut attached = Vec::new();
        let mut not_attached = Vec::new();
        let mut refusal = None;
        for program in skel.object().progs_mut() {
            let Some(name) = wanted.iter().find(|name| program.name() == **name) else {
                continue;
            };
            match program.attach() {
                Ok(link) => {
                    links.push(link);
                    attached.push(*name);
                }
                Err(error) => {
                    tracing::debug!(hook = name, %error, "not attached");
                    not_attached.push((*name, error.to_string()));
                    refusal = Some(error);
                }
            }
        }
        let programs = Programs::of(skel.object())
            .map_err(|error| at("keeping the programs open")(error.into()))?;
        let hooks = Self {
            links,
            skel,
            set,
            refused: None,
            attached,
            not_attached,
            absent,
            programs,
            shards: options.shards,
        };
        Ok((hooks, refusal))
    }

    /// The loaded programs, for what the kernel counts of them.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// Begins to track, all at once.
    pub fn start(&mut self) {
        if let Some(vars) = self.skel.maps.bss_data.as_deref_mut() {
            // SAFETY: the variable lives in mapped memory that the kernel reads.
            unsafe { std::ptr::write_volatile(&raw mut vars.tracking, 1) };
        }
    }

    /// Number of the last event.
    #[must_use]
    pub fn last_seq(&self) -> u64 {
        let Some(vars) = self.skel.maps.bss_data.as_deref() else {
            return 0;
        };
        // SAFETY: the variable lives in mapped memory that the kernel writes.
        unsafe { std::ptr::read_volatile(&raw const vars.last_seq) }
    }

    /// Events lost since the hooks were loaded, by class in the order of [`wire::CLASSES`].
    ///
    /// # Errors
    ///
    /// The map cannot be read.
    pub fn lost(&self) -> Result<[u64; wire::CLASSES.len()], MapError> {
        let mut counts = [0; wire::CLASSES.len()];
        for (class, count) in (0..EventClass::COUNT).zip(&mut counts) {
            let map = &self.skel.maps.lost;
            let cpus = map.lookup_percpu(&class.to_ne_bytes(), MapFlags::ANY);
            let cpus = cpus.map_err(|source| MapError {
                map: "lost",
                source,
            })?;
            *count = cpus.into_iter().flatten().map(|value| number(&value)).sum();
        }
        Ok(counts)
    }

    /// Takes note of the objects about which something was lost; `None` if there were
    /// too many to list, so that everything is suspect.
    pub fn take_stale(&mut self) -> Option<BTreeSet<Object>> {
        let mut objects = BTreeSet::new();
        let keys: Vec<Vec<u8>> = self.skel.maps.stale.keys().collect();
        for key in keys {
            let class = self
                .skel
                .maps
                .stale
                .lookup(&key, MapFlags::ANY)
                .ok()
                .flatten();
            // What is lost from here on is noted anew.
            let _ = self.skel.maps.stale.delete(&key);
            let class = class.and_then(|bytes| bytes.first_chunk::<4>().copied());
            objects.extend(class.and_then(|c| wire::object(u32::from_ne_bytes(c), number(&key))));
        }
        let vars = self.skel.maps.bss_data.as_deref_mut();
        let overflow = vars.map_or(0, |vars| std::mem::take(&mut vars.stale_overflow));
        (overflow == 0).then_some(objects)
    }

    /// Lets the next change of an object be said again.
    pub fn clear_dirty(&self, address: u64) {
        // It is not there if nothing was said.
        let _ = self.skel.maps.dirty.delete(&address.to_ne_bytes());
    }

    /// Objects whose changes are not said until they are cleared.
    #[must_use]
    pub fn dirty(&self) -> Vec<u64> {
        self.skel
            .maps
            .dirty
            .keys()
            .map(|key| number(&key))
            .collect()
    }

    /// The sockets that the hooks follow though they were made outside.
    pub fn adopted(&mut self) -> Adopted<'_> {
        let maps = &mut self.skel.maps;
        let vars = maps.bss_data.as_deref_mut();
        Adopted::new(&maps.adopted, vars.map(|vars| &mut vars.adoptions))
    }

    /// The reader of all rings; `sink` gets every event, and `None` for a record that
    /// has not even a number.
    ///
    /// # Errors
    ///
    /// A ring cannot be mapped.
    pub fn rings<F>(&self, sink: F) -> Result<Rings, LoadError>
    where
        F: FnMut(Option<Event>) + Clone + 'static,
    {
        let at = |source| LoadError {
            step: "mapping the rings",
            source,
        };
        let buffers = self.ring_maps().map(|ring| {
            let mut sink = sink.clone();
            let mut builder = RingBufferBuilder::new();
            let each = move |bytes: &[u8]| {
                sink(wire::decode(bytes).ok());
                0
            };
            builder.add(ring, each).map_err(at)?;
            builder.build().map_err(at)
        });
        let buffers = buffers.collect::<Result<_, _>>()?;
        let asleep = self.skel.maps.bss_asleep.as_fd();
        Rings::new(buffers, self.fills()?, asleep).map_err(|error| at(error.into()))
    }

    /// Where to see how full the rings are.
    ///
    /// # Errors
    ///
    /// A ring cannot be mapped.
    pub fn fills(&self) -> Result<Fills, LoadError> {
        let maps = self.ring_maps();
        Fills::of(maps.map(|map| (map.as_fd(), map.max_entries()))).map_err(|error| LoadError {
            step: "mapping the rings' positions",
            source: error.into(),
        })
    }

    /// The rings in use.
    fn ring_maps(&self) -> impl Iterator<Item = &MapMut<'static>> {
        let maps = &self.skel.maps;
        let rings = [
            &maps.ring0,
            &maps.ring1,
            &maps.ring2,
            &maps.ring3,
            &maps.ring4,
            &maps.ring5,
            &maps.ring6,
            &maps.ring7,
        ];
        (0..self.shards).zip(rings).map(|(_, ring)| ring)
    }

    /// Programs attached.
    #[must_use]
    pub fn link_count(&self) -> usize {
        self.links.len()
    }
}

pub(super) fn number(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk::<8>()
        .map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

fn programs<'a>(open: &'a mut OpenTrackSkel<'static>) -> impl Iterator<Item = OpenProgramMut<'a>> {
    open.open_object_mut().progs_mut()
}
