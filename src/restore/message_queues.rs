//! System V message queues: made with their old ids, filled, and used once by the processes that
//! used them last, which is how the kernel tells later whose they are.

use super::RestoreError;
use super::signals::{number, words_to};
use super::supervisor::Supervisor;
use super::sysv::make_with_id;
use super::tape::Script;
use crate::model::frozen::{Application, MessageQueue};
use crate::model::ids::Pid;
use crate::sys::sysv::{
    QueueState, create_queue, discard_message, queue_state, remove_queue, send_message, set_queue,
};
use nix::errno::Errno;
use nix::libc;
use std::collections::BTreeSet;
use std::path::Path;

/// What a queue may hold while it is filled: all there is, also where its limit was lowered
/// below that. The kernel takes an `int` (msgctl_down()).
const ROOM: u64 = i32::MAX as u64;

fn refused(id: i32, call: &str) -> impl FnOnce(Errno) -> RestoreError + use<> {
    RestoreError::system(format!("{call} of System V message queue {id}"))
}

fn taken(queue: &MessageQueue) -> RestoreError {
    RestoreError::QueueInUse {
        id: queue.id,
        key: queue.key,
    }
}

/// Makes every queue and fills it; the ids of new ones are added to `created`. One that the
/// checkpoint left behind on this kernel is used as it is, but for its messages.
///
/// # Errors
/// An id or key is in use, or the kernel refuses a step.
pub fn create_all(app: &Application, created: &mut Vec<i32>) -> Result<(), RestoreError> {
    for queue in &app.header.message_queues {
        let id = queue.id;
        match queue_state(id) {
            Ok(state) if is_left(queue, &state, is_used_by) => empty(id)?,
            Ok(_) => return Err(taken(queue)),
            // There is none of this number, or of this sequence number.
            Err(Errno::EINVAL | Errno::EIDRM) => {
                create(queue)?;
                created.push(id);
            }
            Err(errno) => return Err(refused(id, "msgctl(IPC_STAT)")(errno)),
        }
        configure(queue, ROOM)?;
        for (index, message) in (1..).zip(&queue.messages) {
            send_message(id, message.mtype, &message.mtext).map_err(|errno| {
                let len = message.mtext.len();
                let what = format!(
                    "msgsnd of message {index}, {len} bytes, which kernel.msgmax must allow, to \
                     System V message queue {id}"
                );
                RestoreError::system(what)(errno)
            })?;
        }
    }
    Ok(())
}

/// Whether this is the queue itself, which outlived the application and which nobody took over.
fn is_left(queue: &MessageQueue, state: &QueueState, used_by: impl Fn(Pid) -> bool) -> bool {
    let creator = (queue.creator_uid, queue.creator_gid);
    let same = (state.key, state.creator) == (queue.key, creator);
    same && ![state.sender, state.receiver]
        .map(Pid)
        .iter()
        .any(|pid| used_by(*pid))
}

/// The application's own processes do not exist yet. What this process did itself is what an
/// earlier restorer of the same PID did.
fn is_used_by(pid: Pid) -> bool {
    let own = Pid(std::process::id().cast_signed());
    pid.0 > 0 && pid != own && Path::new(&format!("/proc/{pid}")).exists()
}

fn empty(id: i32) -> Result<(), RestoreError> {
    loop {
        match discard_message(id) {
            Ok(()) => {}
            Err(Errno::ENOMSG) => return Ok(()),
            Err(errno) => return Err(refused(id, "msgrcv")(errno)),
        }
    }
}

fn create(queue: &MessageQueue) -> Result<(), RestoreError> {
    let mode = i32::try_from(queue.mode & 0o777).unwrap_or(0);
    make_with_id(
        "msg_next_id",
        queue.id,
        (queue.creator_uid, queue.creator_gid),
        || create_queue(queue.key, mode),
        remove_queue,
        |errno| match errno {
            Errno::EEXIST => taken(queue),
            errno => refused(queue.id, "msgget")(errno),
        },
    )
}

fn configure(queue: &MessageQueue, qbytes: u64) -> Result<(), RestoreError> {
    set_queue(queue.id, queue.uid, queue.gid, queue.mode, qbytes)
        .map_err(refused(queue.id, "msgctl(IPC_SET)"))
}

/// Who is to use a queue once: the last sender and the last receiver, or one of them for both
/// where the other is gone.
fn users(queue: &MessageQueue, exists: impl Fn(Pid) -> bool) -> Option<(Pid, Pid)> {
    let sender = Some(queue.sender).filter(|pid| exists(*pid));
    let receiver = Some(queue.receiver).filter(|pid| exists(*pid));
    Some((sender.or(receiver)?, receiver.or(sender)?))
}

/// A type that no message of a queue has.
fn unused_type(queue: &MessageQueue) -> u64 {
    let used: BTreeSet<i64> = queue.messages.iter().map(|m| m.mtype).collect();
    let unused = (1..).find(|mtype| !used.contains(mtype));
    unused.map_or(1, i64::cast_unsigned)
}

impl Supervisor<'_> {
    /// Has the last users of each queue send and receive an empty message. Before their
    /// credentials are put back, which need not allow that any more.
    ///
    /// # Errors
    /// The kernel refuses a call.
    pub fn use_message_queues(&mut self) -> Result<(), RestoreError> {
        let app = self.app;
        for queue in &app.header.message_queues {
            let Some((sender, receiver)) = users(queue, |pid| self.tapes.contains_key(&pid)) else {
                continue;
            };
            let (id, mtype) = (number(queue.id), unused_type(queue));
            let no_wait = number(libc::IPC_NOWAIT);
            let tape = self.tape(sender)?;
            tape.clear_data();
            let text = words_to(tape, &[mtype])?;
            let mut script = Script::default();
            script.zero(libc::SYS_msgsnd, &[id, text, 0, no_wait]);
            self.run(sender, sender.leader(), &script)?;
            let tape = self.tape(receiver)?;
            tape.clear_data();
            let text = words_to(tape, &[0])?;
            let mut script = Script::default();
            script.zero(libc::SYS_msgrcv, &[id, text, 0, mtype, no_wait]);
            self.run(receiver, receiver.leader(), &script)?;
        }
        Ok(())
    }
}

/// Limits those that were filled, now that nobody sends any more.
///
/// # Errors
/// The kernel refuses.
pub fn limit(app: &Application) -> Result<(), RestoreError> {
    for queue in &app.header.message_queues {
        configure(queue, queue.qbytes)?;
    }
    Ok(())
}

/// Takes back what was made, after a failure.
pub fn remove(created: &[i32]) {
    for id in created {
        let _ = remove_queue(*id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::Message;

    fn queue(sender: i32, receiver: i32, types: &[i64]) -> MessageQueue {
        let message = |mtype: &i64| Message {
            mtype: *mtype,
            ..Message::default()
        };
        MessageQueue {
            key: 7,
            creator_uid: 33,
            sender: Pid(sender),
            receiver: Pid(receiver),
            messages: types.iter().map(message).collect(),
            ..MessageQueue::default()
        }
    }

    #[test]
    fn the_last_users_use_it_and_stand_in_for_those_who_are_gone() {
        let users = |sender, receiver| {
            let found = users(&queue(sender, receiver, &[]), |pid| [5, 6].contains(&pid.0));
            found.map(|(sender, receiver)| (sender.0, receiver.0))
        };
        assert_eq!(users(5, 6), Some((5, 6)));
        assert_eq!(users(5, 0), Some((5, 5)));
        assert_eq!(users(99, 6), Some((6, 6)));
        assert_eq!(users(0, 0), None);
        assert_eq!(users(99, 0), None);
    }

    #[test]
    fn the_empty_message_is_not_taken_for_another() {
        assert_eq!(unused_type(&queue(5, 6, &[])), 1);
        assert_eq!(unused_type(&queue(5, 6, &[2, 1, 7, 1, 4])), 3);
        assert_eq!(unused_type(&queue(5, 6, &[i64::MAX, -1, 0])), 1);
    }

    #[test]
    fn a_queue_is_the_one_that_was_left_or_anothers() {
        let state = QueueState {
            key: 7,
            creator: (33, 0),
            sender: 5,
            receiver: 77,
            ..QueueState::default()
        };
        let is_left = |state: QueueState, living: i32| {
            super::is_left(&queue(5, 6, &[]), &state, |pid| pid.0 == living)
        };
        assert!(is_left(state, 1));
        assert!(!is_left(state, 77), "somebody uses it");
        assert!(!is_left(QueueState { key: 8, ..state }, 1));
        let creator = (34, 0);
        assert!(!is_left(QueueState { creator, ..state }, 1));
    }
}
