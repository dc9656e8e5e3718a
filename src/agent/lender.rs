//! Iterators that nobody uses, loaded beforehand for who makes a checkpoint.
//!
//! Loading takes longer than all else before a checkpoint's freeze. The agent has its own for
//! its readings at any time, so these are a second instance, lent to one borrower at a time.

use crate::bpf::lent::{Loan, Spare};
use crate::sys::process;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

/// nice(2) value of the thread that loads: nobody waits for it.
const NICENESS: i32 = 10;

/// Nothing is lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotLent {
    /// It is early.
    #[error("The agent's spare iterators are not loaded yet")]
    Loading,
    /// There is one instance.
    #[error("The agent's spare iterators are lent already")]
    Lent,
    /// They could not be loaded.
    #[error("The agent could not load spare iterators; see its log")]
    Failed,
}

/// What has become of the spare iterators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SpareState {
    /// They are on their way.
    #[default]
    Loading,
    /// They wait for a borrower.
    Ready,
    /// Somebody has them.
    Lent,
    /// They could not be loaded.
    Failed,
}

impl fmt::Display for SpareState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Loading => "loading",
            Self::Ready => "ready",
            Self::Lent => "lent",
            Self::Failed => "failed",
        })
    }
}

/// The agent's account of its spare iterators.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpareStatus {
    /// What has become of them.
    pub state: SpareState,
    /// How often they were lent.
    pub lent: u64,
}

#[derive(Debug, Default)]
struct Shelf {
    spare: Option<Spare>,
    status: SpareStatus,
}

/// Lends one spare instance.
#[derive(Clone, Debug, Default)]
pub(super) struct Lender(Arc<Mutex<Shelf>>);

/// What is lent until this is dropped.
#[derive(Debug)]
pub(super) struct Lease(Lender);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.shelf().status.state = SpareState::Ready;
    }
}

impl Lender {
    /// Loads the spare instance in a thread of its own, with less of the CPU than others have.
    ///
    /// # Errors
    ///
    /// There can be no more threads.
    pub(super) fn load(&self) -> io::Result<()> {
        let this = self.clone();
        let load = move || {
            if let Err(error) = process::lower_priority(NICENESS) {
                tracing::debug!(%error, "the spare iterators are loaded at full priority");
            }
            match Spare::load() {
                Ok(spare) => this.offer(spare),
                Err(error) => {
                    let error: &dyn std::error::Error = &error;
                    tracing::warn!(error, "there are no spare iterators");
                    this.shelf().status.state = SpareState::Failed;
                }
            }
        };
        thread::Builder::new().name("spare".into()).spawn(load)?;
        Ok(())
    }

    fn offer(&self, spare: Spare) {
        let mut shelf = self.shelf();
        shelf.spare = Some(spare);
        shelf.status.state = SpareState::Ready;
    }

    /// Lends them, if they are there.
    pub(super) fn lend(&self) -> Result<(Loan, Lease), NotLent> {
        let mut shelf = self.shelf();
        let spare = match (shelf.status.state, &shelf.spare) {
            (SpareState::Ready, Some(spare)) => spare,
            (SpareState::Lent, _) => return Err(NotLent::Lent),
            (SpareState::Failed, _) => return Err(NotLent::Failed),
            (SpareState::Loading | SpareState::Ready, _) => return Err(NotLent::Loading),
        };
        let loan = spare.loan().clone();
        shelf.status.state = SpareState::Lent;
        shelf.status.lent += 1;
        Ok((loan, Lease(self.clone())))
    }

    pub(super) fn status(&self) -> SpareStatus {
        self.shelf().status
    }

    fn shelf(&self) -> MutexGuard<'_, Shelf> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_borrower_at_a_time() {
        let lender = Lender::default();
        assert_eq!(lender.lend().unwrap_err(), NotLent::Loading);
        lender.offer(Spare::of(Loan::default()));
        let (_, lease) = lender.lend().unwrap();
        assert_eq!(lender.lend().unwrap_err(), NotLent::Lent);
        drop(lease);
        let (_, _lease) = lender.lend().unwrap();
        let (state, lent) = (SpareState::Lent, 2);
        assert_eq!(lender.status(), SpareStatus { state, lent });
    }

    #[test]
    fn what_could_not_be_loaded_is_not_lent() {
        let lender = Lender::default();
        lender.shelf().status.state = SpareState::Failed;
        assert_eq!(lender.lend().unwrap_err(), NotLent::Failed);
    }
}
