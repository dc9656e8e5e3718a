//! Updates the Linux kernel under running applications: see `ARCHITECTURE.md`.

pub mod agent;
pub mod applications;
pub mod bpf;
pub mod capture;
pub mod cli;
pub mod error;
pub mod fault;
pub mod handover;
pub mod image;
pub mod model;
pub mod restore;
pub mod sys;
pub mod track;
