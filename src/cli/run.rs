//! `tracker run`: starts an application in a cgroup of its own, or finds it resumed.

use crate::applications::{ApplicationError, NamedApplication, RunRecord};
use crate::error::{ExitCode, HasExitCode};
use crate::sys::signal::restore_sigpipe;
use clap::Args;
use nix::errno::Errno;
use std::ffi::CString;

/// Arguments of `tracker run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Name of the application: its cgroup is tracker/NAME
    #[arg(long, value_name = "NAME")]
    name: String,

    /// Program and arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    command: Vec<String>,
}

/// Why an application was not started.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Its cgroup or record.
    #[error(transparent)]
    Application(#[from] ApplicationError),
    /// The command has a NUL byte in it.
    #[error("The command contains a NUL byte; pass it without")]
    Nul,
    /// execvp(3) failed.
    #[error("exec {program}: {errno}; check that the program exists and is executable")]
    Exec {
        /// The program.
        program: String,
        /// What the kernel answered.
        errno: Errno,
    },
    /// The working directory is gone.
    #[error("getcwd: {0}; change to a directory that exists")]
    Directory(std::io::Error),
}

impl HasExitCode for RunError {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Application(ApplicationError::Name(_)) | Self::Nul => ExitCode::Usage,
            Self::Application(_) => ExitCode::Unsupported,
            Self::Exec { .. } | Self::Directory(_) => ExitCode::Difference,
        }
    }
}

/// Becomes the command, within the application's cgroup. An application that
/// runs already (resumed after an update) is waited for instead.
///
/// # Errors
/// See [`RunError`]; on success it returns only for a resumed application.
pub fn run(args: &RunArgs) -> Result<ExitCode, RunError> {
    let application = NamedApplication::new(&args.name)?;
    let pids = application.pids()?;
    if let Some(first) = pids.iter().min() {
        eprintln!(
            "tracker: {} runs already as PID {first}; waiting for its end",
            args.name
        );
        application.wait_until_empty()?;
        return Ok(ExitCode::Done);
    }
    let argv = args
        .command
        .iter()
        .map(|arg| CString::new(arg.as_str()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|_| RunError::Nul)?;
    let directory = std::env::current_dir().map_err(RunError::Directory)?;
    application.make_cgroup()?;
    application.write_record(&RunRecord {
        command: args.command.clone(),
        directory: directory.to_string_lossy().into_owned(),
        cgroup: application.cgroup_below_mount(),
    })?;
    application.add_process(0)?;
    // Rust ignores SIGPIPE; the application gets what an ordinary parent would hand on.
    restore_sigpipe();
    let Err(errno) = nix::unistd::execvp(&argv[0], &argv);
    Err(RunError::Exec {
        program: args.command[0].clone(),
        errno,
    })
}
