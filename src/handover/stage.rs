//! The stage: what early boot does, in a process that PID 1 can do without.
//!
//! It puts the machine's part of the image back and has each application restored by a
//! *worker* (`worker`), a process of its own again with a deadline. When all of them stand, the
//! network answers again and they run. One that cannot be restored is started by its own
//! command.

use super::arena::{Arena, ArenaError};
use super::cmdline::{Deadlines, Handed};
use super::early::say;
use super::eligible::FIRST_PID;
use super::report::{ApplicationReport, ApplicationStatus, Status, UpdateReport, continued, step};
use super::worker::{self, Worker};
use super::{huge, mounts, network, sysctl};
use crate::applications::{NamedApplication, RunRecord};
use crate::bpf::netlock::{LockError, NetLock};
use crate::fault::{Fault, FaultHit};
use crate::image::{Image, ImageError, RangeStore, Store, StoreError, decode, decode_one};
use crate::model::frozen::{
    Application, FileKind, Milestone, Origin, SocketState, System, TcpConnection,
};
use crate::restore::orphans::Orphans;
use crate::restore::pids;
use crate::sys::clock;
use crate::sys::huge::DIR;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// First argument of the stage; the second is the time stamp counter when PID 1 began.
pub(super) const RESTORE: &str = "--restore";

/// First argument of a worker; the others are the application's number in the image, and the
/// first and the end of the numbers that no application needs, then the leaders of its groups and
/// sessions that other applications have.
pub(super) const APPLICATION: &str = "--application";

/// Why there is nothing to restore from.
#[derive(Debug, thiserror::Error)]
pub(super) enum StageError {
    #[error("read /proc/cmdline: {0}")]
    Cmdline(#[source] io::Error),
    #[error("The kernel command line has no tracker.image=")]
    NotHanded,
    #[error(transparent)]
    Arena(#[from] ArenaError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Fault(#[from] FaultHit),
}

/// Runs the stage or a worker.
pub(super) fn main(arguments: &[OsString]) -> ExitCode {
    let words: Vec<_> = arguments.iter().filter_map(|word| word.to_str()).collect();
    match words[..] {
        [RESTORE, tsc] => restore(tsc.parse().unwrap_or_default()),
        [APPLICATION, index, start, end, ref led_elsewhere @ ..] => {
            let number = |word: &&str| word.parse().unwrap_or_default();
            let [start, end] = [start, end].map(|word| number(&word));
            let led_elsewhere = led_elsewhere.iter().map(number).collect();
            worker::main(
                index.parse().unwrap_or(usize::MAX),
                start..end,
                led_elsewhere,
            )
        }
        _ => {
            say("This is the early-boot stage, run by the kernel as init=");
            ExitCode::from(crate::error::ExitCode::Usage as u8)
        }
    }
}

fn handed() -> Result<Handed, StageError> {
    let line = fs::read_to_string("/proc/cmdline").map_err(StageError::Cmdline)?;
    Ok(Handed::parse(&line))
}

/// The image that the old kernel has left.
fn open_image() -> Result<(RangeStore, Image), StageError> {
    let store = open_store()?;
    let image = decode(&store.metadata()?)?;
    Ok((store, image))
}

/// What of it one application needs, counted from 0.
pub(super) fn open_application(index: usize) -> Result<(RangeStore, Image), StageError> {
    let store = open_store()?;
    let image = decode_one(&store.metadata()?, index)?;
    Ok((store, image))
}

fn open_store() -> Result<RangeStore, StageError> {
    let address = handed()?.arena.ok_or(StageError::NotHanded)?;
    let arena = Arena::at(address)?;
    Ok(RangeStore::open(&arena.device)?)
}

fn restore(begun: u64) -> ExitCode {
    let mut report = UpdateReport {
        kernel_after: kernel_release(),
        warnings: mounts::prepare(),
        ..UpdateReport::default()
    };
    let fault = Fault::Stage.point();
    let result = fault.map_err(StageError::from).and_then(|()| open_image());
    let status = match result {
        Ok((store, image)) => {
            let deadlines = handed().map(|handed| handed.deadlines).unwrap_or_default();
            restore_image(&image, begun, deadlines, &mut report);
            // A failed update keeps its image, for `tracker inspect` and another try.
            if report.status == Status::Done
                && let Err(error) = store.erase()
            {
                report.warnings.push(error.to_string());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            report.warnings.push(error.to_string());
            ExitCode::FAILURE
        }
    };
    for warning in &report.warnings {
        say(warning);
    }
    if let Err(error) = report.write() {
        say(&format!("The report cannot be written: {error}"));
    }
    status
}

fn kernel_release() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| String::new(),
        |name| name.release().to_string_lossy().into_owned(),
    )
}

/// Steps of this kernel on the old kernel's clock.
struct Timeline<'a> {
    origin: &'a Origin,
    milestones: &'a mut Vec<Milestone>,
}

impl Timeline<'_> {
    fn add(&mut self, step: &str) {
        self.add_at(step, clock::tsc());
    }

    fn add_at(&mut self, step: &str, tsc: u64) {
        self.milestones.push(Milestone {
            step: step.to_owned(),
            at: continued(self.origin, tsc),
        });
    }
}

fn restore_image(image: &Image, begun: u64, deadlines: Deadlines, report: &mut UpdateReport) {
    let system = image.system.clone().unwrap_or_default();
    report
        .kernel_before
        .clone_from(&system.origin.kernel_release);
    report.verification.clone_from(&system.verification);
    let mut milestones = system.origin.timeline.clone();
    let mut timeline = Timeline {
        origin: &system.origin,
        milestones: &mut milestones,
    };
    timeline.add_at(step::EARLY, begun);
    timeline.add("image read");
    put_identity(&system, &mut report.warnings);
    let spare = spare_pids(&image.applications, &mut report.warnings);
    let lock = match engage_lock() {
        Ok(lock) => Some(lock),
        Err(error) => {
            report.warnings.push(error.to_string());
            None
        }
    };
    timeline.add("network locked");
    report.warnings.extend(network::apply(&system));
    timeline.add("network configured");
    let applications = &image.applications;
    let (deadline, warnings) = (deadlines.application, &mut report.warnings);
    let deadline = Duration::from_secs(deadline.into());
    report.applications = restore_applications(
        applications,
        &system.orphans,
        &spare,
        deadline,
        lock,
        &mut timeline,
        warnings,
    );
    let all = |app: &ApplicationReport| app.status == ApplicationStatus::Restored;
    report.status = if report.applications.iter().all(all) {
        Status::Done
    } else {
        Status::Partial
    };
    report.timeline = milestones;
    report.measure();
}

/// Where the applications leave most numbers free. The next PIDs are given out from there on, so
/// that nothing of early boot takes one of theirs.
fn spare_pids(applications: &[Application], warnings: &mut Vec<String>) -> Range<i32> {
    let all = pids::all().unwrap_or_else(|error| {
        warnings.push(error.to_string());
        0..0
    });
    let spare = pids::widest_gap(applications, FIRST_PID..all.end.max(FIRST_PID));
    let path = "/proc/sys/kernel/ns_last_pid";
    if let Err(error) = fs::write(path, (spare.start - 1).to_string()) {
        warnings.push(format!("write {path}: {error}"));
    }
    spare
}

fn put_identity(system: &System, warnings: &mut Vec<String>) {
    if let Err(errno) = nix::unistd::sethostname(&system.hostname) {
        warnings.push(format!("sethostname {}: {errno}", system.hostname));
    }
    warnings.extend(sysctl::apply(Path::new("/proc/sys"), &system.sysctls));
    warnings.extend(huge::apply(Path::new(DIR), &system.huge_pages));
}

/// Until every connection is back, none is answered.
fn engage_lock() -> Result<NetLock, LockError> {
    let mut lock = NetLock::load(0)?;
    lock.add_all_tcp()?;
    lock.engage()?;
    Ok(lock)
}

/// Has every application stand, then all of them run. Until the last one stands nothing of
/// the first may run: its peers, which may be other applications, are not answered yet, and what
/// it sends would be lost and sent again only after a time-out.
fn restore_applications(
    applications: &[Application],
    orphans: &[TcpConnection],
    spare: &Range<i32>,
    deadline: Duration,
    lock: Option<NetLock>,
    timeline: &mut Timeline,
    warnings: &mut Vec<String>,
) -> Vec<ApplicationReport> {
    let places: Vec<_> = applications.iter().map(Place::make).collect();
    let start = |place: &Result<Place, String>, index| match place {
        Ok(_) => Worker::start(index, spare, &pids::led_elsewhere(applications, index)),
        Err(error) => Err(error.clone()),
    };
    let mut workers = places
        .iter()
        .zip(0..)
        .map(|(place, index)| start(place, index));
    let mut standing = Vec::new();
    let mut next = workers.next();
    while let Some(worker) = next {
        // Meanwhile the one after it starts and reads the image.
        next = workers.next();
        let app = &applications[standing.len()];
        standing.push(worker.and_then(|worker| worker.restore(deadline)));
        timeline.add(&format!("{} restored", app.header.name));
    }
    drop(workers);
    let (orphans, errors) = Orphans::make(orphans);
    warnings.extend(errors.iter().map(ToString::to_string));
    if let Some(mut lock) = lock
        && let Err(error) = lock.release()
    {
        warnings.push(error.to_string());
    }
    for worker in standing.iter_mut().flatten() {
        worker.let_run();
    }
    let errors = orphans.go_live();
    warnings.extend(errors.iter().map(ToString::to_string));
    let until = Instant::now() + deadline;
    let mut failed = Vec::new();
    let mut reports = Vec::new();
    for ((app, place), worker) in applications.iter().zip(places).zip(standing) {
        let left = until.saturating_duration_since(Instant::now());
        let result = worker.and_then(|worker| worker.until_it_runs(left));
        let mut report = ApplicationReport {
            name: app.header.name.clone(),
            pids: app.processes.iter().map(|process| process.pid.0).collect(),
            connections: connections(app),
            status: ApplicationStatus::Restored,
            error: None,
        };
        if let Err(error) = result {
            say(&format!("{} is not restored: {error}", report.name));
            report.error = Some(error);
            failed.push((reports.len(), place));
        }
        reports.push(report);
    }
    timeline.add(step::RUNNING);
    for (index, place) in failed {
        restart(place, &mut reports[index]);
    }
    reports
}

/// Where an application is put, and what is remembered of it.
struct Place {
    named: NamedApplication,
    record: RunRecord,
}

impl Place {
    fn make(app: &Application) -> Result<Self, String> {
        let header = &app.header;
        let named = NamedApplication::new(&header.name).map_err(|error| error.to_string())?;
        let record = RunRecord {
            command: header.command.clone(),
            directory: header.directory.clone(),
            cgroup: named.cgroup_below_mount(),
        };
        named
            .make_cgroup()
            .and_then(|()| named.write_record(&record))
            .map_err(|error| error.to_string())?;
        Ok(Self { named, record })
    }
}

/// Runs the own command of an application that is not restored, and reports it.
fn restart(place: Result<Place, String>, report: &mut ApplicationReport) {
    let started = place.and_then(|place| start_afresh(&place.named, &place.record));
    (report.status, report.pids) = match started {
        Ok(pid) => (ApplicationStatus::Restarted, vec![pid]),
        Err(error) => {
            say(&format!("{} cannot be started: {error}", report.name));
            (ApplicationStatus::Failed, Vec::new())
        }
    };
}

fn connections(app: &Application) -> usize {
    let connected = |file: &&crate::model::frozen::OpenFile| match &file.kind {
        FileKind::Socket(socket) => matches!(socket.state, SocketState::TcpConnection(_)),
        _ => false,
    };
    app.ofds.values().filter(connected).count()
}

/// Ends what is left of a failed restore and runs the application's own command.
fn start_afresh(named: &NamedApplication, record: &RunRecord) -> Result<i32, String> {
    if record.command.is_empty() {
        return Err("its command is not known".to_owned());
    }
    let kill = named.cgroup().join("cgroup.kill");
    fs::write(&kill, "1").map_err(|e| format!("write {}: {e}", kill.display()))?;
    named.wait_until_empty().map_err(|e| e.to_string())?;
    let child = Command::new("/proc/self/exe")
        .arg0("tracker")
        .args(["run", "--name", named.name(), "--"])
        .args(&record.command)
        .current_dir(&record.directory)
        .stdin(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(|e| format!("start {}: {e}", record.command[0]))?;
    i32::try_from(child.id()).map_err(|e| e.to_string())
}
