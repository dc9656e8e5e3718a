//! `cargo xtask bench`: checkpoints by tracker and by CRIU, in turns in one VM; or by tracker alone,
//! on this machine.

use anyhow::Result;
use clap::Args;
use vmtests::apps;
use vmtests::image::Kernel;
use vmtests::vm::Vm;

use self::tools::Tool;
use crate::setup;

mod here;
mod objects;
mod redis;
mod tools;

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct Arguments {
    /// The kernel: 6.1 or 6.12
    #[arg(long, default_value = "6.12")]
    kernel: Kernel,
    /// How many times each tool has its turn
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Instead of redis under load, programs with few and with many objects of one kind: those
    /// whose row, e.g. "10000 eventfds", contains TEXT
    #[arg(long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "")]
    objects: Option<String>,
    /// Under this machine's own kernel, without CRIU: how much longer programs stand still that
    /// have many objects of one kind, of those whose kind contains TEXT
    #[arg(long, value_name = "TEXT", num_args = 0..=1, default_missing_value = "")]
    #[arg(conflicts_with_all = ["objects", "kernel", "only", "json"])]
    here: Option<String>,
    /// Connections to redis
    #[arg(long, default_value_t = 50)]
    clients: usize,
    /// Megabytes of data in redis
    #[arg(long, value_name = "MB", default_value_t = 200)]
    data: usize,
    /// Programs beside redis that do nothing but keep a CPU busy each
    #[arg(long, value_name = "N", default_value_t = 0)]
    busy: usize,
    /// Only this tool
    #[arg(long, value_enum)]
    only: Option<Tool>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Arguments {
    /// The agent runs beside tracker, as it does in production, and has iterators to lend.
    fn start_agent(&self, vm: &Vm) -> Result<()> {
        if !self.wants(Tool::Tracker) {
            return Ok(());
        }
        apps::start_agent(vm)?;
        apps::await_spare(vm)
    }

    fn wants(&self, tool: Tool) -> bool {
        self.only.is_none_or(|only| only == tool)
    }
}

/// Returns the exit code.
pub fn run(arguments: &Arguments) -> Result<u8> {
    if let Some(wanted) = &arguments.here {
        here::run(arguments, wanted)?;
        return Ok(0);
    }
    setup::for_vm()?;
    match &arguments.objects {
        Some(wanted) => objects::run(arguments, wanted)?,
        None => redis::run(arguments)?,
    }
    Ok(0)
}

/// The middle of the values, the upper of two.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
