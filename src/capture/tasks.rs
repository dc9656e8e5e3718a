//! Processes and threads, put together from the iterators, ptrace and what only /proc has.

use super::attributes;
use super::error::CheckpointError;
use super::mm::path_ref;
use super::restart::Now;
use super::threads::{self, Stopped, Tracees};
use super::timers;
use super::view::View;
use crate::bpf::events::{ProcessFlag, ProcessRec, SigactionsRec, ThreadFlag, ThreadRec, TimerRec};
use crate::bpf::iter::Tasks;
use crate::model::frozen::{
    AltStack, Credentials, JobStop, PathRef, Process, Rseq, Scheduling, SigAction, SigInfo, Thread,
};
use crate::model::ids::{FilesId, FsId, MmId, Pid, Tid};
use crate::sys::task::affinity;
use nix::libc;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// `MMF_DISABLE_THP` (include/linux/sched/coredump.h, since 6.18 mm_types.h).
const MMF_DISABLE_THP: u64 = 1 << 24;

/// Puts the processes of an application together, parents before children.
///
/// # Errors
/// A thread or a file of /proc cannot be read.
pub fn processes(
    tasks: &Tasks,
    tracees: &mut Tracees,
    now: &Now,
    view: &View,
) -> Result<Vec<Process>, CheckpointError> {
    let mut threads: BTreeMap<u32, Vec<&ThreadRec>> = BTreeMap::new();
    for rec in &tasks.threads {
        threads.entry(rec.tgid).or_default().push(rec);
    }
    let groups = group_lists(&tasks.threads)?;
    let inside: BTreeSet<u32> = tasks.processes.iter().map(|p| p.pid).collect();
    let mut found = Vec::new();
    for rec in &tasks.processes {
        let mut own = threads.remove(&rec.pid).unwrap_or_default();
        own.sort_by_key(|thread| (thread.tid != rec.pid, thread.tid));
        let parent = inside.contains(&rec.ppid).then(|| pid(rec.ppid));
        let one = Assembly {
            rec,
            threads: own,
            parent,
            tasks,
            tracees,
            groups: &groups,
            now,
            view,
        };
        found.push(one.process()?);
    }
    let live = found.iter_mut().filter(|process| process.zombie.is_none());
    for thread in live.flat_map(|process| &mut process.threads) {
        thread.xstate = tracees.take_xstate(thread.tid)?;
    }
    Ok(parents_first(found))
}

fn pid(number: u32) -> Pid {
    Pid(number.cast_signed())
}

pub(super) fn parents_first(mut processes: Vec<Process>) -> Vec<Process> {
    let mut done: BTreeSet<Pid> = BTreeSet::new();
    let mut out: Vec<Process> = Vec::new();
    while !processes.is_empty() {
        let ready = |p: &Process| p.parent.is_none_or(|parent| done.contains(&parent));
        let (mut now, later): (Vec<_>, Vec<_>) = processes.into_iter().partition(ready);
        if now.is_empty() {
            // A parent that is its own descendant does not exist.
            out.extend(later);
            return out;
        }
        now.sort_by_key(|p| p.pid);
        done.extend(now.iter().map(|p| p.pid));
        out.append(&mut now);
        processes = later;
    }
    out
}

struct Assembly<'a> {
    rec: &'a ProcessRec,
    threads: Vec<&'a ThreadRec>,
    parent: Option<Pid>,
    tasks: &'a Tasks,
    tracees: &'a Tracees,
    groups: &'a BTreeMap<u64, Vec<u32>>,
    now: &'a Now,
    view: &'a View,
}

impl Assembly<'_> {
    fn process(&self) -> Result<Process, CheckpointError> {
        let rec = self.rec;
        let Some(leader) = self.threads.first() else {
            return Err(CheckpointError::Unstable(format!(
                "PID {} has no threads",
                rec.pid
            )));
        };
        let base = Process {
            pid: pid(rec.pid),
            parent: self.parent,
            pgid: pid(rec.pgid),
            sid: pid(rec.sid),
            exit_signal: leader.exit_signal,
            loginuid: (leader.loginuid != u32::MAX).then_some(leader.loginuid),
            ..Process::default()
        };
        if leader.is_zombie() {
            return Ok(Process {
                zombie: Some(leader.exit_code),
                threads: vec![Thread {
                    tid: Tid(leader.tid.cast_signed()),
                    comm: leader.comm().into_bytes(),
                    ..Thread::default()
                }],
                ..base
            });
        }
        let mm = self.tasks.mms.iter().find(|mm| mm.mm == leader.mm);
        let flags = mm.map_or(0, |mm| mm.flags);
        let proc = ProcDir::new(rec.pid);
        let shared = self.pending(Tid(leader.tid.cast_signed()), true, rec.shared_pending)?;
        let stopped = job_stop(rec, leader);
        let actions = self.tasks.sigactions.iter().find(|a| a.pid == rec.pid);
        let live: Vec<_> = self.live()?;
        let rseqs = threads::rseqs(pid(rec.pid), &live)?;
        Ok(Process {
            mm: MmId(leader.mm),
            files: FilesId(leader.files),
            fs: FsId(leader.fs),
            exe: proc.link("exe", self.view)?,
            cwd: proc.link("cwd", self.view)?,
            root: proc.link("root", self.view)?,
            umask: leader.umask,
            personality: leader.personality,
            dumpable: u8::try_from(flags & 3).unwrap_or(0),
            child_subreaper: rec.flags & ProcessFlag::CHILD_SUBREAPER != 0,
            thp_disable: flags & MMF_DISABLE_THP != 0,
            oom_score_adj: i16::try_from(rec.oom_score_adj).unwrap_or(0),
            coredump_filter: mm.map(|_| dump_filter(flags)),
            ptracer: attributes::ptracer(rec, &self.tasks.threads),
            autogroup_nice: attributes::autogroup_nice(rec),
            seccomp: match leader.seccomp_filters {
                0 => Vec::new(),
                _ => crate::sys::seccomp::filters(Tid(leader.tid.cast_signed()))?,
            },
            rlimits: rec.rlimits.iter().map(|l| (l.cur, l.max)).collect(),
            sigactions: actions.map(sigactions).unwrap_or_default(),
            itimers: timers::interval(rec, self.now),
            posix_timers: timers::posix(self.own_timers(), rec, self.now),
            // Stopped already, it would not notice another one, which goes when it continues.
            pending: shared
                .into_iter()
                .filter(|info| stopped.is_none() || !is_stop(info))
                .collect(),
            stopped,
            continued: rec.signal_flags & SIGNAL_STOP_CONTINUED != 0,
            threads: live
                .iter()
                .map(|(stopped, rec)| self.thread(stopped, rec, rseqs.get(&stopped.tid)))
                .collect::<Result<_, _>>()?,
            ..base
        })
    }

    /// What has not ended, with its registers.
    fn live(&self) -> Result<Vec<(&Stopped, &ThreadRec)>, CheckpointError> {
        let live = self.threads.iter().filter(|thread| !thread.is_zombie());
        live.map(|rec| {
            let tid = Tid(rec.tid.cast_signed());
            let unstable = || CheckpointError::Unstable(format!("Thread {tid} was not stopped"));
            let stopped = self.tracees.of(tid).ok_or_else(unstable)?;
            Ok((stopped, *rec))
        })
        .collect()
    }

    fn thread(
        &self,
        stopped: &Stopped,
        rec: &ThreadRec,
        rseq: Option<&Rseq>,
    ) -> Result<Thread, CheckpointError> {
        let tid = stopped.tid;
        let groups = self.groups.get(&rec.group_info).cloned();
        let temporary = rec.flags & ThreadFlag::RESTORE_SIGMASK != 0;
        Ok(Thread {
            tid,
            comm: comm(rec),
            regs: stopped.regs,
            // Read last of all.
            xstate: Vec::new(),
            syscall: stopped.syscall,
            sigmask: if temporary {
                rec.saved_sigmask
            } else {
                rec.blocked
            },
            pending: self.pending(tid, false, rec.pending)?,
            altstack: AltStack {
                sp: rec.sas_ss_sp,
                flags: rec.sas_ss_flags,
                size: rec.sas_ss_size,
            },
            robust_list: (rec.robust_list, robust_len(rec.robust_list)),
            clear_child_tid: rec.clear_child_tid,
            rseq: rseq.copied(),
            creds: credentials(rec, groups.unwrap_or_default()),
            sched: Scheduling {
                policy: attributes::policy_flags(rec) | rec.policy,
                // MAX_RT_PRIO + NICE_WIDTH / 2
                nice: rec.static_prio - 120,
                priority: rec.rt_priority,
                affinity: affinity(tid)?,
                slice: rec.slice_ns,
            },
            pdeathsig: rec.pdeath_signal,
            timer_slack: rec.timer_slack_ns,
            ioprio: u16::try_from(rec.ioprio).unwrap_or(0),
            policy: attributes::policy(&rec.numa),
            io_flusher: attributes::is_io_flusher(rec),
            mce_kill_early: attributes::mce_kill_early(rec),
        })
    }

    fn own_timers(&self) -> impl Iterator<Item = &TimerRec> {
        let all = self.tasks.timers.iter();
        all.filter(|timer| timer.pid == self.rec.pid)
    }

    /// What is queued for the process, or for one thread of it, whose `mask` was read with the
    /// timers.
    fn pending(&self, tid: Tid, shared: bool, mask: u64) -> Result<Vec<SigInfo>, CheckpointError> {
        if mask == 0 {
            return Ok(Vec::new());
        }
        let mut pending = threads::pending(tid, shared)?;
        pending.retain(|info| !timers::will_send(info, mask, self.rec, self.own_timers()));
        Ok(pending)
    }
}

/// `SIGNAL_*` of include/linux/sched/signal.h.
pub(super) const SIGNAL_STOP_STOPPED: u64 = 1;
const SIGNAL_STOP_CONTINUED: u64 = 2;

/// The group stop of a process. The signal is at hand until its parent has been told of it
/// (wait_task_stopped()).
fn job_stop(rec: &ProcessRec, leader: &ThreadRec) -> Option<JobStop> {
    const JOBCTL_STOP_SIGMASK: u64 = 0xffff;
    let reported = rec.group_exit_code == 0;
    let last = i32::try_from(leader.jobctl & JOBCTL_STOP_SIGMASK).unwrap_or(0);
    let signal = if reported { last } else { rec.group_exit_code };
    (rec.signal_flags & SIGNAL_STOP_STOPPED != 0).then_some(JobStop { signal, reported })
}

fn is_stop(info: &SigInfo) -> bool {
    let signal = info.0.first_chunk::<4>().map(|b| i32::from_ne_bytes(*b));
    signal == Some(libc::SIGSTOP)
}

/// `MMF_DUMP_FILTER_MASK` (include/linux/sched/coredump.h), as /proc shows it.
fn dump_filter(flags: u64) -> u32 {
    u32::try_from(flags >> 2 & 0x1ff).unwrap_or(0)
}

fn robust_len(head: u64) -> u64 {
    // sizeof(struct robust_list_head), the only length the kernel takes.
    if head == 0 { 0 } else { 24 }
}

/// The bytes of a name, which need not be UTF-8.
fn comm(rec: &ThreadRec) -> Vec<u8> {
    rec.comm
        .iter()
        .map(|c| c.to_ne_bytes()[0])
        .take_while(|byte| *byte != 0)
        .collect()
}

fn sigactions(rec: &SigactionsRec) -> Vec<SigAction> {
    let action = |a: &crate::bpf::events::SigactionRec| SigAction {
        handler: a.handler,
        flags: a.flags,
        restorer: a.restorer,
        mask: a.mask,
    };
    rec.actions.iter().map(action).collect()
}

fn credentials(rec: &ThreadRec, groups: Vec<u32>) -> Credentials {
    Credentials {
        uids: [rec.uid, rec.euid, rec.suid, rec.fsuid],
        gids: [rec.gid, rec.egid, rec.sgid, rec.fsgid],
        groups,
        caps: [
            rec.cap_inheritable,
            rec.cap_permitted,
            rec.cap_effective,
            rec.cap_bset,
            rec.cap_ambient,
        ],
        securebits: rec.securebits,
        no_new_privs: rec.flags & ThreadFlag::NO_NEW_PRIVS != 0,
    }
}

struct ProcDir(PathBuf);

impl ProcDir {
    fn new(pid: u32) -> Self {
        Self(PathBuf::from(format!("/proc/{pid}")))
    }

    fn thread(pid: u32, tid: u32) -> Self {
        Self(PathBuf::from(format!("/proc/{pid}/task/{tid}")))
    }

    fn link(&self, name: &str, view: &View) -> Result<PathRef, CheckpointError> {
        let link = self.0.join(name);
        let path = fs::read_link(&link).map_err(CheckpointError::io("readlink", &link))?;
        let place = view.find(&link, &path);
        // By name, so that the restore finds the same numbers (overlay filesystems).
        let named = place.as_ref().map(|place| fs::metadata(&place.path));
        let stat = match named {
            Some(Ok(stat)) => Ok(stat),
            _ => fs::metadata(&link),
        };
        let stat = stat.map_err(CheckpointError::io("stat", &link))?;
        Ok(PathRef {
            through: place.map(|place| place.through).unwrap_or_default(),
            ..path_ref(Path::new(&path), &stat)
        })
    }
}

/// Supplementary groups by the identity of the kernel's list, which does not change and which
/// children inherit: of all that iterators cannot tell, one file is read for each.
fn group_lists(recs: &[ThreadRec]) -> Result<BTreeMap<u64, Vec<u32>>, CheckpointError> {
    let mut lists = BTreeMap::new();
    for rec in recs
        .iter()
        .filter(|rec| rec.ngroups > 0 && !rec.is_zombie())
    {
        if let Entry::Vacant(entry) = lists.entry(rec.group_info) {
            let path = ProcDir::thread(rec.tgid, rec.tid).0.join("status");
            let text = fs::read_to_string(&path).map_err(CheckpointError::io("read", &path))?;
            entry.insert(groups(&text));
        }
    }
    Ok(lists)
}

/// The supplementary groups in /proc/PID/status.
fn groups(status: &str) -> Vec<u32> {
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let numbers = line.unwrap_or("").split_ascii_whitespace();
    numbers.filter_map(|group| group.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_parsed() {
        assert_eq!(groups("Name:\tx\nGroups:\t0 24 1000 \n"), [0, 24, 1000]);
        assert!(groups("Name:\tx\nGroups:\t \n").is_empty());
    }

    #[test]
    fn parents_come_first() {
        let process = |pid, parent: Option<i32>| Process {
            pid: Pid(pid),
            parent: parent.map(Pid),
            ..Process::default()
        };
        let order = parents_first(vec![
            process(3, Some(9)),
            process(9, Some(5)),
            process(5, None),
            process(4, None),
        ]);
        let pids: Vec<i32> = order.iter().map(|p| p.pid.0).collect();
        assert_eq!(pids, [4, 5, 9, 3]);
    }
}
