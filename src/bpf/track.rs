//! The tracking hooks: which of them the kernel takes, their rings and counters.

use super::events::EventClass;
use super::skeleton::track::{OpenTrackSkel, TrackSkel, TrackSkelBuilder};
use super::wire;
use crate::model::event::{Event, Object};
use libbpf_rs::btf::{Btf, BtfType, types};
use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, OpenProgramMut, RingBuffer, RingBufferBuilder};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::mem::MaybeUninit;

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
    map: &'static str,
    source: libbpf_rs::Error,
}

/// Room in a ring for each event that wakes its reader: several times the mean size, so
/// that a ring is read long before it is full.
const WAKE_BYTES: u32 = 1024;

/// What a program hooks.
#[derive(Clone, Copy, Debug)]
enum Target {
    /// A BTF tracepoint; which of several layouts, by its number of arguments.
    Tracepoint(&'static str, Option<usize>),
    /// A kernel function.
    Function(&'static str),
}

/// When a program is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum When {
    Always,
    /// With the fentry set.
    Fentry,
    /// With the fallback set.
    Fallback,
    /// With the fallback set, or if one of [`MAPPINGS`] is not there.
    Mappings,
}

use Target::{Function, Tracepoint};
use When::{Always, Fallback, Fentry, Mappings};

const PROGRAMS: &[(&str, Target, When)] = &[
    ("task_newtask", Tracepoint("task_newtask", None), Always),
    ("task_exec", Tracepoint("sched_process_exec", None), Always),
    ("task_rename", Tracepoint("task_rename", None), Always),
    ("task_exit", Tracepoint("sched_process_exit", None), Always),
    ("task_free", Tracepoint("sched_process_free", None), Always),
    (
        "cgroup_attach",
        Tracepoint("cgroup_attach_task", None),
        Always,
    ),
    (
        "inet_sock_set_state",
        Tracepoint("inet_sock_set_state", None),
        Always,
    ),
    (
        "mmap_lock_path",
        Tracepoint("mmap_lock_acquire_returned", Some(4)),
        Mappings,
    ),
    (
        "mmap_lock",
        Tracepoint("mmap_lock_acquire_returned", Some(3)),
        Mappings,
    ),
    ("mmap_region", Function("mmap_region"), Fentry),
    ("do_mas_munmap", Function("do_mas_munmap"), Fentry),
    ("do_vmi_munmap", Function("do_vmi_munmap"), Fentry),
    (
        "do_vmi_align_munmap",
        Function("do_vmi_align_munmap"),
        Fentry,
    ),
    ("mprotect_fixup", Function("mprotect_fixup"), Fentry),
    ("do_brk_flags", Function("do_brk_flags"), Fentry),
    ("sys_brk", Function("__x64_sys_brk"), Fentry),
    ("sys_mremap", Function("__x64_sys_mremap"), Fentry),
    ("do_madvise", Function("do_madvise"), Fentry),
    ("mlock_fixup", Function("mlock_fixup"), Fentry),
    ("mbind_range", Function("mbind_range"), Fentry),
    ("ksys_shmdt", Function("ksys_shmdt"), Fentry),
    ("userfaultfd_ioctl", Function("userfaultfd_ioctl"), Fentry),
    ("do_mseal", Function("do_mseal"), Fentry),
    ("sys_prctl", Function("__x64_sys_prctl"), Fentry),
    ("expand_downwards", Function("expand_downwards"), Fentry),
    ("sys_exit", Tracepoint("sys_exit", None), Fallback),
    ("task_release", Function("release_task"), Fentry),
    ("unshare_files", Function("unshare_files"), Fentry),
    ("ksys_unshare", Function("ksys_unshare"), Fentry),
    ("fd_install", Function("fd_install"), Fentry),
    ("pick_file", Function("pick_file"), Fentry),
    (
        "file_close_fd_locked",
        Function("file_close_fd_locked"),
        Fentry,
    ),
    ("do_dup2", Function("do_dup2"), Fentry),
    ("do_dup2_exit", Function("do_dup2"), Fentry),
    ("set_close_on_exec", Function("set_close_on_exec"), Fentry),
    ("do_close_on_exec", Function("do_close_on_exec"), Fentry),
    ("close_range_exit", Function("__close_range"), Fentry),
    ("dup_fd", Function("dup_fd"), Fentry),
    ("exit_files", Function("exit_files"), Fentry),
    ("fcntl", Function("do_fcntl"), Fentry),
    ("vfs_ioctl", Function("do_vfs_ioctl"), Fentry),
    ("f_setown", Function("__f_setown"), Fentry),
    ("commit_creds", Function("commit_creds"), Fentry),
    ("set_fs_pwd", Function("set_fs_pwd"), Fentry),
    ("set_fs_root", Function("set_fs_root"), Fentry),
    ("sys_umask", Function("__x64_sys_umask"), Fentry),
    ("change_pid", Function("change_pid"), Fentry),
    ("unix_release", Function("unix_release_sock"), Fentry),
    ("watch_set", Function("inotify_update_watch"), Fentry),
    (
        "watch_removed",
        Function("inotify_ignored_and_remove_idr"),
        Fentry,
    ),
    ("sys_setsockopt", Function("__sys_setsockopt"), Fentry),
    ("sys_bind", Function("__sys_bind"), Fentry),
    ("sys_listen", Function("__sys_listen"), Fentry),
    ("sys_connect", Function("__sys_connect_file"), Fentry),
    ("sys_shutdown", Function("__sys_shutdown"), Fentry),
    ("epoll_ctl", Function("do_epoll_ctl"), Fentry),
    ("epoll_ctl_exit", Function("do_epoll_ctl"), Fentry),
    ("epoll_insert", Function("ep_ptable_queue_proc"), Fentry),
    ("epoll_remove_item", Function("ep_remove_epi"), Fentry),
    ("epoll_remove_forced", Function("__ep_remove"), Fentry),
    ("epoll_remove", Function("ep_remove"), Fentry),
];

/// Programs that say the same: only the first one the kernel has is loaded.
const INSTEAD: &[&[&str]] = &[&["epoll_remove_item", "epoll_remove_forced", "epoll_remove"]];

/// Without one of each of these groups the fentry set is not exact, and is not used.
const NEEDED: &[&[&str]] = &[
    &["fd_install"],
    &["pick_file", "file_close_fd_locked"],
    &["do_dup2"],
    &["set_close_on_exec"],
    &["do_close_on_exec"],
    &["close_range_exit"],
    &["dup_fd"],
    &["unshare_files"],
    &["ksys_unshare"],
    &["epoll_ctl"],
    &["epoll_ctl_exit"],
    &["epoll_insert"],
    INSTEAD[0],
    &["exit_files"],
    &["fcntl"],
    &["vfs_ioctl"],
    &["f_setown"],
    &["commit_creds"],
    &["set_fs_pwd"],
    &["set_fs_root"],
    &["sys_umask"],
    &["change_pid"],
    &["unix_release"],
    &["watch_set"],
    &["watch_removed"],
    &["sys_bind"],
    &["sys_listen"],
    &["sys_connect"],
    &["sys_shutdown"],
    &["sys_setsockopt"],
];

/// Together these mark every change of mappings; else the tracepoint of `mmap_lock` does.
const MAPPINGS: &[&[&str]] = &[
    &["mmap_region"],
    &["do_mas_munmap", "do_vmi_align_munmap"],
    &["mprotect_fixup"],
    &["do_brk_flags"],
    &["sys_brk"],
    &["sys_mremap"],
    &["do_madvise"],
    &["mlock_fixup"],
    &["mbind_range"],
    &["ksys_shmdt"],
    &["userfaultfd_ioctl"],
    &["sys_prctl"],
    &["expand_downwards"],
];

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
    /// Loads and attaches the better set that the kernel accepts, or the one asked
    /// for. Nothing is tracked before [`Hooks::set_roots`].
    ///
    /// # Errors
    ///
    /// The kernel refused every set that was allowed.
    pub fn load(options: &Options) -> Result<Self, LoadError> {
        super::redirect_libbpf_log();
        match options.set {
            Some(set) => Self::load_set(options, set),
            None => Self::load_set(options, HookSet::Fentry).or_else(|refusal| {
                let mut hooks = Self::load_set(options, HookSet::Fallback)?;
                let reason = format!("{}: {}", refusal.step, refusal.source);
                tracing::info!(reason, "the fentry hooks were refused");
                hooks.refused = Some(reason);
                Ok(hooks)
            }),
        }
    }

    fn load_set(options: &Options, set: HookSet) -> Result<Self, LoadError> {
        let at = |step| move |source| LoadError { step, source };
        let btf = Btf::from_vmlinux().map_err(at("reading the kernel's BTF"))?;
        let mut wanted: Vec<&'static str> = PROGRAMS
            .iter()
            .filter(|(_, target, when)| {
                let here = match when {
                    Always => true,
                    Fentry => set == HookSet::Fentry,
                    Fallback => set == HookSet::Fallback,
                    Mappings => set == HookSet::Fallback || !functions(&btf, MAPPINGS),
                };
                here && exists(&btf, *target)
            })
            .map(|(name, _, _)| *name)
            .collect();
        for group in INSTEAD {
            let first = group.iter().find(|name| wanted.contains(name));
            wanted.retain(|name| !group.contains(name) || Some(name) == first);
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
            rodata.wake_mask = (options.ring_bytes / WAKE_BYTES).clamp(1, 1024) - 1;
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
                    refusal = Some(error);
                }
            }
        }
        let missing = |group: &&[&str]| !group.iter().any(|name| attached.contains(name));
        if set == HookSet::Fentry && NEEDED.iter().any(missing) {
            let source = refusal.unwrap_or_else(|| {
                std::io::Error::new(std::io::ErrorKind::NotFound, "a function is inlined").into()
            });
            return Err(LoadError {
                step: "attach",
                source,
            });
        }
        Ok(Self {
            links,
            skel,
            set,
            refused: None,
            attached,
            shards: options.shards,
        })
    }

    /// Sets the cgroups that are tracked with everything below them: cgroup id and
    /// depth below the root cgroup. At most [`events::TRK_MAX_ROOTS`](super::events) count.
    pub fn set_roots(&mut self, roots: &[(u64, u32)]) {
        let Some(vars) = self.skel.maps.bss_data.as_deref_mut() else {
            return;
        };
        vars.root_count = 0;
        let mut count = 0;
        for (slot, (id, level)) in vars.roots.iter_mut().zip(roots) {
            // The generated type is another than the one of events.h, with the same fields.
            slot.id = *id;
            slot.level = *level;
            count += 1;
        }
        // SAFETY: the variable lives in mapped memory that the kernel reads; a volatile
        // write comes after those above.
        unsafe { std::ptr::write_volatile(&raw mut vars.root_count, count) };
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

    /// One consumer per ring; `sink` gets every event, and `None` for a record that
    /// has not even a number.
    ///
    /// # Errors
    ///
    /// A ring cannot be mapped.
    pub fn rings<F>(&self, sink: impl Fn(u32) -> F) -> Result<Vec<RingBuffer<'static>>, LoadError>
    where
        F: FnMut(Option<Event>) + 'static,
    {
        let at = |source| LoadError {
            step: "mapping the rings",
            source,
        };
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
        (0..self.shards)
            .zip(rings)
            .map(|(shard, ring)| {
                let mut sink = sink(shard);
                let mut builder = RingBufferBuilder::new();
                let each = move |bytes: &[u8]| {
                    sink(wire::decode(bytes).ok());
                    0
                };
                builder.add(ring, each).map_err(at)?;
                builder.build().map_err(at)
            })
            .collect()
    }

    /// Programs attached.
    #[must_use]
    pub fn link_count(&self) -> usize {
        self.links.len()
    }
}

/// Whether the kernel has one function of each group, by the names of their programs.
fn functions(btf: &Btf<'_>, groups: &[&[&str]]) -> bool {
    let target = |name: &str| PROGRAMS.iter().find(|(program, _, _)| *program == name);
    let there = |name: &&str| target(name).is_some_and(|(_, target, _)| exists(btf, *target));
    groups.iter().all(|group| group.iter().any(there))
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .first_chunk::<8>()
        .map_or(0, |bytes| u64::from_ne_bytes(*bytes))
}

fn programs<'a>(open: &'a mut OpenTrackSkel<'static>) -> impl Iterator<Item = OpenProgramMut<'a>> {
    open.open_object_mut().progs_mut()
}

fn exists(btf: &Btf<'_>, target: Target) -> bool {
    match target {
        Function(name) => btf.type_by_name::<types::Func<'_>>(name).is_some(),
        Tracepoint(name, arguments) => {
            let Some(typedef) = btf.type_by_name::<BtfType<'_>>(&format!("btf_trace_{name}"))
            else {
                return false;
            };
            let Some(wanted) = arguments else { return true };
            // typedef -> pointer -> prototype, whose first parameter is not the tracepoint's
            let pointer = typedef.next_type();
            let prototype = pointer.and_then(|pointer| pointer.next_type());
            let prototype = prototype.and_then(|ty| types::FuncProto::try_from(ty).ok());
            prototype.is_some_and(|prototype| prototype.len() == wanted + 1)
        }
    }
}
