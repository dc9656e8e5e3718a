//! System V message queues: those that a process of the application used last or waits for.
//!
//! The namespace is the machine's and a queue belongs to nobody; who sent last, who received
//! last and who sleeps in a call on it is all that tells whose it is.

use super::error::CheckpointError;
use super::semaphores::inside;
use super::sysv::table;
use crate::bpf::iter::Tasks;
use crate::model::frozen::{Blocker, Message, MessageQueue, Process};
use crate::model::ids::Pid;
use crate::sys::sysv::{QueueState, copy_message, queue_state};
use nix::errno::Errno;
use nix::libc;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// A queue of the application.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    queue: MessageQueue,
    /// A process of the application that uses it.
    user: Pid,
    /// Why its messages are not all there are.
    unread: Option<Unread>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unread {
    /// Others used it meanwhile.
    Changed,
    /// The message at this index is longer than `kernel.msgmax`.
    TooLong(usize),
    /// The kernel shows no messages.
    Unsupported,
}

/// Who of a running application sleeps in msgsnd(2) or msgrcv(2) on which queue.
///
/// # Errors
/// procfs cannot be read.
pub fn running_waits(tasks: &Tasks) -> Result<BTreeMap<i32, Pid>, CheckpointError> {
    if table(TABLE)?.is_empty() {
        return Ok(BTreeMap::new());
    }
    let threads = tasks.threads.iter().filter_map(|thread| {
        let (tgid, tid) = (thread.tgid, thread.tid);
        // A thread that is gone by now waits for nothing.
        let text = fs::read_to_string(format!("/proc/{tgid}/task/{tid}/syscall")).ok()?;
        Some((waited_for(&text)?, Pid(tgid.cast_signed())))
    });
    Ok(threads.collect())
}

const TABLE: &str = "/proc/sysvipc/msg";

/// The queue that /proc/TID/syscall tells of: number and arguments.
fn waited_for(text: &str) -> Option<i32> {
    let mut words = text.split_ascii_whitespace();
    let number = words.next()?.parse().ok()?;
    let first = words.next()?.strip_prefix("0x")?;
    queue_of(number, u64::from_str_radix(first, 16).ok()?)
}

/// The queue of a system call with this first argument, which is an `int`.
fn queue_of(number: i64, first: u64) -> Option<i32> {
    let of_queues = [libc::SYS_msgsnd, libc::SYS_msgrcv].contains(&number);
    let id = u32::try_from(first & u64::from(u32::MAX)).ok()?;
    of_queues.then_some(id.cast_signed())
}

/// As [`running_waits`], of an application that is frozen: its threads were stopped in the call.
pub fn frozen_waits(processes: &[Process]) -> BTreeMap<i32, Pid> {
    let threads = processes.iter().flat_map(|process| {
        let threads = process.threads.iter();
        threads.filter_map(|thread| {
            let regs = &thread.regs;
            Some((
                queue_of(regs.orig_rax.cast_signed(), regs.rdi)?,
                process.pid,
            ))
        })
    });
    threads.collect()
}

/// Reads the queues that the application uses, those of `waits` included.
///
/// # Errors
/// procfs cannot be read.
pub fn read(tasks: &Tasks, waits: &BTreeMap<i32, Pid>) -> Result<Vec<Found>, CheckpointError> {
    let inside = inside(tasks);
    let mut found = Vec::new();
    for line in table(TABLE)? {
        let id = line.get(1).and_then(|id| i32::try_from(*id).ok());
        let Some(id) = id else { continue };
        // A queue that is gone by now is no longer used.
        let Ok(state) = queue_state(id) else {
            continue;
        };
        let last = [state.sender, state.receiver].map(Pid);
        let user = last.into_iter().find(|pid| inside.contains(pid));
        let Some(user) = user.or_else(|| waits.get(&id).copied()) else {
            continue;
        };
        let (messages, mut unread) = match messages(id, &state) {
            Ok(messages) => (messages, None),
            Err(unread) => (Vec::new(), Some(unread)),
        };
        match queue_state(id) {
            Ok(now) if now == state => {}
            Ok(_) => unread = Some(Unread::Changed),
            Err(_) => continue,
        }
        found.push(Found {
            queue: queue(id, &state, messages),
            user,
            unread,
        });
    }
    Ok(found)
}

fn messages(id: i32, state: &QueueState) -> Result<Vec<Message>, Unread> {
    /// What most messages fit into: the kernel allocates as much for each copy.
    const USUAL: usize = 256;
    let all = usize::try_from(state.cbytes).unwrap_or(usize::MAX);
    let mut most = USUAL.min(all);
    let mut found = Vec::new();
    loop {
        match copy_message(id, found.len(), most) {
            Ok((mtype, text)) => found.push(Message {
                mtype,
                mtext: text.into(),
            }),
            Err(Errno::E2BIG) if most < all => most = most.saturating_mul(4).min(all),
            Err(Errno::ENOMSG) => return Ok(found),
            Err(Errno::ENOSYS) => return Err(Unread::Unsupported),
            // copy_msg(): the copy is as long as the buffer, but no longer than kernel.msgmax.
            Err(Errno::EINVAL) => return Err(Unread::TooLong(found.len())),
            Err(_) => return Err(Unread::Changed),
        }
    }
}

fn queue(id: i32, state: &QueueState, messages: Vec<Message>) -> MessageQueue {
    MessageQueue {
        id,
        key: state.key,
        mode: state.mode,
        uid: state.owner.0,
        gid: state.owner.1,
        creator_uid: state.creator.0,
        creator_gid: state.creator.1,
        qbytes: state.qbytes,
        sender: Pid(state.sender),
        receiver: Pid(state.receiver),
        messages,
    }
}

/// What cannot be carried of these queues, which the application uses.
pub fn blockers(tasks: &Tasks, found: &[Found]) -> Vec<Blocker> {
    let inside = inside(tasks);
    let exists = |pid: Pid| Path::new(&format!("/proc/{pid}")).exists();
    let outside = |pid: Pid| pid.0 > 0 && !inside.contains(&pid) && exists(pid);
    found
        .iter()
        .filter_map(|one| refusal(one, outside))
        .collect()
}

fn refusal(found: &Found, outside: impl Fn(Pid) -> bool) -> Option<Blocker> {
    let last = [found.queue.sender, found.queue.receiver];
    let other = last.into_iter().find(|pid| outside(*pid));
    let reason = match (other, found.unread) {
        (Some(pid), _) => format!(
            "PID {pid}, which is outside the application, uses it as well; checkpoint both \
             together"
        ),
        (None, Some(Unread::TooLong(index))) => format!(
            "message {} is longer than kernel.msgmax allows now; raise it with sysctl(8)",
            index + 1
        ),
        (None, Some(Unread::Unsupported)) => "the kernel does not show its messages \
             (CONFIG_CHECKPOINT_RESTORE); remove it before the update"
            .to_owned(),
        // While it runs, that is no wonder.
        (None, Some(Unread::Changed) | None) => return None,
    };
    Some(Blocker {
        pid: found.user,
        fd: None,
        object: format!("System V message queue {}", found.queue.id),
        reason,
    })
}

/// The queues as they are carried, for which there are no [`blockers`].
///
/// # Errors
/// One was used while the application was frozen.
pub fn carried(found: Vec<Found>) -> Result<Vec<MessageQueue>, CheckpointError> {
    let one = |found: Found| match found.unread {
        None => Ok(found.queue),
        Some(_) => Err(CheckpointError::Unstable(format!(
            "System V message queue {} was used by others while the application was frozen",
            found.queue.id
        ))),
    };
    found.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::{Registers, Thread};

    #[test]
    fn a_blocked_call_names_its_queue() {
        let waits = "70 0x8001 0x7ffc0 0x10 0x7 0x0 0x0 0x7ffc 0x7f12\n";
        assert_eq!(waited_for(waits), Some(0x8001));
        assert_eq!(waited_for("69 0x3 0x7ffc0 0x10"), Some(3));
        for other in ["0 0x8001 0x7ffc0", "running", "-1 0x7ffc 0x7f12", ""] {
            assert_eq!(waited_for(other), None, "{other}");
        }
        let regs = |number: i64| Registers {
            orig_rax: number.cast_unsigned(),
            // Only the lower half is an argument.
            rdi: 0xdead_0000_0007,
            ..Registers::default()
        };
        let process = |pid, number| Process {
            pid: Pid(pid),
            threads: vec![Thread {
                regs: regs(number),
                ..Thread::default()
            }],
            ..Process::default()
        };
        let processes = [process(5, libc::SYS_read), process(6, libc::SYS_msgrcv)];
        assert_eq!(
            frozen_waits(&processes).into_iter().collect::<Vec<_>>(),
            [(7, Pid(6))]
        );
    }

    fn found(sender: i32, receiver: i32, unread: Option<Unread>) -> Found {
        Found {
            queue: MessageQueue {
                id: 9,
                sender: Pid(sender),
                receiver: Pid(receiver),
                ..MessageQueue::default()
            },
            user: Pid(5),
            unread,
        }
    }

    #[test]
    fn what_others_use_or_nobody_can_read_is_refused() {
        let refused = |found: Found| {
            let blocker = refusal(&found, |pid| pid == Pid(77));
            blocker
                .map(|blocker| blocker.to_string())
                .unwrap_or_default()
        };
        assert_eq!(refused(found(5, 0, None)), "");
        assert_eq!(refused(found(5, 6, Some(Unread::Changed))), "");
        for shared in [found(5, 77, None), found(77, 5, Some(Unread::Changed))] {
            let said = refused(shared);
            assert!(said.contains("message queue 9: PID 77, which is"), "{said}");
        }
        let long = refused(found(5, 0, Some(Unread::TooLong(2))));
        assert!(long.contains("message 3 is longer"), "{long}");
        let hidden = refused(found(5, 0, Some(Unread::Unsupported)));
        assert!(hidden.contains("CONFIG_CHECKPOINT_RESTORE"), "{hidden}");
    }

    #[test]
    fn one_that_changes_under_the_freeze_is_not_carried() {
        assert_eq!(carried(vec![found(5, 0, None)]).unwrap().len(), 1);
        let error = carried(vec![found(5, 0, Some(Unread::Changed))]).unwrap_err();
        assert!(error.to_string().contains("message queue 9"), "{error}");
    }
}
