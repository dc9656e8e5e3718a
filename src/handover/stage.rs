//! The stage: what early boot does, in a process that PID 1 can do without.
//!
//! It puts the machine's part of the image back and has each application restored by a
//! *worker*, a process of its own again with a deadline: what happens to one application
//! does not touch the others. One that cannot be restored is started by its own command.

use super::arena::{Arena, ArenaError};
use super::cmdline::Handed;
use super::early::{milliseconds, say};
use super::report::{ApplicationReport, ApplicationStatus, Status, UpdateReport, continued, step};
use super::{mounts, network, sysctl};
use crate::applications::{NamedApplication, RunRecord};
use crate::bpf::features::cgroup2_mount;
use crate::bpf::netlock::{LockError, NetLock};
use crate::fault::{Fault, FaultHit};
use crate::image::{Image, ImageError, RangeStore, Store, StoreError, decode};
use crate::model::frozen::{Application, FileKind, Milestone, Origin, SocketState, System};
use crate::model::ids::Pid;
use crate::restore::{self, RestoreOptions};
use crate::sys::clock;
use crate::sys::process::pidfd_open;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::Signal;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

/// First argument of the stage; the second is the time stamp counter when PID 1 began.
pub(super) const RESTORE: &str = "--restore";

/// First argument of a worker; the second is the application's number in the image.
const APPLICATION: &str = "--application";

/// Why there is nothing to restore from.
#[derive(Debug, thiserror::Error)]
enum StageError {
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
        [APPLICATION, index] => worker(index.parse().unwrap_or(usize::MAX)),
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

fn open_image() -> Result<(RangeStore, Image), StageError> {
    let address = handed()?.arena.ok_or(StageError::NotHanded)?;
    let arena = Arena::at(address)?;
    let store = RangeStore::open(&arena.device)?;
    let image = decode(&store.metadata()?)?;
    Ok((store, image))
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
            restore_image(&image, begun, &mut report);
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

fn restore_image(image: &Image, begun: u64, report: &mut UpdateReport) {
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
    reserve_pids(&image.applications, &mut report.warnings);
    put_identity(&system, &mut report.warnings);
    let mut lock = match engage_lock() {
        Ok(lock) => Some(lock),
        Err(error) => {
            report.warnings.push(error.to_string());
            None
        }
    };
    timeline.add("network locked");
    report.warnings.extend(network::apply(&system));
    timeline.add("network configured");
    for (index, app) in image.applications.iter().enumerate() {
        report.applications.push(restore_application(index, app));
        timeline.add(&format!("{} restored", app.header.name));
    }
    if let Some(lock) = &mut lock
        && let Err(error) = lock.release()
    {
        report.warnings.push(error.to_string());
    }
    timeline.add(step::RUNNING);
    let all = |app: &ApplicationReport| app.status == ApplicationStatus::Restored;
    report.status = if report.applications.iter().all(all) {
        Status::Done
    } else {
        Status::Partial
    };
    report.timeline = milestones;
    report.measure();
}

/// Moves the next PIDs behind those of the applications, so that nothing of early boot
/// takes one of them.
fn reserve_pids(applications: &[Application], warnings: &mut Vec<String>) {
    let processes = applications.iter().flat_map(|app| &app.processes);
    let numbers = processes.flat_map(|process| {
        let threads = process.threads.iter().map(|thread| thread.tid.0);
        threads.chain([process.pid.0])
    });
    let Some(highest) = numbers.max() else { return };
    let path = "/proc/sys/kernel/ns_last_pid";
    let last = fs::read_to_string(path).unwrap_or_default();
    if last.trim().parse().unwrap_or(0) < highest
        && let Err(error) = fs::write(path, highest.to_string())
    {
        warnings.push(format!("write {path}: {error}"));
    }
}

fn put_identity(system: &System, warnings: &mut Vec<String>) {
    if let Err(errno) = nix::unistd::sethostname(&system.hostname) {
        warnings.push(format!("sethostname {}: {errno}", system.hostname));
    }
    warnings.extend(sysctl::apply(Path::new("/proc/sys"), &system.sysctls));
}

/// Until every connection is back, none is answered.
fn engage_lock() -> Result<NetLock, LockError> {
    let mut lock = NetLock::load()?;
    lock.add_all_tcp()?;
    lock.engage()?;
    Ok(lock)
}

fn restore_application(index: usize, app: &Application) -> ApplicationReport {
    let header = &app.header;
    let mut report = ApplicationReport {
        name: header.name.clone(),
        pids: app.processes.iter().map(|process| process.pid.0).collect(),
        connections: connections(app),
        ..ApplicationReport::default()
    };
    let named = match NamedApplication::new(&header.name) {
        Ok(named) => named,
        Err(error) => {
            report.error = Some(error.to_string());
            return report;
        }
    };
    let record = RunRecord {
        command: header.command.clone(),
        directory: header.directory.clone(),
        cgroup: named.cgroup_below_mount(),
    };
    let prepared = named
        .make_cgroup()
        .and_then(|()| named.write_record(&record));
    let result = prepared
        .map_err(|error| error.to_string())
        .and_then(|()| run_worker(index));
    let Err(error) = result else {
        report.status = ApplicationStatus::Restored;
        return report;
    };
    say(&format!("{} is not restored: {error}", header.name));
    report.error = Some(error);
    match start_afresh(&named, &record) {
        Ok(pid) => {
            report.status = ApplicationStatus::Restarted;
            report.pids = vec![pid];
        }
        Err(error) => {
            say(&format!("{} cannot be started: {error}", header.name));
            report.pids.clear();
        }
    }
    report
}

fn connections(app: &Application) -> usize {
    let connected = |file: &&crate::model::frozen::OpenFile| match &file.kind {
        FileKind::Socket(socket) => matches!(socket.state, SocketState::TcpConnection(_)),
        _ => false,
    };
    app.ofds.values().filter(connected).count()
}

/// Where a worker leaves its error. A pipe would be open in what it restores.
fn error_file(index: usize) -> PathBuf {
    Path::new(crate::applications::STATE_DIR).join(format!("restore.{index}.error"))
}

/// Restores one application in a process of its own.
fn run_worker(index: usize) -> Result<(), String> {
    let path = error_file(index);
    let errors = File::create(&path).map_err(|e| format!("create {}: {e}", path.display()))?;
    let mut child = Command::new("/proc/self/exe")
        .arg0("early")
        .args([APPLICATION, &index.to_string()])
        .stdin(Stdio::null())
        .stderr(errors)
        .spawn()
        .map_err(|e| format!("start a worker: {e}"))?;
    let pid = i32::try_from(child.id()).map_err(|e| e.to_string())?;
    let pidfd = pidfd_open(Pid(pid)).map_err(|e| e.to_string())?;
    let mut fds = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    let deadline = handed().map_err(|e| e.to_string())?.deadlines.application;
    let ended = poll(&mut fds, milliseconds(deadline)) == Ok(1);
    if !ended {
        let _ = child.kill();
    }
    let status = child.wait().map_err(|e| e.to_string())?;
    let text = fs::read_to_string(&path).unwrap_or_default();
    let _ = fs::remove_file(&path);
    match (ended, status.success(), text.trim()) {
        (false, _, _) => Err(format!("not done after {deadline} s")),
        (true, true, _) => Ok(()),
        (true, false, "") => Err(format!("the worker ended with {status}")),
        (true, false, text) => Err(text.to_owned()),
    }
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

/// Restores application number `index`; what goes wrong is told on stderr.
fn worker(index: usize) -> ExitCode {
    match restore_one(index) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(crate::error::ExitCode::RestoreFailed as u8)
        }
    }
}

fn restore_one(index: usize) -> Result<(), String> {
    // Ended with the stage: nobody may restore behind the back of the real init.
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(|e| format!("prctl(PR_SET_PDEATHSIG): {e}"))?;
    let (store, image) = open_image().map_err(|e| e.to_string())?;
    let app = image.applications.get(index);
    let app = app.ok_or_else(|| format!("The image has no application {index}"))?;
    let cgroup_root = cgroup2_mount().map_err(|e| e.to_string())?;
    let options = RestoreOptions {
        cgroup_root,
        // The stage holds the lock itself, over all applications.
        network_lock: None,
    };
    let restored =
        restore::restore(app, &store, &image.slots, &options).map_err(|e| e.to_string())?;
    tracing::debug!("{} stands, {:?}", app.header.name, restored.roots);
    Ok(())
}
