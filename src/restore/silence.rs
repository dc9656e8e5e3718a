//! The network lock that a restore releases when all stand.

use super::files;
use super::{RestoreError, RestoreOptions};
use crate::bpf::netlock::{LockError, NetLock};
use crate::model::frozen::Application;
use std::net::SocketAddr;

/// Opened before anything is created: a lock that cannot be released is found out in time. Where
/// none was left behind, those connections need one that answer at once to what they get.
///
/// # Errors
/// A lock cannot be opened or made.
pub fn open(app: &Application, options: &RestoreOptions) -> Result<Option<NetLock>, RestoreError> {
    let lock = match &options.network_lock {
        None => Ok(None),
        Some(dir) if dir.exists() => NetLock::open_pinned(dir).map(Some),
        Some(_) => around(&files::brought_by_packets(app)),
    };
    lock.map_err(|e| RestoreError::Lock(e.to_string()))
}

fn around(connections: &[(SocketAddr, SocketAddr)]) -> Result<Option<NetLock>, LockError> {
    if connections.is_empty() {
        return Ok(None);
    }
    let mut lock = NetLock::load(connections.len())?;
    for (local, remote) in connections {
        lock.add_connection(*local, *remote)?;
    }
    lock.engage()?;
    Ok(Some(lock))
}
