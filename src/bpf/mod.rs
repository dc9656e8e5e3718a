//! The BPF side seen from user space: skeletons, record types, iterators, network lock.
//!
//! `bpf/events.h` is the only source of the record layouts; [`events`] is generated from it.

pub mod accept;
pub mod adopted;
pub mod features;
pub mod fill;
mod found;
mod hooks;
mod instance;
pub mod iter;
pub mod lent;
pub mod netlock;
mod pass;
pub mod programs;
pub mod reading;
pub mod record;
pub mod rings;
mod scope;
mod shared;
mod skeleton;
pub mod track;
pub mod wire;

use std::sync::Once;

use libbpf_rs::PrintLevel;

/// Record types, generated from `bpf/events.h` by bindgen.
#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unsafe_op_in_unsafe_fn,
    clippy::all,
    clippy::pedantic,
    clippy::undocumented_unsafe_blocks,
    rustdoc::all
)]
pub mod events {
    include!(concat!(env!("OUT_DIR"), "/events.rs"));
}

/// Sends libbpf's messages to `tracing` instead of stderr. Idempotent.
pub fn redirect_libbpf_log() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        libbpf_rs::set_print(Some((PrintLevel::Debug, |level, message| {
            let message = message.trim_end();
            match level {
                // a failed load is reported through its error; the verifier's log is for -v
                PrintLevel::Warn | PrintLevel::Info => {
                    tracing::debug!(target: "libbpf", "{message}")
                }
                PrintLevel::Debug => tracing::trace!(target: "libbpf", "{message}"),
            }
        })));
    });
}
