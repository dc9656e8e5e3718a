//! POSIX message queues, as the iterators found them. Nothing is borrowed: what is received is
//! gone, and nothing else shows what is in a queue.

use super::refuse::O_PATH;
use crate::bpf::events::{FileRec, MqueueDataRec, MqueueFlag as Flag, MqueueRec};
use crate::bpf::iter::{Detail, File, Files};
use crate::model::frozen::{MqueueNotify, MqueueState, QueuedMessage};
use crate::model::ids::Pid;
use crate::model::map::{Map, Set};
use nix::libc;
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;

/// Why a queue that somebody else has open is not carried.
pub(super) const OPEN_OUTSIDE: &str =
    "it is open outside the application as well; close it there, or checkpoint both together";

/// Its name in messages.
pub fn object(queue: &MqueueRec) -> String {
    format!(
        "POSIX message queue /{}",
        String::from_utf8_lossy(&queue.name_bytes())
    )
}

/// Whether there is anything to be read by [`Iterators::messages`].
///
/// [`Iterators::messages`]: crate::bpf::iter::Iterators::messages
#[must_use]
pub fn has_messages(files: &[File]) -> bool {
    let waiting = |file: &File| matches!(&file.detail, Detail::Mqueue(queue) if queue.curmsgs > 0);
    files.iter().any(waiting)
}

/// Who has which queue open, by the queue's inode.
#[derive(Debug, Default)]
pub struct Queues {
    /// Open file descriptions.
    open: Map<u64, u32>,
    /// Processes with a descriptor that mq_notify(3) takes.
    users: Set<(u64, u32)>,
    pids: Set<u32>,
}

impl Queues {
    pub(super) fn of(found: &Files) -> Self {
        let mut queues = Self::default();
        let mut known = Set::default();
        for file in &found.files {
            queues.pids.insert(file.rec.tgid);
            let Detail::Mqueue(queue) = &file.detail else {
                continue;
            };
            if known.insert(file.rec.file) {
                *queues.open.entry(queue.inode).or_default() += 1;
            }
            if file.rec.flags & O_PATH == 0 {
                queues.users.insert((queue.inode, file.rec.tgid));
            }
        }
        queues
    }

    /// Whether somebody else has it open too.
    pub(super) fn outside(&self, queue: &MqueueRec) -> Option<String> {
        let open = self.open.get(&queue.inode).copied().unwrap_or_default();
        (queue.open > open).then(|| OPEN_OUTSIDE.into())
    }

    /// Why the registration of who is told of messages is not carried.
    pub(super) fn notice_refusal(&self, queue: &MqueueRec) -> Option<String> {
        if queue.flags & Flag::NOTIFY == 0 {
            return None;
        }
        let pid = queue.notify_pid;
        if queue.flags & Flag::ENDED != 0 || !self.pids.contains(&pid) {
            return Some(format!(
                "PID {pid}, which is outside the application or has ended, is to be told of its \
                 messages; have it call mq_notify(3) without a notification"
            ));
        }
        if queue.notify == libc::SIGEV_THREAD {
            return Some(format!(
                "PID {pid} is told of its messages by a thread (SIGEV_THREAD of mq_notify(3)), \
                 which is not carried yet; use a signal"
            ));
        }
        (!self.users.contains(&(queue.inode, pid))).then(|| {
            format!(
                "PID {pid} is to be told of its messages and has closed it; have it receive \
                 the next one"
            )
        })
    }
}

/// What is in the queues, by their inodes.
#[derive(Debug, Default)]
pub struct Messages(BTreeMap<u64, Vec<Part>>);

/// A message, as far as its parts have come.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    size: usize,
    message: QueuedMessage,
}

impl Messages {
    /// Puts together what a pass has found.
    pub(super) fn of(records: &[MqueueDataRec]) -> Self {
        let mut messages = Self::default();
        messages.add(records);
        messages
    }

    /// Adds what another pass has found, but for queues that are known.
    pub(super) fn add(&mut self, records: &[MqueueDataRec]) {
        let known: Set<u64> = self.0.keys().copied().collect();
        for rec in records.iter().filter(|rec| !known.contains(&rec.inode)) {
            let parts = self.0.entry(rec.inode).or_default();
            if rec.offset == 0 {
                parts.push(Part {
                    size: rec.size as usize,
                    message: QueuedMessage {
                        priority: rec.priority,
                        text: ByteBuf::new(),
                    },
                });
            }
            let len = (rec.len as usize).min(rec.data.len());
            if let Some(part) = parts.last_mut() {
                part.message.text.extend_from_slice(&rec.data[..len]);
            }
        }
    }

    /// All that a queue says to have.
    fn take(&self, queue: &MqueueRec) -> Result<Vec<QueuedMessage>, String> {
        let parts = self.0.get(&queue.inode).map_or(&[][..], Vec::as_slice);
        let whole = parts
            .iter()
            .all(|part| part.message.text.len() == part.size);
        let bytes: usize = parts.iter().map(|part| part.size).sum();
        let count = i64::try_from(parts.len()).unwrap_or(i64::MAX);
        if !whole || bytes as u64 != queue.qsize || count != queue.curmsgs {
            return Err("others used it while the application was frozen; try again".into());
        }
        Ok(parts.iter().map(|part| part.message.clone()).collect())
    }
}

/// A queue as the image carries it, from its records; `Err` tells why not.
pub fn state(
    file: &FileRec,
    queue: &MqueueRec,
    messages: &Messages,
) -> Result<MqueueState, String> {
    let signal = || {
        // One that has executed another program meanwhile gets none (__do_notify()).
        let sent = queue.notify == libc::SIGEV_SIGNAL && queue.flags & Flag::EXECED == 0;
        sent.then_some(queue.notify_sig)
    };
    Ok(MqueueState {
        name: ByteBuf::from(queue.name_bytes()),
        unlinked: file.nlink == 0,
        mode: file.mode & 0o7777,
        uid: queue.uid,
        gid: queue.gid,
        account: queue.account,
        maxmsg: queue.maxmsg,
        msgsize: queue.msgsize,
        messages: messages.take(queue)?,
        notify: (queue.flags & Flag::NOTIFY != 0).then(|| MqueueNotify {
            pid: Pid(queue.notify_pid.cast_signed()),
            signal: signal(),
            value: queue.notify_value,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(inode: u64, priority: u32, size: u32, offset: u32, bytes: &[u8]) -> MqueueDataRec {
        let mut rec = MqueueDataRec {
            inode,
            priority,
            size,
            offset,
            len: u32::try_from(bytes.len()).unwrap(),
            ..MqueueDataRec::default()
        };
        rec.data[..bytes.len()].copy_from_slice(bytes);
        rec
    }

    fn queue(curmsgs: i64, qsize: u64) -> MqueueRec {
        MqueueRec {
            inode: 7,
            curmsgs,
            qsize,
            ..MqueueRec::default()
        }
    }

    #[test]
    fn messages_are_put_together_and_must_be_whole() {
        let records = [
            part(7, 9, 5, 0, b"abc"),
            part(7, 9, 5, 3, b"de"),
            part(7, 1, 0, 0, b""),
            part(8, 2, 1, 0, b"x"),
        ];
        let messages = Messages::of(&records);
        let found = messages.take(&queue(2, 5)).unwrap();
        let found: Vec<_> = found.iter().map(|m| (m.priority, &m.text[..])).collect();
        assert_eq!(found, [(9, &b"abcde"[..]), (1, b"")]);
        for other in [queue(3, 5), queue(2, 6), queue(0, 0)] {
            assert!(messages.take(&other).is_err(), "{other:?}");
        }
        let cut = Messages::of(&records[..1]);
        assert!(cut.take(&queue(1, 5)).is_err());
    }

    #[test]
    fn a_queue_that_another_pass_sees_again_is_not_doubled() {
        let mut messages = Messages::of(&[part(7, 1, 1, 0, b"a")]);
        messages.add(&[part(7, 1, 1, 0, b"a"), part(9, 1, 1, 0, b"b")]);
        assert_eq!(messages.take(&queue(1, 1)).unwrap().len(), 1);
        assert_eq!(messages.0[&9].len(), 1);
    }

    fn open(file: u64, tgid: u32, flags: u32, detail: MqueueRec) -> File {
        File {
            rec: FileRec {
                file,
                tgid,
                flags,
                ..FileRec::default()
            },
            detail: Detail::Mqueue(Box::new(detail)),
        }
    }

    #[test]
    fn queues_that_others_use_are_refused() {
        let told = |pid, notify, flags| MqueueRec {
            open: 2,
            flags,
            notify,
            notify_pid: pid,
            ..queue(0, 0)
        };
        let rec = told(0, 0, 0);
        let files = |second| Files {
            // The first is shared by two processes, one of which cannot register.
            files: vec![open(1, 5, 2, rec), open(1, 6, 2, rec), second],
            ..Files::default()
        };
        let own = Queues::of(&files(open(2, 8, O_PATH, rec)));
        assert_eq!(own.outside(&rec), None);
        let shared = Queues::of(&files(open(1, 8, 2, rec)));
        assert_eq!(shared.outside(&rec).as_deref(), Some(OPEN_OUTSIDE));

        let refused = |rec: MqueueRec| own.notice_refusal(&rec).unwrap_or_default();
        assert_eq!(refused(told(77, 0, 0)), "");
        for notify in [libc::SIGEV_SIGNAL, libc::SIGEV_NONE] {
            assert_eq!(refused(told(6, notify, Flag::NOTIFY)), "");
        }
        let said = refused(told(77, 0, Flag::NOTIFY));
        assert!(said.contains("PID 77, which is outside"), "{said}");
        let said = refused(told(5, 0, Flag::NOTIFY | Flag::ENDED));
        assert!(said.contains("has ended"), "{said}");
        let said = refused(told(5, libc::SIGEV_THREAD, Flag::NOTIFY));
        assert!(said.contains("SIGEV_THREAD"), "{said}");
        let said = refused(told(8, 0, Flag::NOTIFY));
        assert!(said.contains("has closed it"), "{said}");
    }

    #[test]
    fn one_that_has_executed_another_program_gets_no_signal() {
        let notify = |flags| {
            let rec = MqueueRec {
                flags: Flag::NOTIFY | flags,
                notify_sig: 12,
                notify_pid: 5,
                ..queue(0, 0)
            };
            state(&FileRec::default(), &rec, &Messages::default())
                .unwrap()
                .notify
                .unwrap()
        };
        assert_eq!(notify(0).signal, Some(12));
        assert_eq!(notify(Flag::EXECED).signal, None);
    }
}
