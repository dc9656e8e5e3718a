//! Who is told by a signal that a descriptor is ready: `F_SETOWN` and `F_SETSIG` of fcntl(2).

use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Pid, getpgrp, getpid, gettid};

use super::child::Child;
use super::lease::pending;
use super::probe::sys;
use super::refused::{cgroup_root, leave_cgroup};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("owner_signals", signals),
    Entry::refused("owner_outside", "outside the application", outside),
    Entry::refused("owner_thread", "alone", thread),
];

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_GETOWN_EX: i32 = 16;

pub(super) const THREAD: i32 = 0;
const PROCESS: i32 = 1;
const GROUP: i32 = 2;

/// `F_SETOWN_EX`.
pub(super) fn set_owner(fd: RawFd, kind: i32, id: Pid) -> Result<()> {
    let owner = [kind, id.as_raw()];
    // SAFETY: reads one struct f_owner_ex.
    let set = unsafe { libc::fcntl(fd, F_SETOWN_EX, owner.as_ptr()) };
    sys("F_SETOWN_EX", set.into()).map(|_| ())
}

/// `F_SETSIG`.
pub(super) fn set_signal(fd: RawFd, signal: Signal) -> Result<()> {
    // SAFETY: takes integers.
    let set = unsafe { libc::fcntl(fd, F_SETSIG, signal as i32) };
    sys("F_SETSIG", set.into()).map(|_| ())
}

fn set_async(fd: RawFd) -> Result<()> {
    // SAFETY: takes integers.
    let set = unsafe { libc::fcntl(fd, libc::F_SETFL, libc::O_ASYNC | libc::O_NONBLOCK) };
    sys("F_SETFL", set.into()).map(|_| ())
}

/// Kind and id of the owner, and the signal; of nobody no kind.
fn told(fd: RawFd) -> Result<(i32, i32, i32)> {
    let mut owner = [0; 2];
    // SAFETY: the kernel writes one struct f_owner_ex.
    let got = unsafe { libc::fcntl(fd, F_GETOWN_EX, owner.as_mut_ptr()) };
    sys("F_GETOWN_EX", got.into())?;
    // SAFETY: takes integers.
    let signal = unsafe { libc::fcntl(fd, F_GETSIG) };
    let [kind, id] = owner;
    Ok((if id == 0 { 0 } else { kind }, id, signal))
}

/// Owners of each kind, one that has ended, and signals of nobody.
fn signals(case: &Case) -> Result<()> {
    let set: SigSet = [Signal::SIGUSR1, Signal::SIGUSR2].into_iter().collect();
    set.thread_block()?;
    let mut ends = Vec::new();
    for _ in 0..5 {
        ends.push(UnixStream::pair()?);
    }
    let fds: Vec<RawFd> = ends.iter().map(|(end, _)| end.as_raw_fd()).collect();
    let [process, thread, group, ended, nobody] = fds[..] else {
        unreachable!("five pairs");
    };
    set_owner(process, PROCESS, getpid())?;
    set_signal(process, Signal::SIGUSR1)?;
    set_async(process)?;
    set_owner(thread, THREAD, gettid())?;
    set_owner(group, GROUP, getpgrp())?;
    let child = Child::start(case.dir(), "ended", |turn| {
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    set_owner(ended, PROCESS, child.pid)?;
    child.finish()?;
    set_signal(nobody, Signal::SIGUSR2)?;
    let (reader, mut writer) = std::io::pipe()?;
    set_owner(reader.as_raw_fd(), PROCESS, getpid())?;
    set_signal(reader.as_raw_fd(), Signal::SIGUSR2)?;
    set_async(reader.as_raw_fd())?;
    let before = fds.iter().map(|fd| told(*fd)).collect::<Result<Vec<_>>>()?;
    ensure!(before[3] == (0, 0, 0), "It was told {:?}", before[3]);

    case.ready()?;

    let now = fds.iter().map(|fd| told(*fd)).collect::<Result<Vec<_>>>()?;
    ensure!(now == before, "Told were {before:?}, are {now:?}");
    ends[0].1.write_all(b"x")?;
    let first = pending(&set).context("Of a socket")?;
    ensure!(first == (Signal::SIGUSR1 as i32, process), "Told {first:?}");
    writer.write_all(b"x")?;
    let piped = pending(&set).context("Of a pipe")?;
    ensure!(
        piped == (Signal::SIGUSR2 as i32, reader.as_raw_fd()),
        "Told {piped:?}"
    );
    set_owner(nobody, PROCESS, getpid())?;
    set_async(nobody)?;
    ends[4].1.write_all(b"x")?;
    let second = pending(&set).context("Of one set anew")?;
    ensure!(
        second == (Signal::SIGUSR2 as i32, nobody),
        "Told {second:?}"
    );
    Ok(())
}

/// One that does not lead its process.
fn thread(case: &Case) -> Result<()> {
    let (end, _other) = UnixStream::pair()?;
    let (tell, told_id) = std::sync::mpsc::channel();
    let (hold, held) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || {
        let told = tell.send(gettid());
        told.is_ok() && held.recv().is_err()
    });
    let id = told_id.recv()?;
    set_owner(end.as_raw_fd(), THREAD, id)?;
    case.ready()?;
    ensure!(told(end.as_raw_fd())? == (THREAD, id.as_raw(), 0), "Nobody");
    drop(hold);
    ensure!(thread.join().is_ok_and(|ended| ended), "The thread failed");
    Ok(())
}

/// Nobody there would be told afterwards.
fn outside(case: &Case) -> Result<()> {
    let root = cgroup_root()?;
    let (end, mut other) = UnixStream::pair()?;
    let child = Child::start(case.dir(), "outside", move |turn| {
        leave_cgroup(&root)?;
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    set_owner(end.as_raw_fd(), PROCESS, child.pid)?;
    case.ready()?;
    ensure!(told(end.as_raw_fd())?.1 == child.pid.as_raw(), "Nobody");
    other.write_all(b"x")?;
    child.finish()
}
