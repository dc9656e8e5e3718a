//! What keeps an application from being checkpointed, found before anything is touched.

use super::error::CheckpointError;
use super::freeze::longer;
use super::tasks::{SIGNAL_STOP_STOPPED, parents_first};
use super::view::View;
use super::{
    aio, attributes, cgroups, files, message_queues, mm, names, namespaces, semaphores, sysv,
    timers, uring,
};
use crate::bpf::events::{FileKind, ProcessRec, RestartKind, ThreadFlag, ThreadRec, VmaRec};
use crate::bpf::iter::{Iterators, Scope, Tasks};
use crate::model::frozen::{Blocker, Process};
use crate::model::ids::{Fd, FilesId, FsId, Pid};
use crate::model::plan;
use crate::sys::cgroup::Cgroup;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// Inode numbers of the namespaces tracker itself is in: those an application must share,
/// the time namespace excepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    user: u32,
    mnt: u32,
    uts: u32,
    ipc: u32,
    net: u32,
    pid: u32,
    cgroup: u32,
}

impl Namespaces {
    /// Those of this process.
    #[must_use]
    pub fn ours() -> Self {
        let inode = |name: &str| {
            let link = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap_or_default();
            let text = link.to_string_lossy();
            let number = text.split_once('[').map_or("", |(_, rest)| rest);
            number.trim_end_matches(']').parse().unwrap_or(0)
        };
        Self {
            user: inode("user"),
            mnt: inode("mnt"),
            uts: inode("uts"),
            ipc: inode("ipc"),
            net: inode("net"),
            pid: inode("pid"),
            cgroup: inode("cgroup"),
        }
    }

    /// Whether this process sees the mounts that a task sees.
    pub(super) fn has_mounts_of(&self, rec: &ThreadRec) -> bool {
        self.mnt == rec.mnt_ns
    }

    /// Whether this process and a task know the machine by the same names.
    pub(super) fn has_uts_of(&self, rec: &ThreadRec) -> bool {
        self.uts == rec.uts_ns
    }

    /// Of the kinds that are not carried.
    fn others(&self, rec: &ThreadRec) -> Vec<&'static str> {
        let pairs = [
            ("user", self.user, rec.user_ns),
            ("IPC", self.ipc, rec.ipc_ns),
            ("network", self.net, rec.net_ns),
            ("PID", self.pid, rec.pid_ns),
            ("cgroup", self.cgroup, rec.cgroup_ns),
        ];
        let differ = pairs.iter().filter(|(_, ours, theirs)| ours != theirs);
        differ.map(|(name, ..)| *name).collect()
    }
}

/// How often the running application is looked at for objects that are not carried: those that
/// it holds for a moment only, as a program that reads a file of /proc does, block nothing.
const LOOKS: u32 = 12;

/// What of a running application cannot be carried.
///
/// # Errors
/// The iterators or the cgroup cannot be read.
pub fn survey(
    iterators: &mut Iterators,
    cgroup: &Cgroup,
    ours: &Namespaces,
) -> Result<Vec<Blocker>, CheckpointError> {
    let mut found = look(iterators, cgroup, ours)?;
    for round in 1..LOOKS {
        if found.is_empty() {
            break;
        }
        // An eighth of a second in all.
        std::thread::sleep(longer(round));
        let still = look(iterators, cgroup, ours)?;
        found.retain(|blocker| still.contains(blocker));
    }
    Ok(found)
}

fn look(
    iterators: &mut Iterators,
    cgroup: &Cgroup,
    ours: &Namespaces,
) -> Result<Vec<Blocker>, CheckpointError> {
    let scope = Scope::Cgroup(cgroup.id());
    let mut tasks = iterators.tasks(scope)?;
    let waiting = uring::waiting(&tasks);
    uring::leave_out_workers(&mut tasks);
    let vmas = iterators.vmas_of(scope, &tasks.processes)?;
    let mut found = blockers(&tasks, &vmas, ours);
    found.extend(waiting);
    found.extend(cgroups::blockers(cgroup, &tasks)?);
    found.extend(aio::unmapped(&tasks, &vmas));
    found.extend(sysv::blockers(&sysv::segments()?, &vmas, &tasks));
    found.extend(semaphores::blockers(&tasks, &semaphores::read(&tasks)?));
    let waits = message_queues::running_waits(&tasks)?;
    let queues = message_queues::read(&tasks, &waits)?;
    found.extend(message_queues::blockers(&tasks, &queues));
    let open = iterators.files_of(scope, &tasks.processes)?;
    found.extend(files::blockers(&open, &tasks));
    found.extend(files::leased_and_mapped(&open, &vmas));
    found.extend(uring::unopened(&vmas, &open));
    found.extend(files::controlling(&tasks, &open));
    let view = View::of(&tasks, ours)?;
    found.extend(namespaces::blockers(&tasks, ours, &view)?);
    found.extend(attributes::confined(&tasks));
    found.extend(names::blockers(&tasks, &vmas, &open, &view));
    Ok(found)
}

/// Named files that are open or mapped on one of these devices (major << 20 | minor).
///
/// # Errors
/// The iterators cannot be read.
pub fn on_devices(
    iterators: &mut Iterators,
    cgroup: &Cgroup,
    devices: &BTreeSet<u32>,
) -> Result<Vec<Blocker>, CheckpointError> {
    const REASON: &str = "it lives in memory alone (tmpfs) and would be gone after the update; \
                          keep it on a disk, or close it before";
    let scope = Scope::Cgroup(cgroup.id());
    let processes = iterators.threads(scope)?.processes;
    let open = iterators.descriptors_of(scope, &processes)?;
    let named = |kind| [FileKind::REGULAR, FileKind::DIRECTORY, FileKind::FIFO].contains(&kind);
    let held = open.iter().filter(|file| {
        named(file.rec.kind) && file.rec.nlink > 0 && devices.contains(&file.rec.dev)
    });
    let mut found: Vec<_> = held
        .map(|file| Blocker {
            pid: Pid(file.rec.tgid.cast_signed()),
            fd: Some(Fd(file.rec.fd.cast_signed())),
            object: format!("file {}", file.rec.name()),
            reason: REASON.to_owned(),
        })
        .collect();
    let mapped = iterators.vmas_of(scope, &processes)?;
    let mapped = mapped
        .iter()
        .filter(|vma| vma.file != 0 && vma.nlink > 0 && devices.contains(&vma.dev));
    found.extend(mapped.map(|vma| Blocker {
        pid: Pid(vma.tgid.cast_signed()),
        fd: None,
        object: format!("mapping {:x}-{:x} of {}", vma.start, vma.end, vma.name()),
        reason: REASON.to_owned(),
    }));
    Ok(found)
}

/// Everything about tasks and mappings that is not carried. Descriptors are looked at
/// elsewhere.
#[must_use]
pub fn blockers(tasks: &Tasks, vmas: &[VmaRec], ours: &Namespaces) -> Vec<Blocker> {
    let mut found = Vec::new();
    let mut leaders: HashMap<u32, &ThreadRec> = HashMap::new();
    for rec in &tasks.threads {
        if rec.tid == rec.tgid {
            leaders.insert(rec.tgid, rec);
        }
    }
    for rec in &tasks.threads {
        thread(rec, leaders.get(&rec.tgid).copied(), ours, &mut found);
    }
    shared_memory(&leaders, &mut found);
    family(tasks, &leaders, &mut found);
    for process in &tasks.processes {
        let threads = tasks.threads.iter().filter(|t| t.tgid == process.pid);
        if stopping(process, threads) {
            found.push(blocker(
                process.pid,
                "process about to stop",
                "a stop signal was sent to it; try again when it has stopped",
            ));
        }
        let stopped = process.signal_flags & SIGNAL_STOP_STOPPED != 0;
        if stopped && !tasks.processes.iter().any(|p| p.pid == process.sid) {
            // When the restorer ends, whose session it will be in, the kernel would send SIGHUP
            // to the process group (kill_orphaned_pgrp()).
            found.push(blocker(
                process.pid,
                "stopped process in a session led from outside",
                "it is not carried yet: send SIGCONT, or start the application with setsid(1)",
            ));
        }
    }
    let blocked = tasks.timers.iter().filter_map(timers::refusal);
    found.extend(blocked.map(|(timer, whose)| {
        let object = format!("timer {} on the CPU clock of {whose}", timer.id);
        blocker(timer.pid, &object, "such timers are not carried")
    }));
    found.extend(attributes::blockers(tasks));
    found.extend(namespaces::divided(tasks));
    found.extend(aio::blockers(tasks));
    found.extend(uring::registered(tasks));
    found.extend(vmas.iter().filter_map(mm::refusal));
    found.dedup();
    found
}

/// Whether a stop signal is on its way, or some threads have stopped for it and others not yet.
fn stopping<'a>(process: &ProcessRec, threads: impl Iterator<Item = &'a ThreadRec>) -> bool {
    const JOBCTL_STOP_PENDING: u64 = 1 << 17;
    const SIGSTOP: u64 = 1 << (nix::libc::SIGSTOP - 1);
    if process.signal_flags & SIGNAL_STOP_STOPPED != 0 {
        return false;
    }
    let mut threads = threads.filter(|thread| !thread.is_zombie());
    let on_its_way = |thread: &ThreadRec| {
        thread.jobctl & JOBCTL_STOP_PENDING != 0
            || (thread.pending | process.shared_pending) & SIGSTOP != 0
    };
    threads.any(on_its_way)
}

pub(super) fn blocker(pid: u32, object: &str, reason: &str) -> Blocker {
    Blocker {
        pid: Pid(pid.cast_signed()),
        fd: None,
        object: object.to_owned(),
        reason: reason.to_owned(),
    }
}

fn thread(
    rec: &ThreadRec,
    leader: Option<&ThreadRec>,
    ours: &Namespaces,
    found: &mut Vec<Blocker>,
) {
    const SCHED_DEADLINE: u32 = 6;
    if rec.is_zombie() {
        return;
    }
    let mut add = |object: &str, reason: &str| found.push(blocker(rec.tgid, object, reason));
    if rec.tracer != 0 {
        let by = format!("thread {} traced by PID {}", rec.tid, rec.tracer);
        add(&by, "detach the debugger");
    }
    if rec.seccomp_mode == libc::SECCOMP_MODE_STRICT {
        add("strict seccomp", "nothing could be restored under it");
    }
    if rec.flags & ThreadFlag::SECCOMP_LISTENER != 0 {
        add(
            "seccomp filter with a listener",
            "who listens to it would be lost; it must not be supervised",
        );
    }
    if rec.policy == SCHED_DEADLINE {
        add("SCHED_DEADLINE", "its reservation is not carried yet");
    }
    if rec.restart_kind == RestartKind::UNKNOWN && rec.restart_fn != 0 {
        tracing::debug!(
            "thread {} has restart function {:x}",
            rec.tid,
            rec.restart_fn
        );
    }
    let Some(leader) = leader else { return };
    if rec.tid == leader.tid {
        for name in ours.others(rec) {
            add(
                &format!("{name} namespace"),
                "only that of the host is carried yet",
            );
        }
        return;
    }
    if leader.is_zombie() {
        add(
            "exited main thread",
            "a process whose main thread is gone is not carried yet",
        );
    } else if rec.files != leader.files || rec.fs != leader.fs {
        add(
            &format!(
                "thread {} with descriptors or directories of its own",
                rec.tid
            ),
            "threads that called unshare(2) are not carried yet",
        );
    } else if rec.seccomp_filter != leader.seccomp_filter {
        add(
            &format!("thread {} with seccomp filters of its own", rec.tid),
            "only filters of whole processes are carried yet",
        );
    } else if rec.nsproxy != leader.nsproxy {
        add(
            &format!("thread {} in namespaces of its own", rec.tid),
            "it is not carried yet",
        );
    }
}

/// Processes that share an address space (clone(2) without CLONE_THREAD).
fn shared_memory(leaders: &HashMap<u32, &ThreadRec>, found: &mut Vec<Blocker>) {
    let mut users: BTreeMap<u64, Vec<u32>> = BTreeMap::new();
    for rec in leaders.values().filter(|rec| !rec.is_zombie()) {
        users.entry(rec.mm).or_default().push(rec.tgid);
    }
    for pids in users.values_mut().filter(|pids| pids.len() > 1) {
        pids.sort_unstable();
        found.push(blocker(
            pids[1],
            "address space shared with another process",
            "vfork(2) or CLONE_VM: try again when the child has called exec",
        ));
    }
}

/// Trees that cannot be made again: sessions, descriptor tables and directories are had from
/// birth on.
fn family(tasks: &Tasks, leaders: &HashMap<u32, &ThreadRec>, found: &mut Vec<Blocker>) {
    let inside: BTreeSet<u32> = tasks.processes.iter().map(|p| p.pid).collect();
    let pid = |number: u32| Pid(number.cast_signed());
    let known = tasks.processes.iter().filter_map(|process| {
        let leader = leaders.get(&process.pid)?;
        Some(Process {
            pid: pid(process.pid),
            parent: inside.contains(&process.ppid).then(|| pid(process.ppid)),
            pgid: pid(process.pgid),
            sid: pid(process.sid),
            zombie: leader.is_zombie().then_some(leader.exit_code),
            files: FilesId(leader.files),
            fs: FsId(leader.fs),
            ..Process::default()
        })
    });
    let family = parents_first(known.collect());
    if let Err(error) = plan::processes(&family) {
        found.push(Blocker {
            pid: error.pid(),
            fd: None,
            object: "process tree".to_owned(),
            reason: format!("{error}; it cannot be made again"),
        });
    }
    let mut directories = BTreeSet::new();
    for process in family.iter().filter(|p| p.zombie.is_none()) {
        let link = format!("/proc/{}/root", process.pid);
        if !directories.insert(process.fs)
            && std::fs::read_link(link).is_ok_and(|root| root != Path::new("/"))
        {
            found.push(Blocker {
                pid: process.pid,
                fd: None,
                object: "root directory shared with another process".to_owned(),
                reason: "CLONE_FS is not carried together with chroot(2) yet".to_owned(),
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leader(pid: u32, mm: u64) -> ThreadRec {
        ThreadRec {
            tid: pid,
            tgid: pid,
            mm,
            fs: mm,
            ..ThreadRec::default()
        }
    }

    fn check(threads: Vec<ThreadRec>, expected: &[&str]) {
        let tasks = Tasks {
            threads,
            ..Tasks::default()
        };
        let found = blockers(&tasks, &[], &Namespaces::default());
        let objects: Vec<&str> = found.iter().map(|b| b.object.as_str()).collect();
        assert_eq!(objects, expected);
    }

    #[test]
    fn an_ordinary_tree_is_eligible() {
        check(vec![leader(5, 1), leader(6, 2)], &[]);
    }

    #[test]
    fn what_is_not_carried_is_named() {
        let mut traced = leader(5, 1);
        traced.tracer = 77;
        check(vec![traced], &["thread 5 traced by PID 77"]);
        let mut filtered = leader(5, 1);
        filtered.seccomp_mode = 2;
        check(vec![filtered], &[]);
        filtered.flags |= ThreadFlag::SECCOMP_LISTENER;
        check(vec![filtered], &["seccomp filter with a listener"]);
        filtered.flags = 0;
        filtered.seccomp_mode = 1;
        check(vec![filtered], &["strict seccomp"]);
        let mut foreign = leader(5, 1);
        foreign.net_ns = 9;
        check(vec![foreign], &["network namespace"]);
    }

    #[test]
    fn a_stop_is_carried_once_it_is_complete() {
        let process = |signal_flags, shared_pending, sid| ProcessRec {
            pid: 5,
            sid,
            signal_flags,
            shared_pending,
            ..ProcessRec::default()
        };
        let check = |process: ProcessRec, expected: &[&str]| {
            let tasks = Tasks {
                threads: vec![leader(5, 1)],
                processes: vec![process],
                ..Tasks::default()
            };
            let found = blockers(&tasks, &[], &Namespaces::default());
            let objects: Vec<&str> = found.iter().map(|b| b.object.as_str()).collect();
            assert_eq!(objects, expected);
        };
        check(process(SIGNAL_STOP_STOPPED, 1 << 18, 5), &[]);
        check(process(0, 1 << 18, 5), &["process about to stop"]);
        let outside = "stopped process in a session led from outside";
        check(process(SIGNAL_STOP_STOPPED, 0, 4), &[outside]);
    }

    #[test]
    fn threads_must_share_what_threads_share() {
        let mut other = leader(5, 1);
        other.tid = 6;
        other.files = 42;
        check(
            vec![leader(5, 1), other],
            &["thread 6 with descriptors or directories of its own"],
        );
        other.files = leader(5, 1).files;
        other.seccomp_filter = 9;
        check(
            vec![leader(5, 1), other],
            &["thread 6 with seccomp filters of its own"],
        );
    }

    #[test]
    fn a_shared_address_space_is_refused() {
        let mut child = leader(6, 1);
        child.fs = 2;
        check(
            vec![leader(5, 1), child],
            &["address space shared with another process"],
        );
    }
}
