//! Descriptors and what is behind them.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::ptr;

use anyhow::{Context, Result, bail, ensure};
use tracker::bpf::events::{FileKind, SockRec};
use tracker::bpf::iter::{Detail, File, Iterators, Scope};

use crate::sys::{check, fork_pause, own};

/// fcntl(2), missing in libc.
const F_SETSIG: i32 = 10;

pub fn me() -> Scope {
    Scope::Process(std::process::id())
}

/// The record of one of our descriptors.
pub fn find(iterators: &mut Iterators, fd: &impl AsFd) -> Result<File> {
    find_among(iterators.descriptors(me())?, fd)
}

/// The same of a pass that was made.
pub fn find_among(files: Vec<File>, fd: &impl AsFd) -> Result<File> {
    let number = u32::try_from(fd.as_fd().as_raw_fd())?;
    files
        .into_iter()
        .find(|f| f.rec.fd == number)
        .with_context(|| format!("fd {number} missing"))
}

fn socket(iterators: &mut Iterators, fd: &impl AsFd) -> Result<SockRec> {
    match find(iterators, fd)?.detail {
        Detail::Socket(rec) => Ok(*rec),
        other => bail!("not a socket: {other:?}"),
    }
}

pub fn descriptor_set(iterators: &mut Iterators) -> Result<()> {
    let _high = {
        let null = fs::File::open("/dev/null")?;
        // SAFETY: duplicates our own descriptor to a free number.
        let fd = unsafe { libc::fcntl(null.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 700) };
        own(fd, "F_DUPFD")?
    };
    let found = iterators.descriptors(me())?;
    let numbers: BTreeSet<u32> = found.iter().map(|f| f.rec.fd).collect();
    ensure!(
        numbers.len() == found.len(),
        "a descriptor was reported twice"
    );
    ensure!(numbers.contains(&700), "fd 700");
    let mut links = 0;
    for file in &found {
        // the iterator itself is closed by now
        let Ok(link) = fs::read_link(format!("/proc/self/fd/{}", file.rec.fd)) else {
            continue;
        };
        links += 1;
        let text = link.to_string_lossy();
        if let Some(name) = text.strip_prefix("anon_inode:") {
            ensure!(file.rec.name() == name, "{text} is {}", file.rec.name());
        }
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", file.rec.fd))?;
        let flags = info
            .lines()
            .find_map(|l| l.strip_prefix("flags:\t"))
            .context("flags")?;
        let listed = u32::from_str_radix(flags, 8)?;
        let cloexec = u32::try_from(libc::O_CLOEXEC)?;
        ensure!(
            listed & !cloexec == file.rec.flags & !cloexec,
            "flags {:o}",
            file.rec.flags
        );
        ensure!(
            (listed & cloexec != 0) == (file.rec.cloexec == 1),
            "close-on-exec of {text}"
        );
        let mnt_id = info
            .lines()
            .find_map(|l| l.strip_prefix("mnt_id:\t"))
            .context("mnt_id")?;
        ensure!(
            mnt_id.trim().parse::<u32>()? == file.rec.mnt_id,
            "mount of {text}"
        );
        let stat = nix::sys::stat::stat(format!("/proc/self/fd/{}", file.rec.fd).as_str());
        if let (Ok(stat), true) = (stat, text.starts_with('/')) {
            ensure!(
                stat.st_ino == file.rec.ino && stat.st_mode == file.rec.mode,
                "inode of {text}"
            );
            ensure!(
                stat.st_rdev == file.rec.st_rdev(),
                "device number of {text}"
            );
        }
    }
    let listed = fs::read_dir("/proc/self/fd")?.count();
    ensure!(links + 1 == listed, "{links} of {} descriptors", listed - 1);
    Ok(())
}

/// A thread with a descriptor table of its own.
pub fn own_table(iterators: &mut Iterators) -> Result<()> {
    let (stop, wait) = std::sync::mpsc::channel::<()>();
    let (ready, started) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || -> Result<()> {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)?;
        let null = fs::File::open("/dev/null")?;
        ready.send((nix::unistd::gettid(), null.as_raw_fd()))?;
        wait.recv().ok();
        Ok(())
    });
    let (tid, fd) = started.recv()?;
    let found = iterators.descriptors(me())?;
    let mappings = iterators.vmas(me())?;
    stop.send(())?;
    thread
        .join()
        .map_err(|_| anyhow::anyhow!("the thread panicked"))??;
    let (tid, fd) = (tid.as_raw().cast_unsigned(), fd.cast_unsigned());
    let theirs: Vec<_> = found.iter().filter(|f| f.rec.tid == tid).collect();
    ensure!(
        theirs.iter().any(|f| f.rec.fd == fd),
        "fd {fd} of thread {tid}"
    );
    let ours = found
        .iter()
        .find(|f| f.rec.tid == std::process::id())
        .context("our own")?;
    ensure!(
        theirs.iter().all(|f| f.rec.files != ours.rec.files),
        "tables differ"
    );
    ensure!(
        theirs.iter().all(|f| f.rec.tgid == std::process::id()),
        "same process"
    );
    let mut starts: Vec<u64> = mappings.iter().map(|vma| vma.start).collect();
    starts.dedup();
    ensure!(
        starts.is_sorted() && starts.len() == mappings.len(),
        "mappings are not repeated"
    );
    Ok(())
}

pub fn regular_files(iterators: &mut Iterators) -> Result<()> {
    let dir = tempdir()?;
    let path = dir.join("data");
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .read(true)
        .open(&path)?;
    file.write_all(b"0123456789")?;
    file.seek(SeekFrom::Start(4))?;
    let copy = file.try_clone()?;
    let other = fs::File::open(&path)?;
    // SAFETY: the descriptor is ours and the arguments are what fcntl(2) wants.
    unsafe {
        let fd = file.as_raw_fd();
        check(
            libc::fcntl(fd, libc::F_SETOWN, libc::getpid()).into(),
            "F_SETOWN",
        )?;
        check(libc::fcntl(fd, F_SETSIG, libc::SIGUSR1).into(), "F_SETSIG")?;
    }
    let rec = find(iterators, &file)?.rec;
    ensure!(
        rec.kind == FileKind::REGULAR && rec.name() == "data",
        "{rec:?}"
    );
    ensure!((rec.pos, rec.size, rec.nlink) == (4, 10, 1), "{rec:?}");
    ensure!(rec.flags & u32::try_from(libc::O_APPEND)? != 0, "O_APPEND");
    ensure!(
        rec.owner_pid == std::process::id() && rec.owner_type == 1,
        "owner {}",
        rec.owner_pid
    );
    ensure!(
        rec.owner_sig == libc::SIGUSR1,
        "owner signal {}",
        rec.owner_sig
    );
    ensure!(rec.refs == 2, "{} references", rec.refs);
    ensure!(
        find(iterators, &copy)?.rec.file == rec.file,
        "dup shares the description"
    );
    let second = find(iterators, &other)?.rec;
    ensure!(
        second.file != rec.file && second.inode == rec.inode,
        "a second open does not"
    );
    ensure!(second.refs == 1 && second.owner_pid == 0, "{second:?}");
    fs::remove_file(&path)?;
    ensure!(find(iterators, &file)?.rec.nlink == 0, "deleted");
    let directory = fs::File::open(&dir)?;
    ensure!(
        find(iterators, &directory)?.rec.kind == FileKind::DIRECTORY,
        "directory"
    );
    let null = fs::File::open("/dev/null")?;
    let rec = find(iterators, &null)?.rec;
    ensure!(
        rec.kind == FileKind::CHAR_DEVICE && rec.st_rdev() == libc::makedev(1, 3),
        "{rec:?}"
    );
    fs::remove_dir(&dir)?;
    Ok(())
}

pub fn pipes(iterators: &mut Iterators) -> Result<()> {
    let (reader, mut writer) = std::io::pipe()?;
    writer.write_all(b"hello")?;
    writer.write_all(&[7; 5000])?;
    // SAFETY: resizes our own pipe.
    let result = unsafe { libc::fcntl(writer.as_raw_fd(), libc::F_SETPIPE_SZ, 1 << 18) };
    check(result.into(), "F_SETPIPE_SZ")?;
    let (from, to) = (find(iterators, &reader)?, find(iterators, &writer)?);
    ensure!(
        from.rec.kind == FileKind::PIPE && from.rec.file != to.rec.file,
        "{:?}",
        from.rec
    );
    let (Detail::Pipe(pipe), Detail::Pipe(same)) = (from.detail, to.detail) else {
        bail!("no pipe detail")
    };
    ensure!(pipe.pipe == same.pipe && pipe.bytes == 5005, "{pipe:?}");
    ensure!(
        pipe.slots == 64 && (pipe.readers, pipe.writers) == (1, 1),
        "{pipe:?}"
    );
    let dir = tempdir()?;
    let path = dir.join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU)?;
    let mut fifo = OpenOptions::new().read(true).write(true).open(&path)?;
    fifo.write_all(b"abc")?;
    let found = find(iterators, &fifo)?;
    let Detail::Pipe(pipe) = found.detail else {
        bail!("no pipe detail")
    };
    ensure!(
        found.rec.kind == FileKind::FIFO && pipe.bytes == 3,
        "{pipe:?}"
    );
    fs::remove_dir_all(&dir)?;
    Ok(())
}

pub fn event_files(iterators: &mut Iterators) -> Result<()> {
    // SAFETY: makes a descriptor.
    let eventfd = own(unsafe { libc::eventfd(7, libc::EFD_SEMAPHORE) }, "eventfd")?;
    let found = find(iterators, &eventfd)?;
    let Detail::Eventfd(rec) = found.detail else {
        bail!("no eventfd detail: {found:?}")
    };
    ensure!(rec.count == 7 && rec.flags & 1 == 1, "{rec:?}");
    ensure!(found.rec.kind == FileKind::EVENTFD, "kind");

    // SAFETY: makes a descriptor.
    let timer = own(
        unsafe { libc::timerfd_create(libc::CLOCK_BOOTTIME, 0) },
        "timerfd_create",
    )?;
    let Detail::Timerfd(rec) = find(iterators, &timer)?.detail else {
        bail!("no timerfd detail")
    };
    ensure!(
        rec.clock == libc::CLOCK_BOOTTIME && rec.expires_ns == 0,
        "{rec:?}"
    );
    let spec = libc::itimerspec {
        it_interval: libc::timespec {
            tv_sec: 3,
            tv_nsec: 0,
        },
        it_value: libc::timespec {
            tv_sec: 9000,
            tv_nsec: 0,
        },
    };
    let set = |flags: i32, spec: &libc::itimerspec| {
        // SAFETY: the specification is valid.
        let result = unsafe {
            libc::timerfd_settime(
                timer.as_raw_fd(),
                flags,
                ptr::from_ref(spec),
                ptr::null_mut(),
            )
        };
        check(result.into(), "timerfd_settime")
    };
    set(0, &spec)?;
    let Detail::Timerfd(rec) = find(iterators, &timer)?.detail else {
        bail!("no timerfd detail")
    };
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)?;
    let left = (rec.expires_ns / 1_000_000_000).saturating_sub(u64::try_from(now.tv_sec())?);
    ensure!(
        (8000..=9001).contains(&left) && rec.base_clock == 7,
        "{left} s left, {rec:?}"
    );
    ensure!(
        rec.interval_ns == 3_000_000_000 && rec.ticks == 0,
        "{rec:?}"
    );
    let soon = libc::itimerspec {
        it_interval: libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        },
        it_value: libc::timespec {
            tv_sec: 0,
            tv_nsec: 1,
        },
    };
    set(0, &soon)?;
    let mut poll = libc::pollfd {
        fd: timer.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    let result = unsafe { libc::poll(&raw mut poll, 1, 10_000) };
    check(result.into(), "poll")?;
    let Detail::Timerfd(rec) = find(iterators, &timer)?.detail else {
        bail!("no timerfd detail")
    };
    ensure!(rec.ticks == 1 && rec.expires_ns == 0, "fired: {rec:?}");

    let mut mask = nix::sys::signal::SigSet::empty();
    mask.add(nix::sys::signal::Signal::SIGHUP);
    mask.add(nix::sys::signal::Signal::SIGTERM);
    // SAFETY: makes a descriptor; the mask is valid.
    let signalfd = own(
        unsafe { libc::signalfd(-1, ptr::from_ref(mask.as_ref()), 0) },
        "signalfd",
    )?;
    let Detail::Signalfd(rec) = find(iterators, &signalfd)?.detail else {
        bail!("no detail")
    };
    ensure!(
        rec.mask == 1 << (libc::SIGHUP - 1) | 1 << (libc::SIGTERM - 1),
        "{:x}",
        rec.mask
    );
    Ok(())
}

pub fn memfd_and_pidfd(iterators: &mut Iterators) -> Result<()> {
    // SAFETY: makes a descriptor; the name is a C string.
    let memfd = own(
        unsafe { libc::memfd_create(c"iter".as_ptr(), 0) },
        "memfd_create",
    )?;
    // SAFETY: sizes our own file.
    let result = unsafe { libc::ftruncate(memfd.as_raw_fd(), 8192) };
    check(result.into(), "ftruncate")?;
    let rec = find(iterators, &memfd)?.rec;
    ensure!(rec.kind == FileKind::MEMFD && rec.size == 8192, "{rec:?}");
    ensure!(rec.name() == "memfd:iter", "{}", rec.name());
    let child = fork_pause()?;
    // SAFETY: makes a descriptor.
    let pidfd = own(
        unsafe { libc::syscall(libc::SYS_pidfd_open, child.0, 0) },
        "pidfd_open",
    )?;
    let found = find(iterators, &pidfd)?;
    let Detail::Pidfd(rec) = found.detail else {
        bail!("no pidfd detail: {found:?}")
    };
    ensure!(rec.pid == child.0.cast_unsigned(), "{rec:?}");
    Ok(())
}

pub fn unix_sockets(iterators: &mut Iterators) -> Result<()> {
    let (mut left, right) = UnixStream::pair()?;
    left.write_all(b"queued")?;
    let (from, to) = (socket(iterators, &left)?, socket(iterators, &right)?);
    ensure!(from.peer == to.sock && to.peer == from.sock, "peers");
    ensure!(
        from.peer_ino == to.ino && from.ino == find(iterators, &left)?.rec.ino,
        "inodes"
    );
    ensure!(
        (from.rcv_qlen, to.rcv_qlen) == (0, 1) && to.rmem > 0 || to.rcv_qlen == 1,
        "{to:?}"
    );
    ensure!(
        from.path_len == 0 && from.family == u16::try_from(libc::AF_UNIX)?,
        "{from:?}"
    );
    left.shutdown(std::net::Shutdown::Write)?;
    ensure!(socket(iterators, &left)?.shutdown == 2, "shutdown");
    ensure!(
        socket(iterators, &right)?.shutdown == 1,
        "shutdown of the peer"
    );

    let dir = tempdir()?;
    let path = dir.join("listener");
    let listener = UnixListener::bind(&path)?;
    let _waiting = UnixStream::connect(&path)?;
    let rec = socket(iterators, &listener)?;
    let bytes = rec.unix_path();
    ensure!(
        bytes.strip_suffix(b"\0") == Some(path.as_os_str().as_encoded_bytes()),
        "{bytes:?}"
    );
    ensure!(rec.state == 10 && rec.rcv_qlen == 1, "{rec:?}");
    let abstract_socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name("iter-check")?)?;
    let rec = socket(iterators, &abstract_socket)?;
    ensure!(rec.unix_path() == b"\0iter-check", "{:?}", rec.unix_path());
    ensure!(rec.type_ == u16::try_from(libc::SOCK_DGRAM)?, "type");
    fs::remove_dir_all(&dir)?;
    Ok(())
}

pub fn inet_sockets(iterators: &mut Iterators) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    let client = TcpStream::connect(address)?;
    let mut rec = socket(iterators, &listener)?;
    // The last packet of the handshake may still be on its way to the listener.
    for _ in 0..1000 {
        if rec.ack_backlog > 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
        rec = socket(iterators, &listener)?;
    }
    ensure!(
        rec.state == 10 && rec.ack_backlog == 1 && rec.protocol == 6,
        "{rec:?}"
    );
    ensure!(
        rec.local_port == address.port() && rec.local_addr[..4] == [127, 0, 0, 1],
        "{rec:?}"
    );
    let (server, _) = listener.accept()?;
    let (near, far) = (socket(iterators, &client)?, socket(iterators, &server)?);
    ensure!(near.state == 1 && far.state == 1, "established");
    ensure!(near.local_port == client.local_addr()?.port(), "{near:?}");
    ensure!(
        near.remote_port == address.port() && far.remote_port == near.local_port,
        "{far:?}"
    );
    ensure!(near.remote_addr[..4] == [127, 0, 0, 1], "{near:?}");
    if let Ok(udp) = UdpSocket::bind("[::1]:0") {
        let rec = socket(iterators, &udp)?;
        ensure!(rec.family == u16::try_from(libc::AF_INET6)?, "{rec:?}");
        ensure!(
            rec.local_addr == std::net::Ipv6Addr::LOCALHOST.octets(),
            "{rec:?}"
        );
        ensure!(rec.local_port == udp.local_addr()?.port(), "{rec:?}");
    }
    Ok(())
}

pub fn tempdir() -> Result<std::path::PathBuf> {
    static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
    let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    let dir = std::env::temp_dir().join(format!("iter-check-{}-{number}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("Create {}", dir.display()))?;
    Ok(dir)
}
