//! What the programs share: waiting for a thread to block, patterns, and the
//! kernel's view of their memory.

use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::errno::Errno;
use nix::unistd::{Pid, gettid};

/// Longest time anything may take on a loaded machine under emulation.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// setsockopt(2) of any value.
pub fn set_option(socket: &impl AsFd, level: i32, name: i32, value: &[u8]) -> nix::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).unwrap_or(0);
    let (fd, at) = (socket.as_fd().as_raw_fd(), value.as_ptr().cast());
    // SAFETY: the kernel reads so many bytes.
    Errno::result(unsafe { libc::setsockopt(fd, level, name, at, length) }).map(drop)
}

/// getsockopt(2) of a value of at most 256 bytes.
pub fn option(socket: &impl AsFd, level: i32, name: i32) -> nix::Result<Vec<u8>> {
    let mut value = vec![0; 256];
    let mut length: libc::socklen_t = 256;
    let (fd, at) = (socket.as_fd().as_raw_fd(), value.as_mut_ptr().cast());
    // SAFETY: the kernel writes at most so many bytes.
    Errno::result(unsafe { libc::getsockopt(fd, level, name, at, &raw mut length) })?;
    value.truncate(usize::try_from(length).unwrap_or(0));
    Ok(value)
}

/// Waits until the condition holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !condition()? {
        ensure!(
            begun.elapsed() < PATIENCE,
            "Not within {PATIENCE:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Waits until a thread sleeps in this system call.
pub fn blocked_in(tid: Pid, number: i64) -> Result<()> {
    let path = format!("/proc/{tid}/syscall");
    eventually(
        &format!("thread {tid} sleeps in system call {number}"),
        || {
            let text = fs::read_to_string(&path).with_context(|| format!("Read {path}"))?;
            Ok(text.split(' ').next().and_then(|word| word.parse().ok()) == Some(number))
        },
    )
}

/// Starts a thread and waits until it sleeps in this system call.
pub fn blocked_thread<T: Send + 'static>(
    number: i64,
    body: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<JoinHandle<Result<T>>> {
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        tell.send(gettid())
            .map_err(|_| anyhow!("Nobody waits for the thread"))?;
        drop(tell);
        body()
    });
    let blocked = told
        .recv()
        .map_err(anyhow::Error::from)
        .and_then(|tid| blocked_in(tid, number));
    match blocked {
        Ok(()) => Ok(thread),
        // The thread's own complaint says more.
        Err(error) if thread.is_finished() => match thread.join() {
            Ok(Ok(_)) => Err(error.context("The thread did not sleep")),
            Ok(Err(reason)) => Err(reason),
            Err(_) => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// The thread's result.
pub fn join<T>(what: &str, thread: JoinHandle<Result<T>>) -> Result<T> {
    eventually(&format!("end of the thread in {what}"), || {
        Ok(thread.is_finished())
    })?;
    match thread.join() {
        Ok(result) => result.with_context(|| format!("Thread in {what}")),
        Err(_) => bail!("The thread in {what} panicked"),
    }
}

/// Bytes that depend on the seed and their place.
pub fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    fill(seed, &mut bytes);
    bytes
}

/// Writes the pattern.
pub fn fill(seed: u64, bytes: &mut [u8]) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for chunk in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
    }
}

/// Compares with the pattern and names the first difference.
pub fn check_pattern(what: &str, seed: u64, bytes: &[u8]) -> Result<()> {
    let expected = pattern(seed, bytes.len());
    match bytes
        .iter()
        .zip(&expected)
        .position(|(have, want)| have != want)
    {
        None => Ok(()),
        Some(at) => bail!(
            "{what}: byte {at:#x} is {:#x}, not {:#x}",
            bytes[at],
            expected[at]
        ),
    }
}

/// The `rwxp` column of /proc/self/maps at an address; none in a hole.
pub fn permissions_at(address: usize) -> Result<Option<String>> {
    let maps = fs::read_to_string("/proc/self/maps").context("Read /proc/self/maps")?;
    for line in maps.lines() {
        let mut words = line.split(' ');
        let range = words
            .next()
            .and_then(|range| range.split_once('-'))
            .context("Odd line in maps")?;
        let start = usize::from_str_radix(range.0, 16)?;
        let end = usize::from_str_radix(range.1, 16)?;
        if (start..end).contains(&address) {
            return Ok(words.next().map(str::to_owned));
        }
    }
    Ok(None)
}

/// What /proc/self/smaps says in this field (with its colon) of what is mapped at an address.
pub fn smaps_at(address: usize, field: &str) -> Result<String> {
    let smaps = fs::read_to_string("/proc/self/smaps").context("Read /proc/self/smaps")?;
    let mut inside = false;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        if let Some(text) = line.strip_prefix(field) {
            if inside {
                return Ok(text.trim().to_owned());
            }
        } else if let Some((start, end)) = first.split_once('-') {
            inside = (usize::from_str_radix(start, 16)?..usize::from_str_radix(end, 16)?)
                .contains(&address);
        }
    }
    bail!("Nothing is mapped at {address:#x}, or it has no {field}")
}

/// The `VmFlags` at an address.
pub fn vm_flags_at(address: usize) -> Result<Vec<String>> {
    let flags = smaps_at(address, "VmFlags:")?;
    Ok(flags.split_whitespace().map(str::to_owned).collect())
}

/// A number from `/proc/self/status` or `/proc/PID/status`.
pub fn status(pid: &str, key: &str) -> Result<String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("Read {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    Ok(line
        .with_context(|| format!("No {key} in {path}"))?
        .trim()
        .to_owned())
}

/// What the kernel says when it is to read (`false`) or write (`true`) one
/// byte there on our behalf: no error, or EFAULT.
pub fn kernel_access(address: usize, write: bool) -> Result<Result<(), Errno>> {
    let (from, mut to) = io::pipe().context("Make a pipe")?;
    let fd = if write {
        to.write_all(b"x")?;
        OwnedFd::from(from)
    } else {
        OwnedFd::from(to.try_clone()?)
    };
    // SAFETY: the kernel checks the address itself; for a write the caller
    // gives an address that it either may lose a byte at or cannot write.
    let done = unsafe {
        if write {
            libc::read(fd.as_raw_fd(), address as *mut libc::c_void, 1)
        } else {
            libc::write(fd.as_raw_fd(), address as *const libc::c_void, 1)
        }
    };
    Ok(Errno::result(done).map(|_| ()))
}

/// Turns a system call's result into an error that names it.
pub fn sys(name: &str, result: i64) -> Result<i64> {
    Errno::result(result).with_context(|| name.to_owned())
}

/// A new descriptor that a system call returned.
pub fn owned(name: &str, result: i64) -> Result<OwnedFd> {
    let fd = i32::try_from(sys(name, result)?)?;
    // SAFETY: owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
