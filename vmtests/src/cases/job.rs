//! Job control: sessions on a terminal, process groups, stopped and continued processes.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigHandler, SigSet, Signal, kill, killpg, signal};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::{Pid, getpgrp, getpid, setpgid, setsid, tcgetpgrp, tcsetpgrp};

use super::child::Child;
use super::probe::{eventually, status, sys};
use super::pty::{expect, pair};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("job_session", session),
    Entry::carried("job_foreground", foreground),
    Entry::carried("job_leaderless", leaderless),
    Entry::carried("job_stopped", stopped),
    Entry::carried("job_stop_unreported", stop_unreported),
    Entry::carried("job_continued", continued),
    Entry::carried("job_stopped_threads", stopped_threads),
    Entry::carried("job_stopped_signals", stopped_signals),
    Entry::carried("job_stopped_group", stopped_group),
];

fn is_stopped(pid: Pid) -> Result<bool> {
    Ok(status(&pid.to_string(), "State")?.starts_with('T'))
}

fn stop(child: &Child, by: Signal) -> Result<()> {
    kill(child.pid, by)?;
    eventually("a child to stop", || is_stopped(child.pid))
}

const STOPS: WaitPidFlag = WaitPidFlag::WUNTRACED.union(WaitPidFlag::WNOHANG);

/// What a wait for stops tells, without waiting.
fn stop_report(pid: Pid) -> Result<WaitStatus> {
    Ok(waitpid(pid, Some(STOPS))?)
}

/// Makes the terminal the controlling one of a new session.
fn lead(slave: &File) -> Result<()> {
    setsid()?;
    // SAFETY: takes an integer.
    let done = unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) };
    sys("TIOCSCTTY", done.into()).map(|_| ())
}

/// A session on a terminal: its leader finds the terminal by /dev/tty, and Ctrl-C reaches it.
fn session(case: &Case) -> Result<()> {
    let (mut master, slave) = pair()?;
    let own = master.as_raw_fd();
    let dir = case.dir().to_owned();
    let leader = Child::start(&dir, "leader", move |turn| {
        // SAFETY: the child does not use the parent's end.
        unsafe { libc::close(own) };
        lead(&slave)?;
        turn.wait();
        let mut tty = OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/tty")
            .context("Open /dev/tty")?;
        tty.write_all(b"hello\n")?;
        ensure!(
            nix::sys::termios::tcgetsid(&tty)? == getpid(),
            "The terminal's session is {}",
            nix::sys::termios::tcgetsid(&tty)?
        );
        ensure!(
            tcgetpgrp(&tty)? == getpid(),
            "In the foreground is {}",
            tcgetpgrp(&tty)?
        );
        // SAFETY: sets a signal's default action.
        unsafe { signal(Signal::SIGINT, SigHandler::SigDfl) }?;
        // Ctrl-C ends this.
        let _ = tty.read(&mut [0; 10]);
        Ok(())
    })?;
    leader.waits()?;
    case.ready()?;
    leader.go()?;
    expect(&master, b"hello\r\n")?;
    leader.sleeps_in(libc::SYS_read)?;
    master.write_all(b"\x03")?;
    let end = waitpid(leader.pid, None)?;
    ensure!(
        end == WaitStatus::Signaled(leader.pid, Signal::SIGINT, false),
        "After Ctrl-C: {end:?}"
    );
    std::mem::forget(leader);
    Ok(())
}

/// A group in the foreground that is not the leader's; a read in the background stops.
fn foreground(case: &Case) -> Result<()> {
    let (mut master, slave) = pair()?;
    let own = master.as_raw_fd();
    let dir = case.dir().to_owned();
    let inner = dir.clone();
    let leader = Child::start(&dir, "leader", move |turn| {
        // SAFETY: the child does not use the parent's end.
        unsafe { libc::close(own) };
        lead(&slave)?;
        let join = || setpgid(Pid::from_raw(0), Pid::from_raw(0));
        let front = Child::start(&inner, "front", |turn| {
            join()?;
            turn.wait();
            let mut line = [0; 5];
            (&slave).read_exact(&mut line)?;
            ensure!(&line == b"line\n", "The foreground reads {line:?}");
            Ok(())
        })?;
        let back = Child::start(&inner, "back", |turn| {
            join()?;
            turn.wait();
            let mut line = [0; 5];
            (&slave).read_exact(&mut line)?;
            ensure!(&line == b"next\n", "The background reads {line:?}");
            Ok(())
        })?;
        front.waits()?;
        back.waits()?;
        tcsetpgrp(&slave, front.pid)?;
        turn.wait();
        ensure!(
            tcgetpgrp(&slave)? == front.pid,
            "In the foreground is {}, not {}",
            tcgetpgrp(&slave)?,
            front.pid
        );
        back.go()?;
        let told = waitpid(back.pid, Some(WaitPidFlag::WUNTRACED))?;
        ensure!(
            told == WaitStatus::Stopped(back.pid, Signal::SIGTTIN),
            "The background reads from the terminal: {told:?}"
        );
        fs::write(inner.join("stopped"), "")?;
        front.finish()?;
        // SAFETY: ignores a signal.
        unsafe { signal(Signal::SIGTTOU, SigHandler::SigIgn) }?;
        tcsetpgrp(&slave, back.pid)?;
        fs::write(inner.join("front-done"), "")?;
        kill(back.pid, Signal::SIGCONT)?;
        back.join()
    })?;
    leader.waits()?;
    case.ready()?;
    leader.go()?;
    eventually("the background to stop", || {
        Ok(dir.join("stopped").exists())
    })?;
    master.write_all(b"line\n")?;
    eventually("the foreground's end", || {
        Ok(dir.join("front-done").exists())
    })?;
    master.write_all(b"next\n")?;
    leader.join()
}

/// A group whose leader has gone is in the foreground.
fn leaderless(case: &Case) -> Result<()> {
    let (mut master, slave) = pair()?;
    let own = master.as_raw_fd();
    let dir = case.dir().to_owned();
    let inner = dir.clone();
    let shell = Child::start(&dir, "shell", move |turn| {
        // SAFETY: the child does not use the parent's end.
        unsafe { libc::close(own) };
        lead(&slave)?;
        let first = Child::start(&inner, "first", |turn| {
            setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
            turn.wait();
            Ok(())
        })?;
        first.waits()?;
        let group = first.pid;
        let second = Child::start(&inner, "second", move |turn| {
            setpgid(Pid::from_raw(0), group)?;
            turn.wait();
            ensure!(getpgrp() == group, "The group is {}", getpgrp());
            turn.wait();
            Ok(())
        })?;
        second.waits()?;
        tcsetpgrp(&slave, group)?;
        first.finish()?;
        turn.wait();
        ensure!(
            tcgetpgrp(&slave)? == group,
            "In the foreground is {}",
            tcgetpgrp(&slave)?
        );
        ensure!(
            waitid(Id::Pid(group), WaitPidFlag::WEXITED | WaitPidFlag::WNOHANG).is_err(),
            "The leader of the group is back"
        );
        second.go()?;
        fs::write(inner.join("asked"), "")?;
        let end = waitpid(second.pid, None)?;
        ensure!(
            end == WaitStatus::Signaled(second.pid, Signal::SIGINT, false),
            "Ctrl-C ended the foreground by {end:?}"
        );
        std::mem::forget(second);
        Ok(())
    })?;
    shell.waits()?;
    case.ready()?;
    shell.go()?;
    eventually("the shell", || Ok(dir.join("asked").exists()))?;
    master.write_all(b"\x03")?;
    shell.join()
}

/// Its stop was reported; it goes on when it is told to, and that is reported too.
fn stopped(case: &Case) -> Result<()> {
    let child = Child::start(case.dir(), "stopped", |turn| {
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    stop(&child, Signal::SIGSTOP)?;
    let told = stop_report(child.pid)?;
    ensure!(
        told == WaitStatus::Stopped(child.pid, Signal::SIGSTOP),
        "{told:?}"
    );

    case.ready()?;

    ensure!(is_stopped(child.pid)?, "It runs");
    let told = stop_report(child.pid)?;
    ensure!(
        told == WaitStatus::StillAlive,
        "Its stop was reported again: {told:?}"
    );
    // It must not act on this before it goes on.
    child.go()?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    ensure!(is_stopped(child.pid)?, "A signal woke it");
    kill(child.pid, Signal::SIGCONT)?;
    let flags = WaitPidFlag::WCONTINUED | WaitPidFlag::WEXITED;
    let told = waitid(Id::Pid(child.pid), flags)?;
    let quick = WaitStatus::Exited(child.pid, 0);
    ensure!(
        told == WaitStatus::Continued(child.pid) || told == quick,
        "It was continued: {told:?}"
    );
    if told == quick {
        std::mem::forget(child);
        return Ok(());
    }
    child.join()
}

/// Its stop, by a signal of the terminal, is reported afterwards and once.
fn stop_unreported(case: &Case) -> Result<()> {
    let child = Child::start(case.dir(), "stopped", |turn| {
        // A group of its own, in the session of its parent: not orphaned.
        setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    stop(&child, Signal::SIGTSTP)?;
    case.ready()?;
    let told = stop_report(child.pid)?;
    ensure!(
        told == WaitStatus::Stopped(child.pid, Signal::SIGTSTP),
        "{told:?}"
    );
    let told = stop_report(child.pid)?;
    ensure!(told == WaitStatus::StillAlive, "Reported again: {told:?}");
    ensure!(is_stopped(child.pid)?, "It runs");
    kill(child.pid, Signal::SIGCONT)?;
    let told = waitpid(child.pid, Some(WaitPidFlag::WCONTINUED))?;
    ensure!(told == WaitStatus::Continued(child.pid), "{told:?}");
    child.finish()
}

/// That it was continued is reported afterwards and once, and SIGCHLD does not come again.
fn continued(case: &Case) -> Result<()> {
    let child = Child::start(case.dir(), "continued", |turn| {
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.thread_block()?;
    stop(&child, Signal::SIGSTOP)?;
    mask.wait()?;
    let told = stop_report(child.pid)?;
    ensure!(
        told == WaitStatus::Stopped(child.pid, Signal::SIGSTOP),
        "{told:?}"
    );
    kill(child.pid, Signal::SIGCONT)?;
    // It is told when the child runs again, not when it is woken.
    mask.wait()?;
    case.ready()?;
    let pending = status("self", "ShdPnd")?;
    let bit = 1_u64 << (libc::SIGCHLD - 1);
    ensure!(
        u64::from_str_radix(&pending, 16)? & bit == 0,
        "SIGCHLD came from nowhere: {pending}"
    );
    let told = waitpid(
        child.pid,
        Some(WaitPidFlag::WCONTINUED | WaitPidFlag::WNOHANG),
    )?;
    ensure!(told == WaitStatus::Continued(child.pid), "{told:?}");
    let told = waitpid(child.pid, Some(WaitPidFlag::WCONTINUED | STOPS))?;
    ensure!(told == WaitStatus::StillAlive, "Reported again: {told:?}");
    child.finish()
}

/// Every thread of a stopped process stands still, and goes on.
fn stopped_threads(case: &Case) -> Result<()> {
    let count = case.path("count");
    let child = Child::start(case.dir(), "threads", move |turn| {
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let file = count.clone();
                std::thread::spawn(move || -> Result<()> {
                    let mut file = OpenOptions::new().create(true).append(true).open(file)?;
                    loop {
                        file.write_all(b".")?;
                        std::thread::sleep(std::time::Duration::from_millis(5));
                    }
                })
            })
            .collect();
        turn.wait();
        ensure!(
            threads.iter().all(|thread| !thread.is_finished()),
            "A thread has ended"
        );
        Ok(())
    })?;
    child.waits()?;
    let path = case.path("count");
    let written = || -> Result<u64> { Ok(fs::metadata(&path).map_or(0, |found| found.len())) };
    eventually("threads to write", || Ok(written()? > 10))?;
    stop(&child, Signal::SIGSTOP)?;
    let tasks = format!("/proc/{}/task", child.pid);
    let all_stopped = || -> Result<bool> {
        for task in fs::read_dir(&tasks)? {
            let stat = fs::read_to_string(task?.path().join("status"))?;
            if !stat.contains("State:\tT") {
                return Ok(false);
            }
        }
        Ok(true)
    };
    eventually("all threads to stop", all_stopped)?;
    case.ready()?;
    ensure!(all_stopped()?, "A thread runs");
    let before = written()?;
    std::thread::sleep(std::time::Duration::from_millis(200));
    ensure!(written()? == before, "A thread writes");
    ensure!(fs::read_dir(&tasks)?.count() == 4, "A thread is missing");
    kill(child.pid, Signal::SIGCONT)?;
    eventually("threads to write again", || Ok(written()? > before + 20))?;
    child.finish()
}

/// Signals that came meanwhile act when it goes on; further stops are forgotten.
fn stopped_signals(case: &Case) -> Result<()> {
    let child = Child::start(case.dir(), "signals", |turn| {
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    stop(&child, Signal::SIGSTOP)?;
    kill(child.pid, Signal::SIGTERM)?;
    kill(child.pid, Signal::SIGSTOP)?;
    case.ready()?;
    ensure!(is_stopped(child.pid)?, "It runs, or has ended");
    let told = stop_report(child.pid)?;
    ensure!(
        told == WaitStatus::Stopped(child.pid, Signal::SIGSTOP),
        "{told:?}"
    );
    kill(child.pid, Signal::SIGCONT)?;
    let end = waitpid(child.pid, None)?;
    ensure!(
        end == WaitStatus::Signaled(child.pid, Signal::SIGTERM, false),
        "It ended by {end:?}"
    );
    std::mem::forget(child);
    Ok(())
}

/// A stopped process in the group of its parent, which is that of the application. Its restored
/// group has nobody above it, and gets no SIGHUP for that.
fn stopped_group(case: &Case) -> Result<()> {
    let child = Child::start(case.dir(), "member", |turn| {
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    stop(&child, Signal::SIGSTOP)?;
    case.ready()?;
    ensure!(is_stopped(child.pid)?, "It runs");
    killpg(getpgrp(), Signal::SIGCONT)?;
    eventually("it to go on", || Ok(!is_stopped(child.pid)?))?;
    child.finish()
}
