//! `tracker update`: the next kernel, under running applications.

use crate::error::ExitCode;
use crate::handover::update::{Request, Update, UpdateError};
use clap::Args;
use std::path::PathBuf;
use std::time::Duration;

/// Arguments of `tracker update`.
#[derive(Debug, Args)]
pub struct UpdateArgs {
    /// Kernel image to boot
    #[arg(long, value_name = "VMLINUZ")]
    kernel: PathBuf,
    /// Its initrd
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Words to add to the kernel command line
    #[arg(
        long,
        value_name = "ARGS",
        default_value = "",
        allow_hyphen_values = true
    )]
    append: String,
    /// Roll back rather than have the applications stand still for longer before the kexec
    #[arg(long, value_name = "MS")]
    max_freeze: Option<u64>,
    /// Give up restoring an application after this time and start it afresh
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    restore_deadline: u32,
    /// Check everything and tell what would happen
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Boots the next kernel; returns after a dry run only.
///
/// # Errors
/// Nothing happened, or all of it was undone.
pub fn run(args: &UpdateArgs) -> Result<ExitCode, UpdateError> {
    let update = Update::prepare(&Request {
        kernel: args.kernel.clone(),
        initrd: args.initrd.clone(),
        append: args.append.clone(),
        max_freeze: args.max_freeze.map(Duration::from_millis),
        restore_deadline: args.restore_deadline,
    })?;
    if !args.dry_run {
        match update.run()? {}
    }
    let names = update.applications();
    let range = update.arena().range;
    if args.json {
        let plan = serde_json::json!({
            "applications": names,
            "arena": { "address": range.address, "bytes": range.size },
            "command_line": update.command_line(),
        });
        println!("{plan}");
    } else {
        println!("Applications: {}", names.join(" "));
        println!("Arena: {} MiB at {:#x}", range.size >> 20, range.address);
        println!("Command line: {}", update.command_line());
    }
    Ok(ExitCode::Done)
}
