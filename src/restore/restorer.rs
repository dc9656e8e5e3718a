//! The restorer process and its caller's side of it.

use super::RestoreError;
use super::cgroups;
use super::creds::Rights;
use super::files;
use super::fill;
use super::groups;
use super::huge;
use super::layout::Layout;
use super::message_queues;
use super::namespaces::Entrance;
use super::pids;
use super::semaphores;
use super::silence;
use super::sources::check_files;
use super::supervisor::Supervisor;
use super::sysv;
use super::tape::Tape;
use super::time::RestoredClocks;
use super::tree::{Births, loginuid};
use crate::error::{ExitCode, HasExitCode};
use crate::fault::Fault;
use crate::image::Pages;
use crate::model::frozen::{Application, Process};
use crate::model::ids::Pid;
use crate::model::plan::{self, Step};
use crate::sys::area::exit_now;
use crate::sys::process::{
    CallError, Fork, fork_in_cgroup, fork_with_pid, quiet_signals, raise_descriptor_limit,
    raise_limit,
};
use crate::sys::ptrace;
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;

/// How to restore.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Where cgroup2 is mounted.
    pub cgroup_root: PathBuf,
    /// Where a pinned network lock may be, which keeps the application's peers waiting since
    /// the checkpoint. Released when everything stands; still engaged if the restore fails
    /// before.
    pub network_lock: Option<PathBuf>,
    /// The machine's init has not run yet.
    pub early: bool,
    /// The restorer's own processes take their numbers here, as far as the application does not
    /// need them: others that are yet to be restored need the rest.
    pub spare: Range<i32>,
    /// Leaders of the application's groups and sessions that others will be, who are restored too:
    /// nothing stands in for them.
    pub led_elsewhere: BTreeSet<i32>,
}

/// What was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// Processes whose parent is outside of the application; now children of the caller's
    /// nearest subreaper.
    pub roots: Vec<Pid>,
}

/// Restores `app`, whose pages are in `image`. To be called with a single thread. When all of it
/// stands and nothing of it runs, `stands` is called; what that refuses does not run.
///
/// # Errors
/// The application cannot be restored; nothing of it is left running then.
pub fn restore(
    app: &Application,
    image: Pages<'_>,
    options: &RestoreOptions,
    stands: impl FnOnce() -> Result<(), RestoreError>,
) -> Result<Restored, RestoreError> {
    check_supported(app)?;
    let is_taken = |number| options.led_elsewhere.contains(&number);
    let restorer = pids::restorer_pid(app, options.spare.clone(), is_taken)?;
    let is_free = |number| number != restorer.0 && !is_taken(number) && pids::is_free(number);
    let stand_ins = groups::stand_ins(app, is_free);
    let with_stand_ins;
    let task = Task {
        app: if stand_ins.is_empty() {
            app
        } else {
            with_stand_ins = groups::with(app, &stand_ins);
            &with_stand_ins
        },
        stand_ins: &stand_ins,
        image,
        options,
    };
    pids::check_free(task.app)?;
    if app.header.namespaces.mounts.is_empty() {
        check_files(app, Pid(std::process::id().cast_signed()))?;
    }
    huge::check(app)?;
    let cgroup = cgroups::make_all(app, options)?;
    let Begun {
        pid,
        mut reader,
        opener,
    } = begin(&task, restorer, cgroup.as_ref())?;
    drop(cgroup);
    let mut opener = Some(opener);
    let mut allowed = Ok(());
    let mut allow = |step: Result<(), RestoreError>| {
        if let Some(opener) = &mut opener
            && step.is_ok()
        {
            let _ = opener.write_all(&[OPEN]);
        } else {
            // One whose gate is closed ends.
            opener = None;
            allowed = step;
        }
    };
    let mut said = read_byte(&mut reader);
    if said == Some(MAPPED) {
        allow(fill::fill(app, image));
        said = read_byte(&mut reader);
    }
    if said == Some(STANDS) {
        allow(stands());
        said = read_byte(&mut reader);
    }
    let report = said.map(|code| (code, rest(reader)));
    let status = reap(pid)?;
    allowed?;
    match report {
        Some((0, _)) => {
            cgroups::limit(app, options);
            Ok(Restored {
                roots: roots(app).collect(),
            })
        }
        Some((code, message)) => Err(RestoreError::Restorer { code, message }),
        None => Err(ended(pid, status)),
    }
}

/// A restorer that has begun, and our side of what it and we tell each other.
struct Begun {
    pid: Pid,
    reader: File,
    opener: File,
}

/// Has the restorer begin in the application's cgroup: sockets and memory are accounted where their
/// maker is.
fn begin(task: &Task<'_>, restorer: Pid, cgroup: Option<&File>) -> Result<Begun, RestoreError> {
    if let Some(cgroup) = cgroup {
        let fork = || fork_in_cgroup(Some(restorer), libc::SIGCHLD, cgroup.as_fd());
        match attempt(task, fork, None)? {
            Ok(begun) => return Ok(begun),
            // Some kernels compare how often the parent's cgroup and this one had all their
            // processes killed (`kill_seq` in kernel/cgroup/cgroup.c, of 6.18 for one), and take
            // the child for one that was forked while this one had.
            Err(WaitStatus::Signaled(_, Signal::SIGKILL, _)) => {
                tracing::debug!("the restorer, born in its cgroup, was killed; it is moved there");
            }
            Err(status) => return Err(ended(restorer, status)),
        }
    }
    let fork = || fork_with_pid(Some(restorer), libc::SIGCHLD);
    attempt(task, fork, cgroup)?.map_err(|status| ended(restorer, status))
}

/// Forks a restorer, which is moved into `cgroup` before it does anything. The inner error is how
/// one ended that has not begun.
fn attempt(
    task: &Task<'_>,
    fork: impl FnOnce() -> Result<Fork, CallError>,
    cgroup: Option<&File>,
) -> Result<Result<Begun, WaitStatus>, RestoreError> {
    let pipe = || unistd::pipe().map_err(RestoreError::system("pipe"));
    let ((reader, writer), (gate, opener)) = (pipe()?, pipe()?);
    match fork()? {
        Fork::Child => {
            drop((reader, opener));
            let name = &task.app.header.name;
            if cgroup.is_none() && Fault::RestoreBirth.point_of(name).is_err() {
                exit_now(i32::from(ExitCode::RestoreFailed as u8));
            }
            let caller = Caller {
                gate: File::from(gate),
                report: File::from(writer),
            };
            child(task, caller)
        }
        Fork::Parent(pid) => {
            drop((writer, gate));
            let (mut reader, mut opener) = (File::from(reader), File::from(opener));
            if read_byte(&mut reader) != Some(BEGUN) {
                return Ok(Err(reap(pid)?));
            }
            if let Some(cgroup) = cgroup {
                let file = format!("/proc/self/fd/{}/cgroup.procs", cgroup.as_raw_fd());
                if let Err(error) = fs::write(&file, pid.to_string()) {
                    // One whose gate is closed ends.
                    drop(opener);
                    reap(pid)?;
                    let what = "Moving the restorer into the application's cgroup";
                    return Err(RestoreError::io(what)(error));
                }
            }
            let _ = opener.write_all(&[OPEN]);
            Ok(Ok(Begun {
                pid,
                reader,
                opener,
            }))
        }
    }
}

fn reap(pid: Pid) -> Result<WaitStatus, RestoreError> {
    let raw = unistd::Pid::from_raw(pid.0);
    waitpid(raw, None).map_err(RestoreError::system(format!("waitpid {pid}")))
}

fn ended(pid: Pid, status: WaitStatus) -> RestoreError {
    RestoreError::Restorer {
        code: ExitCode::RestoreFailed as u8,
        message: format!("The restorer, PID {pid}, ended with {status:?}"),
    }
}

fn roots(app: &Application) -> impl Iterator<Item = Pid> {
    let outside = |p: &&crate::model::frozen::Process| p.parent.is_none() && p.zombie.is_none();
    app.processes.iter().filter(outside).map(|p| p.pid)
}

fn read_byte(pipe: &mut File) -> Option<u8> {
    let mut byte = [0];
    pipe.read_exact(&mut byte).ok().map(|()| byte[0])
}

fn rest(mut pipe: File) -> String {
    let mut bytes = Vec::new();
    // A message cut short is better than none.
    let _ = pipe.read_to_end(&mut bytes);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What the restorer is told when it may go on.
const OPEN: u8 = b'o';

/// What the restorer says first of all.
const BEGUN: u8 = b'b';

/// What the restorer says when all memory is mapped and waits to be filled.
const MAPPED: u8 = b'm';

/// What the restorer says when everything stands and waits to run. Otherwise it says its exit code
/// and, when that is not 0, why.
const STANDS: u8 = b's';

/// The restorer's side of what it and its caller tell each other.
struct Caller {
    gate: File,
    report: File,
}

impl Caller {
    /// Says that `what` is so and waits until it may go on.
    fn await_leave(&mut self, what: u8) -> Result<(), RestoreError> {
        let told = self.report.write_all(&[what]);
        match told.ok().and_then(|()| read_byte(&mut self.gate)) {
            Some(OPEN) => Ok(()),
            _ => Err(RestoreError::Withheld),
        }
    }
}

/// What the restorer is to do.
#[derive(Clone, Copy)]
struct Task<'a> {
    /// With the stand-ins.
    app: &'a Application,
    /// Processes that are needed only while groups are made.
    stand_ins: &'a [Process],
    image: Pages<'a>,
    options: &'a RestoreOptions,
}

fn child(task: &Task<'_>, mut caller: Caller) -> ! {
    let mut made = Made::default();
    let result = catch_unwind(AssertUnwindSafe(|| run(task, &mut caller, &mut made)));
    let (code, message) = match result {
        Ok(Ok(())) => (0, String::new()),
        Ok(Err(error)) => (error.exit_code() as u8, error.to_string()),
        Err(_) => {
            let message = "The restorer panicked; this is a defect of tracker";
            (ExitCode::RestoreFailed as u8, message.to_owned())
        }
    };
    if code != 0 {
        destroy(&made.born);
        sysv::remove(&made.segments);
        semaphores::remove(&made.semaphores);
        message_queues::remove(&made.message_queues);
        files::remove_mqueues(&made.mqueues);
    }
    let report = [&[code], message.as_bytes()].concat();
    let _ = caller.report.write_all(&report);
    exit_now(i32::from(code != 0))
}

/// What a failed restore takes back.
#[derive(Debug, Default)]
struct Made {
    born: BTreeSet<Pid>,
    segments: Vec<i32>,
    semaphores: Vec<i32>,
    message_queues: Vec<i32>,
    mqueues: Vec<CString>,
}

/// Kills what was created. Sockets in repair mode go silently with it.
fn destroy(born: &BTreeSet<Pid>) {
    for pid in born {
        let _ = kill(unistd::Pid::from_raw(pid.0), Signal::SIGKILL);
    }
    // Each traced thread must be reaped, or its leader never reports (ptrace(2)).
    while ptrace::wait_any().is_ok() {}
}

fn run(task: &Task<'_>, caller: &mut Caller, made: &mut Made) -> Result<(), RestoreError> {
    let Task {
        app,
        stand_ins,
        image,
        options,
    } = *task;
    caller.await_leave(BEGUN)?;
    let steps = plan::processes(&app.processes)?;
    become_supervisor(app)?;
    let mut lock = silence::open(app, options)?;
    // The clocks run from here on: timers armed after it may be late by them, never early.
    let clocks = RestoredClocks::start(&app.header.clocks)?;
    sysv::create_all(app, image, &mut made.segments)?;
    semaphores::create_all(app, &mut made.semaphores)?;
    message_queues::create_all(app, &mut made.message_queues)?;
    let entrance = Entrance::make(app, options.early)?;
    let mut opened = entrance.inside(|| {
        if !app.header.namespaces.mounts.is_empty() {
            check_files(app, Pid(unistd::getppid().as_raw()))?;
        }
        Ok(files::open_all(app, image, &mut made.mqueues)?)
    })?;
    let departed = opened.take_departed();
    Fault::RestoreFiles.point_of(&app.header.name)?;

    let children = steps.iter().filter_map(|step| match step {
        Step::Fork { child, .. } => Some(*child),
        _ => None,
    });
    let children: Vec<_> = children.collect();
    let layout = Layout::find(app, children.len())?;
    let mut tapes = BTreeMap::new();
    for (index, pid) in (0_u64..).zip(&children) {
        let addr = layout.tapes + index * Tape::LEN as u64;
        let tape = Tape::new(addr).map_err(RestoreError::system("mmap of the tape"))?;
        tapes.insert(*pid, tape);
    }
    let restorer = Pid(unistd::getpid().as_raw());
    let mut used = pids::numbers(app);
    used.insert(restorer.0);
    let mut go_betweens = BTreeMap::new();
    for step in &steps {
        if let Step::Fork {
            child,
            orphan: true,
            ..
        } = step
        {
            let number = pids::unneeded(&used, options.spare.clone())?;
            used.insert(number.0);
            go_betweens.insert(*child, number);
        }
    }
    let births = Births {
        app,
        steps: &steps,
        tapes: &tapes,
        files: &opened,
        restorer,
        loginuid: loginuid(),
        go_betweens,
    };
    entrance.inside(|| births.create(&mut made.born))?;
    files::complete(app, &opened, departed)?;
    cgroups::move_all(app, options, &steps)?;
    births.furnish_all()?;

    let mut supervisor = Supervisor {
        app,
        layout: &layout,
        tapes,
        rights: Rights::own()?,
        clocks,
    };
    supervisor.regroup(&steps)?;
    supervisor.use_message_queues()?;
    message_queues::limit(app)?;
    supervisor.await_messages()?;
    supervisor.foreground(&opened, restorer)?;
    supervisor.bury_all(&steps)?;
    supervisor.reap(stand_ins)?;
    supervisor.stop_jobs()?;
    let plans = supervisor.map_all()?;
    caller.await_leave(MAPPED)?;
    supervisor.rebuild_all(&plans)?;
    sysv::mark_destroyed(app)?;
    Fault::RestoreMemory.point_of(&app.header.name)?;
    supervisor.make_ready()?;
    entrance.inside(|| Ok(files::watch_all(app, &opened)?))?;
    caller.await_leave(STANDS)?;
    Fault::RestoreRelease.point_of(&app.header.name)?;
    // What a connection sends when it goes live must not be dropped: sent again, it would be
    // sent after a time-out.
    if let Some(lock) = &mut lock {
        lock.release()
            .map_err(|e| RestoreError::Lock(e.to_string()))?;
    }
    files::go_live(app, &opened)?;
    // The end of this process closes them all at once.
    std::mem::forget(opened);
    supervisor.release()
}

/// Refuses what would come out different.
fn check_supported(app: &Application) -> Result<(), RestoreError> {
    let mut mms = BTreeSet::new();
    let mut directories = BTreeSet::new();
    for process in app.processes.iter().filter(|p| p.zombie.is_none()) {
        let unsupported = |what: &str| RestoreError::Unsupported {
            pid: process.pid,
            what: what.to_owned(),
        };
        if !mms.insert(process.mm) {
            return Err(unsupported("an address space shared with another process"));
        }
        let shared = process.fs.0 != 0 && !directories.insert(process.fs);
        if shared && process.root.path != b"/" {
            return Err(unsupported("a root directory shared with another process"));
        }
        if !app.mms.contains_key(&process.mm) || !app.files.contains_key(&process.files) {
            return Err(unsupported("a process without memory or descriptors"));
        }
        if process.threads.first().map(|t| t.tid) != Some(process.pid.leader()) {
            return Err(unsupported("a process whose first thread has exited"));
        }
    }
    Ok(())
}

/// Leaves nothing in the restorer that its children must not inherit.
fn become_supervisor(app: &Application) -> Result<(), RestoreError> {
    quiet_signals();
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)
        .map_err(RestoreError::system("prctl(PR_SET_PDEATHSIG)"))?;
    nix::sys::prctl::set_child_subreaper(true)
        .map_err(RestoreError::system("prctl(PR_SET_CHILD_SUBREAPER)"))?;
    if !pids::in_session(pids::foreign_session(app)) {
        unistd::setsid().map_err(RestoreError::system("setsid"))?;
    }
    // Memory and message queues are put back before their owner's limits are.
    for resource in [
        libc::RLIMIT_AS,
        libc::RLIMIT_DATA,
        libc::RLIMIT_STACK,
        libc::RLIMIT_MEMLOCK,
        libc::RLIMIT_FSIZE,
        libc::RLIMIT_CPU,
        libc::RLIMIT_MSGQUEUE,
    ] {
        raise_limit(resource, u64::MAX)?;
    }
    Ok(raise_descriptor_limit()?)
}
