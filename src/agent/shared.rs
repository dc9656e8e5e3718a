//! What the agent's threads share: tracking, and the agent's account of itself.

use super::lender::Lender;
use super::status::{AgentStatus, LastAudit, Status, names};
use crate::sys::clock;
use crate::track::audit::{Report, audit};
use crate::track::{Gone, Settle, Tracking, View};
use std::sync::{Mutex, PoisonError};

pub(super) struct Shared {
    pub(super) tracking: Tracking,
    pub(super) lender: Lender,
    /// `CLOCK_REALTIME` when the agent started.
    started: u64,
    last_audit: Mutex<Option<LastAudit>>,
}

impl Shared {
    pub(super) fn new(tracking: Tracking, started: u64) -> Self {
        Self {
            tracking,
            lender: Lender::default(),
            started,
            last_audit: Mutex::default(),
        }
    }

    /// How everything is right now.
    pub(super) fn status(&self) -> Result<Status, Gone> {
        let names = names(&self.tracking.roots);
        let look = move |view: View<'_>| Status::of(view, &names);
        let model = self.tracking.look(Settle::No, look)?;
        let last_audit = self.last_audit.lock();
        let last_audit = *last_audit.unwrap_or_else(PoisonError::into_inner);
        let agent = AgentStatus::now(self.started);
        Ok(Status {
            spare_iterators: self.lender.status(),
            ..Status::now(model, &self.tracking, agent, last_audit)
        })
    }

    /// An audit, the outcome of which is kept for the status.
    pub(super) fn audit(&self) -> Result<Report, Gone> {
        let report = audit(&self.tracking)?;
        let last = LastAudit::of(&report, clock::realtime());
        let mut kept = self
            .last_audit
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *kept = Some(last);
        Ok(report)
    }
}
