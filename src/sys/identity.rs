//! Who the calling process is to others: ids without the loss of capabilities.

use nix::errno::Errno;
use nix::libc;

/// `SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP` (capabilities(7)): ids leave capabilities alone.
const HANDS_OFF: libc::c_ulong = 0x14;

/// Gives the calling process these ids, real, effective and saved, and keeps its capabilities.
/// By raw calls, which reach the calling thread only: for a forked child, whose C library may
/// believe in threads that it does not have.
///
/// # Errors
/// `EPERM`: needs `CAP_SETPCAP`, `CAP_SETGID` and `CAP_SETUID`.
pub fn assume(uid: u32, gid: u32, groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::prctl(libc::PR_SET_SECUREBITS, HANDS_OFF, 0, 0, 0) })?;
    // SAFETY: the kernel reads as many ids as it is told, which `groups` holds.
    Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: takes integers.
    Errno::result(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}
