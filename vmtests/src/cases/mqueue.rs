//! POSIX message queues.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use nix::sys::uio::pread;

use super::child::Child;
use super::probe::{blocked_thread, check_pattern, join, pattern, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("mqueue", messages),
    Entry::carried("mqueue_large", large),
    Entry::carried("mqueue_waits", waits),
    Entry::carried("mqueue_unlinked", unlinked),
    Entry::carried("mqueue_in_flight", in_flight),
];

/// A descriptor of a queue.
pub(super) struct Queue(pub(super) OwnedFd);

/// Largest message of any queue here.
pub(super) const MSGSIZE: usize = 9000;

impl Queue {
    pub(super) fn create(name: &CStr, maxmsg: i64, msgsize: usize) -> Result<Queue> {
        let flags = libc::O_CREAT | libc::O_EXCL | libc::O_RDWR;
        // SAFETY: plain data for which zero is valid.
        let mut attr: libc::mq_attr = unsafe { std::mem::zeroed() };
        (attr.mq_maxmsg, attr.mq_msgsize) = (maxmsg, i64::try_from(msgsize)?);
        // SAFETY: the name is a C string; the attributes are read.
        let fd = unsafe { libc::mq_open(name.as_ptr(), flags, 0o600, &raw const attr) };
        sys("mq_open", fd.into())?;
        // SAFETY: a new descriptor, owned by nobody else.
        Ok(Queue(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(super) fn open(name: &CStr, flags: i32) -> Result<Queue> {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::mq_open(name.as_ptr(), flags) };
        sys("mq_open", fd.into())?;
        // SAFETY: a new descriptor, owned by nobody else.
        Ok(Queue(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    pub(super) fn send(&self, priority: u32, text: &[u8]) -> Result<(), Errno> {
        // SAFETY: the kernel reads so many bytes.
        let sent = unsafe { libc::mq_send(self.fd(), text.as_ptr().cast(), text.len(), priority) };
        Errno::result(sent).map(drop)
    }

    pub(super) fn receive(&self) -> Result<(u32, Vec<u8>), Errno> {
        self.receive_until(libc::timespec {
            tv_sec: i64::MAX / 2_000_000_000,
            tv_nsec: 0,
        })
    }

    fn receive_until(&self, deadline: libc::timespec) -> Result<(u32, Vec<u8>), Errno> {
        let (mut text, mut priority) = (vec![0_u8; MSGSIZE], 0);
        // SAFETY: the kernel writes at most so many bytes and the priority.
        let got = unsafe {
            libc::mq_timedreceive(
                self.fd(),
                text.as_mut_ptr().cast(),
                text.len(),
                &raw mut priority,
                &raw const deadline,
            )
        };
        text.truncate(usize::try_from(Errno::result(got)?).unwrap_or(0));
        Ok((priority, text))
    }

    /// Flags, room and number of messages.
    pub(super) fn attributes(&self) -> Result<[i64; 4]> {
        // SAFETY: plain data for which zero is valid; the kernel fills it.
        let mut attr: libc::mq_attr = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes one mq_attr.
        let got = unsafe { libc::mq_getattr(self.fd(), &raw mut attr) };
        sys("mq_getattr", got.into())?;
        Ok([
            attr.mq_flags,
            attr.mq_maxmsg,
            attr.mq_msgsize,
            attr.mq_curmsgs,
        ])
    }

    /// What read(2) shows: bytes, and who is told. To close any descriptor of the queue would
    /// take back the word of the process, so none is opened for it.
    pub(super) fn shown(&self) -> Result<String> {
        let mut text = [0; 128];
        let got = pread(&self.0, &mut text, 0)?;
        Ok(String::from_utf8_lossy(&text[..got]).into_owned())
    }

    fn file(&self) -> Result<File> {
        Ok(File::from(self.0.try_clone()?))
    }

    /// Owner, group, mode, links.
    fn status(&self) -> Result<(u32, u32, u32, u64)> {
        let found = self.file()?.metadata()?;
        Ok((found.uid(), found.gid(), found.mode(), found.nlink()))
    }

    fn is_same(&self, other: &Queue) -> Result<bool> {
        Ok(self.file()?.metadata()?.ino() == other.file()?.metadata()?.ino())
    }

    pub(super) fn notify(&self, event: Option<&libc::sigevent>) -> Result<(), Errno> {
        let event = event.map_or(std::ptr::null(), std::ptr::from_ref);
        // SAFETY: the kernel reads one sigevent, if any, and for SIGEV_THREAD what it points to.
        let done = unsafe { libc::syscall(libc::SYS_mq_notify, self.fd(), event) };
        Errno::result(done).map(drop)
    }
}

pub(super) fn unlink(name: &CStr) -> Result<()> {
    // SAFETY: a C string.
    sys(
        "mq_unlink",
        unsafe { libc::mq_unlink(name.as_ptr()) }.into(),
    )
    .map(|_| ())
}

fn getfl(fd: impl AsFd) -> Result<i32> {
    fcntl(fd, FcntlArg::F_GETFL).context("F_GETFL")
}

/// Messages of all sizes in the order of their priorities; descriptors of several kinds; owner,
/// mode and room that a new queue would not have.
fn messages(case: &Case) -> Result<()> {
    let name = c"/tracker-case";
    let queue = Queue::create(name, 20, MSGSIZE)?;
    // Priority and length, in the order in which they are sent: up to three segments, and where
    // they meet.
    let sizes = [
        (5, 17),
        (1, 0),
        (32_767, MSGSIZE),
        (5, 4047),
        (0, 4048),
        (5, 4049),
        (7, 8136),
        (7, 8137),
        (3, 1023),
        (2, 1024),
        (4, 1),
        (6, 2046),
    ];
    for (seed, (priority, len)) in (20..).zip(sizes) {
        queue.send(priority, &pattern(seed, len))?;
    }
    // One more, which is taken out again: there is a gap in the tree.
    queue.send(31_000, b"gone")?;
    let first = queue.receive()?;
    ensure!(first.0 == 32_767, "Priority {} came first", first.0);
    check_pattern("The first message", 22, &first.1)?;
    ensure!(
        queue.receive()? == (31_000, b"gone".to_vec()),
        "Not the second"
    );

    let reader = Queue::open(name, libc::O_RDONLY | libc::O_NONBLOCK)?;
    let shared = reader.0.try_clone()?;
    let mut by_path = File::options()
        .read(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/mqueue/tracker-case")?;
    let mut head = [0; 6];
    by_path.read_exact(&mut head)?;
    ensure!(&head == b"QSIZE:", "It shows {head:?}");
    let path_only = File::options()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open("/dev/mqueue/tracker-case")?;
    fchown(&queue.0, Some(33), Some(44))?;
    queue
        .file()?
        .set_permissions(std::fs::Permissions::from_mode(0o646))?;
    let properties = || -> Result<_> {
        let flags = [
            getfl(&queue.0)?,
            getfl(&reader.0)?,
            getfl(&shared)?,
            getfl(&by_path)?,
            getfl(&path_only)?,
        ];
        Ok((
            flags,
            queue.status()?,
            queue.attributes()?,
            reader.attributes()?,
        ))
    };
    let before = properties()?;

    case.ready()?;

    let after = properties()?;
    ensure!(before == after, "{after:?}, not {before:?}");
    fcntl(&shared, FcntlArg::F_SETFL(OFlag::empty()))?;
    ensure!(
        getfl(&reader.0)? & libc::O_NONBLOCK == 0,
        "It is not shared"
    );
    fcntl(&shared, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let again = Queue::open(name, libc::O_WRONLY)?;
    ensure!(queue.is_same(&again)?, "The name leads to another one");
    ensure!(
        path_only.metadata()?.ino() == by_path.metadata()?.ino()
            && reader.is_same(&again)?
            && by_path.metadata()?.ino() == again.file()?.metadata()?.ino(),
        "There are several"
    );
    let mut rest = String::new();
    by_path.read_to_string(&mut rest)?;
    let bytes: usize = sizes.iter().map(|(_, len)| len).sum::<usize>() - MSGSIZE;
    ensure!(rest.starts_with(&bytes.to_string()), "It shows {rest}");
    ensure!(
        reader.send(1, b"") == Err(Errno::EBADF),
        "What was for reading is for writing"
    );
    let mut order: Vec<_> = (20..).zip(sizes).filter(|(seed, _)| *seed != 22).collect();
    // Stable: of one priority, the oldest first.
    order.sort_by_key(|(_, (priority, _))| std::cmp::Reverse(*priority));
    again.send(7, b"after")?;
    for (seed, (wanted, len)) in order {
        if wanted == 6 {
            ensure!(
                reader.receive()? == (7, b"after".to_vec()),
                "Not the new one"
            );
        }
        let (priority, text) = reader.receive()?;
        ensure!(
            (priority, text.len()) == (wanted, len),
            "Priority {priority} with {} bytes, not {wanted} with {len}",
            text.len()
        );
        check_pattern("A message", seed, &text)?;
    }
    ensure!(reader.receive() == Err(Errno::EAGAIN), "More than was sent");
    unlink(name)
}

/// More than the ring of the iterators takes, made by another user with more than his limit.
fn large(case: &Case) -> Result<()> {
    const COUNT: usize = 700;
    const SIZE: usize = 8192;
    let name = c"/tracker-case-large";
    let infinite = libc::rlimit {
        rlim_cur: libc::RLIM_INFINITY,
        rlim_max: libc::RLIM_INFINITY,
    };
    // SAFETY: reads one rlimit.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_MSGQUEUE, &raw const infinite) };
    sys("setrlimit", set.into())?;
    // SAFETY: takes integers; the effective id stays.
    sys("setreuid", unsafe { libc::setreuid(33, u32::MAX) }.into())?;
    let queue = Queue::create(name, i64::try_from(COUNT)?, SIZE)?;
    // SAFETY: as above.
    sys("setreuid", unsafe { libc::setreuid(0, u32::MAX) }.into())?;
    let least = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: reads one rlimit.
    let set = unsafe { libc::setrlimit(libc::RLIMIT_MSGQUEUE, &raw const least) };
    sys("setrlimit", set.into())?;
    let priority = |index: usize| u32::try_from(index * 7919 % 1000);
    for index in 0..COUNT {
        queue.send(priority(index)?, &pattern(u64::try_from(index)?, SIZE))?;
    }

    case.ready()?;

    let mut order = (0..COUNT)
        .map(|index| Ok((priority(index)?, index)))
        .collect::<Result<Vec<_>>>()?;
    order.sort_by_key(|(priority, _)| std::cmp::Reverse(*priority));
    for (wanted, index) in order {
        let (priority, text) = queue.receive()?;
        ensure!(
            (priority, text.len()) == (wanted, SIZE),
            "Priority {priority} with {} bytes, not {wanted}",
            text.len()
        );
        check_pattern("A message", u64::try_from(index)?, &text)?;
    }
    ensure!(queue.attributes()?[3] == 0, "More than was sent");
    ensure!(queue.status()?.0 == 0, "It belongs to another user");
    unlink(name)
}

/// Processes and a thread that wait for messages or for room.
fn waits(case: &Case) -> Result<()> {
    let (empty_name, full_name) = (c"/tracker-case-empty", c"/tracker-case-full");
    let empty = Queue::create(empty_name, 4, MSGSIZE)?;
    let full = Queue::create(full_name, 2, MSGSIZE)?;
    full.send(1, b"first")?;
    full.send(1, b"second")?;
    let timed_name = c"/tracker-case-timed";
    let timed = Queue::create(timed_name, 2, MSGSIZE)?;
    let receiver = {
        let own = Queue(empty.0.try_clone()?);
        let full = Queue(full.0.try_clone()?);
        Child::start(case.dir(), "receiver", move |turn| {
            let found = own.receive()?;
            ensure!(found == (9, b"go".to_vec()), "Received {found:?}");
            turn.wait();
            full.send(3, b"from the receiver")?;
            Ok(())
        })?
    };
    receiver.sleeps_in(libc::SYS_mq_timedreceive)?;
    let sender = {
        let full = Queue(full.0.try_clone()?);
        Child::start(case.dir(), "sender", move |_| {
            full.send(2, b"third")?;
            Ok(())
        })?
    };
    sender.sleeps_in(libc::SYS_mq_timedsend)?;
    let thread = {
        let timed = Queue(timed.0.try_clone()?);
        let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)?;
        let deadline = libc::timespec {
            tv_sec: now.tv_sec() + 86_400,
            tv_nsec: 0,
        };
        blocked_thread(libc::SYS_mq_timedreceive, move || {
            Ok(timed.receive_until(deadline)?)
        })?
    };

    case.ready()?;

    ensure!(full.attributes()?[3] == 2, "{:?}", full.attributes()?);
    receiver.sleeps_in(libc::SYS_mq_timedreceive)?;
    sender.sleeps_in(libc::SYS_mq_timedsend)?;
    empty.send(9, b"go")?;
    receiver.waits()?;
    ensure!(full.receive()? == (1, b"first".to_vec()), "Not the first");
    sender.join()?;
    ensure!(full.receive()? == (2, b"third".to_vec()), "Not the third");
    receiver.finish()?;
    let found = full.receive()?;
    ensure!(
        found == (3, b"from the receiver".to_vec()),
        "Received {found:?}"
    );
    ensure!(full.receive()? == (1, b"second".to_vec()), "Not the second");
    timed.send(0, b"in time")?;
    let found = join("mq_timedreceive", thread)?;
    ensure!(found == (0, b"in time".to_vec()), "Received {found:?}");
    for name in [empty_name, full_name, timed_name] {
        unlink(name)?;
    }
    Ok(())
}

/// A queue without a name, two descriptions of it, and another that has the name since.
fn unlinked(case: &Case) -> Result<()> {
    let name = c"/tracker-case-unlinked";
    let queue = Queue::create(name, 5, MSGSIZE)?;
    let other_end = Queue::open(name, libc::O_WRONLY | libc::O_NONBLOCK)?;
    unlink(name)?;
    let named = Queue::create(name, 6, MSGSIZE)?;
    let third = Queue::create(c"/tracker-case-third", 7, MSGSIZE)?;
    unlink(c"/tracker-case-third")?;
    other_end.send(1, b"unlinked")?;
    named.send(2, b"named")?;
    third.send(3, b"third")?;
    let child = {
        let own = Queue(other_end.0.try_clone()?);
        Child::start(case.dir(), "child", move |turn| {
            turn.wait();
            own.send(4, b"from the child")?;
            Ok(())
        })?
    };
    child.waits()?;
    let status = || -> Result<_> { Ok((queue.status()?, named.status()?, third.status()?)) };
    let before = status()?;
    ensure!((before.0.3, before.1.3) == (0, 1), "{before:?}");

    case.ready()?;

    let after = status()?;
    ensure!(before == after, "{after:?}, not {before:?}");
    ensure!(queue.is_same(&other_end)?, "Two queues were made of one");
    let by_name = Queue::open(name, libc::O_RDONLY)?;
    ensure!(
        by_name.is_same(&named)? && !by_name.is_same(&queue)?,
        "The name leads to another one"
    );
    let room = [&queue, &named, &third].map(|queue| queue.attributes().map(|found| found[1]));
    let [Ok(5), Ok(6), Ok(7)] = room else {
        anyhow::bail!("Room {room:?}");
    };
    child.finish()?;
    let found = queue.receive()?;
    ensure!(found == (4, b"from the child".to_vec()), "{found:?}");
    ensure!(queue.receive()? == (1, b"unlinked".to_vec()), "Not it");
    ensure!(
        by_name.receive()? == (2, b"named".to_vec()),
        "Not the named"
    );
    ensure!(third.receive()? == (3, b"third".to_vec()), "Not the third");
    let left = |entry: io::Result<std::fs::DirEntry>| Ok::<_, io::Error>(entry?.file_name());
    for entry in std::fs::read_dir("/dev/mqueue")? {
        let entry = left(entry)?.to_string_lossy().into_owned();
        let digits = entry.strip_prefix("tracker-");
        ensure!(
            !digits.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit())),
            "{entry} was left behind"
        );
    }
    unlink(name)
}

/// A descriptor that is nowhere but in a message.
fn in_flight(case: &Case) -> Result<()> {
    let name = c"/tracker-case-flight";
    let (from, to) = UnixStream::pair()?;
    let queue = Queue::create(name, 3, MSGSIZE)?;
    queue.send(5, &pattern(5, 5000))?;
    let fds = [queue.fd()];
    let rights = [ControlMessage::ScmRights(&fds)];
    let (text, none) = ([IoSlice::new(b"queue")], MsgFlags::empty());
    sendmsg::<()>(to.as_raw_fd(), &text, &rights, none, None)?;
    drop(queue);

    case.ready()?;

    let mut text = [0; 16];
    let mut parts = [IoSliceMut::new(&mut text)];
    let mut space = cmsg_space!([RawFd; 1]);
    let received = recvmsg::<()>(from.as_raw_fd(), &mut parts, Some(&mut space), none)?;
    let fds = received.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(fds) => fds.first().copied(),
        _ => None,
    });
    // SAFETY: the kernel has just made it for this message.
    let queue = Queue(unsafe { OwnedFd::from_raw_fd(fds.context("No descriptor came")?) });
    let (priority, text) = queue.receive()?;
    ensure!(priority == 5, "Priority {priority}");
    check_pattern("The message", 5, &text)?;
    ensure!(
        queue.is_same(&Queue::open(name, libc::O_RDONLY)?)?,
        "Not it"
    );
    unlink(name)
}
