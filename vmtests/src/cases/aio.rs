//! Linux AIO: contexts by their ids, and completions in their rings.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::probe::{blocked_thread, join, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("aio_contexts", contexts),
    Entry::carried("aio_unread", unread),
    Entry::carried("aio_destroyed", destroyed),
    Entry::carried("aio_ring_read_by_user", read_by_user),
    Entry::carried("aio_waiting_thread", waiting_thread),
    Entry::carried("aio_parent_and_child", parent_and_child),
    Entry::carried("aio_slow_request", slow_request),
    Entry::refused("aio_in_flight", "with requests in flight", in_flight),
    Entry::refused("aio_unmapped", "without its ring", unmapped),
];

const PREAD: u16 = 0;
const PWRITE: u16 = 1;
const POLL: u16 = 5;

/// `struct iocb`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Request {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Event {
    data: u64,
    request: u64,
    result: i64,
    result2: i64,
}

/// `struct aio_ring`, without the events.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Ring {
    id: u32,
    nr: u32,
    head: u32,
    tail: u32,
    magic: u32,
    compat_features: u32,
    incompat_features: u32,
    header_length: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Context(u64);

impl Context {
    fn new(requests: u32) -> Result<Self> {
        let mut id = 0;
        // SAFETY: the kernel writes the context's id.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, requests, &raw mut id) };
        sys("io_setup", made)?;
        Ok(Self(id))
    }

    /// Submits requests whose buffers outlive them.
    fn submit(self, requests: &mut [Request]) -> Result<()> {
        let pointers: Vec<*mut Request> = requests.iter_mut().map(|r| r as *mut Request).collect();
        // SAFETY: the kernel reads the requests, and the callers keep their buffers.
        let done = unsafe {
            libc::syscall(
                libc::SYS_io_submit,
                self.0,
                pointers.len(),
                pointers.as_ptr(),
            )
        };
        let done = sys("io_submit", done)?;
        ensure!(
            usize::try_from(done) == Ok(requests.len()),
            "{done} of {} submitted",
            requests.len()
        );
        Ok(())
    }

    fn events(self, least: usize, most: usize, wait: Duration) -> Result<Vec<Event>, Errno> {
        let mut events = vec![Event::default(); most];
        let wait = libc::timespec {
            tv_sec: wait.as_secs().cast_signed(),
            tv_nsec: wait.subsec_nanos().into(),
        };
        // SAFETY: the kernel writes at most `most` events.
        let got = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.0,
                least,
                most,
                events.as_mut_ptr(),
                &raw const wait,
            )
        })?;
        events.truncate(usize::try_from(got).unwrap_or(0));
        Ok(events)
    }

    fn destroy(self) -> Result<()> {
        // SAFETY: takes the id.
        let gone = unsafe { libc::syscall(libc::SYS_io_destroy, self.0) };
        sys("io_destroy", gone).map(|_| ())
    }

    fn ring(self) -> Ring {
        // SAFETY: the id is the address of the ring, which is mapped as long as the context is.
        unsafe { std::ptr::read_volatile(self.0 as *const Ring) }
    }

    /// Writes so many bytes of this value to a file and takes the completion.
    fn write(self, file: &File, value: u8, count: usize, offset: u64) -> Result<()> {
        let bytes = vec![value; count];
        let mut requests = [request(
            PWRITE,
            file.as_raw_fd(),
            &bytes,
            offset,
            value.into(),
        )];
        self.submit(&mut requests)?;
        let events = self.events(1, 8, Duration::from_secs(60))?;
        let [event] = events[..] else {
            anyhow::bail!("Events {events:?}");
        };
        let sent = &raw const requests[0] as u64;
        ensure!(
            event.data == u64::from(value) && event.request == sent,
            "Event {event:?}"
        );
        ensure!(
            event.result == i64::try_from(count)?,
            "Wrote {}",
            event.result
        );
        Ok(())
    }
}

fn request(opcode: u16, file: RawFd, bytes: &[u8], offset: u64, data: u64) -> Request {
    Request {
        data,
        opcode,
        file: file.cast_unsigned(),
        buffer: bytes.as_ptr() as u64,
        bytes: bytes.len() as u64,
        offset: offset.cast_signed(),
        ..Request::default()
    }
}

/// A read of nothing, which is told from others by `data`.
fn nothing(file: &File, data: u64) -> Request {
    request(PREAD, file.as_raw_fd(), &[], 0, data)
}

/// Two contexts of different sizes, used before and after.
fn contexts(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let (small, large) = (Context::new(1)?, Context::new(1000)?);
    for round in 0..3 {
        small.write(&file, 1 + round, 100, u64::from(round) * 100)?;
    }
    large.write(&file, 7, 50, 300)?;
    let sizes = (small.ring().nr, large.ring().nr);
    case.ready()?;
    ensure!(
        (small.ring().nr, large.ring().nr) == sizes,
        "The rings have other sizes"
    );
    ensure!(
        (small.ring().head, small.ring().tail) == (3, 3),
        "The ring was moved: {:?}",
        small.ring()
    );
    small.write(&file, 8, 10, 350)?;
    large.write(&file, 9, 10, 360)?;
    let text = std::fs::read(case.path("data"))?;
    let expected = [
        vec![1; 100],
        vec![2; 100],
        vec![3; 100],
        vec![7; 50],
        vec![8; 10],
        vec![9; 10],
    ];
    ensure!(text == expected.concat(), "The file holds {text:?}");
    small.destroy()?;
    large.destroy()?;
    ensure!(
        large.events(0, 1, Duration::ZERO) == Err(Errno::EINVAL),
        "It is still there"
    );
    Context::new(5)?.destroy()
}

/// Events at the end of a ring and again at its start.
fn unread(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let (wrapped, full) = (Context::new(16)?, Context::new(16)?);
    let slots = wrapped.ring().nr;
    for at in 0..slots - 5 {
        wrapped.submit(&mut [nothing(&file, at.into())])?;
        ensure!(
            wrapped.events(1, 1, Duration::ZERO)?.len() == 1,
            "No completion"
        );
    }
    for data in 0..12 {
        wrapped.submit(&mut [nothing(&file, 1000 + data)])?;
    }
    // As many as there is room for.
    let mut data = 0;
    while full.submit(&mut [nothing(&file, data)]).is_ok() {
        data += 1;
    }
    ensure!(data > u64::from(slots) / 2, "Only {data} fit");
    let (before, before_full) = (wrapped.ring(), full.ring());
    ensure!(before.tail < before.head, "It does not wrap: {before:?}");
    case.ready()?;
    let after = wrapped.ring();
    let same = (after.nr, after.head, after.tail) == (before.nr, before.head, before.tail);
    ensure!(same, "{before:?} became {after:?}");
    let after = full.ring();
    ensure!(
        (after.head, after.tail) == (before_full.head, before_full.tail),
        "{before_full:?} became {after:?}"
    );
    let events = wrapped.events(12, 20, Duration::ZERO)?;
    let data_of = |events: &[Event]| events.iter().map(|e| e.data).collect::<Vec<_>>();
    ensure!(
        data_of(&events) == (1000..1012).collect::<Vec<_>>(),
        "Events {events:?}"
    );
    ensure!(
        events.iter().all(|e| e.result == 0 && e.request != 0),
        "Results {events:?}"
    );
    let events = full.events(0, 500, Duration::ZERO)?;
    ensure!(
        data_of(&events) == (0..data).collect::<Vec<_>>(),
        "Events {events:?}"
    );
    // All slots are free again.
    for context in [wrapped, full] {
        for data in 0..u64::from(slots) / 2 {
            context.submit(&mut [nothing(&file, data)])?;
        }
        let events = context.events(0, 500, Duration::ZERO)?;
        ensure!(events.len() as u64 == u64::from(slots) / 2, "{events:?}");
    }
    Ok(())
}

/// The kernel keeps its table of contexts when the last is gone.
fn destroyed(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let context = Context::new(8)?;
    context.write(&file, 1, 10, 0)?;
    context.destroy()?;
    case.ready()?;
    ensure!(
        context.events(0, 1, Duration::ZERO) == Err(Errno::EINVAL),
        "The context is back"
    );
    let context = Context::new(8)?;
    context.write(&file, 2, 10, 10)
}

/// As libaio and databases do it, without a system call.
fn read_by_user(case: &Case) -> Result<()> {
    const MAGIC: u32 = 0xa10a_10a1;
    let file = case.open("data")?;
    let context = Context::new(8)?;
    let reap = || -> Result<u64> {
        let ring = context.ring();
        ensure!(
            ring.magic == MAGIC && ring.incompat_features == 0 && ring.header_length == 32,
            "{ring:?}"
        );
        ensure!(ring.head != ring.tail, "Nothing in it: {ring:?}");
        let slot = context.0 + 32 + 32 * u64::from(ring.head);
        // SAFETY: within the ring.
        let event = unsafe { std::ptr::read_volatile(slot as *const Event) };
        let head = (context.0 + 8) as *mut u32;
        // SAFETY: the head is user space's to write.
        unsafe { std::ptr::write_volatile(head, (ring.head + 1) % ring.nr) };
        Ok(event.data)
    };
    for data in [3, 4, 5] {
        context.submit(&mut [nothing(&file, data)])?;
    }
    ensure!(reap()? == 3, "Not the first event");
    case.ready()?;
    ensure!((reap()?, reap()?) == (4, 5), "Not the other events");
    let rounds = 3 * u64::from(context.ring().nr);
    for data in 0..rounds {
        context.submit(&mut [nothing(&file, data)])?;
        ensure!(reap()? == data, "Not event {data}");
    }
    Ok(())
}

/// A thread that waits for completions gets those of requests made later.
fn waiting_thread(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let context = Context::new(64)?;
    let thread = blocked_thread(libc::SYS_io_getevents, move || {
        Ok(context.events(2, 2, Duration::from_secs(3600))?)
    })?;
    case.ready()?;
    context.submit(&mut [nothing(&file, 21)])?;
    context.submit(&mut [nothing(&file, 22)])?;
    let events = join("the waiting thread", thread)?;
    let data: Vec<u64> = events.iter().map(|event| event.data).collect();
    ensure!(data == [21, 22], "The thread got {events:?}");
    Ok(())
}

/// A child does not inherit a context, though it may inherit the ring's mapping.
fn parent_and_child(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let context = Context::new(8)?;
    context.submit(&mut [nothing(&file, 77)])?;
    let (hold, mut release) = std::io::pipe()?;
    // SAFETY: there is one thread.
    let ForkResult::Parent { child } = (unsafe { fork() })? else {
        drop(release);
        let verdict = child_of(&file, context, hold);
        if let Err(error) = &verdict {
            println!("Child: {error:#}");
        }
        std::process::exit(i32::from(verdict.is_err()));
    };
    drop(hold);
    case.ready()?;
    release.write_all(b"go")?;
    drop(release);
    let ended = waitpid(child, None)?;
    ensure!(ended == WaitStatus::Exited(child, 0), "It {ended:?}");
    let events = context.events(1, 4, Duration::ZERO)?;
    ensure!(events.len() == 1 && events[0].data == 77, "{events:?}");
    context.write(&file, 5, 20, 0)
}

fn child_of(file: &File, parents: Context, mut hold: std::io::PipeReader) -> Result<()> {
    let own = Context::new(200)?;
    own.submit(&mut [nothing(file, 78)])?;
    std::io::Read::read_to_end(&mut hold, &mut Vec::new())?;
    let events = own.events(1, 4, Duration::ZERO)?;
    ensure!(events.len() == 1 && events[0].data == 78, "{events:?}");
    // An address that is not mapped is EFAULT or EINVAL, as the kernel likes.
    let others = parents.events(0, 1, Duration::ZERO);
    ensure!(others.is_err(), "The parent's context is mine: {others:?}");
    own.destroy()
}

/// Requests that end soon put the freeze off.
fn slow_request(case: &Case) -> Result<()> {
    let context = Context::new(8)?;
    let (reader, mut writer) = std::io::pipe()?;
    let (mut sent, mut taken) = (0_u64, 0_u64);
    let mut failure = None;
    let mut poll = request(POLL, reader.as_raw_fd(), &[], 0, 0);
    poll.buffer = libc::POLLIN as u64;
    writer.write_all(b"x")?;
    case.ready_polling(Duration::from_millis(2), || {
        // In flight for as long as nothing is in the pipe: for a moment.
        let mut drained = [0; 1];
        let round = (|| -> Result<()> {
            nix::unistd::read(&reader, &mut drained)?;
            context.submit(&mut [Request { data: sent, ..poll }])?;
            sent += 1;
            std::thread::sleep(Duration::from_micros(100));
            writer.write_all(b"x")?;
            let events = context.events(1, 1, Duration::from_secs(60))?;
            ensure!(events[0].data == taken, "Event {events:?}");
            taken += 1;
            Ok(())
        })();
        failure = failure.take().or(round.err());
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    ensure!(sent > 0 && sent == taken, "{taken} of {sent}");
    Ok(())
}

/// A request that waits for something that does not happen.
fn in_flight(case: &Case) -> Result<()> {
    let context = Context::new(8)?;
    let (reader, mut writer) = std::io::pipe()?;
    let mut poll = request(POLL, reader.as_raw_fd(), &[], 0, 91);
    poll.buffer = libc::POLLIN as u64;
    context.submit(&mut [poll])?;
    case.ready()?;
    writer.write_all(b"x")?;
    let events = context.events(1, 1, Duration::from_secs(60))?;
    ensure!(events.len() == 1 && events[0].data == 91, "{events:?}");
    Ok(())
}

/// The kernel goes on with its ring, which nothing shows the place of.
fn unmapped(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let context = Context::new(8)?;
    let mapped = context.0 as *mut libc::c_void;
    // SAFETY: nothing refers to the ring's memory.
    let gone = unsafe { libc::munmap(mapped, 4096) };
    sys("munmap", gone.into())?;
    case.ready()?;
    // SAFETY: takes the id, which it reads the ring by.
    let gone = unsafe { libc::syscall(libc::SYS_io_destroy, context.0) };
    ensure!(gone == -1, "The context is found without its ring");
    Context::new(8)?.write(&file, 3, 10, 0)
}
