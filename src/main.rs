//! The `tracker` command; everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    if tracker::handover::early::called() {
        return tracker::handover::early::main();
    }
    ExitCode::from(tracker::cli::main() as u8)
}
