//! The clocks an application sees.

use super::error::CheckpointError;
use super::restart::Now;
use crate::model::frozen::Clocks;
use crate::model::ids::Pid;
use nix::time::{ClockId, clock_gettime};

/// Offsets of a time namespace in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offsets {
    monotonic: i64,
    boottime: i64,
}

impl Offsets {
    /// Those a process lives with; none where the kernel has no time namespaces.
    #[must_use]
    pub fn of(pid: Pid) -> Self {
        let text = std::fs::read_to_string(format!("/proc/{pid}/timens_offsets"));
        Self::parse(&text.unwrap_or_default())
    }

    fn parse(text: &str) -> Self {
        let offset = |name: &str| {
            let line = text.lines().find(|line| line.starts_with(name))?;
            let mut numbers = line.split_ascii_whitespace().skip(1);
            let seconds: i64 = numbers.next()?.parse().ok()?;
            let nanos: i64 = numbers.next()?.parse().ok()?;
            Some(seconds * 1_000_000_000 + nanos)
        };
        Self {
            monotonic: offset("monotonic").unwrap_or(0),
            boottime: offset("boottime").unwrap_or(0),
        }
    }
}

/// Reads the clocks: the host's for comparing with kernel timers, the application's for the
/// image.
///
/// # Errors
/// clock_gettime(2) fails.
pub fn read(offsets: Offsets) -> Result<(Now, Clocks), CheckpointError> {
    let clock = |id| -> Result<u64, CheckpointError> {
        let time = clock_gettime(id)
            .map_err(|errno| CheckpointError::io("clock_gettime", "clocks")(errno.into()))?;
        let nanos = time.tv_sec() * 1_000_000_000 + time.tv_nsec();
        Ok(nanos.cast_unsigned())
    };
    let now = Now {
        monotonic: clock(ClockId::CLOCK_MONOTONIC)?,
        boottime: clock(ClockId::CLOCK_BOOTTIME)?,
        realtime: clock(ClockId::CLOCK_REALTIME)?,
        offset: offsets.monotonic,
    };
    let clocks = Clocks {
        monotonic: now.monotonic.saturating_add_signed(offsets.monotonic),
        boottime: now.boottime.saturating_add_signed(offsets.boottime),
        realtime: now.realtime,
    };
    Ok((now, clocks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_parsed() {
        let text = "monotonic           -2         500000000\nboottime             3         7\n";
        let expected = Offsets {
            monotonic: -1_500_000_000,
            boottime: 3_000_000_007,
        };
        assert_eq!(Offsets::parse(text), expected);
        assert_eq!(Offsets::parse(""), Offsets::default());
    }
}
