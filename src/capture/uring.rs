//! io_uring as tasks and address spaces show it: requests in flight, workers, mapped rings. The
//! instances themselves are open files ([`super::files`]).

use super::mm::{self, vm};
use crate::bpf::events::{FileKind, ThreadFlag, ThreadRec, VmaRec};
use crate::bpf::iter::{Files, Tasks};
use crate::model::frozen::Blocker;
use crate::model::ids::Pid;
use crate::sys::uring::{OFF_CQ_RING, OFF_SQ_RING, OFF_SQES};
use std::collections::HashSet;

/// Name of the file that an instance is.
const NAME: &str = "[io_uring]";

/// `PF_IO_WORKER` of include/linux/sched.h.
const PF_IO_WORKER: u32 = 0x10;

/// Leaves out the threads that the kernel runs within a process for its requests (`iou-wrk-*`):
/// they execute no code of it, cannot be traced, and come again when there is work for them.
pub fn leave_out_workers(tasks: &mut Tasks) {
    tasks
        .threads
        .retain(|thread| thread.task_flags & PF_IO_WORKER == 0);
}

/// Workers that wait for something with a request at hand. The freezer would end the wait, and
/// the request with `EINTR`, which nobody has asked for; a disk is waited for in another way.
#[must_use]
pub fn waiting(tasks: &Tasks) -> Vec<Blocker> {
    /// `TASK_INTERRUPTIBLE` of include/linux/sched.h.
    const INTERRUPTIBLE: u32 = 1;
    let waits = |thread: &&ThreadRec| {
        thread.flags & ThreadFlag::WORKING != 0 && thread.state & INTERRUPTIBLE != 0
    };
    let workers = tasks.threads.iter().filter(waits);
    workers
        .map(|worker| {
            let reason = "it waits for something that only a freeze would end, by an error; try \
                          again when it has ended";
            blocker(worker, "io_uring request", reason)
        })
        .collect()
}

/// Whether requests of some thread, or of AIO, have not ended.
#[must_use]
pub fn are_in_flight(tasks: &Tasks) -> bool {
    let threads = tasks.threads.iter().filter(|thread| !thread.is_zombie());
    threads.map(|t| t.uring_in_flight).any(|n| n != 0)
        || tasks.aio.iter().any(|context| context.in_flight != 0)
}

fn blocker(thread: &ThreadRec, object: &str, reason: &str) -> Blocker {
    Blocker {
        pid: Pid(thread.tgid.cast_signed()),
        fd: None,
        object: format!("{object} of thread {}", thread.tid),
        reason: reason.to_owned(),
    }
}

/// Requests of frozen threads that have not ended, though they were given time: they never end,
/// or not soon. While threads run, there is nothing wrong with requests.
#[must_use]
pub fn in_flight(tasks: &Tasks) -> Vec<Blocker> {
    let threads = tasks.threads.iter().filter(|thread| !thread.is_zombie());
    threads
        .filter(|thread| thread.uring_in_flight != 0)
        .map(|thread| {
            let reason = "they end in the kernel they were made in; try again when they have";
            blocker(thread, "io_uring requests in flight", reason)
        })
        .collect()
}

/// Rings that are reached by a number which only the kernel's own table of a thread resolves.
#[must_use]
pub fn registered(tasks: &Tasks) -> Vec<Blocker> {
    let threads = tasks.threads.iter().filter(|t| t.uring_registered != 0);
    threads
        .map(|thread| {
            let reason = "rings reached without a descriptor are not carried yet; the program \
                          must not call io_uring_register_ring_fd(3)";
            blocker(thread, "registered io_uring descriptor", reason)
        })
        .collect()
}

/// Whether a mapping is of an instance.
#[must_use]
pub fn is_mapped(rec: &VmaRec) -> bool {
    // No file on a disk is mapped like that.
    rec.file != 0 && rec.flags & (vm::PFNMAP | vm::MIXEDMAP) != 0 && rec.name() == NAME
}

/// Why a mapping of an instance cannot be carried.
#[must_use]
pub fn refusal(rec: &VmaRec) -> Option<Blocker> {
    const PARTS: [u64; 3] = [OFF_SQ_RING, OFF_CQ_RING, OFF_SQES];
    let reason = if rec.flags & vm::MAYSHARE == 0 {
        "it is private"
    } else if !PARTS.contains(&mm::offset(rec)) {
        "it is of a part, or of buffers that were provided there"
    } else {
        return None;
    };
    Some(mm::blocker(rec, "mapping", NAME, reason))
}

/// Mapped instances that nobody has open: only in that way could they be had again.
#[must_use]
pub fn unopened(vmas: &[VmaRec], open: &Files) -> Vec<Blocker> {
    let rings = open.files.iter().map(|file| &file.rec);
    let rings = rings.filter(|rec| rec.kind == FileKind::IO_URING);
    let rings: HashSet<u64> = rings.map(|rec| rec.file).collect();
    let lost = vmas
        .iter()
        .filter(|vma| is_mapped(vma) && !rings.contains(&vma.file));
    lost.map(|vma| {
        let reason = "no process of the application has a descriptor of it any more";
        mm::blocker(vma, "mapping", NAME, reason)
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::events::FileRec;
    use crate::bpf::iter::{Detail, File};

    fn mapping(pgoff: u64) -> VmaRec {
        let mut name = VmaRec::default().name;
        for (to, from) in name.iter_mut().zip(NAME.bytes()) {
            *to = from.cast_signed();
        }
        VmaRec {
            start: 0x1000,
            end: 0x2000,
            file: 77,
            flags: vm::MAYSHARE | vm::PFNMAP,
            pgoff,
            name,
            ..VmaRec::default()
        }
    }

    #[test]
    fn whole_shared_mappings_of_open_instances_are_carried() {
        for pgoff in [0, 0x8000, 0x1_0000] {
            assert!(is_mapped(&mapping(pgoff)));
            assert_eq!(refusal(&mapping(pgoff)), None);
        }
        assert!(refusal(&mapping(1)).is_some());
        let private = VmaRec {
            flags: 0,
            ..mapping(0)
        };
        assert!(refusal(&private).is_some());
        let mut open = Files::default();
        assert_eq!(unopened(&[mapping(0)], &open).len(), 1);
        open.files.push(File {
            rec: FileRec {
                file: 77,
                kind: FileKind::IO_URING,
                ..FileRec::default()
            },
            detail: Detail::None,
        });
        assert_eq!(unopened(&[mapping(0)], &open), []);
    }

    #[test]
    fn threads_are_told_from_workers_and_busy_ones_from_idle_ones() {
        let thread = |tid, task_flags, uring_in_flight| ThreadRec {
            tid,
            task_flags,
            uring_in_flight,
            ..ThreadRec::default()
        };
        let worker = ThreadRec {
            flags: ThreadFlag::WORKING,
            ..thread(6, PF_IO_WORKER, 0)
        };
        let mut tasks = Tasks {
            threads: vec![thread(5, 0, 0), worker],
            ..Tasks::default()
        };
        assert_eq!(waiting(&tasks), []);
        tasks.threads[1].state = 1;
        assert_eq!(waiting(&tasks).len(), 1);
        leave_out_workers(&mut tasks);
        assert_eq!(tasks.threads.len(), 1);
        assert!(!are_in_flight(&tasks) && in_flight(&tasks).is_empty());
        tasks.threads.push(thread(7, 0, 3));
        assert!(are_in_flight(&tasks));
        assert!(in_flight(&tasks)[0].object.ends_with("of thread 7"));
    }
}
