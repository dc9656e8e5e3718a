//! The generated skeletons, one module per BPF object.

macro_rules! skeleton {
    ($name:ident, $file:literal) => {
        #[allow(
            missing_docs,
            dead_code,
            unsafe_op_in_unsafe_fn,
            clippy::all,
            clippy::pedantic,
            clippy::undocumented_unsafe_blocks
        )]
        pub(super) mod $name {
            include!(concat!(env!("OUT_DIR"), "/", $file, ".skel.rs"));
        }
    };
}

skeleton!(accept, "accept");
skeleton!(iter, "iter");
skeleton!(netlock, "netlock");
skeleton!(probe, "probe");
skeleton!(track, "track");
