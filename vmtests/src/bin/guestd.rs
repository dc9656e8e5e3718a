//! The guest's init and control agent.
//!
//! As PID 1 it mounts what a distribution's init would, brings the network up
//! and obeys the host over a virtio-serial port. It may be started with
//! restored applications already running as its children (after a kexec), so
//! it changes only what is not in place yet and ends no process that it has
//! not started.

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.first().map(String::as_str) {
        Some("kexec") => vmtests::guest::kexec::run(&arguments[1..]),
        _ => vmtests::guest::init::main(),
    }
}
