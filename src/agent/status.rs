//! What `tracker status` and the metrics show.

use crate::bpf::track::HookSet;
use crate::handover::report::UpdateReport;
use crate::model::event::FileKind;
use crate::model::ids::{CgroupId, OfdId, Pid};
use crate::model::state::State;
use crate::track::roots::Root;
use crate::track::{Counters, View};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The agent's own account of itself and of what it tracks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
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
    /// The update that started this kernel, if one did.
    pub last_update: Option<UpdateReport>,
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
    /// The account of a view, and of the update before it.
    #[must_use]
    pub fn now(view: &View, roots: &[Root]) -> Self {
        let last_update = UpdateReport::read();
        if let Err(error) = &last_update {
            tracing::warn!(%error, "the report of the last update cannot be read");
        }
        Self {
            last_update: last_update.unwrap_or_default(),
            ..Self::of(view, roots)
        }
    }

    fn of(view: &View, roots: &[Root]) -> Self {
        let state = &view.state;
        let mut suspects = BTreeMap::<String, u64>::new();
        for object in state.suspects() {
            *suspects.entry(object.kind().to_owned()).or_default() += 1;
        }
        let names = names(roots);
        let mut members = BTreeMap::<String, BTreeSet<CgroupId>>::new();
        for (cgroup, name) in &names {
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
            refused: view.refused.clone(),
            lag: view.last_seq.saturating_sub(state.seq),
            counters: view.counters.clone(),
            total: Sizes::of(state, |_| true),
            suspects,
            applications: applications.collect(),
            last_update: None,
        }
    }
}

/// The application each cgroup belongs to.
fn names(roots: &[Root]) -> BTreeMap<CgroupId, String> {
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
        let tables: BTreeSet<_> = tasks().filter_map(|task| task.files).collect();
        let tables = tables.iter().filter_map(|id| state.tables.get(id));
        let slots: Vec<OfdId> = tables
            .flat_map(|t| t.fds.values())
            .map(|slot| slot.ofd)
            .collect();
        let ofds: BTreeSet<OfdId> = slots.iter().copied().collect();
        let mms: BTreeSet<_> = tasks().filter_map(|task| task.mm).collect();
        let mut kinds = BTreeMap::<String, u64>::new();
        for ofd in ofds.iter().filter_map(|id| state.ofds.get(id)) {
            *kinds.entry(kind_name(ofd.kind)).or_default() += 1;
        }
        let epolls = ofds.iter().filter_map(|id| state.epolls.get(id));
        let mappings = mms.iter().filter_map(|id| state.mms.get(id)?.vmas.as_ref());
        let processes: BTreeSet<Pid> = tasks().map(|task| task.tgid).collect();
        Self {
            processes: count(processes.len()),
            threads: count(tasks().count()),
            descriptors: count(slots.len()),
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
