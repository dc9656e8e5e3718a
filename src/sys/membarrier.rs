//! membarrier(2).

use nix::errno::Errno;

/// `MEMBARRIER_CMD_GLOBAL` (include/uapi/linux/membarrier.h).
const CMD_GLOBAL: libc::c_int = 1;

/// Waits until every CPU has left what it was doing in the kernel without being
/// preempted: the command is a `synchronize_rcu()` (kernel/sched/membarrier.c).
///
/// # Errors
///
/// `ENOSYS` on kernels without it, `EINVAL` with `nohz_full`.
pub fn grace_period() -> Result<(), Errno> {
    // SAFETY: membarrier takes integers only and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, CMD_GLOBAL, 0, 0) };
    Errno::result(result).map(drop)
}
