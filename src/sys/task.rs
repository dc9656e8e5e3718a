//! What system calls tell about other tasks, and ending this one.

use super::process::CallError;
use crate::model::ids::Tid;
use nix::libc;

/// CPUs a thread may run on (sched_getaffinity(2)): bit = CPU, little-endian, without
/// zero bytes at the end.
///
/// # Errors
/// `ESRCH`: it is gone.
pub fn affinity(tid: Tid) -> Result<Vec<u8>, CallError> {
    let mut mask = [0_u8; 1024];
    // SAFETY: the kernel writes at most `mask.len()` bytes to it.
    let len = unsafe {
        libc::syscall(
            libc::SYS_sched_getaffinity,
            tid.0,
            mask.len(),
            mask.as_mut_ptr(),
        )
    };
    let Ok(len) = usize::try_from(len) else {
        return Err(CallError::last("sched_getaffinity", tid.0));
    };
    let used = mask[..len]
        .iter()
        .rposition(|b| *b != 0)
        .map_or(0, |at| at + 1);
    Ok(mask[..used].to_vec())
}

/// Ends this process at once: no destructor, no exit handler. For a forked child, whose
/// copies of its parent's objects must not be cleaned up twice.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: does not return.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_may_run_somewhere() {
        assert!(!affinity(Tid(0)).unwrap().is_empty());
    }
}
