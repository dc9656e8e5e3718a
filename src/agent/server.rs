//! The control socket's side of the agent.

use super::AgentError;
use super::protocol::{Answer, Request, receive, send};
use super::status::Status;
use crate::model::diff::diff;
use crate::model::state::State;
use crate::track::audit::audit;
use crate::track::{Settle, Tracking};
use crossbeam_channel::Sender;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

/// How long a client may take to send its request or take the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(30);

/// Binds the socket, for root only. The lock says that a socket found is of a dead agent.
pub(super) fn listen(path: &Path) -> Result<UnixListener, AgentError> {
    let failed = |action| {
        move |source| AgentError::File {
            action,
            path: path.to_owned(),
            source,
        }
    };
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(failed("Removing")(error));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).map_err(failed("Binding"))?;
    fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("Protecting"))?;
    Ok(listener)
}

/// Answers clients, each in a thread of its own.
pub(super) fn serve(listener: &UnixListener, tracking: &Arc<Tracking>, stop: &Sender<()>) {
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        let (tracking, stop) = (Arc::clone(tracking), stop.clone());
        let spawned = thread::Builder::new().name("client".into()).spawn(move || {
            if let Err(error) = answer(client, &tracking, &stop) {
                tracing::debug!(%error, "a client went away");
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "a client was not served");
        }
    }
}

/// Answers one client until it goes away.
fn answer(mut client: UnixStream, tracking: &Tracking, stop: &Sender<()>) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    // The model as this client has it.
    let mut sent = State::default();
    loop {
        let request = match receive(&mut client) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            request => request?,
        };
        let reply = match request {
            Request::Status => tracking
                .view(Settle::No)
                .map(|view| Answer::Status(Box::new(Status::now(&view, &tracking.roots)))),
            Request::Audit => audit(tracking).map(Answer::Audit),
            Request::Model => tracking.view(Settle::Suspects).map(|view| {
                sent.clone_from(&view.state);
                Answer::Model(Box::new(view.state))
            }),
            Request::Delta => tracking.view(Settle::Events).map(|view| {
                let delta = diff(&sent, &view.state);
                sent = view.state;
                Answer::Delta(Box::new(delta))
            }),
            Request::Shutdown => Ok(Answer::Done),
        };
        let reply = reply.unwrap_or_else(|error| Answer::Error(error.to_string()));
        send(&mut client, &reply)?;
        if request == Request::Shutdown {
            // If the channel is full, it stops already.
            let _ = stop.try_send(());
            return Ok(());
        }
    }
}
