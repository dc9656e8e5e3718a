//! Asking a running agent.

use super::protocol::{Answer, Request, receive, send};
use super::status::Status;
use crate::error::{ExitCode, HasExitCode};
use crate::model::diff::patch;
use crate::model::state::State;
use crate::track::audit::Report;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

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
    /// Its socket is not for everybody.
    #[error("Only root, and the group of the agent's --socket-group, may use {socket}")]
    Forbidden {
        /// Its control socket.
        socket: PathBuf,
        /// What the kernel said.
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

/// Where an agent listens unless it is told otherwise.
pub const SOCKET: &str = "/run/tracker/agent.sock";

fn failed(socket: &Path) -> impl Fn(io::Error) -> ClientError {
    move |source| {
        let socket = socket.to_owned();
        match source.kind() {
            io::ErrorKind::PermissionDenied => ClientError::Forbidden { socket, source },
            _ => ClientError::Socket { socket, source },
        }
    }
}

fn ask(socket: &Path, request: Request) -> Result<Answer, ClientError> {
    let mut stream = UnixStream::connect(socket).map_err(failed(socket))?;
    ask_over(&mut stream, socket, request)
}

fn ask_over(
    stream: &mut UnixStream,
    socket: &Path,
    request: Request,
) -> Result<Answer, ClientError> {
    send(stream, &request).map_err(failed(socket))?;
    match receive(stream).map_err(failed(socket))? {
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

/// A connection that keeps a copy of the agent's model, so that its last changes come quickly.
#[derive(Debug)]
pub struct Follower {
    socket: PathBuf,
    stream: UnixStream,
    state: State,
}

impl Follower {
    /// Fetches the model, complete up to the call; `None` where no agent listens.
    ///
    /// # Errors
    ///
    /// There is an agent, and it failed.
    pub fn start(socket: &Path) -> Result<Option<Self>, ClientError> {
        let mut stream = match UnixStream::connect(socket) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            stream => stream.map_err(failed(socket))?,
        };
        match ask_over(&mut stream, socket, Request::Model)? {
            Answer::Model(mut state) => {
                // It does not travel.
                state.reindex();
                Ok(Some(Self {
                    socket: socket.to_owned(),
                    stream,
                    state: *state,
                }))
            }
            _ => Err(unexpected(socket)),
        }
    }

    /// The model with everything that has happened by now, if the agent says so in time.
    ///
    /// # Errors
    ///
    /// The agent failed or took too long; the connection is of no use any more.
    pub fn catch_up(mut self, patience: Duration) -> Result<State, ClientError> {
        let socket = &self.socket;
        let limited = self.stream.set_read_timeout(Some(patience));
        limited.map_err(failed(socket))?;
        match ask_over(&mut self.stream, socket, Request::Delta)? {
            Answer::Delta(delta) => Ok(patch(self.state, *delta)),
            _ => Err(unexpected(socket)),
        }
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
