//! Descriptors of processes.

use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg,
    sendmsg, socketpair,
};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, getpid};

use super::child::Child;
use super::probe::{blocked_thread, eventually, join, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("pidfd", pidfd),
    Entry::carried("pidfd_epoll", epoll),
    Entry::carried("pidfd_in_flight", in_flight),
    Entry::carried("pidfd_waits", waits),
    Entry::carried("pidfd_clone_files", shared_table),
    Entry::refused("refused_pidfd_outside", "outside the application", outside),
];

fn open(pid: Pid, flags: i32) -> Result<OwnedFd> {
    // SAFETY: takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), flags) };
    let fd = RawFd::try_from(sys("pidfd_open", fd)?)?;
    // SAFETY: a new descriptor, owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    let null = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo asks for that of kill(2).
    Errno::result(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            null,
            0,
        )
    })
    .map(drop)
}

/// The PID that the kernel shows for a pidfd; -1 when it is gone.
fn shown(pidfd: BorrowedFd<'_>) -> Result<i32> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pid:"));
    Ok(line.context("No Pid in fdinfo")?.trim().parse()?)
}

fn has_ended(pidfd: BorrowedFd<'_>) -> Result<bool> {
    let mut fds = [PollFd::new(pidfd, PollFlags::POLLIN)];
    Ok(poll(&mut fds, PollTimeout::ZERO)? == 1)
}

/// Of a child, of a zombie, of one that was waited for, of oneself; one that is inherited.
fn pidfd(case: &Case) -> Result<()> {
    const NONBLOCK: i32 = libc::O_NONBLOCK;
    let dir = case.dir().to_owned();
    let own = open(getpid(), 0)?;
    let other_own = own.try_clone()?;
    let me = getpid();
    let child = Child::start(&dir, "child", move |turn| {
        turn.wait();
        ensure!(
            shown(other_own.as_fd())? == me.as_raw(),
            "The inherited one"
        );
        send(other_own.as_fd(), 0).context("Signal 0 to the parent")?;
        Ok(())
    })?;
    child.waits()?;
    let running = open(child.pid, 0)?;
    let nonblocking = open(child.pid, NONBLOCK)?;
    let ended = Child::start(&dir, "ended", |_| {
        // SAFETY: ends the child.
        unsafe { libc::_exit(9) }
    })?;
    let zombie = open(ended.pid, 0)?;
    eventually("a zombie", || has_ended(zombie.as_fd()))?;
    let brief = Child::start(&dir, "brief", |_| Ok(()))?;
    let gone = open(brief.pid, 0)?;
    brief.join()?;

    case.ready()?;

    ensure!(shown(own.as_fd())? == me.as_raw(), "My own");
    ensure!(shown(running.as_fd())? == child.pid.as_raw(), "The child's");
    ensure!(shown(gone.as_fd())? == -1, "One is not gone any more");
    ensure!(has_ended(gone.as_fd())?, "The gone one has not ended");
    ensure!(
        send(gone.as_fd(), 0) == Err(Errno::ESRCH),
        "The gone one takes signals"
    );
    ensure!(has_ended(zombie.as_fd())?, "The zombie has not ended");
    let status = waitid(Id::PIDFd(zombie.as_fd()), WaitPidFlag::WEXITED)?;
    ensure!(
        status == WaitStatus::Exited(ended.pid, 9),
        "The zombie: {status:?}"
    );
    std::mem::forget(ended);
    ensure!(!has_ended(running.as_fd())?, "The child has ended");
    let waited = waitid(Id::PIDFd(nonblocking.as_fd()), WaitPidFlag::WEXITED);
    ensure!(
        waited == Err(Errno::EAGAIN),
        "The non-blocking one waits: {waited:?}"
    );
    send(running.as_fd(), libc::SIGUSR1)?;
    let status = waitid(Id::PIDFd(running.as_fd()), WaitPidFlag::WEXITED)?;
    ensure!(
        status == WaitStatus::Exited(child.pid, 0),
        "The child: {status:?}"
    );
    ensure!(has_ended(nonblocking.as_fd())?, "The other has not ended");
    std::mem::forget(child);
    let third = Child::start(&dir, "third", |_| Ok(()))?;
    third.join()
}

/// In an epoll set, the watched process alive and dead.
fn epoll(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let alive = Child::start(&dir, "alive", |turn| {
        turn.wait();
        Ok(())
    })?;
    alive.waits()?;
    let dead = Child::start(&dir, "dead", |_| Ok(()))?;
    let (to_live, to_die) = (open(alive.pid, 0)?, open(dead.pid, 0)?);
    eventually("a zombie", || has_ended(to_die.as_fd()))?;
    epoll.add(&to_live, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
    epoll.add(&to_die, EpollEvent::new(EpollFlags::EPOLLIN, 2))?;

    case.ready()?;

    let ready = |timeout| -> Result<Vec<u64>> {
        let mut events = [EpollEvent::empty(); 4];
        let count = epoll.wait(&mut events, timeout)?;
        Ok(events[..count].iter().map(EpollEvent::data).collect())
    };
    ensure!(ready(EpollTimeout::ZERO)? == [2], "Not the dead one");
    dead.join()?;
    epoll.delete(&to_die)?;
    ensure!(
        ready(EpollTimeout::ZERO)? == [0u64; 0],
        "One without a reason"
    );
    alive.go()?;
    ensure!(ready(EpollTimeout::NONE)? == [1], "Not the one that ends");
    alive.join()
}

/// In flight over a Unix socket, to a process that has no other.
fn in_flight(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let (from, to) = socketpair(
        AddressFamily::Unix,
        SockType::Stream,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    let target = Child::start(&dir, "target", |turn| {
        turn.wait();
        Ok(())
    })?;
    target.waits()?;
    let pidfd = open(target.pid, 0)?;
    let fds = [pidfd.as_raw_fd()];
    let data = [IoSlice::new(b"p")];
    let rights = [ControlMessage::ScmRights(&fds)];
    sendmsg::<()>(from.as_raw_fd(), &data, &rights, MsgFlags::empty(), None)?;
    drop(pidfd);

    case.ready()?;

    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let message = recvmsg::<()>(
        to.as_raw_fd(),
        &mut data,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let fds = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = *fds.context("Nothing came")?.first().context("No fd")?;
    // SAFETY: just received, owned by nobody else.
    let pidfd = unsafe { OwnedFd::from_raw_fd(fd) };
    ensure!(
        shown(pidfd.as_fd())? == target.pid.as_raw(),
        "Another process"
    );
    ensure!(!has_ended(pidfd.as_fd())?, "It has ended");
    send(pidfd.as_fd(), libc::SIGUSR1)?;
    target.join()
}

/// A thread asleep in waitid(2) on one, another in poll(2).
fn waits(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let start = |name| -> Result<(Child, OwnedFd)> {
        let child = Child::start(&dir, name, |turn| {
            turn.wait();
            Ok(())
        })?;
        child.waits()?;
        let pidfd = open(child.pid, 0)?;
        Ok((child, pidfd))
    };
    let (waited, waited_fd) = start("waited")?;
    let (polled, polled_fd) = start("polled")?;
    let waiter = blocked_thread(libc::SYS_waitid, move || {
        Ok(waitid(Id::PIDFd(waited_fd.as_fd()), WaitPidFlag::WEXITED)?)
    })?;
    let poller = blocked_thread(libc::SYS_poll, move || {
        let mut fds = [PollFd::new(polled_fd.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::NONE)?)
    })?;

    case.ready()?;

    ensure!(
        !waiter.is_finished() && !poller.is_finished(),
        "One was woken"
    );
    waited.go()?;
    let status = join("waitid", waiter)?;
    ensure!(
        status == WaitStatus::Exited(waited.pid, 0),
        "It waited for {status:?}"
    );
    std::mem::forget(waited);
    kill(polled.pid, Signal::SIGKILL)?;
    ensure!(join("poll", poller)? == 1, "Nothing polled");
    let status = waitpid(polled.pid, None)?;
    ensure!(
        status == WaitStatus::Signaled(polled.pid, Signal::SIGKILL, false),
        "{status:?}"
    );
    std::mem::forget(polled);
    Ok(())
}

/// In a table that the child it refers to has too.
fn shared_table(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let own = open(getpid(), 0)?;
    let number = own.as_raw_fd();
    let me = getpid();
    let child = Child::sharing(libc::CLONE_FILES, &dir, "child", move |turn| {
        turn.wait();
        // SAFETY: the parent keeps it open.
        let pidfd = unsafe { BorrowedFd::borrow_raw(number) };
        ensure!(shown(pidfd)? == me.as_raw(), "Another process");
        Ok(())
    })?;
    child.waits()?;
    let pidfd = open(child.pid, 0)?;
    case.ready()?;
    ensure!(shown(pidfd.as_fd())? == child.pid.as_raw(), "Another child");
    send(pidfd.as_fd(), libc::SIGUSR1)?;
    child.join()
}

/// One of the machine's init.
fn outside(case: &Case) -> Result<()> {
    let init = open(Pid::from_raw(1), 0)?;
    case.ready()?;
    ensure!(shown(init.as_fd())? == 1, "Another process");
    ensure!(!has_ended(init.as_fd())?, "init has ended");
    Ok(())
}
