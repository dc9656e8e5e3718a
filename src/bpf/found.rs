//! What the passes of the iterators find, and what their records say in words.

use super::events::{
    AioRec, EpollItemRec, EpollRec, EventfdRec, FileRec, LockRec, MemberRec, MmRec, MqueueDataRec,
    MqueueRec, PidfdRec, PipeRec, PressureRec, ProcessFlag, ProcessRec, RecKind, RegistersRec,
    SemUndoRec, SigactionsRec, SignalfdRec, SockRec, ThreadRec, TimerRec, TimerfdRec, TtyDataRec,
    TtyRec, UringRec, VmaRec, WaitingDataRec, WaitingRec, WatchRec,
};
use super::record::{Malformed, Raw, c_text};
use crate::model::frozen::Registers;
use crate::sys::xstate::Layout;
use std::collections::HashMap;

/// What a pass over the tasks found. Zombies are included.
#[derive(Clone, Debug, Default)]
pub struct Tasks {
    /// Every thread.
    pub threads: Vec<ThreadRec>,
    /// Every process.
    pub processes: Vec<ProcessRec>,
    /// Every address space; one shared by several processes (`CLONE_VM`) is repeated.
    pub mms: Vec<MmRec>,
    /// The signal actions of every process that still has any (zombies do not).
    pub sigactions: Vec<SigactionsRec>,
    /// Every POSIX timer.
    pub timers: Vec<TimerRec>,
    /// Every AIO context.
    pub aio: Vec<AioRec>,
    /// What is undone of System V semaphore operations when a process ends.
    pub sem_undos: Vec<SemUndoRec>,
    /// Registers of frozen threads by TID, if they were asked for; not of all, see
    /// [`Iterators::frozen_tasks`](super::iter::Iterators::frozen_tasks).
    pub registers: HashMap<u32, ThreadRegisters>,
}

/// The registers of a thread, as ptrace(2) would tell them.
#[derive(Clone, Debug)]
pub struct ThreadRegisters {
    /// General registers.
    pub general: Registers,
    /// Extended registers in the standard XSAVE format.
    pub extended: Vec<u8>,
}

/// An open descriptor.
#[derive(Clone, Debug)]
pub struct File {
    /// What all descriptors have.
    pub rec: FileRec,
    /// What its kind has besides.
    pub detail: Detail,
}

/// The state of some kinds of files, read in the same pass. What is large lies elsewhere: ten
/// thousand eventfds would take the room of as many sockets.
#[derive(Clone, Debug)]
pub enum Detail {
    /// Nothing beyond the [`FileRec`].
    None,
    /// An eventfd.
    Eventfd(EventfdRec),
    /// A pipe or an open FIFO.
    Pipe(PipeRec),
    /// A timerfd.
    Timerfd(TimerfdRec),
    /// An epoll instance that polls devices in its own way.
    Epoll(EpollRec),
    /// A signalfd.
    Signalfd(SignalfdRec),
    /// A pidfd.
    Pidfd(PidfdRec),
    /// A socket.
    Socket(Box<SockRec>),
    /// Either end of a pseudo-terminal.
    Tty(Box<TtyRec>),
    /// An io_uring instance.
    Uring(UringRec),
    /// A file of pressure stall information with a trigger.
    Pressure(PressureRec),
    /// A POSIX message queue.
    Mqueue(Box<MqueueRec>),
}

/// What a pass over the descriptors found.
#[derive(Clone, Debug, Default)]
pub struct Files {
    /// Every descriptor of every descriptor table. A table shared by several processes
    /// (`CLONE_FILES`) is reported once per process: [`FileRec::files`] tells.
    pub files: Vec<File>,
    /// What the epoll instances among them watch.
    pub epoll_items: Vec<EpollItemRec>,
    /// What the inotify instances among them watch.
    pub watches: Vec<WatchRec>,
    /// Locks and leases on the files among them, whoever holds them.
    pub locks: Vec<LockRec>,
    /// Multicast groups that the sockets among them are members of, the newest first for each.
    pub members: Vec<MemberRec>,
    /// What is queued in the pseudo-terminals among them, in order for each.
    pub tty_data: Vec<TtyDataRec>,
    /// What is in the POSIX message queues among them, in order for each; only if
    /// [`Iterators::messages`](super::iter::Iterators::messages) was asked for it.
    pub messages: Vec<MqueueDataRec>,
}

/// A connection that nobody has accepted.
#[derive(Clone, Debug)]
pub struct Waiting {
    /// What the kernel keeps of it.
    pub rec: WaitingRec,
    /// What it has received.
    pub data: Vec<WaitingDataRec>,
}

#[cfg(test)]
impl WaitingDataRec {
    /// One with these bytes.
    pub fn with(seq: u32, bytes: &[u8]) -> Self {
        let mut rec = Self {
            seq,
            len: u32::try_from(bytes.len()).unwrap_or(u32::MAX),
            ..Self::default()
        };
        rec.data[..bytes.len()].copy_from_slice(bytes);
        rec
    }
}

impl Waiting {
    pub(super) fn new(rec: WaitingRec) -> Self {
        Self {
            rec,
            data: Vec::new(),
        }
    }
}

impl Detail {
    /// What a record says that follows that of a file.
    pub(super) fn decode(raw: &Raw<'_>) -> Result<Self, Malformed> {
        Ok(match raw.kind {
            RecKind::EPOLL => Self::Epoll(raw.decode()?),
            RecKind::EVENTFD => Self::Eventfd(raw.decode()?),
            RecKind::PIPE => Self::Pipe(raw.decode()?),
            RecKind::TIMERFD => Self::Timerfd(raw.decode()?),
            RecKind::SIGNALFD => Self::Signalfd(raw.decode()?),
            RecKind::PIDFD => Self::Pidfd(raw.decode()?),
            RecKind::TTY => Self::Tty(Box::new(raw.decode()?)),
            RecKind::URING => Self::Uring(raw.decode()?),
            RecKind::PRESSURE => Self::Pressure(raw.decode()?),
            RecKind::MQUEUE => Self::Mqueue(Box::new(raw.decode()?)),
            _ => Self::Socket(Box::new(raw.decode()?)),
        })
    }
}

impl ThreadRec {
    /// The thread's name.
    #[must_use]
    pub fn comm(&self) -> String {
        c_text(&self.comm)
    }

    /// Whether the thread has exited and waits to be reaped.
    #[must_use]
    pub fn is_zombie(&self) -> bool {
        self.exit_state != 0
    }
}

impl RegistersRec {
    /// What it says, if it is of a processor of this layout.
    #[must_use]
    pub fn read(&self, layout: &Layout) -> Option<ThreadRegisters> {
        let kept = self.xstate.get(..self.xstate_len as usize)?;
        Some(ThreadRegisters {
            general: self.general(),
            extended: layout.standard(kept, self.user_xfeatures, self.pkru)?,
        })
    }

    /// In the order of `struct pt_regs`.
    fn general(&self) -> Registers {
        /// With FRED the kernel keeps more in the words of segments.
        const SEGMENT: u64 = 0xffff;
        let word = &self.general;
        Registers {
            r15: word[0],
            r14: word[1],
            r13: word[2],
            r12: word[3],
            rbp: word[4],
            rbx: word[5],
            r11: word[6],
            r10: word[7],
            r9: word[8],
            r8: word[9],
            rax: word[10],
            rcx: word[11],
            rdx: word[12],
            rsi: word[13],
            rdi: word[14],
            orig_rax: word[15],
            rip: word[16],
            cs: word[17] & SEGMENT,
            eflags: word[18],
            rsp: word[19],
            ss: word[20] & SEGMENT,
            fs_base: self.fs_base,
            gs_base: self.gs_base,
            ds: self.ds.into(),
            es: self.es.into(),
            fs: self.fs.into(),
            gs: self.gs.into(),
        }
    }
}

impl FileRec {
    /// The start of the name the file has in its directory, or the kernel's name for its kind.
    #[must_use]
    pub fn name(&self) -> String {
        c_text(&self.name)
    }

    /// Device number of the filesystem as stat(2) encodes it.
    #[must_use]
    pub fn st_dev(&self) -> u64 {
        user_dev(self.dev)
    }

    /// Number of the device, for device files, as stat(2) encodes it.
    #[must_use]
    pub fn st_rdev(&self) -> u64 {
        user_dev(self.rdev)
    }
}

impl MqueueRec {
    /// Its name in the mqueue filesystem, without the slash that user space puts in front.
    #[must_use]
    pub fn name_bytes(&self) -> Vec<u8> {
        let bytes = self.name.iter().map(|c| c.to_ne_bytes()[0]);
        bytes.take_while(|byte| *byte != 0).collect()
    }
}

impl VmaRec {
    /// The name of a special or named anonymous mapping, or the start of the file's name.
    #[must_use]
    pub fn name(&self) -> String {
        c_text(&self.name)
    }

    /// Device number of the file as stat(2) encodes it.
    #[must_use]
    pub fn st_dev(&self) -> u64 {
        user_dev(self.dev)
    }
}

impl SockRec {
    /// The address of a Unix socket: empty if unnamed, starting with NUL if abstract.
    #[must_use]
    pub fn unix_path(&self) -> Vec<u8> {
        let len = (self.path_len as usize).min(self.path.len());
        self.path[..len]
            .iter()
            .map(|c| c.to_ne_bytes()[0])
            .collect()
    }
}

/// Turns the kernel's own device number (major << 20 | minor) into the one user space sees.
#[must_use]
pub fn user_dev(dev: u32) -> u64 {
    nix::sys::stat::makedev(u64::from(dev >> 20), u64::from(dev & 0xf_ffff))
}

impl ProcessRec {
    /// Whether this process leads its session.
    #[must_use]
    pub fn is_session_leader(&self) -> bool {
        self.flags & ProcessFlag::SESSION_LEADER != 0
    }
}
