//! Registrations for membarrier(2), which a program makes once and relies on ever after.

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[Entry::carried("membarrier_registered", registered)];

// `enum membarrier_cmd` of include/uapi/linux/membarrier.h.
const REGISTER_GLOBAL_EXPEDITED: libc::c_int = 1 << 2;
const PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;
const PRIVATE_EXPEDITED_SYNC_CORE: libc::c_int = 1 << 5;
const PRIVATE_EXPEDITED_RSEQ: libc::c_int = 1 << 7;
const REGISTER_PRIVATE_EXPEDITED_RSEQ: libc::c_int = 1 << 8;
/// Since Linux 6.3.
const GET_REGISTRATIONS: libc::c_int = 1 << 9;

fn membarrier(command: libc::c_int) -> Result<i64, Errno> {
    // SAFETY: membarrier takes integers only and touches no memory of ours.
    Errno::result(unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) })
}

/// What is registered works, with a second thread too; what is not is refused still.
fn registered(case: &Case) -> Result<()> {
    let registrations = [
        REGISTER_PRIVATE_EXPEDITED,
        REGISTER_PRIVATE_EXPEDITED_RSEQ,
        REGISTER_GLOBAL_EXPEDITED,
    ];
    ensure!(
        membarrier(PRIVATE_EXPEDITED) == Err(Errno::EPERM),
        "It is registered without being asked to"
    );
    for command in registrations {
        membarrier(command).with_context(|| format!("Register {command:#x}"))?;
    }
    let told = membarrier(GET_REGISTRATIONS);
    case.ready()?;
    for command in [PRIVATE_EXPEDITED, PRIVATE_EXPEDITED_RSEQ] {
        let done = std::thread::spawn(move || membarrier(command)).join();
        ensure!(
            matches!(done, Ok(Ok(0))),
            "Command {command:#x} ends with {done:?}"
        );
    }
    let other = membarrier(PRIVATE_EXPEDITED_SYNC_CORE);
    ensure!(
        other == Err(Errno::EPERM),
        "What was not registered ends with {other:?}"
    );
    // A kernel that cannot tell may be followed by one that can.
    let now = membarrier(GET_REGISTRATIONS);
    let all = i64::from(registrations.iter().fold(0, |all, command| all | command));
    ensure!(
        now == told || told == Err(Errno::EINVAL) && now == Ok(all),
        "Registrations {told:?} became {now:?}"
    );
    Ok(())
}
