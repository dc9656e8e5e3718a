//! Restores an application.
pub mod files;
