//! `tracker checkpoint`: freezes an application into an image directory.

use crate::bpf::iter::Origin;
use crate::capture::Slots;
use crate::capture::{
    Capture, CheckpointError, Durations, Known, MemoryStats, Options, Selection, shared_iterators,
};
use crate::error::ExitCode;
use crate::fault::Fault;
use crate::image::{DirectoryStore, Image, Store, encode};
use crate::model::frozen::Application;
use crate::model::ids::Pid;
use crate::model::verify::Verification;
use clap::Args;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Arguments of `tracker checkpoint`.
#[derive(Debug, Args)]
pub struct CheckpointArgs {
    /// The application of this name
    #[arg(
        long,
        value_name = "NAME",
        required_unless_present = "pid",
        conflicts_with = "pid"
    )]
    name: Option<String>,

    /// A process and everything below it
    #[arg(long, value_name = "PID")]
    pid: Option<i32>,

    /// Directory to make for the image
    #[arg(long, value_name = "DIR")]
    image: PathBuf,

    /// Let the application run on
    #[arg(long)]
    leave_running: bool,

    /// Give up when it is not frozen after this time
    #[arg(long, value_name = "MS", default_value_t = 10_000)]
    deadline: u64,

    /// Roll back rather than let it stand still for longer before its image is complete
    #[arg(long, value_name = "MS")]
    max_freeze: Option<u64>,

    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// What was done, for machines.
#[derive(Debug, Serialize)]
struct Outcome<'a> {
    name: &'a str,
    image: &'a Path,
    processes: usize,
    threads: usize,
    descriptors: usize,
    mappings: usize,
    memory: MemoryStats,
    iterators: Origin,
    verification: Option<&'a Verification>,
    network_locked: bool,
    silenced: bool,
    left_running: bool,
    #[serde(flatten)]
    durations: Durations,
}

/// Makes a checkpoint. Whatever fails, the application runs on and no image is left.
///
/// # Errors
/// See [`CheckpointError`].
pub fn run(args: &CheckpointArgs) -> Result<ExitCode, CheckpointError> {
    let selection = match (&args.name, args.pid) {
        (Some(name), _) => Selection::Name(name.clone()),
        (None, pid) => Selection::Tree(Pid(pid.unwrap_or_default())),
    };
    let options = Options {
        deadline: Duration::from_millis(args.deadline),
        max_freeze: args.max_freeze.map(Duration::from_millis),
    };
    let iterators = shared_iterators()?;
    let origin = iterators.borrow().origin();
    let mut capture = Capture::prepare(&selection, options, iterators)?;
    if !capture.blockers().is_empty() {
        return Err(CheckpointError::Blocked(capture.blockers().to_vec()));
    }
    let mut store = DirectoryStore::create(&args.image)?;
    let (application, verification) = match take(&mut capture, &mut store, args.leave_running) {
        Ok(taken) => taken,
        Err(error) => {
            // The application first: removing an image may take its time.
            capture.thaw();
            store.discard();
            return Err(error);
        }
    };
    report(args, &capture, &application, origin, verification.as_ref());
    Ok(ExitCode::Done)
}

fn take(
    capture: &mut Capture,
    store: &mut DirectoryStore,
    leave_running: bool,
) -> Result<(Application, Option<Verification>), CheckpointError> {
    let mut slots = Slots::default();
    capture.precopy(store, &mut slots)?;
    let known = Known::fetch();
    capture.reached("model");
    capture.load_lock()?;
    capture.refresh(store, &mut slots, leave_running)?;
    capture.lock_network()?;
    capture.freeze(slots)?;
    let comparison = known.compare(|| vec![capture.found()]);
    capture.collect_memory(store, &mut slots)?;
    let application = if leave_running {
        capture.collect_talking_files(store, &mut slots)?
    } else {
        capture.silence()?;
        capture.collect_files(store, &mut slots)?
    };
    let verification = comparison.result();
    capture.reached("verify");
    if leave_running {
        capture.thaw();
        capture.write_rest(store)?;
    }
    Fault::Encode.point()?;
    let image = Image {
        system: None,
        slots: store.written().first(slots.used()),
        applications: vec![application],
    };
    let metadata = encode(&image);
    Fault::Commit.point()?;
    store.commit(&metadata, slots.used())?;
    if !leave_running {
        capture.commit_and_kill()?;
    }
    let application = image.applications.into_iter().next().unwrap_or_default();
    Ok((application, verification))
}

fn report(
    args: &CheckpointArgs,
    capture: &Capture,
    application: &Application,
    iterators: Origin,
    verification: Option<&Verification>,
) {
    let durations = capture.timeline().durations();
    let outcome = Outcome {
        name: &application.header.name,
        image: &args.image,
        processes: application.processes.len(),
        threads: application.processes.iter().map(|p| p.threads.len()).sum(),
        descriptors: application.files.values().map(|t| t.fds.len()).sum(),
        mappings: application.mms.values().map(|mm| mm.vmas.len()).sum(),
        memory: capture.memory(),
        iterators,
        verification,
        network_locked: capture.is_locked(),
        silenced: capture.was_silenced(),
        left_running: args.leave_running,
        durations,
    };
    if args.json {
        super::print_json(&outcome);
        return;
    }
    println!(
        "{}: {} processes, {} threads, {} descriptors, {} mappings, {} MiB of memory",
        outcome.name,
        outcome.processes,
        outcome.threads,
        outcome.descriptors,
        outcome.mappings,
        outcome.memory.pages / 256,
    );
    if let Some(verification) = outcome.verification {
        println!("{}", verified(verification));
    }
    println!(
        "frozen for {} ms of {} ms; the image is {}",
        millis(outcome.durations.frozen_us),
        millis(outcome.durations.total_us),
        outcome.image.display(),
    );
}

fn verified(verification: &Verification) -> String {
    let Verification {
        objects,
        differing,
        suspect,
        ..
    } = verification;
    format!("the agent knew {objects} objects, {differing} of them otherwise, {suspect} suspect")
}

/// Microseconds as milliseconds with one decimal.
fn millis(micros: u64) -> String {
    format!("{}.{}", micros / 1000, micros % 1000 / 100)
}
