//! Asking a running agent.

use super::protocol::{Answer, Request, receive, send};
use super::status::Status;
use crate::error::{ExitCode, HasExitCode};
use crate::model::state::State;
use crate::track::audit::Report;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// The agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// It could not be asked.
    #[error("Asking the agent at {socket} failed; start one with `tracker agent`")]
    Socket {
        /// Its control socket.
        socket: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It could not do what was asked.
    #[error("The agent at {socket} failed: {message}")]
    Refused {
        /// Its control socket.
        socket: PathBuf,
        /// Its words.
        message: String,
    },
}

impl HasExitCode for ClientError {
    fn exit_code(&self) -> ExitCode {
        ExitCode::Difference
    }
}

fn ask(socket: &Path, request: Request) -> Result<Answer, ClientError> {
    let failed = |source| ClientError::Socket {
        socket: socket.to_owned(),
        source,
    };
    let mut stream = UnixStream::connect(socket).map_err(failed)?;
    send(&mut stream, &request).map_err(failed)?;
    match receive(&mut stream).map_err(failed)? {
        Answer::Error(message) => Err(ClientError::Refused {
            socket: socket.to_owned(),
            message,
        }),
        answer => Ok(answer),
    }
}

fn unexpected(socket: &Path) -> ClientError {
    let message = "it answered another question; is it of this version?".to_owned();
    ClientError::Refused {
        socket: socket.to_owned(),
        message,
    }
}

/// How the agent is.
///
/// # Errors
///
/// There is no agent, or it failed.
pub fn status(socket: &Path) -> Result<Status, ClientError> {
    match ask(socket, Request::Status)? {
        Answer::Status(status) => Ok(*status),
        _ => Err(unexpected(socket)),
    }
}

/// Has the agent compare its model with the kernel.
///
/// # Errors
///
/// There is no agent, or it failed.
pub fn audit(socket: &Path) -> Result<Report, ClientError> {
    match ask(socket, Request::Audit)? {
        Answer::Audit(report) => Ok(report),
        _ => Err(unexpected(socket)),
    }
}

/// The model, complete up to the call; `None` where no agent listens.
///
/// # Errors
///
/// There is an agent, and it failed.
pub fn fetch_model(socket: &Path) -> Result<Option<State>, ClientError> {
    match ask(socket, Request::Model) {
        Ok(Answer::Model(state)) => Ok(Some(*state)),
        Ok(_) => Err(unexpected(socket)),
        Err(ClientError::Socket { source, .. })
            if matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Ends the agent.
///
/// # Errors
///
/// There is no agent.
pub fn shutdown(socket: &Path) -> Result<(), ClientError> {
    ask(socket, Request::Shutdown).map(drop)
}
