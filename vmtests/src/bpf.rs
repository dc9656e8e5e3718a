//! bpf(2), for what is too little for libbpf.

use nix::errno::Errno;

/// A command with the first words of its argument, which the kernel may write to; the rest of
/// it counts as zero.
pub(crate) fn bpf(command: libc::c_int, attr: &mut [u64]) -> nix::Result<libc::c_int> {
    let size = size_of_val(attr);
    // SAFETY: the argument is as long as said; what its addresses name lives as long as the
    // caller's borrow and is as long as said too.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size) };
    Errno::result(result).map(|fd| libc::c_int::try_from(fd).unwrap_or(-1))
}

/// A word of two numbers, the first at the lower address.
pub(crate) fn pair(first: u32, second: u32) -> u64 {
    u64::from(first) | u64::from(second) << 32
}
