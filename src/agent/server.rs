//! The control socket's side of the agent.

use super::lender::Lease;
use super::protocol::{Answer, Request, receive, send};
use super::shared::Shared;
use super::{AgentError, share};
use crate::model::diff::{diff, patch};
use crate::model::state::State;
use crate::sys::precedence::Precedence;
use crate::track::{Settle, View};
use crossbeam_channel::Sender;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Gid;
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

/// Binds the socket, for root and the group, if there is one. The lock says that a socket found
/// is of a dead agent.
pub(super) fn listen(path: &Path, group: Option<Gid>) -> Result<UnixListener, AgentError> {
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
    match group {
        Some(_) => share(path, group, 0o660),
        None => fs::set_permissions(path, Permissions::from_mode(0o600)),
    }
    .map_err(failed("Protecting"))?;
    Ok(listener)
}

/// Answers clients, each in a thread of its own.
pub(super) fn serve(listener: &UnixListener, shared: &Arc<Shared>, stop: &Sender<()>) {
    for client in listener.incoming() {
        let Ok(client) = client else { continue };
        let (shared, stop) = (Arc::clone(shared), stop.clone());
        let spawned = thread::Builder::new().name("client".into()).spawn(move || {
            if let Err(error) = answer(client, &shared, &stop) {
                tracing::debug!(%error, "a client went away");
            }
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "a client was not served");
        }
    }
}

/// Whether the process that connected may do this. Whoever could connect may ask: that is for
/// the socket's mode to say. Only root may end the agent, and have what others would lack.
fn may(client: &UnixStream, request: Request) -> io::Result<bool> {
    match request {
        Request::Status | Request::Audit | Request::Model | Request::Delta => Ok(true),
        Request::Iterators | Request::Shutdown => is_root(client),
    }
}

fn is_root(client: &UnixStream) -> io::Result<bool> {
    Ok(getsockopt(client, PeerCredentials)?.uid() == 0)
}

/// Answers one client until it goes away.
fn answer(mut client: UnixStream, shared: &Shared, stop: &Sender<()>) -> io::Result<()> {
    client.set_read_timeout(Some(CLIENT_PATIENCE))?;
    client.set_write_timeout(Some(CLIENT_PATIENCE))?;
    // The model as this client has it.
    let mut sent = State::default();
    let mut lease = None;
    // While whoever has a model may ask for what has happened since: applications stand still then.
    let mut first = None;
    loop {
        let request = match receive(&mut client) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            request => request?,
        };
        if !may(&client, request)? {
            let refusal = "Only root may ask for that".to_owned();
            send(&mut client, &Answer::Error(refusal))?;
            continue;
        }
        let reply = match request {
            Request::Status => shared
                .status()
                .map(|status| Answer::Status(Box::new(status))),
            Request::Audit => shared.audit().map(Answer::Audit),
            Request::Model => shared.tracking.state(Settle::Suspects).map(|state| {
                sent.clone_from(&state);
                Answer::Model(Box::new(state))
            }),
            Request::Delta => {
                let _urged = first.is_some().then(|| shared.tracking.urge());
                let before = std::mem::take(&mut sent);
                let look = move |view: View<'_>| (diff(&before, view.state), before);
                shared
                    .tracking
                    .look(Settle::Events, look)
                    .map(|(delta, before)| {
                        sent = patch(before, delta.clone());
                        Answer::Delta(Box::new(delta))
                    })
            }
            Request::Iterators => Ok(lend(&client, shared, &mut lease)?),
            Request::Shutdown => Ok(Answer::Done),
        };
        let reply = reply.unwrap_or_else(|error| Answer::Error(error.to_string()));
        send(&mut client, &reply)?;
        if request == Request::Model && first.is_none() && is_root(&client)? {
            first = Some(Precedence::take());
        }
        if request == Request::Shutdown {
            // If the channel is full, it stops already.
            let _ = stop.try_send(());
            return Ok(());
        }
    }
}

/// Lends the spare iterators for as long as the lease lives.
fn lend(client: &UnixStream, shared: &Shared, lease: &mut Option<Lease>) -> io::Result<Answer> {
    Ok(match shared.lender.lend() {
        Ok((loan, lent)) => {
            // A borrower has nothing to say, for however long its checkpoint takes.
            client.set_read_timeout(None)?;
            *lease = Some(lent);
            Answer::Iterators(loan)
        }
        Err(reason) => Answer::Error(reason.to_string()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_root_may_end_the_agent_and_borrow() {
        let (here, _there) = UnixStream::pair().unwrap();
        let root = nix::unistd::geteuid().is_root();
        for request in [Request::Shutdown, Request::Iterators] {
            assert_eq!(may(&here, request).unwrap(), root);
        }
        for request in [
            Request::Status,
            Request::Audit,
            Request::Model,
            Request::Delta,
        ] {
            assert!(may(&here, request).unwrap());
        }
    }
}
