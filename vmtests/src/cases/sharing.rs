//! Descriptor tables and directories that processes share without being threads.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, getpid, pipe, read, write};

use super::child::Child;
use super::probe::sys;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("clone_files", files),
    Entry::carried("clone_files_lock", lock),
    Entry::carried("clone_files_of_two_sets", two_sets),
    Entry::carried("clone_fs", directories),
    Entry::refused(
        "refused_clone_files_apart",
        "which is not its parent",
        apart,
    ),
];

/// `KCMP_FILES` and `KCMP_FS` of include/uapi/linux/kcmp.h.
const KCMP_FILES: i32 = 2;
const KCMP_FS: i32 = 3;

/// Whether two processes have one object in common.
fn same(kind: i32, one: Pid, other: Pid) -> Result<bool> {
    // SAFETY: takes integers.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, one.as_raw(), other.as_raw(), kind, 0, 0) };
    Ok(sys("kcmp", result)? == 0)
}

/// A descriptor by its number, which somebody else owns.
fn fd(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: the cases keep these numbers open, or expect EBADF.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Leaves a number for another process.
fn tell(path: &Path, number: RawFd) -> Result<()> {
    fs::write(path, number.to_string()).with_context(|| format!("Write {}", path.display()))
}

/// A number another process has left.
fn told(path: &Path) -> Result<RawFd> {
    let text = fs::read_to_string(path).with_context(|| format!("Read {}", path.display()))?;
    Ok(text.parse()?)
}

/// A child and its child in the parent's table, one of them asleep in read(2) on it; another
/// child with a table of its own.
fn files(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let me = getpid();
    let (from, to) = pipe()?;
    let (from, to) = (from.into_raw_fd(), to.into_raw_fd());
    fs::write(case.path("text"), "in the file")?;
    let text = File::open(case.path("text"))?;
    fd_flags(text.as_raw_fd(), FdFlag::FD_CLOEXEC)?;
    let text = text.into_raw_fd();
    let stranger = Child::start(&dir, "stranger", move |turn| {
        turn.wait();
        // Its own copies of both.
        ensure!(fcntl(fd(from), FcntlArg::F_GETFD).is_ok(), "No pipe");
        ensure!(!same(KCMP_FILES, getpid(), me)?, "The table is shared");
        Ok(())
    })?;
    stranger.waits()?;
    let child_dir = dir.clone();
    let child = Child::sharing(libc::CLONE_FILES, &dir, "sharer", move |turn| {
        let reader = Child::sharing(libc::CLONE_FILES, &child_dir, "reader", move |_| {
            let mut bytes = [0; 5];
            let got = read(fd(from), &mut bytes)?;
            ensure!(&bytes[..got] == b"woken", "Read {:?}", &bytes[..got]);
            Ok(())
        })?;
        reader.sleeps_in(libc::SYS_read)?;
        turn.wait();
        let opened = told(&child_dir.join("opened"))?;
        let mut bytes = [0; 16];
        let got = read(fd(opened), &mut bytes).context("Read what the parent has opened")?;
        ensure!(&bytes[..got] == b"in the file", "Read {:?}", &bytes[..got]);
        nix::unistd::close(opened)?;
        let answer = File::create(child_dir.join("answer"))?;
        tell(&child_dir.join("number"), answer.into_raw_fd())?;
        write(fd(to), b"woken")?;
        reader.join()
    })?;
    child.waits()?;

    case.ready()?;

    ensure!(
        same(KCMP_FILES, me, child.pid)?,
        "The table is not shared any more"
    );
    let flags = fcntl(fd(text), FcntlArg::F_GETFD)?;
    ensure!(flags == FdFlag::FD_CLOEXEC.bits(), "FD_CLOEXEC is lost");
    let opened = File::open(case.path("text"))?.into_raw_fd();
    tell(&case.path("opened"), opened)?;
    child.finish()?;
    let number = told(&case.path("number"))?;
    ensure!(
        number == opened,
        "The child closed {opened} and got {number}"
    );
    write(fd(number), b"by the parent")?;
    let answer = fs::read_to_string(case.path("answer"))?;
    ensure!(answer == "by the parent", "The answer is {answer:?}");
    stranger.finish()
}

fn fd_flags(number: RawFd, flags: FdFlag) -> Result<()> {
    fcntl(fd(number), FcntlArg::F_SETFD(flags))?;
    Ok(())
}

/// A POSIX lock belongs to the table; who has taken it is told to others. The file is mapped as
/// well: no descriptor of it may be closed behind the lock.
fn lock(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let path = case.path("locked");
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)?;
    file.write_all(&[7; 4096])?;
    // SAFETY: a new mapping of our own file, which lives as long as the process.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        )
    };
    ensure!(mapped != libc::MAP_FAILED, "mmap: {}", Errno::last());
    let number = file.as_raw_fd();
    let stranger_path = path.clone();
    let stranger = Child::start(&dir, "stranger", move |turn| {
        turn.wait();
        let file = File::options().read(true).write(true).open(stranger_path)?;
        let mut range = range(libc::F_WRLCK);
        // SAFETY: reads and writes one struct flock.
        sys("F_GETLK", unsafe {
            libc::fcntl(file.as_raw_fd(), libc::F_GETLK, &raw mut range).into()
        })?;
        ensure!(i32::from(range.l_type) == libc::F_WRLCK, "Not locked");
        let holder = told(&dir_of(&file)?.join("holder"))?;
        ensure!(range.l_pid == holder, "Locked by {}", range.l_pid);
        Ok(())
    })?;
    stranger.waits()?;
    let child = Child::sharing(libc::CLONE_FILES, &dir, "locker", move |turn| {
        set_lock(number, libc::F_WRLCK)?;
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    tell(&case.path("holder"), child.pid.as_raw())?;

    case.ready()?;

    stranger.finish()?;
    // Of one table: no conflict.
    set_lock(number, libc::F_WRLCK)?;
    // SAFETY: mapped above.
    let byte = unsafe { *mapped.cast::<u8>() };
    ensure!(byte == 7, "The mapping shows {byte}");
    child.finish()
}

fn dir_of(file: &File) -> Result<std::path::PathBuf> {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    Ok(path.parent().context("No directory")?.to_owned())
}

fn range(kind: i32) -> libc::flock {
    // SAFETY: plain data for which zero is valid: the whole file.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    range.l_type = i16::try_from(kind).unwrap_or(0);
    range
}

fn set_lock(number: RawFd, kind: i32) -> Result<()> {
    let range = range(kind);
    // SAFETY: reads one struct flock.
    let result = unsafe { libc::fcntl(number, libc::F_SETLK, &raw const range) };
    sys("F_SETLK", result.into()).map(|_| ())
}

/// Two tables, each of two processes, with one description in both.
fn two_sets(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let me = getpid();
    fs::write(case.path("text"), "0123456789")?;
    let file = File::open(case.path("text"))?.into_raw_fd();
    let inner_dir = dir.clone();
    let other = Child::start(&dir, "other", move |turn| {
        let inner = Child::sharing(libc::CLONE_FILES, &inner_dir, "inner", move |turn| {
            turn.wait();
            let mut bytes = [0; 3];
            read(fd(file), &mut bytes)?;
            ensure!(&bytes == b"345", "The offset is another: {bytes:?}");
            nix::unistd::close(file)?;
            Ok(())
        })?;
        inner.waits()?;
        turn.wait();
        ensure!(same(KCMP_FILES, getpid(), inner.pid)?, "The inner table");
        ensure!(!same(KCMP_FILES, getpid(), me)?, "One table for all");
        inner.finish()?;
        ensure!(
            fcntl(fd(file), FcntlArg::F_GETFD) == Err(Errno::EBADF),
            "Still open in the inner table"
        );
        Ok(())
    })?;
    other.waits()?;
    let mate = Child::sharing(libc::CLONE_FILES, &dir, "mate", move |turn| {
        turn.wait();
        let mut bytes = [0; 3];
        read(fd(file), &mut bytes)?;
        ensure!(&bytes == b"012", "Read {bytes:?}");
        Ok(())
    })?;
    mate.waits()?;
    case.ready()?;
    mate.finish()?;
    other.finish()?;
    let mut bytes = [0; 4];
    read(fd(file), &mut bytes)?;
    ensure!(&bytes == b"6789", "Read {bytes:?} at last");
    Ok(())
}

/// Working directory and umask in common, with and without the descriptor table.
fn directories(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let me = getpid();
    let (first, second) = (case.path("first"), case.path("second"));
    fs::create_dir_all(&first)?;
    fs::create_dir_all(&second)?;
    std::env::set_current_dir(&first)?;
    umask(Mode::from_bits_truncate(0o027));
    let stranger_place = first.clone();
    let stranger = Child::start(&dir, "stranger", move |turn| {
        turn.wait();
        ensure!(
            std::env::current_dir()? == stranger_place,
            "The stranger was moved"
        );
        ensure!(
            umask(Mode::empty()) == Mode::from_bits_truncate(0o027),
            "The stranger's umask"
        );
        Ok(())
    })?;
    stranger.waits()?;
    let place = second.clone();
    let child = Child::sharing(libc::CLONE_FS, &dir, "child", move |turn| {
        turn.wait();
        ensure!(!same(KCMP_FILES, getpid(), me)?, "The table is shared");
        ensure!(std::env::current_dir()? == place, "Not moved");
        ensure!(
            umask(Mode::from_bits_truncate(0o077)) == Mode::from_bits_truncate(0o027),
            "The umask is another"
        );
        Ok(())
    })?;
    child.waits()?;
    let flags = libc::CLONE_FS | libc::CLONE_FILES;
    let both = Child::sharing(flags, &dir, "both", move |turn| {
        turn.wait();
        ensure!(same(KCMP_FILES, getpid(), me)?, "The table is not shared");
        Ok(())
    })?;
    both.waits()?;
    case.ready()?;
    for pid in [child.pid, both.pid] {
        ensure!(
            same(KCMP_FS, me, pid)?,
            "PID {pid} has directories of its own"
        );
    }
    ensure!(std::env::current_dir()? == first, "Elsewhere");
    std::env::set_current_dir(&second)?;
    child.finish()?;
    ensure!(
        umask(Mode::empty()) == Mode::from_bits_truncate(0o077),
        "The child's umask is not mine"
    );
    both.finish()?;
    stranger.finish()
}

/// Two siblings share a table that their parent does not.
fn apart(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let mut file = File::create_new(case.path("shared"))?;
    let number = file.as_raw_fd();
    let one = Child::start(&dir, "one", move |turn| {
        // SAFETY: as fork(2); the sibling makes system calls only.
        let sibling = unsafe {
            let flags = libc::CLONE_FILES | libc::CLONE_PARENT | libc::SIGCHLD;
            libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0)
        };
        if sys("clone", sibling)? == 0 {
            loop {
                // SAFETY: sleeps until it is killed.
                unsafe { libc::pause() };
            }
        }
        turn.wait();
        let sibling = Pid::from_raw(i32::try_from(sibling)?);
        ensure!(same(KCMP_FILES, getpid(), sibling)?, "Not shared any more");
        write(fd(number), b"alive")?;
        nix::sys::signal::kill(sibling, nix::sys::signal::Signal::SIGKILL)?;
        Ok(())
    })?;
    one.waits()?;
    case.ready()?;
    one.finish()?;
    file.flush()?;
    let mut text = String::new();
    File::open(case.path("shared"))?.read_to_string(&mut text)?;
    ensure!(text == "alive", "The file holds {text:?}");
    file.write_all_at(b"A", 0)?;
    Ok(())
}
