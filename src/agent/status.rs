//! What `tracker status` and the metrics show.

use super::lender::SpareStatus;
use crate::bpf::fill::RingFill;
use crate::bpf::programs::ProgramStats;
use crate::bpf::track::HookSet;
use crate::handover::report::UpdateReport;
use crate::model::event::FileKind;
use crate::model::ids::{CgroupId, OfdId, Pid};
use crate::model::map::Set;
use crate::model::state::State;
use crate::sys::clock;
use crate::track::audit::Report;
use crate::track::roots::Root;
use crate::track::{Counters, Tracking, View};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// The agent's own account of itself and of what it tracks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// The agent's process.
    pub agent: AgentStatus,
    /// Hook set in use.
    pub hooks: HookSet,
    /// Why the better set is not.
    pub refused: Option<String>,
    /// Events that happened and are not applied yet.
    pub lag: u64,
    /// Counts since the agent started.
    pub counters: Counters,
    /// Everything tracked, together.
    pub total: Sizes,
    /// Objects to be read again, by kind.
    pub suspects: BTreeMap<String, u64>,
    /// Each application.
    pub applications: Vec<Application>,
    /// The hooks' programs.
    pub programs: Vec<ProgramStats>,
    /// The event rings, by shard.
    pub rings: Vec<RingFill>,
    /// Iterators for who makes a checkpoint.
    #[serde(default)]
    pub spare_iterators: SpareStatus,
    /// The last audit since the agent started, if there was one.
    pub last_audit: Option<LastAudit>,
    /// The update that started this kernel, if one did.
    pub last_update: Option<UpdateReport>,
}

/// What the agent's process is and uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// Its PID.
    pub pid: u32,
    /// When it started, in seconds since the epoch.
    pub start_time: f64,
    /// CPU time it has used, in seconds.
    pub cpu_seconds: f64,
    /// Memory it has in use, in bytes; 0 if /proc does not tell.
    pub resident_bytes: u64,
}

impl AgentStatus {
    /// That of this process, which started at that `CLOCK_REALTIME`.
    #[must_use]
    pub fn now(started: u64) -> Self {
        let statm = procfs::process::Process::myself().and_then(|process| process.statm());
        let pages = statm.map_or(0, |statm| statm.resident);
        let seconds = |nanoseconds| Duration::from_nanos(nanoseconds).as_secs_f64();
        Self {
            pid: std::process::id(),
            start_time: seconds(started),
            cpu_seconds: seconds(clock::process_cpu()),
            resident_bytes: pages * procfs::page_size(),
        }
    }
}

/// The outcome of an audit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LastAudit {
    /// When it ended, in seconds since the epoch.
    pub time: f64,
    /// Objects that the model and the kernel described differently.
    pub differences: u64,
    /// Objects that changed while they were compared.
    pub unstable: u64,
    /// Descriptors compared.
    pub descriptors: u64,
}

impl LastAudit {
    /// Of a report that was finished at that `CLOCK_REALTIME`.
    #[must_use]
    pub fn of(report: &Report, time: u64) -> Self {
        Self {
            time: Duration::from_nanos(time).as_secs_f64(),
            differences: count(report.differences.len()),
            unstable: count(report.unstable.len()),
            descriptors: count(report.compared.descriptors),
        }
    }
}

/// One application: a cgroup right below one that is tracked, or that one itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Application {
    /// Name of its cgroup.
    pub name: String,
    /// Its processes.
    pub pids: Vec<Pid>,
    /// How much it has.
    pub sizes: Sizes,
}

/// How much of each kind of object.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Sizes {
    pub processes: u64,
    pub threads: u64,
    pub descriptors: u64,
    pub open_files: u64,
    /// Open files by kind.
    pub kinds: BTreeMap<String, u64>,
    pub sockets: u64,
    pub epoll_items: u64,
    pub address_spaces: u64,
    /// Mappings, as far as they were read.
    pub mappings: u64,
}

impl Status {
    /// The account of the model, of the programs and rings behind it and of the update before it.
    #[must_use]
    pub fn now(
        model: Self,
        tracking: &Tracking,
        agent: AgentStatus,
        last_audit: Option<LastAudit>,
    ) -> Self {
        let programs = tracking.programs.stats();
        if let Err(error) = &programs {
            tracing::warn!(%error, "the kernel does not tell about the programs");
        }
        let last_update = UpdateReport::read();
        if let Err(error) = &last_update {
            tracing::warn!(%error, "the report of the last update cannot be read");
        }
        Self {
            agent,
            programs: programs.unwrap_or_default(),
            rings: tracking.fills.now(),
            last_audit,
            last_update: last_update.unwrap_or_default(),
            ..model
        }
    }

    /// What a view tells by itself, and the names of the applications by their cgroups. The
    /// model stands still meanwhile.
    pub(super) fn of(view: View<'_>, names: &BTreeMap<CgroupId, String>) -> Self {
        let state = view.state;
        let mut suspects = BTreeMap::<String, u64>::new();
        for object in state.suspects() {
            *suspects.entry(object.kind().to_owned()).or_default() += 1;
        }
        let mut members = BTreeMap::<String, BTreeSet<CgroupId>>::new();
        for (cgroup, name) in names {
            members.entry(name.clone()).or_default().insert(*cgroup);
        }
        let applications = members.iter().filter_map(|(name, cgroups)| {
            let sizes = Sizes::of(state, |cgroup| cgroups.contains(&cgroup));
            let tasks = state
                .tasks
                .values()
                .filter(|task| cgroups.contains(&task.cgroup));
            let pids: BTreeSet<Pid> = tasks.map(|task| task.tgid).collect();
            (!pids.is_empty()).then(|| Application {
                name: name.clone(),
                pids: pids.into_iter().collect(),
                sizes,
            })
        });
        Self {
            hooks: view.hooks,
            refused: view.refused.map(ToOwned::to_owned),
            lag: view.last_seq.saturating_sub(state.seq),
            counters: view.counters.clone(),
            total: Sizes::of(state, |_| true),
            suspects,
            applications: applications.collect(),
            agent: AgentStatus::default(),
            programs: Vec::new(),
            rings: Vec::new(),
            spare_iterators: SpareStatus::default(),
            last_audit: None,
            last_update: None,
        }
    }

    /// Runs of the hooks' programs that the kernel left out.
    #[must_use]
    pub fn recursion_misses(&self) -> u64 {
        self.programs.iter().map(|one| one.recursion_misses).sum()
    }
}

/// The application each cgroup belongs to.
pub(super) fn names(roots: &[Root]) -> BTreeMap<CgroupId, String> {
    let mut names = BTreeMap::new();
    for root in roots {
        for (id, below) in root.subtree() {
            let first = below.components().next();
            let path = first.map_or(root.path.as_path(), |first| first.as_os_str().as_ref());
            let name = path.file_name().unwrap_or(path.as_os_str());
            names.insert(id, name.to_string_lossy().into_owned());
        }
    }
    names
}

impl Sizes {
    fn of(state: &State, member: impl Fn(CgroupId) -> bool) -> Self {
        let tasks = || state.tasks.values().filter(|task| member(task.cgroup));
        let tables: Set<_> = tasks().filter_map(|task| task.files).collect();
        let tables: Vec<_> = tables
            .iter()
            .filter_map(|id| state.tables.get(id))
            .collect();
        let slots = || tables.iter().flat_map(|table| table.fds.values());
        let ofds: Set<OfdId> = slots().map(|slot| slot.ofd).collect();
        let mms: Set<_> = tasks().filter_map(|task| task.mm).collect();
        let mut numbers = BTreeMap::<FileKind, u64>::new();
        for ofd in ofds.iter().filter_map(|id| state.ofds.get(id)) {
            *numbers.entry(ofd.kind).or_default() += 1;
        }
        let kinds = numbers.iter().map(|(kind, n)| (kind_name(*kind), *n));
        let kinds: BTreeMap<String, u64> = kinds.collect();
        let epolls = ofds.iter().filter_map(|id| state.epolls.get(id));
        let mappings = mms.iter().filter_map(|id| state.mms.get(id)?.vmas.as_ref());
        let processes: Set<Pid> = tasks().map(|task| task.tgid).collect();
        Self {
            processes: count(processes.len()),
            threads: count(tasks().count()),
            descriptors: tables.iter().map(|table| count(table.fds.len())).sum(),
            open_files: count(ofds.len()),
            sockets: kinds.get("socket").copied().unwrap_or(0),
            kinds,
            epoll_items: epolls.map(|epoll| count(epoll.items.len())).sum(),
            address_spaces: count(mms.len()),
            mappings: mappings.map(|vmas| count(vmas.len())).sum(),
        }
    }
}

fn count(len: usize) -> u64 {
    u64::try_from(len).unwrap_or(u64::MAX)
}

fn kind_name(kind: FileKind) -> String {
    // Its serialized form is its name.
    match serde_json::to_value(kind) {
        Ok(serde_json::Value::String(name)) => name,
        _ => "other".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agent_knows_what_it_uses() {
        let before = clock::process_cpu();
        let agent = AgentStatus::now(1_500_000_000);
        assert_eq!(agent.pid, std::process::id());
        assert_eq!(agent.start_time, 1.5);
        assert!(agent.cpu_seconds >= Duration::from_nanos(before).as_secs_f64());
        // A test program has more than a megabyte of code and data in use, and less than 4 GiB.
        assert!(
            (1 << 20..4 << 30).contains(&agent.resident_bytes),
            "{agent:?}"
        );
    }
}
