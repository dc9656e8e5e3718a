//! At most two VMs run at a time on one machine, whoever starts them.

use std::fs::File;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The right to run a VM, given back on drop.
#[derive(Debug)]
pub struct Slot {
    _lock: Flock<File>,
}

const SLOTS: u32 = 2;

impl Slot {
    /// Waits for a slot; says so on stderr if none is free.
    ///
    /// # Errors
    /// If the lock files cannot be opened.
    pub fn take() -> Result<Slot> {
        let mut waiting = false;
        loop {
            for number in 1..=SLOTS {
                let path = std::env::temp_dir().join(format!("vm-slot.{number}"));
                let file = File::options()
                    .create(true)
                    .truncate(false)
                    .write(true)
                    .open(&path);
                let file = file.with_context(|| format!("Open {}", path.display()))?;
                match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                    Ok(lock) => return Ok(Slot { _lock: lock }),
                    Err((_, Errno::EWOULDBLOCK)) => {}
                    Err((_, error)) => {
                        return Err(error).context(format!("Lock {}", path.display()));
                    }
                }
            }
            if !waiting {
                eprintln!("waiting: {SLOTS} VMs run already");
                waiting = true;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }
}
