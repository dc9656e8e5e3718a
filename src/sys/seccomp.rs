//! Filters of another task's system calls, as its tracer reads them (ptrace(2)).

use super::process::CallError;
use super::ptrace::{number, request};
use crate::model::frozen::SeccompFilter;
use crate::model::ids::Tid;
use nix::errno::Errno;
use nix::libc;
use std::ptr::null_mut;

/// Not in libc: include/uapi/linux/ptrace.h.
const PTRACE_SECCOMP_GET_FILTER: libc::c_uint = 0x420c;
const PTRACE_SECCOMP_GET_METADATA: libc::c_uint = 0x420d;

/// `struct seccomp_metadata`.
#[repr(C)]
struct Metadata {
    index: u64,
    flags: u64,
}

/// Bytes of a `struct sock_filter`.
const INSTRUCTION: usize = size_of::<libc::sock_filter>();

/// All filters of a stopped tracee, in the order they were installed in (get_nth_filter() of
/// kernel/seccomp.c).
///
/// # Errors
/// `EACCES`: needs `CAP_SYS_ADMIN`, and no filters of one's own. `EMEDIUMTYPE`: a filter that was
/// not installed as a classic program.
pub fn filters(tid: Tid) -> Result<Vec<SeccompFilter>, CallError> {
    let mut all = Vec::new();
    loop {
        match filter(tid, all.len()) {
            Ok(filter) => all.push(filter),
            Err(error) if error.errno == Errno::ENOENT => return Ok(all),
            Err(error) => return Err(error),
        }
    }
}

fn filter(tid: Tid, index: usize) -> Result<SeccompFilter, CallError> {
    const GET_FILTER: &str = "ptrace(SECCOMP_GET_FILTER)";
    let get = |to| {
        request(
            GET_FILTER,
            PTRACE_SECCOMP_GET_FILTER,
            tid,
            number(index),
            to,
        )
    };
    // Without room for it the kernel tells its length, in instructions.
    let length = usize::try_from(get(null_mut())?).unwrap_or(0);
    let mut program = vec![0_u8; length * INSTRUCTION];
    get(program.as_mut_ptr().cast())?;
    let mut metadata = Metadata {
        index: index as u64,
        flags: 0,
    };
    request(
        "ptrace(SECCOMP_GET_METADATA)",
        PTRACE_SECCOMP_GET_METADATA,
        tid,
        number(size_of::<Metadata>()),
        (&raw mut metadata).cast(),
    )?;
    Ok(SeccompFilter {
        program: program.into(),
        // All that the kernel tells of a filter besides its program.
        log: metadata.flags & libc::SECCOMP_FILTER_FLAG_LOG != 0,
    })
}
