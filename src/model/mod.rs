//! The pure core: what `tracker` knows about an application's kernel state.
//!
//! No I/O, no clock, no libc, no BPF: state in, state out, and it cannot fail.

pub mod frozen;
pub mod ids;

pub mod apply;
mod attrs;
pub mod check;
mod descriptions;
pub mod diff;
pub mod event;
mod index;
pub mod map;
pub mod names;
pub mod plan;
pub mod snapshot;
pub mod state;
pub mod verify;
