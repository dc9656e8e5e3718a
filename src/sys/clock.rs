//! Clocks: this kernel's, and the one that goes on through kexec.

use nix::time::{ClockId, clock_gettime};

fn nanoseconds(clock: ClockId) -> u64 {
    // The clocks asked for exist on every Linux and are not negative.
    clock_gettime(clock).map_or(0, |t| {
        t.tv_sec().unsigned_abs() * 1_000_000_000 + t.tv_nsec().unsigned_abs()
    })
}

/// `CLOCK_REALTIME` in nanoseconds.
#[must_use]
pub fn realtime() -> u64 {
    nanoseconds(ClockId::CLOCK_REALTIME)
}

/// `CLOCK_MONOTONIC_RAW` in nanoseconds.
#[must_use]
pub fn monotonic_raw() -> u64 {
    nanoseconds(ClockId::CLOCK_MONOTONIC_RAW)
}

/// Nanoseconds of CPU time of all threads of this process, `CLOCK_PROCESS_CPUTIME_ID`.
#[must_use]
pub fn process_cpu() -> u64 {
    nanoseconds(ClockId::CLOCK_PROCESS_CPUTIME_ID)
}

/// Nanoseconds since this kernel started, `CLOCK_BOOTTIME`.
#[must_use]
pub fn boottime() -> u64 {
    nanoseconds(ClockId::CLOCK_BOOTTIME)
}

/// The CPU's time stamp counter, which kexec does not reset. The next kernel takes its
/// wall clock from the RTC, which knows whole seconds only; this tells the pause exactly.
#[must_use]
pub fn tsc() -> u64 {
    // SAFETY: every x86-64 CPU has the instruction, and Linux lets user space use it.
    unsafe { core::arch::x86_64::_rdtsc() }
}
