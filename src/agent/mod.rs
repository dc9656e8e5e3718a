//! The daemon: keeps the model, answers on a control socket, shows metrics.

pub mod client;
pub mod lender;
mod metrics;
pub mod protocol;
mod server;
mod shared;
pub mod status;

use crate::bpf::track::Options;
use crate::error::{ExitCode, HasExitCode};
use crate::sys::{clock, process};
use crate::track::roots::{Root, RootError};
use crate::track::{Settle, StartError, Tracking};
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Group, Uid, chown};
use sd_notify::NotifyState;
use shared::Shared;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

pub use crate::applications::STATE_DIR;

/// nice(2) value of the agent: the more processes compete for the CPUs, the more there is to
/// follow, and a reader of rings that waits for its turn loses events.
const NICENESS: i32 = -10;

/// How the agent is run.
#[derive(Clone, Debug)]
pub struct Config {
    /// Cgroups to track; none: the parent of all that `tracker run` starts.
    pub cgroups: Vec<PathBuf>,
    /// Where to serve metrics, if at all.
    pub metrics_listen: Option<SocketAddr>,
    /// The control socket.
    pub socket: PathBuf,
    /// Directory of the lock file.
    pub state_dir: PathBuf,
    /// The group that may ask the agent, beside root.
    pub socket_group: Option<String>,
    /// The hooks.
    pub hooks: Options,
}

/// The agent cannot run.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// A cgroup.
    #[error(transparent)]
    Root(#[from] RootError),
    /// Tracking.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A file or directory.
    #[error("{action} {path} failed; is it writable for root?")]
    File {
        /// What was done.
        action: &'static str,
        /// To what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The group of the control socket.
    #[error("There is no group {0}; create it, or choose another --socket-group")]
    NoGroup(String),
    /// The group of the control socket could not be looked up.
    #[error("Looking up the group {group} failed")]
    Group {
        /// Its name.
        group: String,
        /// Why.
        source: io::Error,
    },
    /// Another agent.
    #[error("Another agent runs in {0}; stop it first, or give this one its own --state-dir")]
    Running(PathBuf),
    /// The metrics endpoint.
    #[error("Listening on {address} failed; choose another --metrics-listen")]
    Metrics {
        /// Where.
        address: SocketAddr,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A signal or thread call.
    #[error("{0} failed")]
    System(&'static str, #[source] io::Error),
}

impl HasExitCode for AgentError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Start(_) | Self::Root(RootError::NoCgroup2(_)) => ExitCode::Unsupported,
            Self::Root(_) | Self::Metrics { .. } | Self::NoGroup(_) => ExitCode::Usage,
            _ => ExitCode::Difference,
        }
    }
}

/// Runs until SIGTERM, SIGINT or a request to shut down.
///
/// # Errors
///
/// It could not start.
pub fn run(config: &Config) -> Result<(), AgentError> {
    let started = clock::realtime();
    let group = config.socket_group.as_deref().map(find_group).transpose()?;
    let _lock = lock(&config.state_dir, group)?;
    // Before any thread is started, so that all inherit it.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGINT);
    let system = |what| move |errno: nix::Error| AgentError::System(what, errno.into());
    signals.thread_block().map_err(system("Blocking signals"))?;

    if let Err(error) = process::raise_priority(NICENESS) {
        tracing::warn!(%error, "the agent's share of the CPU is not raised");
    }

    let roots = if config.cgroups.is_empty() {
        vec![Root::default_parent()?]
    } else {
        config
            .cgroups
            .iter()
            .map(|path| Root::open(path))
            .collect::<Result<_, _>>()?
    };
    let tracking = Tracking::start(&config.hooks, roots)?;
    // The first reading is in the model before anyone is told that the agent is ready. What
    // changes meanwhile may be suspect still, and on a busy machine something always is.
    tracking
        .look(Settle::Reading, |_| ())
        .map_err(|gone| AgentError::System("Reading the applications", io::Error::other(gone)))?;

    let shared = Arc::new(Shared::new(tracking, started));
    let (stop, stopped) = bounded(1);
    let listener = server::listen(&config.socket, group)?;
    let for_server = (Arc::clone(&shared), stop.clone());
    let thread = |what| move |source| AgentError::System(what, source);
    thread::Builder::new()
        .name("control".into())
        .spawn(move || server::serve(&listener, &for_server.0, &for_server.1))
        .map_err(thread("Starting a thread"))?;
    if let Some(address) = config.metrics_listen {
        let server = metrics::listen(address)?;
        let shared = Arc::clone(&shared);
        thread::Builder::new()
            .name("metrics".into())
            .spawn(move || metrics::serve(&server, &shared))
            .map_err(thread("Starting a thread"))?;
    }
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            if let Ok(signal) = signals.wait() {
                tracing::info!(%signal, "stopping");
                // If the channel is full, it stops already.
                let _ = stop.try_send(());
            }
        })
        .map_err(thread("Starting a thread"))?;

    notify(&[NotifyState::Ready]);
    if let Err(error) = shared.lender.load() {
        tracing::warn!(%error, "there are no spare iterators");
    }
    let ended = until_stopped(&stopped, &shared.tracking);
    notify(&[NotifyState::Stopping]);
    // It may have been removed by hand.
    let _ = fs::remove_file(&config.socket);
    ended
}

/// How often the agent looks after itself if the service manager does not.
const SELF_CHECK: Duration = Duration::from_secs(10);

/// Waits for the end, and meanwhile tells the service manager's watchdog that the model is kept.
fn until_stopped(stopped: &Receiver<()>, tracking: &Tracking) -> Result<(), AgentError> {
    let limit = sd_notify::watchdog_enabled();
    // Waiting and asking together take half the time, as sd_watchdog_enabled(3) advises.
    let pause = limit.map_or(SELF_CHECK, |limit| limit / 4);
    loop {
        match stopped.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) => {}
            // An error means that nobody is left who could ask.
            Ok(()) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
        }
        let alive = tracking.is_alive(pause);
        match alive.map_err(|gone| AgentError::System("Tracking", io::Error::other(gone)))? {
            true if limit.is_some() => notify(&[NotifyState::Watchdog]),
            true => {}
            // It may be reading a lot; the watchdog decides when that has been for too long.
            false => tracing::warn!(?pause, "the model's thread did not answer"),
        }
    }
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "the service manager was not told");
    }
}

fn find_group(name: &str) -> Result<Gid, AgentError> {
    match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        Ok(None) => Err(AgentError::NoGroup(name.to_owned())),
        Err(errno) => Err(AgentError::Group {
            group: name.to_owned(),
            source: errno.into(),
        }),
    }
}

/// Makes sure that one agent runs; the lock is held as long as the value lives. The group, if
/// there is one, may pass through the directory, to the socket in it.
fn lock(dir: &Path, group: Option<Gid>) -> Result<Flock<File>, AgentError> {
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| AgentError::File {
            action,
            path,
            source,
        }
    };
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("Creating", dir))?;
    let path = dir.join("agent.lock");
    // Whoever can open it can hold it, and so keep agents from starting.
    let mut options = OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    let file = options.open(&path).map_err(failed("Creating", &path))?;
    file.set_permissions(Permissions::from_mode(0o600))
        .map_err(failed("Protecting", &path))?;
    let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|_| AgentError::Running(dir.to_owned()))?;
    if group.is_some() {
        share(dir, group, 0o750).map_err(failed("Protecting", dir))?;
    }
    Ok(lock)
}

/// Gives a file to root and the group, before it lets that group in.
fn share(path: &Path, group: Option<Gid>, mode: u32) -> io::Result<()> {
    chown(path, Some(Uid::from_raw(0)), group)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}
