//! Attributes that few programs have: NUMA policies and some of prctl(2), which are carried, and
//! those that are not.

use super::eligibility::blocker;
use crate::bpf::events::{
    MmRec, MmUnusual, PolicyRec, ProcessFlag, ProcessRec, ThreadFlag, ThreadRec, ThreadUnusual,
};
use crate::bpf::iter::Tasks;
use crate::model::frozen::{Blocker, MemoryPolicy, Ptracer};
use crate::model::ids::Tid;
use nix::libc;
use std::collections::HashMap;
use std::fs;

/// What speaks against a checkpoint of a thread, and why.
const OF_THREADS: [(u32, &str, &str); 14] = [
    (
        ThreadUnusual::IO_PORTS,
        "rights to I/O ports",
        "what ioperm(2) and iopl(2) gave is not carried",
    ),
    (
        ThreadUnusual::TLS_SEGMENTS,
        "TLS segments",
        "what set_thread_area(2) set is not carried yet",
    ),
    (
        ThreadUnusual::BREAKPOINTS,
        "hardware breakpoints",
        "remove the debugger that set them",
    ),
    (
        ThreadUnusual::CORE_COOKIE,
        "core scheduling cookie",
        "PR_SCHED_CORE is not carried yet",
    ),
    (
        ThreadUnusual::USER_DISPATCH,
        "system calls dispatched to user space",
        "PR_SET_SYSCALL_USER_DISPATCH is not carried yet",
    ),
    (
        ThreadUnusual::NO_TSC,
        "time stamp counter that faults",
        "PR_SET_TSC is not carried yet",
    ),
    (
        ThreadUnusual::NO_CPUID,
        "CPUID that faults",
        "ARCH_SET_CPUID is not carried yet",
    ),
    (
        ThreadUnusual::SHADOW_STACK,
        "shadow stack",
        "ARCH_SHSTK_ENABLE is not carried yet",
    ),
    (
        ThreadUnusual::TILES,
        "AMX tiles",
        "what ARCH_REQ_XCOMP_PERM gave is not carried yet",
    ),
    (
        ThreadUnusual::LANDLOCK,
        "Landlock domain",
        "its rules cannot be read, and the restored program would be without them",
    ),
    (
        ThreadUnusual::SPECULATION,
        "speculation control",
        "PR_SET_SPECULATION_CTRL is not carried yet",
    ),
    (
        ThreadUnusual::FAR_NODES,
        "NUMA policy",
        "policies with nodes from 64 on are not carried yet",
    ),
    (
        ThreadUnusual::OWN_KEYRING,
        "keyring of a thread or process",
        "keys end with their kernel",
    ),
    (
        ThreadUnusual::SESSION_KEYS,
        "keys in the session keyring",
        "keys end with their kernel",
    ),
];

/// The same of an address space.
const OF_MEMORY: [(u32, &str, &str); 3] = [
    (
        MmUnusual::LDT,
        "local descriptor table",
        "what modify_ldt(2) set is not carried",
    ),
    (
        MmUnusual::TAGS,
        "tagged addresses",
        "ARCH_ENABLE_TAGGED_ADDR is not carried yet",
    ),
    (
        MmUnusual::PKEYS,
        "memory protection keys",
        "keys of pkey_alloc(2) beside memory that can only be executed are not carried yet",
    ),
];

/// Attributes that are not carried.
#[must_use]
pub fn blockers(tasks: &Tasks) -> Vec<Blocker> {
    let threads = tasks.threads.iter().filter(|thread| !thread.is_zombie());
    let of_threads = threads.flat_map(|thread| {
        let has = move |bit: u32| thread.unusual & bit != 0;
        let had = OF_THREADS.iter().filter(move |(bit, ..)| has(*bit));
        had.map(|(_, what, why)| {
            let object = format!("{what} of thread {}", thread.tid);
            blocker(thread.tgid, &object, why)
        })
    });
    let of_memory = tasks.mms.iter().flat_map(|mm| {
        let had = OF_MEMORY.iter().filter(|(bit, ..)| mm.unusual & bit != 0);
        had.map(|(_, what, why)| blocker(mm.tgid, what, why))
    });
    of_threads.chain(of_memory).collect()
}

/// Labels of mandatory access control that say nothing: those of AppArmor without a profile, of
/// SELinux without a policy, and of Smack's floor.
const FREE: [&str; 4] = ["", "unconfined", "kernel", "_"];

/// Threads that a security module confines. A restored one would not be: in early boot there is
/// no policy yet.
#[must_use]
pub fn confined(tasks: &Tasks) -> Vec<Blocker> {
    let threads = || tasks.threads.iter().filter(|thread| !thread.is_zombie());
    let leaders = threads().filter(|thread| thread.tid == thread.tgid);
    let shared: HashMap<u32, u64> = leaders.map(|leader| (leader.tgid, leader.cred)).collect();
    // The label is a part of the credentials, which most threads share.
    let own = |thread: &&ThreadRec| {
        thread.tid == thread.tgid || shared.get(&thread.tgid) != Some(&thread.cred)
    };
    let labelled = threads().filter(own).filter_map(|thread| {
        let path = format!("/proc/{}/task/{}/attr/current", thread.tgid, thread.tid);
        // Without such a module it cannot be read, nor if the thread has ended meanwhile.
        let label = fs::read(path).unwrap_or_default();
        let label = String::from_utf8_lossy(&label);
        let label = label.trim_end_matches(['\0', '\n']);
        (!FREE.contains(&label)).then(|| {
            blocker(
                thread.tgid,
                &format!("thread {} confined as {label}", thread.tid),
                "a restored one would not be: AppArmor, SELinux and Smack are not carried",
            )
        })
    });
    labelled.collect()
}

/// A NUMA policy as the calls take it that set it.
#[must_use]
pub fn policy(rec: &PolicyRec) -> Option<MemoryPolicy> {
    /// `MPOL_MODE_FLAGS` (include/uapi/linux/mempolicy.h): those of user space.
    const MODE_FLAGS: u16 = 0xe000;
    (rec.set != 0).then(|| MemoryPolicy {
        mode: (rec.mode | rec.flags & MODE_FLAGS).into(),
        nodes: rec.nodes,
        home: u16::try_from(rec.home_node).ok(),
    })
}

/// What goes with the policy of a thread: `SCHED_RESET_ON_FORK`.
#[must_use]
pub fn policy_flags(rec: &ThreadRec) -> u32 {
    match rec.flags & ThreadFlag::RESET_ON_FORK {
        0 => 0,
        _ => libc::SCHED_RESET_ON_FORK.cast_unsigned(),
    }
}

/// `PR_SET_PTRACER`. One who is outside the application cannot be told apart from whoever has
/// its TID later: it loses its right, as when it had ended.
#[must_use]
pub fn ptracer(rec: &ProcessRec, threads: &[ThreadRec]) -> Option<Ptracer> {
    let ours = |tid: i32| {
        threads
            .iter()
            .any(|thread| thread.tid == tid.cast_unsigned())
    };
    match rec.ptracer {
        0 => None,
        -1 => Some(Ptracer::Any),
        tid => ours(tid).then_some(Ptracer::Thread(Tid(tid))),
    }
}

/// The nice value of a session in scheduling, of who leads it.
#[must_use]
pub fn autogroup_nice(rec: &ProcessRec) -> i8 {
    match rec.flags & ProcessFlag::SESSION_LEADER {
        0 => 0,
        _ => i8::try_from(rec.autogroup_nice).unwrap_or(0),
    }
}

/// `PR_SET_IO_FLUSHER`. Of the two flags that it sets, the kernel sets the other for a while, too.
#[must_use]
pub fn is_io_flusher(rec: &ThreadRec) -> bool {
    const PF_LOCAL_THROTTLE: u32 = 0x0010_0000;
    rec.task_flags & PF_LOCAL_THROTTLE != 0
}

/// `PR_MCE_KILL`.
#[must_use]
pub fn mce_kill_early(rec: &ThreadRec) -> Option<bool> {
    const PF_MCE_PROCESS: u32 = 0x80;
    const PF_MCE_EARLY: u32 = 0x0800_0000;
    (rec.task_flags & PF_MCE_PROCESS != 0).then_some(rec.task_flags & PF_MCE_EARLY != 0)
}

/// `PR_MDWE_*` from `MMF_HAS_MDWE` and `MMF_HAS_MDWE_NO_INHERIT` (since 6.3 and 6.6).
#[must_use]
pub fn mdwe(rec: &MmRec) -> u32 {
    u32::try_from(rec.flags >> 28 & 3).unwrap_or(0)
}

/// `PR_SET_MEMORY_MERGE` from `MMF_VM_MERGE_ANY` (where it is since 6.6).
#[must_use]
pub fn merges_any(rec: &MmRec) -> bool {
    rec.flags & 1 << 30 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_carried_is_named() {
        let thread = |unusual| ThreadRec {
            tid: 6,
            tgid: 5,
            unusual,
            ..ThreadRec::default()
        };
        let all = OF_THREADS.iter().fold(0, |all, (bit, ..)| all | bit);
        let tasks = Tasks {
            threads: vec![thread(0), thread(all)],
            mms: vec![MmRec {
                unusual: MmUnusual::PKEYS,
                ..MmRec::default()
            }],
            ..Tasks::default()
        };
        let found = blockers(&tasks);
        assert_eq!(found.len(), OF_THREADS.len() + 1);
        assert_eq!(found[0].object, "rights to I/O ports of thread 6");
        assert_eq!(found[OF_THREADS.len()].object, "memory protection keys");
    }

    #[test]
    fn a_policy_is_without_the_flags_of_the_kernel() {
        let rec = PolicyRec {
            set: 1,
            mode: 3,
            flags: 0x8000 | 1 << 3,
            home_node: -1,
            nodes: 5,
        };
        let expected = MemoryPolicy {
            mode: 0x8003,
            nodes: 5,
            home: None,
        };
        assert_eq!(policy(&rec), Some(expected));
        assert_eq!(policy(&PolicyRec::default()), None);
    }

    #[test]
    fn flags_of_tasks_are_told_apart() {
        let of = |task_flags| ThreadRec {
            task_flags,
            ..ThreadRec::default()
        };
        assert_eq!(mce_kill_early(&of(0x0800_0000)), None);
        assert_eq!(mce_kill_early(&of(0x80)), Some(false));
        assert_eq!(mce_kill_early(&of(0x0800_0080)), Some(true));
        assert!(is_io_flusher(&of(0x0018_0000)) && !is_io_flusher(&of(0x0008_0000)));
    }

    #[test]
    fn only_a_tracer_of_the_application_is_carried() {
        let threads = [5, 7].map(|tid| ThreadRec {
            tid,
            ..ThreadRec::default()
        });
        let named = |ptracer| {
            let rec = ProcessRec {
                ptracer,
                ..ProcessRec::default()
            };
            super::ptracer(&rec, &threads)
        };
        assert_eq!(named(0), None);
        assert_eq!(named(-1), Some(Ptracer::Any));
        assert_eq!(named(7), Some(Ptracer::Thread(Tid(7))));
        assert_eq!(named(6), None);
    }

    #[test]
    fn only_who_leads_a_session_speaks_for_it() {
        let of = |flags| ProcessRec {
            flags,
            autogroup_nice: -3,
            ..ProcessRec::default()
        };
        assert_eq!(autogroup_nice(&of(ProcessFlag::SESSION_LEADER)), -3);
        assert_eq!(autogroup_nice(&of(0)), 0);
    }
}
