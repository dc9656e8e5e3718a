//! Updates the Linux kernel under running applications: see `ARCHITECTURE.md`.
