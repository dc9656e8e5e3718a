//! System calls for the checks that neither std nor nix wraps.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use anyhow::{Context, Result};

/// The result of a system call that returns -1 for failure.
pub fn check(result: libc::c_long, what: &str) -> Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error()).with_context(|| what.to_owned())
    } else {
        Ok(result)
    }
}

/// Takes ownership of a descriptor a system call just returned.
pub fn own(fd: impl Into<libc::c_long>, what: &str) -> Result<OwnedFd> {
    let fd = i32::try_from(check(fd.into(), what)?)?;
    // SAFETY: the descriptor was just made by the system call and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A child that exits with `code` at once.
pub fn fork_exit(code: i32) -> Result<i32> {
    // SAFETY: the child calls only _exit.
    let pid = check(unsafe { libc::fork() }.into(), "fork")?;
    if pid == 0 {
        // SAFETY: ends the child without touching the parent's state.
        unsafe { libc::_exit(code) };
    }
    Ok(i32::try_from(pid)?)
}

/// A child that sleeps in pause(2) until it is killed.
pub fn fork_pause() -> Result<Child> {
    // SAFETY: the child calls only pause.
    let pid = check(unsafe { libc::fork() }.into(), "fork")?;
    if pid == 0 {
        loop {
            // SAFETY: pause has no preconditions.
            unsafe { libc::pause() };
        }
    }
    Ok(Child(i32::try_from(pid)?))
}

/// A child that does this for ever.
pub fn fork_running(program: fn()) -> Result<Child> {
    // SAFETY: the child has one thread, and the programs allocate nothing.
    let pid = check(unsafe { libc::fork() }.into(), "fork")?;
    if pid == 0 {
        loop {
            program();
        }
    }
    Ok(Child(i32::try_from(pid)?))
}

/// A child that sleeps once for this many seconds.
pub fn fork_sleep(seconds: i64) -> Result<Child> {
    let time = libc::timespec {
        tv_sec: seconds,
        tv_nsec: 0,
    };
    // SAFETY: the child calls only nanosleep and _exit.
    let pid = check(unsafe { libc::fork() }.into(), "fork")?;
    if pid == 0 {
        // SAFETY: the time is valid; nothing is asked for in return.
        unsafe {
            libc::nanosleep(&raw const time, std::ptr::null_mut());
            libc::_exit(0);
        }
    }
    Ok(Child(i32::try_from(pid)?))
}

/// Waits until a process blocks in this system call.
pub fn wait_for_syscall(pid: i32, number: libc::c_long) -> Result<()> {
    for _ in 0..1000 {
        let text = std::fs::read_to_string(format!("/proc/{pid}/syscall"))?;
        if text.split(' ').next() == Some(&number.to_string()) {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    anyhow::bail!("PID {pid} does not enter system call {number}")
}

/// A child process, killed and reaped on drop.
pub struct Child(pub i32);

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: the PID is that of our own unreaped child.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), 0);
        }
    }
}
