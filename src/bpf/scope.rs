//! Which tasks a pass of the iterators reports, and what the kernel has to walk for it.

use super::events::ProcessRec;
use super::instance::Pass;
use super::pass::Target;

/// How many processes are walked one by one; each walk has to be begun.
const FEW_WALKS: usize = 64;

/// Which tasks a pass reports. Kernel threads are never reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// All of them.
    System,
    /// Those in the cgroup v2 with this id (its inode number) and below.
    Cgroup(u64),
    /// The threads of the process with this PID in the initial PID namespace.
    Process(u32),
}

impl Target {
    pub(super) fn of(process: &ProcessRec) -> Self {
        Self::Process(process.pid)
    }
}

impl Scope {
    /// What the kernel has to walk for it.
    pub(super) fn target(self) -> Target {
        match self {
            Self::System | Self::Cgroup(_) => Target::System,
            Self::Process(pid) => Target::Process(pid),
        }
    }
}

/// The walks over a scope of these processes: of a few alone, so that whatever else the machine
/// has open takes no time.
pub(super) fn targets(scope: Scope, processes: &[ProcessRec]) -> Vec<Target> {
    match processes.len() {
        1..=FEW_WALKS => processes.iter().map(Target::of).collect(),
        _ => vec![scope.target()],
    }
}

pub(super) fn over_files(scope: Scope, processes: &[ProcessRec]) -> Vec<(Pass, Target)> {
    let targets = targets(scope, processes).into_iter();
    targets.map(|target| (Pass::Files, target)).collect()
}
