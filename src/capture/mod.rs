//! Reads an application while it stands still.
pub mod files;
