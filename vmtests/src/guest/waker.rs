//! Has the CPUs wake one another, once a second.
//!
//! QEMU's multi-threaded TCG now and then loses an interrupt of a vCPU that sleeps: its timer
//! never fires, and whatever waits on it stands still ("rcu_preempt kthread timer wakeup didn't
//! happen"). An interrupt by another CPU makes it look again, so each CPU gets one.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::unistd::Pid;

/// Time between two wake-ups of a CPU.
const PERIOD: Duration = Duration::from_secs(1);

/// Starts a thread on each CPU that wakes the next CPU's; they end with the process. A machine
/// with one CPU gets none.
///
/// # Errors
/// If a descriptor cannot be made.
pub fn start() -> nix::Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    if cpus == 1 {
        return Ok(());
    }
    let wake_ups = (0..cpus)
        .map(|_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC).map(Arc::new))
        .collect::<nix::Result<Vec<_>>>()?;
    for (cpu, own) in wake_ups.iter().enumerate() {
        let (own, next) = (Arc::clone(own), Arc::clone(&wake_ups[(cpu + 1) % cpus]));
        std::thread::spawn(move || wake_next(cpu, &own, &next));
    }
    Ok(())
}

fn wake_next(cpu: usize, own: &EventFd, next: &EventFd) {
    let mut only = CpuSet::new();
    let pinned = only
        .set(cpu)
        .and_then(|()| sched_setaffinity(Pid::from_raw(0), &only));
    if pinned.is_err() {
        return;
    }
    let mut fds = [PollFd::new(own.as_fd(), PollFlags::POLLIN)];
    let mut due = Instant::now() + PERIOD;
    loop {
        let left = due.saturating_duration_since(Instant::now());
        let _ = poll(
            &mut fds,
            PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO),
        );
        let _ = own.read();
        if left.is_zero() {
            let _ = next.write(1);
            due = Instant::now() + PERIOD;
        }
    }
}
