//! The arena: RAM that survives kexec, here reserved at boot.
//!
//! `memmap=SIZE!ADDRESS` keeps a range out of the kernel's hands; the drivers `nd_e820` and
//! `nd_pmem` offer it as `/dev/pmemN`. The number may change from boot to boot, the physical
//! address does not.

use super::cmdline::{Reservation, reservations};
use super::modules;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Drivers of a reserved range, in the order they are needed.
const DRIVERS: [&str; 2] = ["nd_e820", "nd_pmem"];

/// How long a device may take to appear behind its drivers, which probe asynchronously.
const PROBE: Duration = Duration::from_secs(5);

/// Why there is no arena.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// Nothing was reserved.
    #[error(
        "No memory is reserved for the image; boot once with memmap=SIZE!ADDRESS on the \
         kernel command line (both multiples of 2 MiB, within RAM)"
    )]
    NotReserved,
    /// The kernel command line cannot be read.
    #[error("read /proc/cmdline: {0}; mount /proc")]
    Cmdline(#[source] std::io::Error),
    /// There is no block device for the reservation.
    #[error(
        "No /dev/pmemN for the memory reserved at {0:#x}; are the drivers nd_e820 and nd_pmem \
         there, and are address and size multiples of 2 MiB within RAM?"
    )]
    NoDevice(u64),
}

/// The reserved range of the running kernel and its block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arena {
    /// Where it lies in physical memory.
    pub range: Reservation,
    /// `/dev/pmemN`.
    pub device: PathBuf,
}

impl Arena {
    /// The largest range reserved on the running kernel's command line.
    ///
    /// # Errors
    /// [`ArenaError`].
    pub fn largest() -> Result<Self, ArenaError> {
        let line = fs::read_to_string("/proc/cmdline").map_err(ArenaError::Cmdline)?;
        let ranges = reservations(&line);
        let range = ranges.iter().max_by_key(|range| range.size);
        Self::open(*range.ok_or(ArenaError::NotReserved)?)
    }

    /// The range at `address`, by the running kernel's command line.
    ///
    /// # Errors
    /// [`ArenaError`].
    pub fn at(address: u64) -> Result<Self, ArenaError> {
        let line = fs::read_to_string("/proc/cmdline").map_err(ArenaError::Cmdline)?;
        let mut ranges = reservations(&line).into_iter();
        let range = ranges.find(|range| range.address == address);
        Self::open(range.ok_or(ArenaError::NotReserved)?)
    }

    fn open(range: Reservation) -> Result<Self, ArenaError> {
        let begun = Instant::now();
        let mut asked = false;
        loop {
            if let Some(name) = device_at(Path::new("/sys/block"), range.address) {
                return Ok(Self {
                    range,
                    device: Path::new("/dev").join(name),
                });
            }
            if !asked {
                modules::load(&DRIVERS);
                asked = true;
            } else if begun.elapsed() > PROBE {
                return Err(ArenaError::NoDevice(range.address));
            } else {
                sleep(Duration::from_millis(5));
            }
        }
    }
}

/// Name of the pmem device whose memory begins at `address`.
fn device_at(sys_block: &Path, address: u64) -> Option<String> {
    let names = fs::read_dir(sys_block).ok()?.flatten();
    names
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("pmem"))
        .find(|name| {
            let resource = sys_block.join(name).join("device/resource");
            let text = fs::read_to_string(resource).unwrap_or_default();
            let hex = text.trim().trim_start_matches("0x");
            u64::from_str_radix(hex, 16) == Ok(address)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_found_by_address() {
        let dir = tempfile::tempdir().unwrap();
        for (name, resource) in [("pmem0", "0x80000000\n"), ("pmem1", "0x180000000\n")] {
            fs::create_dir_all(dir.path().join(name).join("device")).unwrap();
            fs::write(dir.path().join(name).join("device/resource"), resource).unwrap();
        }
        fs::create_dir_all(dir.path().join("vda/device")).unwrap();
        assert_eq!(device_at(dir.path(), 0x1_8000_0000), Some("pmem1".into()));
        assert_eq!(device_at(dir.path(), 0x1000), None);
    }
}
