//! `tracker check`: what the kernel can do, or what keeps an application from an update.

use crate::applications::NamedApplication;
use crate::bpf::features::{Features, Probe};
use crate::bpf::track::{HookSet, Hooks, NO_ROOT, Options};
use crate::capture::{CheckpointError, survey};
use crate::error::{ExitCode, HasExitCode};
use crate::handover::eligible;
use crate::handover::filesystems::{FilesystemError, volatile};
use crate::handover::mounts::is_early;
use crate::model::ids::Pid;
use clap::Args;
use serde::Serialize;

/// Arguments of `tracker check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Only whether this application can be updated under: its name, or the PID of a process
    #[arg(value_name = "NAME|PID")]
    application: Option<String>,
    /// Load and attach every BPF program, of both hook sets, and print what the verifier made of it
    #[arg(long, conflicts_with = "application")]
    programs: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// An application could not be looked at.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It is not there, or what it has cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The machine's mounts.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
}

impl HasExitCode for CheckError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Checkpoint(error) => error.exit_code(),
            Self::Filesystem(_) => ExitCode::Unsupported,
        }
    }
}

#[derive(Serialize)]
struct Found {
    #[serde(flatten)]
    features: Features,
    /// The hook set that an agent would use; `None` if the kernel takes none.
    hook_set: Option<HookSet>,
    /// Programs of that set.
    hooks: Vec<&'static str>,
    /// Why not the better set, or none.
    refused: Option<String>,
}

/// Prints what the kernel can do for tracker; ends with 4 if it lacks what tracking needs. Of
/// BPF programs, ends with 4 if one of them does not load or attach. Of
/// an application, prints every object that cannot be carried; ends with 3 if there is one.
///
/// # Errors
/// There is no such application, or it cannot be looked at.
pub fn run(args: &CheckArgs) -> Result<ExitCode, CheckError> {
    match &args.application {
        Some(wanted) => eligibility(wanted, args.json),
        None if args.programs => Ok(super::programs::run(args.json)),
        None => Ok(kernel(args)),
    }
}

fn eligibility(wanted: &str, json: bool) -> Result<ExitCode, CheckError> {
    let application = find(wanted)?;
    let pids = application.pids().map_err(CheckpointError::from)?;
    if pids.is_empty() {
        return Err(CheckpointError::NotRunning(wanted.to_owned()).into());
    }
    let mut blockers = survey(application.cgroup(), &volatile()?, is_early)?;
    blockers.extend(eligible::blockers(&pids));
    let name = application.name();
    if json {
        super::print_json(&serde_json::json!({ "name": name, "blockers": blockers }));
    } else if blockers.is_empty() {
        println!("{name}: everything it uses can be carried");
    } else {
        println!("{name}: {} objects cannot be carried", blockers.len());
        for blocker in &blockers {
            println!("  {blocker}");
        }
    }
    Ok(match blockers.is_empty() {
        true => ExitCode::Done,
        false => ExitCode::NotEligible,
    })
}

/// The application of this name, or the one that the process of this PID belongs to.
fn find(wanted: &str) -> Result<NamedApplication, CheckpointError> {
    let Ok(pid) = wanted.parse::<i32>() else {
        return Ok(NamedApplication::new(wanted)?);
    };
    for application in NamedApplication::all()? {
        if application.pids()?.contains(&Pid(pid)) {
            return Ok(application);
        }
    }
    Err(CheckpointError::NotRunning(format!("PID {pid}")))
}

fn kernel(args: &CheckArgs) -> ExitCode {
    let features = Features::probe();
    // Loaded and attached without any cgroup to track, and detached at once.
    let (hook_set, hooks, refused) = match Hooks::load(&Options::default(), &NO_ROOT) {
        Ok(hooks) => (
            Some(hooks.set),
            hooks.attached.clone(),
            hooks.refused.clone(),
        ),
        Err(error) => (None, Vec::new(), Some(super::chain(&error))),
    };
    let found = Found {
        features,
        hook_set,
        hooks,
        refused,
    };
    if args.json {
        super::print_json(&found);
    } else {
        print(&found);
    }
    let usable = found.features.iterators.works() && found.hook_set.is_some();
    if usable {
        ExitCode::Done
    } else {
        ExitCode::Unsupported
    }
}

fn print(found: &Found) {
    let features = &found.features;
    println!("Kernel           {}", features.kernel_release);
    let lines = [
        ("BTF", &features.btf),
        ("Iterators", &features.iterators),
        ("fentry", &features.fentry),
        ("Network lock", &features.network_lock),
        ("Accept queues", &features.accept_queues),
    ];
    for (name, probe) in lines {
        let text = match probe {
            Probe::Works => "works".to_owned(),
            Probe::Fails(why) => format!("fails: {why}"),
        };
        println!("{name:<16} {text}");
    }
    let cgroup2 = features
        .cgroup2
        .as_ref()
        .map(|path| path.display().to_string());
    println!(
        "{:<16} {}",
        "Cgroup v2",
        cgroup2.as_deref().unwrap_or("not mounted")
    );
    let lacking = features.capabilities.iter().filter(|(_, held)| !**held);
    let lacking: Vec<&str> = lacking.map(|(name, _)| name.as_str()).collect();
    let lacking = if lacking.is_empty() {
        "all".to_owned()
    } else {
        format!("without {}", lacking.join(" "))
    };
    println!("{:<16} {lacking}", "Capabilities");
    let set = match found.hook_set {
        Some(HookSet::Fentry) => "fentry: exact",
        Some(HookSet::Fallback) => "fallback: tracepoints, tables are read again after changes",
        None => "none",
    };
    println!("{:<16} {set}", "Hook set");
    println!("{:<16} {}", "Hooks", found.hooks.join(" "));
    if let Some(refused) = &found.refused {
        println!("{:<16} {refused}", "Refused");
    }
}
