//! What the running kernel and this process can do, found by trying, never from version numbers.

use std::collections::{BTreeMap, HashSet};
use std::error::Error;
use std::io;
use std::mem::MaybeUninit;
use std::path::PathBuf;

use caps::{CapSet, Capability};
use libbpf_rs::btf::{Btf, types};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use serde::Serialize;

use super::accept::Handshakes;
use super::hooks;
use super::iter::Iterators;
use super::netlock::NetLock;
use super::skeleton::probe::ProbeSkelBuilder;

/// The capabilities tracker uses.
const CAPABILITIES: &[Capability] = &[
    Capability::CAP_BPF,
    Capability::CAP_CHECKPOINT_RESTORE,
    Capability::CAP_KILL,
    Capability::CAP_NET_ADMIN,
    Capability::CAP_PERFMON,
    Capability::CAP_SYS_ADMIN,
    Capability::CAP_SYS_BOOT,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_SYS_RESOURCE,
];

/// The outcome of trying something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Probe {
    /// It works.
    Works,
    /// It does not, and why.
    Fails(String),
}

impl Probe {
    fn of<T, E: Error>(result: Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::Works,
            Err(error) => {
                let mut text = error.to_string();
                let mut source = error.source();
                while let Some(cause) = source {
                    text = format!("{text}: {cause}");
                    source = cause.source();
                }
                Self::Fails(text)
            }
        }
    }

    /// Whether it works.
    #[must_use]
    pub fn works(&self) -> bool {
        *self == Self::Works
    }
}

/// Facts about the running kernel; filled once, by [`Features::probe`].
#[derive(Clone, Debug, Serialize)]
pub struct Features {
    /// `uname -r`, for the reader only: nothing is decided by it.
    pub kernel_release: String,
    /// Whether the kernel describes its types in `/sys/kernel/btf/vmlinux`.
    pub btf: Probe,
    /// Whether the state-reading iterators load.
    pub iterators: Probe,
    /// Whether a fentry program loads and attaches.
    pub fentry: Probe,
    /// Whether the network lock loads.
    pub network_lock: Probe,
    /// Whether TCP connections that nobody has accepted can be made again.
    pub accept_queues: Probe,
    /// Each function that tracking hooks where it exists, and whether the kernel has it out of
    /// line: a stable update may inline any of them.
    pub hook_functions: BTreeMap<&'static str, bool>,
    /// Where the cgroup v2 hierarchy is mounted.
    pub cgroup2: Option<PathBuf>,
    /// Effective capabilities of this process among those tracker uses.
    pub capabilities: BTreeMap<String, bool>,
}

impl Features {
    /// Probes everything. Takes a few tenths of a second; nothing stays loaded.
    #[must_use]
    pub fn probe() -> Self {
        super::redirect_libbpf_log();
        let btf = Btf::from_vmlinux();
        let hook_functions = match &btf {
            Ok(btf) => {
                let present: HashSet<String> = btf
                    .type_by_kind::<types::Func<'_>>()
                    .filter_map(|func| Some(func.name()?.to_str()?.to_owned()))
                    .collect();
                hooks::all_functions()
                    .map(|name| (name, present.contains(name)))
                    .collect()
            }
            Err(_) => hooks::all_functions().map(|name| (name, false)).collect(),
        };
        Self {
            kernel_release: nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            btf: Probe::of(btf),
            iterators: Probe::of(Iterators::load()),
            fentry: Probe::of(probe_fentry()),
            network_lock: Probe::of(NetLock::load(0)),
            accept_queues: Probe::of(Handshakes::attach()),
            hook_functions,
            cgroup2: cgroup2_mount().ok(),
            capabilities: CAPABILITIES
                .iter()
                .map(|cap| {
                    let held = caps::has_cap(None, CapSet::Effective, *cap).unwrap_or(false);
                    (cap.to_string(), held)
                })
                .collect(),
        }
    }
}

/// Where the cgroup v2 hierarchy is mounted.
///
/// # Errors
///
/// `/proc/self/mountinfo` cannot be read, or [`io::ErrorKind::NotFound`].
pub fn cgroup2_mount() -> io::Result<PathBuf> {
    let mounts = procfs::process::Process::myself()
        .and_then(|process| process.mountinfo())
        .map_err(io::Error::other)?;
    mounts
        .into_iter()
        .find(|mount| mount.fs_type == "cgroup2")
        .map(|mount| mount.mount_point)
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 mount"))
}

fn probe_fentry() -> Result<(), libbpf_rs::Error> {
    // See Instance::load for why the storage is left behind.
    let storage = Box::leak(Box::new(MaybeUninit::uninit()));
    let mut skel = ProbeSkelBuilder::default().open(storage)?.load()?;
    libbpf_rs::skel::Skel::attach(&mut skel)
}
