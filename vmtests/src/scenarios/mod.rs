//! Tests that need the host's hand on the VM: each gets one of its own.

use anyhow::Result;

use crate::image::Kernel;
use crate::vm::{Vm, VmBuilder};

mod aborts;
mod agent;
mod damaged;
mod faults;
mod handover;
mod harness;
mod kernel;
mod lending;
mod meanwhile;
mod message_queues;
mod mqueue;
mod programs;
mod sandboxed;
mod services;
mod single_case;
mod terminal;
mod tracked;
mod tracking;
mod tracking_adopted;
mod tracking_losses;
mod tracking_membership;
mod tracking_programs;
mod tracking_restart;
mod way_back;

/// One scenario.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// What it is about first: `redis_fault_freeze`.
    pub name: &'static str,
    /// The kernels that the VM boots first.
    pub kernels: Kernels,
    /// Ports to forward, memory and the like.
    pub configure: fn(VmBuilder) -> VmBuilder,
    /// Drives the VM.
    pub run: fn(&Vm) -> Result<()>,
}

/// Where a scenario runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// On this one.
    Only(Kernel),
    /// On each of them: it is about what they do not have in common.
    Both,
    /// On any, as its objects are tested on each by their cases.
    Either,
}

/// Every scenario.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    [
        agent::SCENARIOS,
        handover::SCENARIOS,
        harness::SCENARIOS,
        kernel::SCENARIOS,
        lending::SCENARIOS,
        meanwhile::SCENARIOS,
        message_queues::SCENARIOS,
        mqueue::SCENARIOS,
        programs::SCENARIOS,
        sandboxed::SCENARIOS,
        services::SCENARIOS,
        terminal::SCENARIOS,
        faults::SCENARIOS,
        aborts::SCENARIOS,
        damaged::SCENARIOS,
        tracking::SCENARIOS,
        tracking_adopted::SCENARIOS,
        tracking_losses::SCENARIOS,
        tracking_membership::SCENARIOS,
        tracking_programs::SCENARIOS,
        tracking_restart::SCENARIOS,
        way_back::SCENARIOS,
    ]
    .into_iter()
    .flatten()
}
