//! io_uring instances, used through a library that keeps positions of its own.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use io_uring::cqueue::{Entry32, EntryMarker as Completion};
use io_uring::squeue::{Entry128, EntryMarker as Request, Flags};
use io_uring::{IoUring, opcode, types};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::stat::Mode;

use super::child::Child;
use super::probe::{blocked_thread, join, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried_alike("uring_used", used),
    Entry::carried_alike("uring_fresh", fresh),
    Entry::carried_alike("uring_unread", unread),
    Entry::carried_alike("uring_positions", positions),
    Entry::carried_alike("uring_large_entries", large_entries),
    Entry::carried_alike("uring_waiting_thread", waiting_thread),
    Entry::carried_alike("uring_parent_and_child", parent_and_child),
    Entry::carried_alike("uring_epoll", in_epoll),
    Entry::carried_alike("uring_busy", busy),
    Entry::carried("uring_closed", closed),
    Entry::refused("refused_uring_poll", "wait for events or time-outs", poll),
    Entry::refused("refused_uring_thread", "flags 0x2", polling_thread),
    Entry::refused("refused_uring_files", "registered files", files),
    Entry::refused("refused_uring_buffers", "registered buffers", buffers),
    Entry::refused("refused_uring_eventfd", "registered eventfd", eventfd),
    Entry::refused(
        "refused_uring_unopened",
        "descriptor of it any more",
        unopened,
    ),
    Entry::refused(
        "refused_uring_in_flight",
        "io_uring request of thread",
        in_flight,
    ),
];

fn push<S: Request, C: Completion>(ring: &mut IoUring<S, C>, request: &S) -> Result<()> {
    // SAFETY: what the requests of these cases point to lives until they have ended.
    unsafe { ring.submission().push(request) }.context("The ring is full")
}

/// A request that does nothing, told from others by `data`.
fn nop(data: u64) -> io_uring::squeue::Entry {
    opcode::Nop::new().build().user_data(data)
}

/// Submits what is in the ring, waits for so many completions, returns (data, result) of all.
fn ended(ring: &mut IoUring, count: usize) -> Result<Vec<(u64, i32)>> {
    loop {
        match ring.submit_and_wait(count) {
            Ok(_) => break,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("io_uring_enter"),
        }
    }
    let completions = ring.completion();
    Ok(completions
        .map(|one| (one.user_data(), one.result()))
        .collect())
}

/// Writes a line by the ring and reads it back.
fn write_and_read(ring: &mut IoUring, file: &File, line: u64) -> Result<()> {
    let text = format!("line {line:10}\n");
    let length = u32::try_from(text.len())?;
    let (at, fd) = (line * u64::from(length), types::Fd(file.as_raw_fd()));
    let write = opcode::Write::new(fd, text.as_ptr(), length).offset(at);
    push(ring, &write.build().user_data(line))?;
    let all = i32::try_from(length)?;
    let found = ended(ring, 1)?;
    ensure!(found == [(line, all)], "Write {line}: {found:?}");
    let mut back = vec![0; text.len()];
    let read = opcode::Read::new(fd, back.as_mut_ptr(), length).offset(at);
    push(ring, &read.build().user_data(!line))?;
    let found = ended(ring, 1)?;
    ensure!(found == [(!line, all)], "Read {line}: {found:?}");
    ensure!(back == text.as_bytes(), "Line {line} is {back:?}");
    Ok(())
}

/// Many more requests than there are slots, before and after.
fn used(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let mut ring = IoUring::new(8)?;
    for line in 0..501 {
        write_and_read(&mut ring, &file, line)?;
    }
    case.ready()?;
    for line in 501..1000 {
        write_and_read(&mut ring, &file, line)?;
    }
    let mut text = vec![0; 16];
    file.read_exact_at(&mut text, 16 * 500)?;
    ensure!(text == b"line        500\n", "{text:?}");
    Ok(())
}

/// One that was never used, of another size than the kernel's choice.
fn fresh(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let mut ring = IoUring::<io_uring::squeue::Entry>::builder()
        .setup_cqsize(512)
        .setup_coop_taskrun()
        .build(4)?;
    case.ready()?;
    ensure!(ring.params().cq_entries() == 512, "{:?}", ring.params());
    for line in 0..300 {
        write_and_read(&mut ring, &file, line)?;
    }
    Ok(())
}

/// Completions that were not read, round the end of the ring, and requests not submitted yet.
fn unread(case: &Case) -> Result<()> {
    let mut ring = IoUring::new(8)?;
    for data in 0..13 {
        push(&mut ring, &nop(data))?;
        ensure!(ended(&mut ring, 1)? == [(data, 0)], "Request {data}");
    }
    for half in [100, 104] {
        for data in half..half + 4 {
            push(&mut ring, &nop(data))?;
        }
        ring.submit()?;
    }
    for data in 200..205 {
        push(&mut ring, &nop(data))?;
    }
    case.ready()?;
    ensure!(
        ring.submission().len() == 5,
        "Not submitted: {}",
        ring.submission().len()
    );
    ensure!(
        ring.completion().len() == 8,
        "Not read: {}",
        ring.completion().len()
    );
    let found = ended(&mut ring, 13)?;
    let expected: Vec<_> = (100..108).chain(200..205).map(|data| (data, 0)).collect();
    ensure!(found == expected, "{found:?}");
    Ok(())
}

/// More requests than completions, and fewer.
fn positions(case: &Case) -> Result<()> {
    let mut silent = IoUring::new(4)?;
    let mut told = IoUring::new(4)?;
    for data in 0..11 {
        push(&mut silent, &nop(data).flags(Flags::SKIP_SUCCESS))?;
        ensure!(
            ended(&mut silent, 0)?.is_empty(),
            "A silent request completed"
        );
    }
    let tell = |from: &mut IoUring, to: &IoUring, data: u64| -> Result<()> {
        let message = opcode::MsgRingData::new(types::Fd(to.as_raw_fd()), 7, data, None);
        push(from, &message.build().user_data(data))?;
        ensure!(ended(from, 1)? == [(data, 0)], "Message {data}");
        Ok(())
    };
    for data in 0..9 {
        tell(&mut silent, &told, data)?;
        ensure!(ended(&mut told, 1)? == [(data, 7)], "Told {data}");
    }
    push(&mut told, &nop(50))?;
    ensure!(ended(&mut told, 1)? == [(50, 0)], "Request 50");
    tell(&mut silent, &told, 60)?;
    case.ready()?;
    ensure!(ended(&mut told, 1)? == [(60, 7)], "Told 60");
    for data in 70..80 {
        tell(&mut silent, &told, data)?;
        ensure!(ended(&mut told, 1)? == [(data, 7)], "Told {data}");
        push(&mut told, &nop(data))?;
        ensure!(ended(&mut told, 1)? == [(data, 0)], "Request {data}");
        push(&mut silent, &nop(data).flags(Flags::SKIP_SUCCESS))?;
        ensure!(ended(&mut silent, 0)?.is_empty(), "Silent {data}");
    }
    Ok(())
}

/// `IORING_SETUP_SQE128` and `IORING_SETUP_CQE32`.
fn large_entries(case: &Case) -> Result<()> {
    let mut ring = IoUring::<Entry128, Entry32>::builder().build(4)?;
    let mut one = |data: u64| -> Result<()> {
        push(&mut ring, &Entry128::from(nop(data)))?;
        ring.submit_and_wait(1)?;
        let found: Vec<_> = ring.completion().map(|one| one.user_data()).collect();
        ensure!(found == [data], "{found:?} for {data}");
        Ok(())
    };
    (0..10).try_for_each(&mut one)?;
    case.ready()?;
    (10..30).try_for_each(&mut one)
}

/// A thread that waits for a completion gets that of a request made later.
fn waiting_thread(case: &Case) -> Result<()> {
    let ring = std::sync::Arc::new(IoUring::new(8)?);
    let (reader, mut writer) = std::io::pipe()?;
    let theirs = std::sync::Arc::clone(&ring);
    let thread = blocked_thread(libc::SYS_io_uring_enter, move || {
        loop {
            match theirs.submitter().submit_and_wait(1) {
                Ok(_) => break,
                Err(error) => ensure!(false, "The wait ended with {error}"),
            }
        }
        // SAFETY: the other thread does not touch completions.
        let found =
            unsafe { theirs.completion_shared() }.map(|one| (one.user_data(), one.result()));
        Ok(found.collect::<Vec<_>>())
    })?;
    case.ready()?;
    let mut byte = [0; 1];
    let read = opcode::Read::new(types::Fd(reader.as_raw_fd()), byte.as_mut_ptr(), 1);
    writer.write_all(b"x")?;
    // SAFETY: the other thread does not touch requests; `byte` lives until it has ended.
    unsafe { ring.submission_shared().push(&read.build().user_data(5)) }?;
    ring.submitter().submit()?;
    let found = join("the waiting thread", thread)?;
    ensure!(found == [(5, 1)] && byte == *b"x", "{found:?}, {byte:?}");
    Ok(())
}

/// Both have the rings mapped; only the parent has the descriptor.
fn parent_and_child(case: &Case) -> Result<()> {
    let mut ring = IoUring::new(4)?;
    for data in 0..3 {
        push(&mut ring, &nop(data))?;
        ensure!(ended(&mut ring, 1)? == [(data, 0)], "Request {data}");
    }
    push(&mut ring, &nop(88))?;
    ring.submit()?;
    let number = ring.as_raw_fd();
    // SAFETY: never dropped, and used by the child alone.
    let mut copy = ManuallyDrop::new(unsafe { std::ptr::read(&raw const ring) });
    let child = Child::start(case.dir(), "child", move |turn| {
        // SAFETY: the child's own table; it does not use the number again.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
        turn.wait();
        let found: Vec<_> = copy.completion().map(|one| one.user_data()).collect();
        ensure!(found == [88], "The child finds {found:?}");
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    child.finish()?;
    ensure!(
        ring.completion().is_empty(),
        "The child's reading is not seen"
    );
    push(&mut ring, &nop(99))?;
    ensure!(ended(&mut ring, 1)? == [(99, 0)], "Request 99");
    Ok(())
}

/// Watched by epoll, with and without something to read.
fn in_epoll(case: &Case) -> Result<()> {
    let (mut full, empty) = (IoUring::new(4)?, IoUring::new(4)?);
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (ring, data) in [(&full, 1), (&empty, 2)] {
        // SAFETY: open as long as the ring lives.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(ring.as_raw_fd()) };
        epoll.add(fd, EpollEvent::new(EpollFlags::EPOLLIN, data))?;
    }
    push(&mut full, &nop(5))?;
    full.submit()?;
    case.ready()?;
    let mut events = [EpollEvent::empty(); 4];
    let count = epoll.wait(&mut events, EpollTimeout::from(10_000_u16))?;
    ensure!(
        count == 1 && events[0].data() == 1,
        "{:?}",
        &events[..count]
    );
    ensure!(ended(&mut full, 0)? == [(5, 0)], "Request 5");
    Ok(())
}

/// Requests on their way all the time, some done by threads of the kernel (`iou-wrk-*`).
fn busy(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let mut ring = IoUring::new(16)?;
    let (mut line, mut failure) = (0, None);
    case.ready_polling(Duration::from_millis(1), || {
        let mut round = || -> Result<()> {
            let text = [b'a'; 512];
            for part in 0..8_u64 {
                let fd = types::Fd(file.as_raw_fd());
                let write = opcode::Write::new(fd, text.as_ptr(), 512).offset(part * 512);
                push(
                    &mut ring,
                    &write.build().user_data(part).flags(Flags::ASYNC),
                )?;
            }
            let mut found = Vec::new();
            // A wait that is interrupted after requests were taken says only how many.
            while found.len() < 8 {
                found.extend(ended(&mut ring, 1)?);
            }
            found.sort_unstable();
            let expected: Vec<_> = (0..8).map(|part| (part, 512)).collect();
            ensure!(found == expected, "{found:?}");
            line += 1;
            Ok(())
        };
        failure = failure.take().or_else(|| round().err());
    })?;
    if let Some(error) = failure {
        return Err(error);
    }
    ensure!(line > 0, "It has done nothing");
    write_and_read(&mut ring, &file, 9)
}

/// The kernel keeps what it knows of a thread's requests, and for a while its workers.
fn closed(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let mut ring = IoUring::new(8)?;
    push(&mut ring, &nop(1).flags(Flags::ASYNC))?;
    ensure!(ended(&mut ring, 1)? == [(1, 0)], "Request 1");
    drop(ring);
    case.ready()?;
    write_and_read(&mut IoUring::new(8)?, &file, 0)
}

/// It would wait for ever.
fn poll(case: &Case) -> Result<()> {
    let mut ring = IoUring::new(4)?;
    let (reader, mut writer) = std::io::pipe()?;
    let poll = opcode::PollAdd::new(types::Fd(reader.as_raw_fd()), libc::POLLIN as u32);
    push(&mut ring, &poll.build().user_data(3))?;
    ring.submit()?;
    case.ready()?;
    writer.write_all(b"x")?;
    let found = ended(&mut ring, 1)?;
    ensure!(found == [(3, i32::from(libc::POLLIN))], "{found:?}");
    Ok(())
}

/// The kernel takes requests by itself.
fn polling_thread(case: &Case) -> Result<()> {
    let mut ring = IoUring::<io_uring::squeue::Entry>::builder()
        .setup_sqpoll(100)
        .build(4)?;
    case.ready()?;
    push(&mut ring, &nop(3))?;
    ensure!(ended(&mut ring, 1)? == [(3, 0)], "Request 3");
    Ok(())
}

fn files(case: &Case) -> Result<()> {
    let file = case.open("data")?;
    let ring = IoUring::new(4)?;
    ring.submitter().register_files(&[file.as_raw_fd()])?;
    case.ready()?;
    ring.submitter()
        .unregister_files()
        .context("It had no files")
}

fn buffers(case: &Case) -> Result<()> {
    let mut bytes = vec![0_u8; 4096];
    let ring = IoUring::new(4)?;
    let buffer = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: `bytes` lives until they are given back.
    unsafe { ring.submitter().register_buffers(&[buffer]) }?;
    case.ready()?;
    ring.submitter()
        .unregister_buffers()
        .context("It had no buffers")
}

fn eventfd(case: &Case) -> Result<()> {
    let event = nix::sys::eventfd::EventFd::new()?;
    let mut ring = IoUring::new(4)?;
    ring.submitter().register_eventfd(event.as_raw_fd())?;
    case.ready()?;
    push(&mut ring, &nop(3))?;
    ensure!(ended(&mut ring, 1)? == [(3, 0)], "Request 3");
    ensure!(event.read()? == 1, "No event");
    Ok(())
}

/// Mapped, but nobody has its descriptor.
fn unopened(case: &Case) -> Result<()> {
    let ring = IoUring::new(4)?;
    let number = ring.as_raw_fd();
    // SAFETY: closed here and not again, since the ring is forgotten.
    sys("close", unsafe { libc::close(number) }.into())?;
    case.ready()?;
    std::mem::forget(ring);
    Ok(())
}

/// A worker waits in open(2) of a FIFO, which the freezer would end with `EINTR`.
fn in_flight(case: &Case) -> Result<()> {
    let mut ring = IoUring::new(4)?;
    let path = case.path("fifo");
    nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))?;
    let name = CString::new(path.as_os_str().as_bytes())?;
    let open = opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), name.as_ptr());
    push(&mut ring, &open.build().user_data(3).flags(Flags::ASYNC))?;
    ring.submit()?;
    case.ready()?;
    let mut writer = OpenOptions::new().write(true).open(&path)?;
    let found = ended(&mut ring, 1)?;
    ensure!(
        found.len() == 1 && found[0].0 == 3 && found[0].1 >= 0,
        "{found:?}"
    );
    // SAFETY: just opened for us.
    let mut reader = unsafe { File::from_raw_fd(found[0].1) };
    writer.write_all(b"x")?;
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text)?;
    ensure!(text == "x", "{text:?}");
    Ok(())
}
