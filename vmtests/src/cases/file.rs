//! Open files: regular, deleted, shared between descriptors and processes,
//! directories, locks.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, OFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::child::Child;
use super::probe::{pattern, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("file_regular", regular),
    Entry::carried("file_shared_offset", shared_offset),
    Entry::carried("file_deleted", deleted),
    Entry::carried("file_deleted_twins", deleted_twins),
    Entry::carried("file_directory", directory),
    Entry::carried("file_locks", locks),
    Entry::carried("file_devices", devices),
    Entry::carried("file_proc", proc),
    Entry::carried("file_proc_busy", proc_busy),
    Entry::carried("file_numbers", numbers),
];

fn flags(fd: &File) -> Result<OFlag> {
    Ok(OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?))
}

fn close_on_exec(fd: &File) -> Result<bool> {
    Ok(FdFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFD)?).contains(FdFlag::FD_CLOEXEC))
}

/// Offset, access mode, O_APPEND, close-on-exec, and dup'ed descriptors.
fn regular(case: &Case) -> Result<()> {
    let path = case.dir().join("plain");
    fs::write(&path, pattern(1, 10_000))?;
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(&path)?;
    let mut first = [0; 1234];
    reader.read_exact(&mut first)?;
    let mut twin = reader.try_clone()?;
    fcntl(&twin, FcntlArg::F_SETFD(FdFlag::empty()))?;
    let log = case.dir().join("log");
    let mut appender = OpenOptions::new().create(true).append(true).open(&log)?;
    appender.write_all(b"before\n")?;
    let mut writer = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(case.dir().join("rw"))?;
    writer.write_all(b"0123456789")?;
    writer.seek(SeekFrom::Start(4))?;
    let wanted = [flags(&reader)?, flags(&appender)?, flags(&writer)?];
    let far = OpenOptions::new().write(true).open(&path)?;
    (&far).seek(SeekFrom::Start(1 << 40))?;

    case.ready()?;

    ensure!(
        [flags(&reader)?, flags(&appender)?, flags(&writer)?] == wanted,
        "Flags differ from {wanted:?}"
    );
    ensure!(
        close_on_exec(&reader)? && !close_on_exec(&twin)?,
        "Close-on-exec differs"
    );
    ensure!(
        reader.stream_position()? == 1234,
        "Offset {}",
        reader.stream_position()?
    );
    let mut some = [0; 1000];
    twin.read_exact(&mut some)?;
    ensure!(some[..] == pattern(1, 10_000)[1234..2234], "Wrong bytes");
    ensure!(
        reader.stream_position()? == 2234,
        "The descriptors have parted"
    );
    ensure!(
        reader
            .write(b"x")
            .is_err_and(|e| e.raw_os_error() == Some(libc::EBADF)),
        "A reader can write"
    );
    // Somebody else makes the file longer: O_APPEND goes to the end.
    OpenOptions::new()
        .append(true)
        .open(&log)?
        .write_all(b"between\n")?;
    appender.write_all(b"after\n")?;
    ensure!(
        fs::read_to_string(&log)? == "before\nbetween\nafter\n",
        "O_APPEND is lost"
    );
    writer.write_all(b"XY")?;
    let mut rest = String::new();
    writer.read_to_string(&mut rest)?;
    ensure!(rest == "6789", "Read {rest:?} after the write");
    ensure!(
        (&far).stream_position()? == 1 << 40,
        "A large offset is lost"
    );
    Ok(())
}

/// Parent and child share one offset through an inherited descriptor.
fn shared_offset(case: &Case) -> Result<()> {
    let path = case.dir().join("shared");
    let content = pattern(1, 4000);
    fs::write(&path, &content)?;
    let mut file = File::open(&path)?;
    file.seek(SeekFrom::Start(100))?;
    let mut own = File::open(&path)?;
    let dir = case.dir().to_owned();
    let child = {
        let mut file = file.try_clone()?;
        let content = content.clone();
        Child::start(&dir, "reader", move |turn| {
            let mut bytes = [0; 200];
            file.read_exact(&mut bytes)?;
            turn.wait();
            // The parent has read 300 bytes meanwhile.
            file.read_exact(&mut bytes)?;
            ensure!(
                bytes[..] == content[600..800],
                "The child read at a wrong offset"
            );
            Ok(())
        })?
    };
    child.waits()?;
    own.seek(SeekFrom::Start(7))?;
    case.ready()?;
    ensure!(
        file.stream_position()? == 300,
        "Offset {}",
        file.stream_position()?
    );
    let mut bytes = [0; 300];
    file.read_exact(&mut bytes)?;
    ensure!(
        bytes[..] == content[300..600],
        "The parent read at a wrong offset"
    );
    child.finish()?;
    ensure!(
        file.stream_position()? == 800,
        "The child's reading did not move the offset"
    );
    ensure!(
        own.stream_position()? == 7,
        "An unrelated open file has moved"
    );
    Ok(())
}

/// A file without a name, and one whose name belongs to another file now.
fn deleted(case: &Case) -> Result<()> {
    let path = case.dir().join("gone");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&path)?;
    file.write_all(&pattern(1, 100_000))?;
    file.seek(SeekFrom::Start(50_000))?;
    let mut second = File::open(&path)?;
    fs::remove_file(&path)?;
    fs::write(&path, b"another file of the same name")?;

    case.ready()?;

    ensure!(file.metadata()?.nlink() == 0, "It has a name again");
    ensure!(file.stream_position()? == 50_000, "Wrong offset");
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    ensure!(rest == pattern(1, 100_000)[50_000..], "Wrong contents");
    file.write_all(b"tail")?;
    let mut all = Vec::new();
    second.read_to_end(&mut all)?;
    ensure!(
        all.len() == 100_004 && all.ends_with(b"tail"),
        "Two descriptors of it have parted"
    );
    ensure!(
        fs::read(&path)? == b"another file of the same name",
        "The other file was changed"
    );
    Ok(())
}

/// Files without a name on two filesystems, with the same inode number.
fn deleted_twins(case: &Case) -> Result<()> {
    let contents = [1, 2].map(|seed| pattern(seed, 5000));
    let twin = |name: &str, content: &[u8]| -> Result<(PathBuf, File)> {
        let dir = case.path(name);
        fs::create_dir(&dir)?;
        let none = None::<&str>;
        mount(none, &dir, Some("tmpfs"), MsFlags::empty(), none).context("Mount a tmpfs")?;
        let path = dir.join("file");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        file.write_all(content)?;
        fs::remove_file(&path)?;
        Ok((dir, file))
    };
    let (dir, first) = twin("one", &contents[0])?;
    let (other_dir, second) = twin("other", &contents[1])?;
    let numbers = [first.metadata()?.ino(), second.metadata()?.ino()];
    ensure!(numbers[0] == numbers[1], "They are no twins: {numbers:?}");

    case.ready()?;

    for (file, content) in [(first, &contents[0]), (second, &contents[1])] {
        let mut found = vec![0; content.len()];
        file.read_exact_at(&mut found, 0)?;
        ensure!(found == *content, "It has its twin's bytes");
    }
    for dir in [dir, other_dir] {
        // Not there after a kexec.
        let _ = umount2(&dir, MntFlags::MNT_DETACH);
    }
    Ok(())
}

/// Names from one getdents64 call with a small buffer.
fn some_names(fd: &File) -> Result<Vec<String>> {
    let mut buffer = [0u8; 512];
    // SAFETY: the kernel writes at most the buffer's length.
    let length = sys("getdents64", unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            fd.as_raw_fd(),
            buffer.as_mut_ptr(),
            buffer.len(),
        )
    })?;
    let mut rest = &buffer[..usize::try_from(length)?];
    let mut names = Vec::new();
    while rest.len() > 19 {
        let size = usize::from(u16::from_ne_bytes([rest[16], rest[17]]));
        let name = rest[19..size]
            .split(|&byte| byte == 0)
            .next()
            .unwrap_or_default();
        names.push(String::from_utf8_lossy(name).into_owned());
        rest = &rest[size..];
    }
    Ok(names)
}

/// A directory read half way.
fn directory(case: &Case) -> Result<()> {
    let path = case.dir().join("many");
    fs::create_dir_all(&path)?;
    let mut expected: BTreeSet<String> = (0..100).map(|i| format!("entry-{i:04}")).collect();
    for name in &expected {
        fs::write(path.join(name), b"")?;
    }
    expected.extend([".".to_owned(), "..".to_owned()]);
    let dir = File::open(&path)?;
    let mut names = some_names(&dir)?;
    names.extend(some_names(&dir)?);
    ensure!(
        names.len() > 10 && names.len() < 90,
        "Read {} names at once",
        names.len()
    );

    case.ready()?;

    loop {
        let more = some_names(&dir)?;
        if more.is_empty() {
            break;
        }
        names.extend(more);
    }
    let count = names.len();
    let seen: BTreeSet<String> = names.into_iter().collect();
    ensure!(count == seen.len(), "Some names came twice");
    ensure!(
        seen == expected,
        "Missing: {:?}",
        expected.difference(&seen).collect::<Vec<_>>()
    );
    let inside = File::open(format!("/proc/self/fd/{}/entry-0042", dir.as_raw_fd()));
    inside
        .context("The directory is not usable as one")
        .map(|_| ())
}

/// A lock type as the struct has it.
fn lock_type(number: i32) -> Result<libc::c_short> {
    Ok(libc::c_short::try_from(number)?)
}

/// What F_GETLK says about a byte, seen from another owner.
fn posix_lock_at(file: &File, start: i64) -> Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: lock_type(libc::F_WRLCK)?,
        l_whence: 0,
        l_start: start,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
    Ok(lock)
}

/// flock, and POSIX record locks that a child bumps into.
fn locks(case: &Case) -> Result<()> {
    let path = case.dir().join("locked");
    fs::write(&path, [0; 100])?;
    let open = || OpenOptions::new().read(true).write(true).open(&path);
    let exclusive = Flock::lock(open()?, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)?;
    let records = open()?;
    let write = libc::flock {
        l_type: lock_type(libc::F_WRLCK)?,
        l_whence: 0,
        l_start: 10,
        l_len: 20,
        l_pid: 0,
    };
    fcntl(&records, FcntlArg::F_SETLK(&write))?;
    let read = libc::flock {
        l_type: lock_type(libc::F_RDLCK)?,
        l_start: 50,
        l_len: 0,
        ..write
    };
    fcntl(&records, FcntlArg::F_SETLK(&read))?;
    let dir = case.dir().to_owned();
    let parent = nix::unistd::getpid().as_raw();
    let path_in_child = path.clone();
    let child = Child::start(&dir, "prober", move |turn| {
        turn.wait();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path_in_child)?;
        let unlocked = lock_type(libc::F_UNLCK)?;
        for (at, kind) in [
            (0, unlocked),
            (10, lock_type(libc::F_WRLCK)?),
            (29, lock_type(libc::F_WRLCK)?),
            (30, unlocked),
            (50, lock_type(libc::F_RDLCK)?),
            (1_000_000, lock_type(libc::F_RDLCK)?),
        ] {
            let lock = posix_lock_at(&file, at)?;
            ensure!(
                lock.l_type == kind,
                "Byte {at}: lock type {}, not {kind}",
                lock.l_type
            );
            ensure!(
                kind == unlocked || lock.l_pid == parent,
                "Byte {at}: held by {}",
                lock.l_pid
            );
        }
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    // First: closing any descriptor of the file ends the record locks.
    child.finish()?;
    let (_, refused) = match Flock::lock(open()?, FlockArg::LockSharedNonblock) {
        Ok(_) => (None, None),
        Err((file, error)) => (Some(file), Some(error)),
    };
    ensure!(refused == Some(Errno::EWOULDBLOCK), "The flock is lost");
    drop(exclusive);
    Flock::lock(open()?, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, e)| e)
        .context("After its end the flock stays")?;
    Ok(())
}

/// Devices without state.
fn devices(case: &Case) -> Result<()> {
    let mut null = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/null")?;
    let mut zero = File::open("/dev/zero")?;
    let mut random = File::open("/dev/urandom")?;
    case.ready()?;
    null.write_all(b"nothing")?;
    let mut bytes = [1; 64];
    ensure!(null.read(&mut bytes)? == 0, "/dev/null is not empty");
    zero.read_exact(&mut bytes)?;
    ensure!(bytes == [0; 64], "/dev/zero is not zero");
    random.read_exact(&mut bytes)?;
    ensure!(bytes != [0; 64], "/dev/urandom is zero");
    Ok(())
}

/// Files of /proc, /sys and the cgroup hierarchy: they go on where they were, and show what
/// is true by then.
fn proc(case: &Case) -> Result<()> {
    let mut own = File::open("/proc/self/status")?;
    let mut memory = File::open("/proc/meminfo")?;
    let mut first = [0; 9];
    memory.read_exact(&mut first)?;
    let tasks = File::open("/proc/self/task")?;
    let mut release = File::open("/proc/sys/kernel/osrelease")?;
    let mut cpus = File::open("/sys/devices/system/cpu/online")?;
    let group = fs::read_to_string("/proc/self/cgroup")?;
    let group = group.trim().trim_start_matches("0::").to_owned();
    let mut group = File::open(format!("/sys/fs/cgroup{group}/cgroup.procs"))?;
    case.ready()?;
    let text = |file: &mut File| -> Result<String> {
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        Ok(text)
    };
    let pid = std::process::id();
    let status = text(&mut own)?;
    ensure!(
        status.starts_with("Name:\tcases\n") && status.contains(&format!("\nPid:\t{pid}\n")),
        "The status is {status:?}"
    );
    let rest = text(&mut memory)?;
    ensure!(
        &first == b"MemTotal:" && rest.trim_start().as_bytes()[0].is_ascii_digit(),
        "The rest of meminfo is {rest:?}"
    );
    let now = nix::sys::utsname::uname()?;
    ensure!(
        text(&mut release)?.trim() == now.release().to_string_lossy(),
        "osrelease shows another kernel"
    );
    ensure!(!text(&mut cpus)?.trim().is_empty(), "No CPU is online");
    let members = text(&mut group)?;
    ensure!(
        members.lines().any(|line| line == pid.to_string()),
        "The cgroup has the processes {members:?}"
    );
    let path = format!("/proc/self/fd/{}", tasks.as_raw_fd());
    let names = fs::read_dir(path)?.count();
    ensure!(names == 1, "The directory of threads has {names} entries");
    Ok(())
}

/// A program that looks at its own memory map all the time is caught when it does not.
fn proc_busy(case: &Case) -> Result<()> {
    let mut looks = 0_u64;
    let mut error = None;
    case.ready_polling(
        std::time::Duration::from_millis(3),
        || match fs::read_to_string("/proc/self/maps") {
            Ok(text) if text.contains("[stack]") => looks += 1,
            other => error = Some(format!("{other:?}")),
        },
    )?;
    ensure!(error.is_none(), "/proc/self/maps: {error:?}");
    ensure!(looks > 0, "It never looked");
    Ok(())
}

/// Descriptor numbers: high ones, gaps, and which is next.
fn numbers(case: &Case) -> Result<()> {
    let file = File::open("/dev/null")?;
    let place = |number: i32| -> Result<OwnedFd> {
        // SAFETY: the number is unused, so the new descriptor is ours alone.
        let fd = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_DUPFD_CLOEXEC, number) };
        ensure!(fd == number, "Asked for descriptor {number}, got {fd}");
        // SAFETY: as above.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let held = [place(57)?, place(100)?, place(900)?];
    let list = || -> Result<BTreeSet<String>> {
        let mut all = BTreeSet::new();
        for entry in fs::read_dir("/proc/self/fd")? {
            all.insert(entry?.file_name().to_string_lossy().into_owned());
        }
        Ok(all)
    };
    let before = list()?;
    case.ready()?;
    let after = list()?;
    ensure!(
        before == after,
        "Descriptors were {before:?}, are {after:?}"
    );
    for fd in &held {
        let link = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        ensure!(
            link.as_os_str() == "/dev/null",
            "{} is {}",
            fd.as_raw_fd(),
            link.display()
        );
    }
    let next = File::open("/dev/null")?;
    ensure!(
        next.as_raw_fd() < 57,
        "The next free number is {}",
        next.as_raw_fd()
    );
    Ok(())
}
