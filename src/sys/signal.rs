//! Signal dispositions of this process.

use nix::sys::signal::{SigHandler, Signal, signal};

/// Undoes what the Rust runtime did at start: `SIGPIPE` ends a program again.
/// For a process about to execute somebody else's program.
pub fn restore_sigpipe() {
    // SAFETY: SIG_DFL runs no code of ours; SIGPIPE can always be set.
    let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
}
