//! Threads: cloned by their leader, then each sets up what the kernel keeps per thread.

use super::RestoreError;
use super::creds::{self, Rights, option};
use super::memory::{ROBUST_LIST_HEAD_LEN, nodes};
use super::signals::{self, number, words_to};
use super::tape::{Expect, Script, Tape};
use crate::model::frozen::{Process, Ptracer, Scheduling, SeccompFilter, Thread};
use nix::libc;

/// Everything that threads of one process share, and one identity for System V semaphores.
const CLONE_FLAGS: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_PTRACE
    | libc::CLONE_SYSVSEM;

/// The calls of the leader that create all other threads, with their TIDs. A new thread stops
/// under its tracer before its first instruction.
///
/// # Errors
/// The tape has no room for the data.
pub fn clone_all(tape: &mut Tape, process: &Process) -> Result<Script, RestoreError> {
    let mut script = Script::default();
    for thread in process.threads.iter().skip(1) {
        let mut flags = option(CLONE_FLAGS);
        if thread.clear_child_tid != 0 {
            flags |= option(libc::CLONE_CHILD_CLEARTID);
        }
        let tid = tape
            .data(&thread.tid.0.to_le_bytes())
            .ok_or(RestoreError::NoRoom)?;
        // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack,
        // stack_size, tls, set_tid, set_tid_size, cgroup.
        let args = [flags, 0, thread.clear_child_tid, 0, 0, 0, 0, 0, tid, 1, 0];
        let addr = words_to(tape, &args)?;
        let expect = Expect::Is(thread.tid.0.into());
        script.add(libc::SYS_clone3, &[addr, size_of_val(&args) as u64], expect);
    }
    Ok(script)
}

/// The call that installs a filter of system calls.
///
/// # Errors
/// The tape has no room for the program.
pub fn filter(
    script: &mut Script,
    tape: &mut Tape,
    filter: &SeccompFilter,
) -> Result<(), RestoreError> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    let program = tape.data(&filter.program).ok_or(RestoreError::NoRoom)?;
    // struct sock_fprog: the length is of 16 bits, and padded.
    let length = (filter.program.len() / INSTRUCTION) as u64;
    let described = words_to(tape, &[length, program])?;
    let flags = if filter.log {
        libc::SECCOMP_FILTER_FLAG_LOG
    } else {
        0
    };
    let args = [libc::SECCOMP_SET_MODE_FILTER.into(), flags, described];
    script.zero(libc::SYS_seccomp, &args);
    Ok(())
}

/// The calls of one thread itself. Credentials come last of what needs rights.
///
/// # Errors
/// The tape has no room for the data.
pub fn settle(
    script: &mut Script,
    tape: &mut Tape,
    process: &Process,
    thread: &Thread,
    rights: Rights,
) -> Result<(), RestoreError> {
    let leader = thread.tid == process.pid.leader();
    let mut comm = thread.comm.clone();
    comm.push(0);
    let comm = tape.data(&comm).ok_or(RestoreError::NoRoom)?;
    script.zero(libc::SYS_prctl, &[option(libc::PR_SET_NAME), comm]);
    if leader {
        let args = [thread.clear_child_tid];
        script.add(libc::SYS_set_tid_address, &args, Expect::Ok);
        if let Some(ptracer) = process.ptracer {
            let tracer = match ptracer {
                Ptracer::Any => u64::MAX,
                Ptracer::Thread(tid) => number(tid.0),
            };
            // Where Yama is not in use, nobody needs its leave.
            let args = [option(libc::PR_SET_PTRACER), tracer];
            script.add(libc::SYS_prctl, &args, Expect::Anything);
        }
    }
    if thread.robust_list.0 != 0 {
        let args = [thread.robust_list.0, ROBUST_LIST_HEAD_LEN];
        script.zero(libc::SYS_set_robust_list, &args);
    }
    const SS_ONSTACK: u32 = 1;
    const SS_DISABLE: u32 = 2;
    let stack = &thread.altstack;
    if stack.size > 0 && stack.flags & SS_DISABLE == 0 {
        let flags = u64::from(stack.flags & !SS_ONSTACK);
        let addr = words_to(tape, &[stack.sp, flags, stack.size])?;
        script.zero(libc::SYS_sigaltstack, &[addr, 0]);
    }
    if let Some(rseq) = thread.rseq {
        script.zero(
            libc::SYS_rseq,
            &[rseq.addr, rseq.len.into(), 0, rseq.sig.into()],
        );
    }
    schedule(script, tape, &thread.sched)?;
    if thread.timer_slack > 0 {
        let args = [option(libc::PR_SET_TIMERSLACK), thread.timer_slack];
        script.zero(libc::SYS_prctl, &args);
    }
    if thread.ioprio > 0 {
        const WHO_PROCESS: u64 = 1;
        let args = [WHO_PROCESS, 0, thread.ioprio.into()];
        script.zero(libc::SYS_ioprio_set, &args);
    }
    if let Some(policy) = &thread.policy {
        let (nodes, bits) = nodes(tape, policy)?;
        let args = [policy.mode.into(), nodes, bits];
        script.zero(libc::SYS_set_mempolicy, &args);
    }
    if thread.io_flusher {
        // Of include/uapi/linux/prctl.h.
        const PR_SET_IO_FLUSHER: u64 = 57;
        let args = [PR_SET_IO_FLUSHER, 1, 0, 0, 0];
        script.zero(libc::SYS_prctl, &args);
    }
    if let Some(early) = thread.mce_kill_early {
        let set = option(libc::PR_MCE_KILL_SET);
        let args = [option(libc::PR_MCE_KILL), set, early.into(), 0, 0];
        script.zero(libc::SYS_prctl, &args);
    }
    creds::restore(script, tape, &thread.creds, rights)?;
    // Changing ids clears it. The restorer set one too: it would kill the tree when it leaves.
    let pdeathsig = if process.parent.is_some() {
        thread.pdeathsig
    } else {
        0
    };
    let args = [option(libc::PR_SET_PDEATHSIG), number(pdeathsig)];
    script.zero(libc::SYS_prctl, &args);
    signals::queue(script, tape, process, Some(thread.tid), &thread.pending)
}

fn schedule(script: &mut Script, tape: &mut Tape, sched: &Scheduling) -> Result<(), RestoreError> {
    if !sched.affinity.is_empty() {
        let mut mask = sched.affinity.clone();
        mask.resize(mask.len().next_multiple_of(8), 0);
        let addr = tape.data(&mask).ok_or(RestoreError::NoRoom)?;
        let args = [0, mask.len() as u64, addr];
        script.add(libc::SYS_sched_setaffinity, &args, Expect::Ok);
    }
    const RESET_ON_FORK: u32 = libc::SCHED_RESET_ON_FORK.cast_unsigned();
    // struct sched_attr, first version: size, policy, flags, nice, priority, 3 deadline words, of
    // which the first is the slice of other policies.
    let mut attr = Vec::with_capacity(48);
    attr.extend(48_u32.to_le_bytes());
    attr.extend((sched.policy & !RESET_ON_FORK).to_le_bytes());
    attr.extend(u64::from(sched.policy & RESET_ON_FORK != 0).to_le_bytes());
    attr.extend(sched.nice.to_le_bytes());
    attr.extend(sched.priority.to_le_bytes());
    attr.extend(sched.slice.to_le_bytes());
    attr.resize(48, 0);
    let addr = tape.data(&attr).ok_or(RestoreError::NoRoom)?;
    script.zero(libc::SYS_sched_setattr, &[0, addr, 0]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::{Pid, Tid};

    #[test]
    fn the_leader_is_not_cloned() {
        let mut process = Process {
            pid: Pid(40),
            ..Process::default()
        };
        process.threads = [40, 41, 43]
            .map(|tid| Thread {
                tid: Tid(tid),
                ..Thread::default()
            })
            .to_vec();
        let mut tape = Tape::new(0x2900_0000_0000).unwrap();
        let script = clone_all(&mut tape, &process).unwrap();
        let expected: Vec<_> = script.calls.iter().map(|c| c.expect).collect();
        assert_eq!(expected, [Expect::Is(41), Expect::Is(43)]);
    }
}
