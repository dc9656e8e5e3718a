//! `tracker agent`.

use crate::agent::{self, AgentError, Config, STATE_DIR};
use crate::bpf::track::{HookSet, Options};
use crate::error::ExitCode;
use clap::{Args, ValueEnum};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Arguments of `tracker agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Cgroup to track with everything below it; may be repeated [default: the parent
    /// of all that `tracker run` starts]
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<PathBuf>,
    /// Serve Prometheus metrics at http://ADDRESS/metrics
    #[arg(long, value_name = "ADDRESS")]
    metrics_listen: Option<SocketAddr>,
    /// Control socket [default: agent.sock in the state directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Directory of the lock file
    #[arg(long, value_name = "DIR", default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// Group whose members may ask for status and audits, beside root
    #[arg(long, value_name = "GROUP")]
    socket_group: Option<String>,
    /// Hook set to use [default: the best the kernel accepts, or $TRACKER_HOOKS]
    #[arg(long, value_name = "SET")]
    hooks: Option<Hooks>,
    /// Bytes of each event ring, a power of two and a multiple of the page size
    #[arg(long, value_name = "BYTES", value_parser = ring_bytes, hide = true)]
    ring_bytes: Option<u32>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Hooks {
    /// Inside the kernel's functions
    Fentry,
    /// Tracepoints only
    Fallback,
}

fn ring_bytes(text: &str) -> Result<u32, String> {
    let bytes: u32 = text.parse().map_err(|error| format!("{error}"))?;
    if bytes.is_power_of_two() && bytes >= 4096 {
        Ok(bytes)
    } else {
        Err("not a power of two of at least 4096".to_owned())
    }
}

/// The variable that chooses the hook set, for tests that cannot change the command.
const HOOKS_VARIABLE: &str = "TRACKER_HOOKS";

/// Runs the daemon.
///
/// # Errors
///
/// It could not start.
pub fn run(args: AgentArgs) -> Result<ExitCode, AgentError> {
    let variable = std::env::var(HOOKS_VARIABLE).ok();
    let named = variable.and_then(|name| Hooks::from_str(&name, true).ok());
    let set = args.hooks.or(named).map(|hooks| match hooks {
        Hooks::Fentry => HookSet::Fentry,
        Hooks::Fallback => HookSet::Fallback,
    });
    let options = Options::default();
    let ring_bytes = args.ring_bytes.unwrap_or(options.ring_bytes);
    agent::run(&Config {
        cgroups: args.cgroup,
        metrics_listen: args.metrics_listen,
        socket: args
            .socket
            .unwrap_or_else(|| args.state_dir.join("agent.sock")),
        state_dir: args.state_dir,
        socket_group: args.socket_group,
        hooks: Options {
            set,
            ring_bytes,
            ..options
        },
    })?;
    Ok(ExitCode::Done)
}

/// Where to ask the agent.
#[derive(Debug, Args)]
pub struct SocketArgs {
    /// Control socket of the agent
    #[arg(long, value_name = "PATH", default_value = crate::agent::client::SOCKET)]
    pub socket: PathBuf,
}
