//! What is not carried: the checkpoint must say so by name and leave the
//! program alone.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;

use super::child::Child;
use super::probe::{PATIENCE, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::refused("refused_userfaultfd", "userfaultfd", userfaultfd),
    Entry::refused(
        "refused_pty_outside",
        "outside the application",
        pty_outside,
    ),
    Entry::refused(
        "refused_pty_unopened",
        "before its slave was opened",
        pty_unopened,
    ),
    Entry::refused("refused_tty", "character device 4:64", tty),
    Entry::refused(
        "refused_stopped_outside",
        "in a session led from outside",
        stopped_outside,
    ),
    Entry::refused("refused_traced", "traced by PID", traced),
    Entry::refused("refused_proc_mem", "it shows an address space", proc_mem),
    Entry::refused(
        "refused_unix_outside",
        "outside the application",
        unix_outside,
    ),
];

/// A descriptor from a system call.
fn object(name: &str, result: i64) -> Result<OwnedFd> {
    match Errno::result(result) {
        // SAFETY: a new descriptor, owned by nobody else.
        Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) }),
        Err(error) => Err(error).with_context(|| name.to_owned()),
    }
}

fn userfaultfd(case: &Case) -> Result<()> {
    const USER_MODE_ONLY: i32 = 1;
    // SAFETY: flags only.
    let fd = object("userfaultfd", unsafe {
        libc::syscall(
            libc::SYS_userfaultfd,
            libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY,
        )
    })?;
    // struct uffdio_api: version 0xaa, no features asked for.
    const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
    let mut api = [0xaau64, 0, 0];
    sys(
        "UFFDIO_API",
        // SAFETY: the kernel reads and writes these 24 bytes.
        unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) }.into(),
    )?;
    case.ready()?;
    let error = File::from(fd)
        .read(&mut [0; 32])
        .err()
        .and_then(|error| error.raw_os_error());
    ensure!(
        error == Some(libc::EAGAIN),
        "Reading it afterwards: {error:?}"
    );
    Ok(())
}

/// A slave whose master is held by a process outside the cgroup.
fn pty_outside(case: &Case) -> Result<()> {
    let root = cgroup_root()?;
    let (mut master, mut slave) = super::pty::pair()?;
    let dir = case.dir().to_owned();
    let own = slave.as_raw_fd();
    let outside = {
        let mut master = master.try_clone()?;
        Child::start(&dir, "outside", move |turn| {
            // SAFETY: the child does not use the parent's end.
            unsafe { libc::close(own) };
            leave_cgroup(&root)?;
            turn.wait();
            let mut text = [0; 13];
            master.read_exact(&mut text)?;
            ensure!(&text == b"to the master", "The outside reads {text:?}");
            master.write_all(b"back\n")?;
            turn.wait();
            Ok(())
        })?
    };
    outside.waits()?;
    master.flush()?;
    drop(master);
    case.ready()?;
    slave.write_all(b"to the master")?;
    outside.go()?;
    let mut text = [0; 5];
    slave.read_exact(&mut text)?;
    ensure!(&text == b"back\n", "Received {text:?}");
    outside.waits()?;
    outside.finish()
}

/// A terminal that is no pseudo-terminal.
fn tty(case: &Case) -> Result<()> {
    let tty = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY | libc::O_NONBLOCK)
        .open("/dev/ttyS0")
        .context("Open /dev/ttyS0")?;
    case.ready()?;
    let termios = nix::sys::termios::tcgetattr(&tty).context("tcgetattr afterwards")?;
    ensure!(!termios.control_chars.is_empty(), "It has no settings");
    Ok(())
}

/// A master that was written to before its slave was ever open.
fn pty_unopened(case: &Case) -> Result<()> {
    let mut master = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open("/dev/ptmx")?;
    master.write_all(b"early\n")?;
    case.ready()?;
    let mut text = [0; 7];
    master.read_exact(&mut text)?;
    ensure!(&text == b"early\r\n", "The echo is {text:?}");
    Ok(())
}

/// A stopped process whose session has lost its leader.
fn stopped_outside(case: &Case) -> Result<()> {
    let path = case.path("member");
    let inner = path.clone();
    let leader = Child::start(case.dir(), "leader", move |_| {
        nix::unistd::setsid()?;
        let member = Child::start(inner.parent().context("No directory")?, "member", |turn| {
            turn.wait();
            Ok(())
        })?;
        member.waits()?;
        fs::write(&inner, member.pid.to_string())?;
        std::mem::forget(member);
        Ok(())
    })?;
    leader.join()?;
    let member = nix::unistd::Pid::from_raw(fs::read_to_string(&path)?.parse()?);
    let state = || super::probe::status(&member.to_string(), "State");
    nix::sys::signal::kill(member, nix::sys::signal::Signal::SIGSTOP)?;
    super::probe::eventually("it to stop", || Ok(state()?.starts_with('T')))?;
    case.ready()?;
    ensure!(state()?.starts_with('T'), "It runs");
    nix::sys::signal::kill(member, nix::sys::signal::Signal::SIGCONT)?;
    super::probe::blocked_in(member, libc::SYS_rt_sigsuspend)?;
    nix::sys::signal::kill(member, nix::sys::signal::Signal::SIGUSR1)?;
    Ok(())
}

/// A child under the eyes of its parent.
fn traced(case: &Case) -> Result<()> {
    use nix::sys::ptrace;
    let child = Child::start(case.dir(), "traced", |turn| {
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    ptrace::seize(child.pid, ptrace::Options::empty())?;
    case.ready()?;
    ptrace::interrupt(child.pid)?;
    let stop = nix::sys::wait::waitpid(child.pid, None)?;
    ensure!(
        matches!(stop, nix::sys::wait::WaitStatus::PtraceEvent(..)),
        "Its tracer sees {stop:?}"
    );
    ptrace::detach(child.pid, None)?;
    child.waits()?;
    child.finish()
}

/// The process's own memory as a file, which stays that of the old address space.
fn proc_mem(case: &Case) -> Result<()> {
    let memory = File::open("/proc/self/mem")?;
    let word = 0x7472_6163_6b65_7221_u64;
    case.ready()?;
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, (&raw const word) as u64)?;
    ensure!(bytes == word.to_ne_bytes(), "It reads {bytes:?}");
    Ok(())
}

/// The mount point of the cgroup v2 hierarchy.
pub(super) fn cgroup_root() -> Result<String> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let found = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let target = words.next()?;
        (words.next()? == "cgroup2").then(|| target.to_owned())
    });
    found.context("No cgroup2 is mounted")
}

/// Moves the calling process to the root of the hierarchy.
pub(super) fn leave_cgroup(root: &str) -> Result<()> {
    let procs = format!("{root}/cgroup.procs");
    let mut file = OpenOptions::new()
        .write(true)
        .open(&procs)
        .with_context(|| format!("Open {procs}"))?;
    file.write_all(b"0").context("Leave the cgroup")
}

/// A stream whose other end is held by a process outside the cgroup.
fn unix_outside(case: &Case) -> Result<()> {
    let root = cgroup_root()?;
    let (mut mine, mut theirs) = UnixStream::pair()?;
    mine.set_read_timeout(Some(PATIENCE))?;
    let own = mine.as_raw_fd();
    let dir = case.dir().to_owned();
    let outside = Child::start(&dir, "outside", move |_| {
        // SAFETY: the child does not use the parent's end.
        unsafe { libc::close(own) };
        leave_cgroup(&root)?;
        let mut byte = [0];
        while theirs.read(&mut byte)? == 1 {
            theirs.write_all(&[byte[0] + 1])?;
        }
        Ok(())
    })?;
    outside.sleeps_in(libc::SYS_recvfrom)?;
    case.ready()?;
    mine.write_all(&[41])?;
    let mut byte = [0];
    mine.read_exact(&mut byte)?;
    ensure!(byte == [42], "The outside answered {byte:?}");
    drop(mine);
    outside.join()
}
