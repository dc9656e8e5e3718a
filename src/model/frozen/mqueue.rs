//! POSIX message queues.

use crate::model::ids::Pid;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// A POSIX message queue, mq_overview(7).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MqueueState {
    /// Its name, without the slash in front.
    pub name: ByteBuf,
    /// The name leads to it no more (mq_unlink(3)).
    pub unlinked: bool,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
    /// User whose `RLIMIT_MSGQUEUE` it counts for: who made it.
    pub account: u32,
    /// Messages that it has room for, `mq_maxmsg`.
    pub maxmsg: i64,
    /// Bytes that each may have, `mq_msgsize`.
    pub msgsize: i64,
    /// What was sent and not received, in the order in which it will be.
    pub messages: Vec<QueuedMessage>,
    /// Who is told when a message comes to the empty queue.
    pub notify: Option<MqueueNotify>,
}

/// A message in a POSIX message queue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedMessage {
    /// Priority; the highest comes first.
    pub priority: u32,
    /// Text.
    pub text: ByteBuf,
}

/// A registration by mq_notify(3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MqueueNotify {
    /// Process that is told.
    pub pid: Pid,
    /// Signal that it gets; `None` for `SIGEV_NONE`: nobody else can be told.
    pub signal: Option<i32>,
    /// `sigev_value`, as the eight bytes that it takes.
    pub value: u64,
}
