//! Asking a running agent.

use super::protocol::{Answer, Request, receive, send};
use super::status::Status;
use crate::bpf::iter::{Iterators, LoanError};
use crate::error::{ExitCode, HasExitCode};
use crate::model::diff::patch;
use crate::model::state::State;
use crate::track::audit::Report;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
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

/// The agent lends no iterators.
#[derive(Debug, thiserror::Error)]
pub enum BorrowError {
    /// It could not be asked, or has none to lend.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// Who answers is not to be trusted with ids of the kernel's objects.
    #[error("The agent at {socket} runs as user {uid}, not as root")]
    NotRoot {
        /// Its control socket.
        socket: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// What it lends is of no use here.
    #[error(transparent)]
    Loan(#[from] LoanError),
}

/// How long a loan may take: loading is the alternative.
const LOAN: Duration = Duration::from_secs(1);

/// Borrows the agent's spare iterators. They are given back when they are dropped, or this
/// process ends.
///
/// # Errors
///
/// There is no agent, or none that has some to lend and says so within a second.
pub fn borrow_iterators(socket: &Path) -> Result<Iterators, BorrowError> {
    let mut stream = UnixStream::connect(socket).map_err(failed(socket))?;
    let limited = stream.set_read_timeout(Some(LOAN));
    let limited = limited.and_then(|()| stream.set_write_timeout(Some(LOAN)));
    limited.map_err(failed(socket))?;
    let lender = getsockopt(&stream, PeerCredentials);
    let lender = lender.map_err(|errno| failed(socket)(errno.into()))?;
    if lender.uid() != 0 {
        return Err(BorrowError::NotRoot {
            socket: socket.to_owned(),
            uid: lender.uid(),
        });
    }
    match ask_over(&mut stream, socket, Request::Iterators)? {
        Answer::Iterators(loan) => Ok(Iterators::borrowed(&loan, stream)?),
        _ => Err(unexpected(socket).into()),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::iter::Loan;
    use std::os::unix::net::UnixListener;
    use std::thread;
    use std::time::Instant;

    /// What comes of borrowing from somebody who answers like this, or not at all.
    fn borrowed(answer: Option<Answer>) -> BorrowError {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| {
                let (mut borrower, _) = listener.accept().unwrap();
                if let (Ok(Request::Iterators), Some(answer)) = (receive(&mut borrower), answer) {
                    send(&mut borrower, &answer).unwrap();
                }
                // Until it hangs up.
                let _ = receive::<Request>(&mut borrower);
            });
            borrow_iterators(&socket).unwrap_err()
        })
    }

    fn is_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[test]
    fn only_roots_iterators_are_borrowed() {
        let refused = borrowed(Some(Answer::Error("None".to_owned())));
        match is_root() {
            true => assert!(matches!(refused, BorrowError::Client(_)), "{refused}"),
            false => assert!(matches!(refused, BorrowError::NotRoot { .. }), "{refused}"),
        }
    }

    #[test]
    fn who_does_not_answer_costs_a_second() {
        let begun = Instant::now();
        let refused = borrowed(None);
        assert!(begun.elapsed() < 5 * LOAN, "{:?}", begun.elapsed());
        if is_root() {
            assert!(matches!(refused, BorrowError::Client(_)), "{refused}");
        }
    }

    #[test]
    fn iterators_that_are_gone_are_not_borrowed() {
        let refused = borrowed(Some(Answer::Iterators(Loan::ours([0; 4], 0, 0))));
        if is_root() {
            assert!(matches!(refused, BorrowError::Loan(_)), "{refused}");
        }
    }
}
