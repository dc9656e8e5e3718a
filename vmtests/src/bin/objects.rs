//! Many kernel objects of one kind and a heartbeat, for `cargo xtask bench --objects`.
//!
//! `objects KIND COUNT DIR` makes them, writes how many microseconds that took to `DIR/made` and its
//! PID to `DIR/ready`, and from then on looks at the clock every half millisecond. When `DIR/take`
//! appears it writes the longest time between two looks, in microseconds, to `DIR/gap`, removes
//! `DIR/take` and begins anew: how long it stood still, whatever the tool that froze it reports.
//! `DIR/take` is answered by a restored one, too.

use std::fs;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{ForkResult, access, fork, pause};
use vmtests::guest::case::publish;

/// Bytes of a page.
const PAGE: usize = 4096;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, count, dir] = &arguments[..] else {
        bail!("Usage: objects KIND COUNT DIR");
    };
    let (count, dir) = (count.parse().context("COUNT")?, Path::new(dir));
    allow_descriptors().context("RLIMIT_NOFILE")?;
    let begun = Instant::now();
    let _held = make(kind, count)?;
    publish(&dir.join("made"), &begun.elapsed().as_micros().to_string())?;
    publish(&dir.join("ready"), &std::process::id().to_string())?;
    beat(dir)
}

/// As many as any row needs; where that takes a capability that is missing, as many as there may be.
fn allow_descriptors() -> nix::Result<()> {
    const WANTED: u64 = 65536;
    let nofile = Resource::RLIMIT_NOFILE;
    if setrlimit(nofile, WANTED, WANTED).is_err() {
        let (_, hard) = getrlimit(nofile)?;
        setrlimit(nofile, hard, hard)?;
    }
    Ok(())
}

fn beat(dir: &Path) -> Result<()> {
    let take = dir.join("take");
    let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
    loop {
        std::thread::sleep(Duration::from_micros(500));
        let now = Instant::now();
        longest = longest.max(now - last);
        last = now;
        // access(2) opens nothing that a checkpoint could meet.
        if access(&take, nix::unistd::AccessFlags::F_OK).is_ok() {
            fs::remove_file(&take)?;
            publish(&dir.join("gap"), &longest.as_micros().to_string())?;
            (last, longest) = (Instant::now(), Duration::ZERO);
        }
    }
}

/// Makes the objects and returns what holds them.
fn make(kind: &str, count: usize) -> Result<Box<dyn std::any::Any>> {
    let eventfds = || -> Result<Vec<EventFd>> {
        let one = |number: usize| {
            EventFd::from_value_and_flags(u32::try_from(number)?, EfdFlags::EFD_NONBLOCK)
                .context("eventfd")
        };
        (0..count).map(one).collect()
    };
    Ok(match kind {
        "eventfds" => Box::new(eventfds()?),
        "epoll" => {
            let (epoll, watched) = (Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?, eventfds()?);
            for (number, fd) in (0..).zip(&watched) {
                epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLOUT, number))?;
            }
            Box::new((epoll, watched))
        }
        "listeners" => Box::new(listeners(count)?),
        "connections" => Box::new(connections(count)?),
        "mappings" => {
            for number in 0..count {
                // Neighbours of different protection stay apart.
                let protection = match number % 2 {
                    0 => ProtFlags::PROT_READ,
                    _ => ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                };
                map(PAGE, protection, PRIVATE)?;
            }
            Box::new(())
        }
        "threads" => {
            for _ in 1..count {
                std::thread::Builder::new()
                    .stack_size(64 << 10)
                    .spawn(|| std::thread::sleep(Duration::from_secs(100_000)))?;
            }
            Box::new(())
        }
        "processes" => {
            for _ in 1..count {
                // SAFETY: the child does nothing but wait.
                if let ForkResult::Child = unsafe { fork() }? {
                    loop {
                        pause();
                    }
                }
            }
            Box::new(())
        }
        "megabytes" | "shared" => {
            let length = count << 20;
            let flags = match kind {
                "shared" => MapFlags::MAP_SHARED,
                _ => PRIVATE,
            };
            let memory = map(length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, flags)?;
            for page in (0..length).step_by(PAGE) {
                // SAFETY: inside the mapping, which is never taken away and nobody else knows.
                unsafe { memory.add(page).cast::<u64>().write(page as u64 | 1) };
            }
            Box::new(())
        }
        other => bail!("There is no kind {other}"),
    })
}

const PRIVATE: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);

fn map(length: usize, protection: ProtFlags, flags: MapFlags) -> Result<*mut u8> {
    let length = length.try_into().context("An empty mapping")?;
    // SAFETY: a new mapping where nothing is.
    let memory = unsafe { mmap_anonymous(None, length, protection, flags) }.context("mmap")?;
    Ok(memory.as_ptr().cast())
}

/// Each at a port that is named, as a restore does it: the kernel's own search for a free one takes
/// the longer the more are in use.
fn listeners(count: usize) -> Result<Vec<TcpListener>> {
    let free =
        (10_000..32_000).filter_map(
            |port| match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
                Err(error) if error.kind() == ErrorKind::AddrInUse => None,
                made => Some(made.context("bind")),
            },
        );
    let made = free.take(count).collect::<Result<Vec<_>>>()?;
    ensure!(made.len() == count, "Only {} ports are free", made.len());
    Ok(made)
}

/// Both ends of each, and what they were accepted from.
fn connections(count: usize) -> Result<(TcpListener, Vec<[TcpStream; 2]>)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let mut held = Vec::new();
    for _ in 0..count {
        let client = TcpStream::connect(address).context("connect")?;
        let (server, from) = listener.accept().context("accept")?;
        ensure!(from == client.local_addr()?, "Accepted {from}");
        held.push([client, server]);
    }
    Ok((listener, held))
}
