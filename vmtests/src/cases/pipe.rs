//! Pipes and FIFOs: queued bytes, capacity, flags, ends in several processes.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe2};

use super::child::Child;
use super::probe::{check_pattern, pattern};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("pipe", pipe),
    Entry::carried("pipe_child", child),
    Entry::carried("pipe_one_end", one_end),
    Entry::carried("fifo", fifo),
];

fn capacity(fd: impl AsFd) -> Result<i32> {
    fcntl(fd, FcntlArg::F_GETPIPE_SZ).context("F_GETPIPE_SZ")
}

/// Data in the pipe, its capacity, and one non-blocking end.
fn pipe(case: &Case) -> Result<()> {
    let (from, to) = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&from, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    fcntl(&to, FcntlArg::F_SETPIPE_SZ(1 << 18))?;
    let (mut from, mut to) = (std::fs::File::from(from), std::fs::File::from(to));
    to.write_all(&pattern(1, 100_000))?;
    let mut head = [0; 777];
    from.read_exact(&mut head)?;
    let (mut small_from, small_to) = std::io::pipe()?;
    let mut small_to_writer = small_to.try_clone()?;
    small_to_writer.write_all(b"small")?;

    case.ready()?;

    ensure!(capacity(&from)? == 1 << 18, "Capacity {}", capacity(&from)?);
    ensure!(
        OFlag::from_bits_retain(fcntl(&from, FcntlArg::F_GETFL)?).contains(OFlag::O_NONBLOCK),
        "O_NONBLOCK is lost"
    );
    ensure!(
        !OFlag::from_bits_retain(fcntl(&to, FcntlArg::F_GETFL)?).contains(OFlag::O_NONBLOCK),
        "O_NONBLOCK appeared"
    );
    to.write_all(b"more")?;
    let mut all = head.to_vec();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match from.read(&mut buffer) {
            Ok(length) => all.extend(&buffer[..length]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(error) => return Err(error).context("Read the pipe"),
        }
    }
    ensure!(all.len() == 100_004, "{} bytes came out", all.len());
    check_pattern("the pipe's data", 1, &all[..100_000])?;
    ensure!(all.ends_with(b"more"), "The new bytes are wrong");
    drop(to);
    ensure!(
        from.read(&mut buffer)? == 0,
        "No end of file: somebody else holds the writing end"
    );
    drop((small_to, small_to_writer));
    let mut text = String::new();
    small_from.read_to_string(&mut text)?;
    ensure!(text == "small", "The small pipe held {text:?}");
    Ok(())
}

/// Two pipes between a parent and a child that answers.
fn child(case: &Case) -> Result<()> {
    let (mut requests, mut ask) = std::io::pipe()?;
    let (mut answers, mut answer) = std::io::pipe()?;
    ask.write_all(&[1, 2, 3])?;
    let dir = case.dir().to_owned();
    let child = {
        let not_mine = [ask.as_raw_fd(), answers.as_raw_fd()];
        Child::start(&dir, "echo", move |_| {
            for fd in not_mine {
                // SAFETY: the child does not use the parent's ends.
                unsafe { libc::close(fd) };
            }
            let mut sum = 0u8;
            let mut byte = [0];
            loop {
                if requests.read(&mut byte)? == 0 {
                    return Ok(());
                }
                sum = sum.wrapping_add(byte[0]);
                answer.write_all(&[sum])?;
            }
        })?
    };
    child.sleeps_in(libc::SYS_read)?;
    case.ready()?;
    ask.write_all(&[10])?;
    let mut sums = [0; 4];
    answers.read_exact(&mut sums)?;
    ensure!(sums == [1, 3, 6, 16], "The child answered {sums:?}");
    drop(ask);
    child.join().context("After end of file")?;
    ensure!(
        answers.read(&mut sums)? == 0,
        "No end of file after the child's end"
    );
    Ok(())
}

/// One end is closed already: end of file, and EPIPE.
fn one_end(case: &Case) -> Result<()> {
    let (mut from, mut to) = std::io::pipe()?;
    to.write_all(b"last words")?;
    drop(to);
    let (nobody, mut into) = std::io::pipe()?;
    drop(nobody);
    case.ready()?;
    let mut text = String::new();
    from.read_to_string(&mut text)?;
    ensure!(text == "last words", "The pipe held {text:?}");
    let error = into.write(b"x").err().map(|error| error.kind());
    ensure!(
        error == Some(ErrorKind::BrokenPipe),
        "Writing without a reader: {error:?}"
    );
    Ok(())
}

/// A named pipe with data, opened at both ends.
fn fifo(case: &Case) -> Result<()> {
    let path = case.dir().join("fifo");
    mkfifo(&path, Mode::from_bits_truncate(0o600))?;
    let mut from = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)?;
    let mut to = OpenOptions::new().write(true).open(&path)?;
    to.write_all(&pattern(1, 5000))?;
    let mut head = [0; 1000];
    from.read_exact(&mut head)?;

    case.ready()?;

    let mut rest = [0; 4000];
    from.read_exact(&mut rest)?;
    ensure!(
        rest[..] == pattern(1, 5000)[1000..],
        "Wrong data in the FIFO"
    );
    let mut third = OpenOptions::new().write(true).open(&path)?;
    third.write_all(b"by name")?;
    let mut text = [0; 7];
    from.read_exact(&mut text)?;
    ensure!(&text == b"by name", "The path leads to another FIFO");
    to.write_all(b"old end")?;
    from.read_exact(&mut text)?;
    ensure!(&text == b"old end", "The old end leads elsewhere");
    let link = std::fs::read_link(format!("/proc/self/fd/{}", from.as_raw_fd()))?;
    ensure!(link == path, "It is now {}", link.display());
    drop((to, third));
    ensure!(from.read(&mut text)? == 0, "No end of file");
    Ok(())
}
