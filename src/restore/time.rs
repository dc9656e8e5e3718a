//! Clocks that go on: a time namespace whose offsets continue the saved clocks.

use super::RestoreError;
use crate::model::frozen::Clocks;
use crate::sys::process::unshare_time;
use nix::time::{ClockId, clock_gettime};

/// The application's clocks as they run in the restored tree.
#[derive(Clone, Copy, Debug)]
pub struct RestoredClocks {
    /// Nanoseconds to add to the host's `CLOCK_MONOTONIC`.
    monotonic_offset: i128,
    /// The application's `CLOCK_MONOTONIC` when it was frozen.
    saved: u64,
}

impl RestoredClocks {
    /// Puts all children made from now on into a time namespace in which `CLOCK_MONOTONIC` and
    /// `CLOCK_BOOTTIME` go on from `saved`.
    ///
    /// # Errors
    /// The kernel has no time namespaces or the capability is missing.
    pub fn start(saved: &Clocks) -> Result<Self, RestoreError> {
        unshare_time()?;
        let monotonic_offset = i128::from(saved.monotonic) - now(ClockId::CLOCK_MONOTONIC)?;
        let boottime_offset = i128::from(saved.boottime) - now(ClockId::CLOCK_BOOTTIME)?;
        let text = offsets_text(monotonic_offset, boottime_offset);
        std::fs::write("/proc/self/timens_offsets", text)
            .map_err(RestoreError::io("write /proc/self/timens_offsets"))?;
        Ok(Self {
            monotonic_offset,
            saved: saved.monotonic,
        })
    }

    /// The application's `CLOCK_MONOTONIC` now, in nanoseconds.
    ///
    /// # Errors
    /// The clock cannot be read.
    pub fn now(&self) -> Result<u64, RestoreError> {
        let now = now(ClockId::CLOCK_MONOTONIC)? + self.monotonic_offset;
        Ok(u64::try_from(now).unwrap_or(0))
    }

    /// Nanoseconds since the application was frozen, by its own clock.
    ///
    /// # Errors
    /// The clock cannot be read.
    pub fn elapsed(&self) -> Result<u64, RestoreError> {
        Ok(self.now()?.saturating_sub(self.saved))
    }
}

fn now(clock: ClockId) -> Result<i128, RestoreError> {
    let time = clock_gettime(clock).map_err(RestoreError::system("clock_gettime"))?;
    Ok(i128::from(time.tv_sec()) * NANOS + i128::from(time.tv_nsec()))
}

const NANOS: i128 = 1_000_000_000;

/// The nanosecond field must lie in 0..=999999999 (time_namespaces(7)); seconds may be negative.
fn offsets_text(monotonic: i128, boottime: i128) -> String {
    let line = |clock, offset: i128| {
        let (seconds, nanos) = (offset.div_euclid(NANOS), offset.rem_euclid(NANOS));
        format!("{clock} {seconds} {nanos}\n")
    };
    line("monotonic", monotonic) + &line("boottime", boottime)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_offset_keeps_its_nanoseconds_positive() {
        assert_eq!(
            offsets_text(-1, 2_500_000_000),
            "monotonic -1 999999999\nboottime 2 500000000\n"
        );
    }
}
