//! Leases on files: who holds one is told by a signal when somebody else opens the file.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork, getpid};

use super::owner::{THREAD, set_owner, set_signal};
use super::probe::sys;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("lease_read", read),
    Entry::carried("lease_write", write),
    Entry::carried("lease_two_processes", two_processes),
    Entry::refused("lease_breaking", "being broken", breaking),
    Entry::refused("lease_closed", "through descriptor", closed),
    Entry::refused("lease_mapped", "a lease for writing and is mapped", mapped),
];

fn set(fd: RawFd, lease: i32) -> Result<()> {
    // SAFETY: takes integers.
    let set = unsafe { libc::fcntl(fd, libc::F_SETLEASE, lease) };
    sys("F_SETLEASE", set.into()).map(|_| ())
}

fn get(fd: RawFd) -> i32 {
    // SAFETY: takes integers.
    unsafe { libc::fcntl(fd, libc::F_GETLEASE) }
}

/// Opens as somebody else would who does not wait.
fn intrude(path: &Path, writing: bool) -> std::io::Result<File> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(writing);
    options.custom_flags(libc::O_NONBLOCK).open(path)
}

fn refuses_to_open(path: &Path, writing: bool) -> Result<()> {
    let opened = intrude(path, writing).map(|_| ());
    let errno = opened.err().and_then(|error| error.raw_os_error());
    ensure!(
        errno == Some(libc::EWOULDBLOCK),
        "Opened against a lease: {errno:?}"
    );
    Ok(())
}

fn block(signals: &[Signal]) -> Result<SigSet> {
    let set: SigSet = signals.iter().copied().collect();
    set.thread_block()?;
    Ok(set)
}

/// Takes a pending signal: which, and the descriptor it names.
pub(super) fn pending(set: &SigSet) -> Result<(i32, i32)> {
    // struct siginfo: signal first, the descriptor of SIGIO behind its band.
    let mut info = [0_i32; 32];
    let patience = libc::timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    // SAFETY: the kernel writes 128 bytes.
    let got = Errno::result(unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            set.as_ref(),
            info.as_mut_ptr(),
            &raw const patience,
            8,
        )
    })?;
    ensure!(got == i64::from(info[0]), "Signal {got} is {}", info[0]);
    Ok((info[0], info[6]))
}

fn leased(case: &Case, name: &str) -> Result<(File, std::path::PathBuf)> {
    let path = case.path(name);
    std::fs::write(&path, "text")?;
    Ok((File::open(&path)?, path))
}

/// Two descriptions with leases for reading, one with a signal of its own.
fn read(case: &Case) -> Result<()> {
    let signals = block(&[Signal::SIGUSR1, Signal::SIGIO])?;
    let (file, path) = leased(case, "leased")?;
    let (other, other_path) = leased(case, "other")?;
    set_signal(file.as_raw_fd(), Signal::SIGUSR1)?;
    for file in [&file, &other] {
        set(file.as_raw_fd(), libc::F_RDLCK)?;
    }
    case.ready()?;
    for file in [&file, &other] {
        ensure!(get(file.as_raw_fd()) == libc::F_RDLCK, "No lease");
    }
    drop(intrude(&path, false)?);
    refuses_to_open(&path, true)?;
    let told = pending(&signals)?;
    let expected = (Signal::SIGUSR1 as i32, file.as_raw_fd());
    ensure!(told == expected, "Told {told:?} instead of {expected:?}");
    set(file.as_raw_fd(), libc::F_UNLCK)?;
    intrude(&path, true)?.write_all(b"more")?;
    refuses_to_open(&other_path, true)?;
    let (signal, _) = pending(&signals)?;
    ensure!(signal == Signal::SIGIO as i32, "Told by signal {signal}");
    set(other.as_raw_fd(), libc::F_UNLCK)
}

/// A lease for writing ends by becoming one for reading.
fn write(case: &Case) -> Result<()> {
    let signals = block(&[Signal::SIGUSR2])?;
    let path = case.path("leased");
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create(true).open(&path)?;
    // Nobody but this thread is to be told.
    set_owner(file.as_raw_fd(), THREAD, nix::unistd::gettid())?;
    set_signal(file.as_raw_fd(), Signal::SIGUSR2)?;
    set(file.as_raw_fd(), libc::F_WRLCK)?;
    case.ready()?;
    ensure!(get(file.as_raw_fd()) == libc::F_WRLCK, "No lease");
    refuses_to_open(&path, false)?;
    let told = pending(&signals)?;
    let expected = (Signal::SIGUSR2 as i32, file.as_raw_fd());
    ensure!(told == expected, "Told {told:?} instead of {expected:?}");
    set(file.as_raw_fd(), libc::F_UNLCK)?;
    intrude(&path, false).map(drop)?;
    Ok(())
}

/// The description is a child's too; who took the lease is told.
fn two_processes(case: &Case) -> Result<()> {
    let signals = block(&[Signal::SIGIO])?;
    let (file, path) = leased(case, "leased")?;
    let (mut hold, release) = std::io::pipe()?;
    set(file.as_raw_fd(), libc::F_RDLCK)?;
    // SAFETY: there is one thread.
    let ForkResult::Parent { child } = (unsafe { fork() })? else {
        drop(release);
        let ended = std::io::Read::read_to_end(&mut hold, &mut Vec::new());
        let kept = get(file.as_raw_fd()) == libc::F_RDLCK;
        let told = SigSet::all().thread_block().is_ok() && signal_pending(Signal::SIGIO);
        std::process::exit(i32::from(ended.is_err() || !kept || told));
    };
    drop(hold);
    case.ready()?;
    drop(release);
    let ended = waitpid(child, None)?;
    ensure!(ended == WaitStatus::Exited(child, 0), "It {ended:?}");
    refuses_to_open(&path, true)?;
    let (signal, _) = pending(&signals)?;
    ensure!(
        signal == Signal::SIGIO as i32 && getpid() != child,
        "Told by signal {signal}"
    );
    set(file.as_raw_fd(), libc::F_UNLCK)
}

fn signal_pending(signal: Signal) -> bool {
    let mut set = 0_u64;
    // SAFETY: the kernel writes eight bytes.
    unsafe { libc::syscall(libc::SYS_rt_sigpending, &raw mut set, 8) };
    set & 1 << (signal as i32 - 1) != 0
}

/// Somebody waits for the lease to be released, for longer than all cases of a batch take: the
/// kernel would end the lease by itself.
fn breaking(case: &Case) -> Result<()> {
    std::fs::write("/proc/sys/fs/lease-break-time", "3600")?;
    let _signals = block(&[Signal::SIGIO])?;
    let (file, path) = leased(case, "leased")?;
    set(file.as_raw_fd(), libc::F_RDLCK)?;
    refuses_to_open(&path, true)?;
    case.ready()?;
    let lease = get(file.as_raw_fd());
    ensure!(lease == libc::F_UNLCK, "The lease is to become {lease}");
    set(file.as_raw_fd(), libc::F_UNLCK)?;
    intrude(&path, true).map(drop)?;
    Ok(())
}

/// The signal would name a descriptor that is none any more.
fn closed(case: &Case) -> Result<()> {
    let (file, _) = leased(case, "leased")?;
    let other = file.try_clone()?;
    set(file.as_raw_fd(), libc::F_RDLCK)?;
    drop(file);
    case.ready()?;
    ensure!(get(other.as_raw_fd()) == libc::F_RDLCK, "No lease");
    Ok(())
}

fn mapped(case: &Case) -> Result<()> {
    let path = case.path("leased");
    std::fs::write(&path, [7; 4096])?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    // SAFETY: a new mapping.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            0,
        )
    };
    ensure!(mapped != libc::MAP_FAILED, "mmap: {}", Errno::last());
    set(file.as_raw_fd(), libc::F_WRLCK)?;
    case.ready()?;
    // SAFETY: mapped above, and as long as the file.
    let byte = unsafe { std::ptr::read_volatile(mapped.cast::<u8>()) };
    ensure!(
        byte == 7 && get(file.as_raw_fd()) == libc::F_WRLCK,
        "{byte}"
    );
    Ok(())
}
