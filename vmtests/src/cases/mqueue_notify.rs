//! Who is told of messages in POSIX message queues, and what of them is not carried.

use std::ffi::CString;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Result, ensure};
use nix::errno::Errno;

use super::child::Child;
use super::mqueue::{MSGSIZE, Queue, unlink};
use super::probe::{pattern, sys};
use super::refused::{cgroup_root, leave_cgroup};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("mqueue_notify", notify),
    Entry::refused("refused_mqueue_thread", "SIGEV_THREAD", notify_thread),
    Entry::refused(
        "refused_mqueue_notify_outside",
        "is to be told of its messages",
        notify_outside,
    ),
    Entry::refused(
        "refused_mqueue_outside",
        "it is open outside the application as well",
        outside,
    ),
];

fn by_signal(signal: i32, value: usize) -> libc::sigevent {
    // SAFETY: plain data for which zero is valid.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    (event.sigev_notify, event.sigev_signo) = (libc::SIGEV_SIGNAL, signal);
    event.sigev_value.sival_ptr = value as *mut libc::c_void;
    event
}

fn block(signal: i32) -> Result<libc::sigset_t> {
    // SAFETY: the set is filled in before it is used.
    let mut set: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: writes and reads the set.
    let blocked = unsafe {
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    };
    sys("sigprocmask", blocked.into())?;
    Ok(set)
}

/// Code, value and sender of a blocked signal, if it comes within so many seconds.
fn taken(set: &libc::sigset_t, seconds: i64) -> Result<(i32, usize, i32), Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    let limit = libc::timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    // SAFETY: reads the set and the limit, writes the information.
    Errno::result(unsafe { libc::sigtimedwait(set, &raw mut info, &raw const limit) })?;
    // SAFETY: the signal is one of a message queue, which has both.
    let (value, pid) = unsafe { (info.si_value(), info.si_pid()) };
    Ok((info.si_code, value.sival_ptr as usize, pid))
}

/// Registrations of two processes and one that tells nobody.
fn notify(case: &Case) -> Result<()> {
    let names = [
        c"/tracker-case-notify-a",
        c"/tracker-case-notify-b",
        c"/tracker-case-notify-c",
    ];
    let [mine, childs, nobodys] = names.map(|name| Queue::create(name, 5, MSGSIZE));
    let (mine, childs, nobodys) = (mine?, childs?, nobodys?);
    let set = block(libc::SIGUSR2)?;
    // Descriptors of the queue that go before and after: to close one takes the word back.
    let low = mine.0.try_clone()?;
    let kept = mine.0.try_clone()?;
    drop(low);
    mine.send(1, b"not told of")?;
    mine.notify(Some(&by_signal(libc::SIGUSR2, 0xfeed_face_cafe)))?;
    // SAFETY: plain data for which zero is valid.
    let mut none: libc::sigevent = unsafe { std::mem::zeroed() };
    none.sigev_notify = libc::SIGEV_NONE;
    nobodys.notify(Some(&none))?;
    let child = {
        let own = Queue(childs.0.try_clone()?);
        Child::start(case.dir(), "child", move |turn| {
            let signal = libc::SIGRTMIN() + 3;
            let set = block(signal)?;
            own.notify(Some(&by_signal(signal, 77)))?;
            turn.wait();
            let (code, value, pid) = taken(&set, 60)?;
            // SAFETY: no pointers.
            let parent = unsafe { libc::getppid() };
            ensure!(
                (code, value, pid) == (libc::SI_MESGQ, 77, parent),
                "Told {code} {value} by {pid}"
            );
            ensure!(own.receive()? == (8, b"to the child".to_vec()), "Not it");
            Ok(())
        })?
    };
    child.waits()?;
    let shown = || -> Result<Vec<String>> {
        [&mine, &childs, &nobodys]
            .map(Queue::shown)
            .into_iter()
            .collect()
    };
    let before = shown()?;

    case.ready()?;

    let after = shown()?;
    ensure!(before == after, "{after:?}, not {before:?}");
    for queue in [&mine, &childs, &nobodys] {
        let refused = queue.notify(Some(&none));
        ensure!(refused == Err(Errno::EBUSY), "Nobody is told: {refused:?}");
    }
    mine.send(1, b"not told of either")?;
    ensure!(taken(&set, 0) == Err(Errno::EAGAIN), "Told of the second");
    while mine.attributes()?[3] > 0 {
        mine.receive()?;
    }
    Queue(kept).send(1, b"told of")?;
    let told = taken(&set, 60)?;
    let own = i32::try_from(std::process::id())?;
    ensure!(
        told == (libc::SI_MESGQ, 0xfeed_face_cafe, own),
        "Told {told:?}"
    );
    // Once only.
    mine.receive()?;
    mine.send(1, b"not told of")?;
    ensure!(taken(&set, 0) == Err(Errno::EAGAIN), "Told again");
    childs.send(8, b"to the child")?;
    child.finish()?;
    nobodys.send(1, b"nobody is told")?;
    ensure!(nobodys.notify(Some(&none)).is_ok(), "It is still there");
    names.iter().try_for_each(|name| unlink(name))
}

/// What the C library does for SIGEV_THREAD: a cookie that comes back over netlink.
fn notify_thread(case: &Case) -> Result<()> {
    const COOKIE: usize = 32;
    let name = c"/tracker-case-thread";
    let queue = Queue::create(name, 5, MSGSIZE)?;
    // SAFETY: takes integers.
    let socket = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, 0) };
    sys("socket", socket.into())?;
    // SAFETY: a new descriptor, owned by nobody else.
    let mut socket = File::from(unsafe { OwnedFd::from_raw_fd(socket) });
    let cookie = pattern(9, COOKIE);
    let mut event = by_signal(socket.as_raw_fd(), cookie.as_ptr() as usize);
    event.sigev_notify = libc::SIGEV_THREAD;
    queue.notify(Some(&event))?;
    case.ready()?;
    queue.send(1, b"message")?;
    let mut told = [0; COOKIE];
    socket.read_exact(&mut told)?;
    ensure!(told[..COOKIE - 1] == cookie[..COOKIE - 1], "Told {told:?}");
    unlink(name)
}

/// A process outside the cgroup has the queue open.
fn outside(case: &Case) -> Result<()> {
    let (name, root) = (c"/tracker-case-outside", cgroup_root()?);
    let queue = Queue::create(name, 5, MSGSIZE)?;
    let own = CString::from(name);
    let outside = Child::start(case.dir(), "outside", move |turn| {
        leave_cgroup(&root)?;
        let queue = Queue::open(&own, libc::O_RDONLY)?;
        turn.wait();
        ensure!(queue.receive()? == (1, b"message".to_vec()), "Not it");
        Ok(())
    })?;
    outside.waits()?;
    queue.send(1, b"message")?;
    case.ready()?;
    outside.finish()?;
    ensure!(queue.attributes()?[3] == 0, "It is still there");
    unlink(name)
}

/// A process outside the cgroup is to be told.
fn notify_outside(case: &Case) -> Result<()> {
    let (name, root) = (c"/tracker-case-told", cgroup_root()?);
    let queue = Queue::create(name, 5, MSGSIZE)?;
    let own = Queue(queue.0.try_clone()?);
    let outside = Child::start(case.dir(), "outside", move |turn| {
        leave_cgroup(&root)?;
        let set = block(libc::SIGUSR2)?;
        own.notify(Some(&by_signal(libc::SIGUSR2, 5)))?;
        turn.wait();
        let (code, value, _) = taken(&set, 60)?;
        ensure!((code, value) == (libc::SI_MESGQ, 5), "Told {code} {value}");
        Ok(())
    })?;
    outside.waits()?;
    case.ready()?;
    queue.send(1, b"message")?;
    outside.finish()?;
    unlink(name)
}
