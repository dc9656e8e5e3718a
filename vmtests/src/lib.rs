//! VM harness and the guest programs that drive `tracker` on real kernels.
//!
//! Host side: [`vm::Vm`] boots a stock kernel under QEMU and talks to it.
//! Guest side: [`guest`]. README.md tells how to add a case.

pub mod apps;
mod bpf;
pub mod cases;
pub mod control;
pub mod guest;
pub mod image;
pub mod load;
pub mod overhead;
pub mod payload;
pub mod protocol;
pub mod scenarios;
pub mod slot;
pub mod suite;
pub mod vm;
