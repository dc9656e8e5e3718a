//! The `tracker` command; everything it does is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(tracker::cli::main() as u8)
}
