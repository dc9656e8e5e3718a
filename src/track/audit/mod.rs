//! Compares the model with the kernel's truth, taken from /proc, sock_diag(7) and getsockopt(2).
//!
//! What only our own BPF programs could tell is left out: securebits, and who gets the signals
//! of a descriptor that is neither a socket nor set to send any; to ask for them, all files of
//! all processes would have to be held for a moment.

mod files;
mod kernel;
mod mappings;
mod options;
mod process;
mod settings;
mod sockets;
mod ticks;

use super::{Gone, Settle, Tracking};
use crate::model::ids::{MmId, Pid, SockId};
use crate::model::state::{State, Task};
use crate::sys::pidfds::Pidfds;
use kernel::sockets::Namespaces;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::thread;
use std::time::Duration;
use ticks::Ticks;

/// One object that the model and the kernel describe differently.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Difference {
    /// Process.
    pub pid: Pid,
    /// Object, as `fd 7` or `thread 12`.
    pub object: String,
    /// What the model says; empty if it does not have it.
    pub model: String,
    /// What the kernel says; empty if it does not have it.
    pub kernel: String,
}

/// How much was compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Compared {
    pub processes: usize,
    pub threads: usize,
    pub credentials: usize,
    pub directories: usize,
    pub descriptors: usize,
    pub names: usize,
    pub sockets: usize,
    pub epoll_items: usize,
    pub watches: usize,
    pub watched_paths: usize,
    pub address_spaces: usize,
    pub mappings: usize,
}

/// What an audit found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// Objects that differed in the same way every time.
    pub differences: Vec<Difference>,
    /// Objects that differed every time, but changed meanwhile: a running program.
    pub unstable: Vec<Difference>,
    /// How much was compared.
    pub compared: Compared,
    /// How often it was compared.
    pub rounds: u32,
}

/// A program at work gets so many chances to look the same twice over.
const ROUNDS: u32 = 4;
/// What differs must do so this often, and in the same way: a busy program opens the same file
/// at the same number again and again, and is now and then caught in the same moment.
const SURE: u32 = 8;
const PAUSE: Duration = Duration::from_millis(100);

/// Compares until nothing differs, at most a few times: a program that runs changes
/// between the look at the model and the look at /proc.
///
/// # Errors
///
/// The model's thread is gone.
pub fn audit(tracking: &Tracking) -> Result<Report, Gone> {
    let mut always = BTreeSet::new();
    let mut rounds = 0;
    loop {
        rounds += 1;
        let state = tracking.state(Settle::Names)?;
        let cgroups = tracking.roots.iter().flat_map(|root| {
            let path = |below: PathBuf| root.path.join(below);
            root.subtree().into_values().map(path).collect::<Vec<_>>()
        });
        let (found, compared) = compare(&state, &cgroups.collect::<Vec<_>>());
        // What is not as it was before is the program's doing.
        let as_before = |difference: &Difference| rounds == 1 || always.contains(difference);
        let (same, unstable): (Vec<_>, _) = found.into_iter().partition(as_before);
        let doubtful = !same.is_empty() || (rounds < ROUNDS && !unstable.is_empty());
        if !doubtful || rounds == SURE {
            return Ok(Report {
                differences: same,
                unstable,
                compared,
                rounds,
            });
        }
        always = same.into_iter().collect();
        thread::sleep(PAUSE);
    }
}

/// One comparison of a state with what the kernel says about the processes in these cgroups.
#[must_use]
pub fn compare(state: &State, cgroups: &[PathBuf]) -> (Vec<Difference>, Compared) {
    let described = state.ofds.values().filter(|ofd| ofd.refs > 0);
    let mut audit = Audit {
        state,
        held: described.filter_map(|ofd| ofd.sock).collect(),
        found: Vec::new(),
        compared: Compared::default(),
        mms: BTreeSet::new(),
        mounts: kernel::mounts("self"),
        sockets: Namespaces::default(),
        ticks: Ticks::of_this_kernel(),
        reachable: false,
        pidfds: Pidfds::default(),
    };
    let kernel = kernel::processes(cgroups.iter().map(PathBuf::as_path));
    let processes = state.processes();
    let alive = |tasks: &Vec<_>| tasks.iter().any(|(_, task): &(_, &Task)| !task.zombie);
    let model: BTreeSet<Pid> = processes
        .iter()
        .filter(|(_, tasks)| alive(tasks))
        .map(|(pid, _)| *pid)
        .collect();
    for pid in kernel.union(&model) {
        audit.compared.processes += 1;
        let (in_model, in_kernel) = (model.contains(pid), kernel.contains(pid));
        if in_model && in_kernel {
            audit.process(*pid, &processes[pid]);
        } else {
            let say = |there: bool| if there { "exists" } else { "" };
            audit.differ(*pid, "process", say(in_model), say(in_kernel));
        }
    }
    (audit.found, audit.compared)
}

struct Audit<'a> {
    state: &'a State,
    /// Sockets that descriptors refer to. Others are kept for a while, when their addresses may
    /// be those of sockets that are not tracked.
    held: BTreeSet<SockId>,
    found: Vec<Difference>,
    compared: Compared,
    /// Those compared already.
    mms: BTreeSet<MmId>,
    /// Devices of the mounts that the process at hand, or we, can see.
    mounts: BTreeMap<u64, u32>,
    sockets: Namespaces,
    /// Nothing where the kernel does not tell.
    ticks: Option<Ticks>,
    /// Whether the table at hand is the one of which a pidfd gives duplicates, which is that of
    /// the thread group's leader (before PIDFD_THREAD of 6.9).
    reachable: bool,
    /// Of the processes whose files were looked at.
    pidfds: Pidfds,
}

impl Audit<'_> {
    fn differ(
        &mut self,
        pid: Pid,
        object: impl Into<String>,
        model: impl Into<String>,
        kernel: impl Into<String>,
    ) {
        let (object, model, kernel) = (object.into(), model.into(), kernel.into());
        if model != kernel {
            self.found.push(Difference {
                pid,
                object,
                model,
                kernel,
            });
        }
    }

    /// Something could not be read. What goes away meanwhile is no difference: if the model
    /// does not see it go, the next look finds it where the kernel lists nothing any more.
    fn unread(&mut self, pid: Pid, object: impl Into<String>, error: &std::io::Error) {
        if !kernel::is_gone(error) {
            self.differ(pid, object, "exists", error.to_string());
        }
    }

    /// Says what only one side has.
    fn differ_sets<T: PartialEq>(
        &mut self,
        pid: Pid,
        object: String,
        (model, kernel): (&[T], &[T]),
        text: impl Fn(&T) -> String,
    ) {
        let only = |a: &[T], b: &[T]| {
            let only = a.iter().filter(|item| !b.contains(item));
            only.map(&text).collect::<Vec<_>>().join(", ")
        };
        self.differ(pid, object, only(model, kernel), only(kernel, model));
    }
}
