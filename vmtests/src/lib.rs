//! VM harness and the guest programs that drive `tracker` on real kernels.
