//! Developer commands: `cargo xtask setup|demo|test|fuzz|vm|vmtest|verifier|bench|overhead`.

mod apt;
mod bench;
mod demo;
mod fuzz;
mod guest_image;
mod overhead;
mod setup;
mod shell;
mod test;
mod verifier;
mod vm;
mod vmtest;

use std::path::{Path, PathBuf};

use clap::{Parser, Subcommand};

/// Developer commands of the tracker workspace.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Measures frozen time and client gaps, against CRIU in the same VM.
    Bench(bench::Arguments),
    /// Measures what tracking costs applications, in instructions.
    Overhead(overhead::Arguments),
    /// Installs what building and testing need; does nothing if all is there.
    Setup(setup::Arguments),
    /// Updates a VM's kernel under redis and memcached with clients connected.
    Demo(demo::Arguments),
    /// Feeds hostile input to what decodes records and images.
    Fuzz(fuzz::Arguments),
    /// Boots a VM with freshly built programs: a shell, or one command.
    Vm(vm::Arguments),
    /// Prints what each kernel makes of the BPF programs.
    Verifier(verifier::Arguments),
    /// Checks and tests everything, in VMs too.
    Test(test::Arguments),
    /// Runs cases and scenarios in VMs.
    Vmtest(vmtest::Arguments),
}

fn main() -> std::process::ExitCode {
    let result = match Arguments::parse().command {
        Task::Setup(arguments) => setup::run(&arguments).map(|()| 0),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Overhead(arguments) => overhead::run(&arguments),
        Task::Demo(arguments) => demo::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Test(arguments) => test::run(&arguments),
        Task::Verifier(arguments) => verifier::run(&arguments),
        Task::Vm(arguments) => vm::run(&arguments),
        Task::Vmtest(arguments) => vmtest::run(&arguments),
    };
    match result {
        Ok(code) => std::process::ExitCode::from(code),
        Err(error) => {
            eprintln!("Error: {error:#}");
            std::process::ExitCode::FAILURE
        }
    }
}

/// The repository's root.
fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map(Path::to_path_buf)
        .unwrap_or_default()
}

/// The path of a tool, if it is installed.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    let admin = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(admin)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}
