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

/// `_LINUX_CAPABILITY_VERSION_3` (capget(2)): sets of two words.
const VERSION: u32 = 0x2008_0522;

/// `struct __user_cap_header_struct`.
#[repr(C)]
struct CapHeader {
    version: u32,
    pid: i32,
}

/// Both `struct __user_cap_data_struct`: effective, permitted, inheritable of each word.
type CapData = [[u32; 3]; 2];

/// Runs `act` while a capability of the calling thread is not effective.
///
/// # Errors
/// As capget(2) and capset(2).
pub fn without_capability<T>(capability: u32, act: impl FnOnce() -> T) -> Result<T, Errno> {
    let mut header = CapHeader {
        version: VERSION,
        pid: 0,
    };
    let mut held = CapData::default();
    // SAFETY: the kernel writes the two words of sets that this version has.
    let read = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, &raw mut held) };
    Errno::result(read)?;
    let mut set = |data: &CapData| {
        // SAFETY: the kernel reads as many words as above.
        let set = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, &raw const *data) };
        Errno::result(set).map(drop)
    };
    let mut less = held;
    if let Some([effective, ..]) = less.get_mut(usize::from(capability >= 32)) {
        *effective &= !(1 << (capability % 32));
    }
    set(&less)?;
    let result = act();
    set(&held)?;
    Ok(result)
}
