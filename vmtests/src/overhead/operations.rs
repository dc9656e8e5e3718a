//! The operations: those that the agent's hooks see, and those that they must
//! not make dearer.

use std::ffi::c_void;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{OFlag, open};
use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, posix_spawn};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::EventFd;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socket};
use nix::sys::stat::Mode;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, close, dup2_raw, fork, getppid, read, write};

use super::meter::Meter;

/// Performs a batch; what is to count goes through the meter.
type Batch = Box<dyn FnMut(&mut Meter) -> Result<()>>;

/// Something whose cost is of interest.
pub(super) struct Operation {
    pub name: &'static str,
    /// How many make a batch: enough to hide the clock, few enough that most
    /// batches end before the next timer tick.
    pub per_batch: usize,
    /// Part of the work is done by children.
    pub children: bool,
    /// Gets ready to perform batches of so many.
    pub prepare: fn(usize) -> Result<Batch>,
}

const fn operation(
    name: &'static str,
    per_batch: usize,
    prepare: fn(usize) -> Result<Batch>,
) -> Operation {
    Operation {
        name,
        per_batch,
        children: false,
        prepare,
    }
}

const fn with_children(
    name: &'static str,
    per_batch: usize,
    prepare: fn(usize) -> Result<Batch>,
) -> Operation {
    Operation {
        children: true,
        ..operation(name, per_batch, prepare)
    }
}

/// All of them, in the order of the report.
pub(super) const OPERATIONS: &[Operation] = &[
    operation("getppid", 1000, getppid_batch),
    operation("read", 1000, read_batch),
    operation("write", 1000, write_batch),
    operation("send", 100, send_batch),
    operation("recv", 100, recv_batch),
    operation("page_fault", 200, page_fault_batch),
    operation("open+close", 200, open_batch),
    operation("socket+close", 100, socket_batch),
    operation("accept+close", 32, accept_batch),
    operation("dup2", 200, dup2_batch),
    operation("epoll_add+del", 200, epoll_add_batch),
    operation("epoll_mod", 200, epoll_mod_batch),
    operation("mmap+munmap", 200, mmap_batch),
    with_children("fork+exit+wait", 16, fork_batch),
    with_children("spawn+exec+wait", 8, spawn_batch),
];

/// Their names.
pub const NAMES: &[&str] = &names();

const fn names() -> [&'static str; OPERATIONS.len()] {
    let mut names = [""; OPERATIONS.len()];
    let mut index = 0;
    while index < names.len() {
        names[index] = OPERATIONS[index].name;
        index += 1;
    }
    names
}

/// Bytes of each message.
const MESSAGE: usize = 64;

/// A batch of one thing, `count` times.
fn repeat(count: usize, mut once: impl FnMut() -> Result<()> + 'static) -> Result<Batch> {
    Ok(Box::new(move |meter| {
        meter.measure(|| (0..count).try_for_each(|_| once()))
    }))
}

fn getppid_batch(count: usize) -> Result<Batch> {
    repeat(count, || {
        getppid();
        Ok(())
    })
}

fn read_batch(count: usize) -> Result<Batch> {
    let zero = open(
        "/dev/zero",
        OFlag::O_RDONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    repeat(count, move || {
        read(&zero, &mut [0; MESSAGE])?;
        Ok(())
    })
}

fn write_batch(count: usize) -> Result<Batch> {
    let null = open(
        "/dev/null",
        OFlag::O_WRONLY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )?;
    repeat(count, move || {
        write(&null, &[0; MESSAGE])?;
        Ok(())
    })
}

/// Both ends of a connection over the loopback device.
fn connection() -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (server, _) = listener.accept()?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    Ok((client, server))
}

fn send_batch(count: usize) -> Result<Batch> {
    let (client, mut server) = connection()?;
    Ok(Box::new(move |meter| {
        let fd = client.as_raw_fd();
        meter.measure(|| {
            for _ in 0..count {
                send(fd, &[1; MESSAGE], MsgFlags::empty())?;
            }
            Ok(())
        })?;
        server
            .read_exact(&mut vec![0; count * MESSAGE])
            .context("Read what was sent")
    }))
}

fn recv_batch(count: usize) -> Result<Batch> {
    let (mut client, server) = connection()?;
    Ok(Box::new(move |meter| {
        for _ in 0..count {
            client.write_all(&[1; MESSAGE])?;
        }
        let fd = server.as_raw_fd();
        meter.measure(|| {
            for _ in 0..count {
                recv(fd, &mut [0; MESSAGE], MsgFlags::MSG_WAITALL)?;
            }
            Ok(())
        })
    }))
}

fn open_batch(count: usize) -> Result<Batch> {
    let flags = OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    repeat(count, move || {
        close(open("/etc/passwd", flags, Mode::empty())?)?;
        Ok(())
    })
}

fn socket_batch(count: usize) -> Result<Batch> {
    repeat(count, || {
        close(socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )?)?;
        Ok(())
    })
}

/// Clients connect beforehand, and go afterwards.
fn accept_batch(count: usize) -> Result<Batch> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let address = listener.local_addr()?;
    Ok(Box::new(move |meter| {
        let clients = (0..count)
            .map(|_| TcpStream::connect(address))
            .collect::<std::io::Result<Vec<_>>>()
            .context("Connect")?;
        meter.measure(|| {
            for _ in 0..count {
                close(listener.accept()?.0)?;
            }
            Ok(())
        })?;
        drop(clients);
        Ok(())
    }))
}

/// Always onto the same number, which is in use.
fn dup2_batch(count: usize) -> Result<Batch> {
    let null = open("/dev/null", OFlag::O_RDWR | OFlag::O_CLOEXEC, Mode::empty())?;
    let target = null.try_clone()?;
    repeat(count, move || {
        let number = target.as_raw_fd();
        // SAFETY: the number is ours and refers to the same file afterwards.
        let same = unsafe { dup2_raw(&null, number) }?;
        // Its owner is `target`.
        std::mem::forget(same);
        Ok(())
    })
}

/// An epoll instance and something to watch.
fn watched() -> Result<(Epoll, EventFd)> {
    Ok((
        Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
        EventFd::new()?,
    ))
}

fn epoll_add_batch(count: usize) -> Result<Batch> {
    let (epoll, eventfd) = watched()?;
    repeat(count, move || {
        epoll.add(&eventfd, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        epoll.delete(&eventfd)?;
        Ok(())
    })
}

fn epoll_mod_batch(count: usize) -> Result<Batch> {
    let (epoll, eventfd) = watched()?;
    epoll.add(&eventfd, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
    let mut data = 0;
    repeat(count, move || {
        data += 1;
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN, data);
        epoll.modify(eventfd.as_fd(), &mut event)?;
        Ok(())
    })
}

/// The size of a page.
const PAGE: usize = 4096;

/// Address space for `pages` pages that nothing can be merged with: what is
/// beside a mapping would else change what making one costs.
fn reserve(pages: usize) -> Result<NonNull<c_void>> {
    let size = NonZeroUsize::new((pages + 2) * PAGE).context("No size")?;
    // SAFETY: the kernel chooses a free place.
    let place = unsafe { mmap_anonymous(None, size, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }?;
    // SAFETY: still within what was mapped.
    Ok(unsafe { place.byte_add(PAGE) })
}

/// Maps memory at a reserved place, in pages of the usual size.
fn map(place: NonNull<c_void>, size: NonZeroUsize) -> nix::Result<NonNull<c_void>> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED;
    let address = NonZeroUsize::new(place.addr().get());
    // SAFETY: what lies there is our own reservation, and nothing refers to it.
    unsafe { mmap_anonymous(address, size, protection, flags) }
}

fn mmap_batch(count: usize) -> Result<Batch> {
    let size = NonZeroUsize::new(16 * PAGE).context("No size")?;
    let place = reserve(16)?;
    repeat(count, move || {
        let mapped = map(place, size)?;
        // SAFETY: nothing refers to it.
        unsafe { munmap(mapped, size.get()) }?;
        Ok(())
    })
}

/// The first write to each of some pages.
fn page_fault_batch(count: usize) -> Result<Batch> {
    let size = NonZeroUsize::new(count * PAGE).context("No size")?;
    let place = reserve(count)?;
    Ok(Box::new(move |meter| {
        let mapped = map(place, size)?;
        // SAFETY: the range is mapped, and a huge page would make one fault of them all.
        unsafe { madvise(mapped, size.get(), MmapAdvise::MADV_NOHUGEPAGE) }?;
        meter.measure(|| {
            for page in 0..count {
                // SAFETY: within what is mapped and writable.
                unsafe { mapped.cast::<u8>().add(page * PAGE).write_volatile(1) };
            }
            Ok(())
        })?;
        // SAFETY: nothing refers to it.
        unsafe { munmap(mapped, size.get()) }?;
        Ok(())
    }))
}

fn fork_batch(count: usize) -> Result<Batch> {
    repeat(count, || {
        // SAFETY: the child does nothing but exit.
        match unsafe { fork() }? {
            // SAFETY: always allowed.
            ForkResult::Child => unsafe { libc::_exit(0) },
            ForkResult::Parent { child } => {
                let status = waitpid(child, None)?;
                ensure!(status == WaitStatus::Exited(child, 0), "{status:?}");
                Ok(())
            }
        }
    })
}

fn spawn_batch(count: usize) -> Result<Batch> {
    let actions = PosixSpawnFileActions::init()?;
    let attributes = PosixSpawnAttr::init()?;
    repeat(count, move || {
        let environment: [&std::ffi::CStr; 0] = [];
        let child = posix_spawn(
            c"/bin/true",
            &actions,
            &attributes,
            &[c"true"],
            &environment,
        )?;
        let status = waitpid(child, None)?;
        ensure!(status == WaitStatus::Exited(child, 0), "{status:?}");
        Ok(())
    })
}
