//! Descriptors that tell of events: eventfd, epoll, timerfd, signalfd,
//! inotify.

use std::fs;
use std::io::Write;
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::mman::{MapFlags, ProtFlags, mmap};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use nix::time::clock_gettime;

use super::probe::{eventually, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("eventfd", eventfd),
    Entry::carried("epoll", epoll),
    Entry::carried("epoll_nested", nested),
    Entry::carried("timerfd", timerfd),
    Entry::carried("signalfd", signalfd),
    Entry::carried("inotify", inotify),
    Entry::carried("inotify_quiet", inotify_quiet),
    Entry::refused(
        "inotify_unread",
        "events that it has not read",
        inotify_unread,
    ),
];

/// Counters, plain, non-blocking and as a semaphore.
fn eventfd(case: &Case) -> Result<()> {
    let plain = EventFd::from_value_and_flags(5, EfdFlags::EFD_CLOEXEC)?;
    plain.write(0x1_0000_0000)?;
    let semaphore =
        EventFd::from_value_and_flags(3, EfdFlags::EFD_SEMAPHORE | EfdFlags::EFD_NONBLOCK)?;
    let empty = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    let full = EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK)?;
    full.write(u64::MAX - 1)?;

    case.ready()?;

    ensure!(plain.read()? == 0x1_0000_0005, "Wrong counter");
    for turn in 0..3 {
        ensure!(
            semaphore.read()? == 1,
            "Not a semaphore any more, turn {turn}"
        );
    }
    ensure!(
        semaphore.read() == Err(Errno::EAGAIN),
        "The semaphore counts too far"
    );
    ensure!(
        empty.read() == Err(Errno::EAGAIN),
        "The empty one is not empty or blocks"
    );
    ensure!(
        full.write(1) == Err(Errno::EAGAIN),
        "The full one takes more"
    );
    ensure!(
        full.read()? == u64::MAX - 1,
        "Wrong counter in the full one"
    );
    empty.write(9)?;
    ensure!(empty.read()? == 9, "It does not count any more");
    Ok(())
}

/// Data of the events that are ready now, sorted.
fn ready(epoll: &Epoll) -> Result<Vec<u64>> {
    let mut events = [EpollEvent::empty(); 16];
    let count = epoll.wait(&mut events, EpollTimeout::ZERO)?;
    let mut data: Vec<u64> = events[..count].iter().map(EpollEvent::data).collect();
    data.sort_unstable();
    Ok(data)
}

/// Level- and edge-triggered and one-shot items with their data.
fn epoll(case: &Case) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let make = || EventFd::from_flags(EfdFlags::EFD_NONBLOCK);
    let [level, edge, fired, armed, quiet, removed] =
        [make()?, make()?, make()?, make()?, make()?, make()?];
    let data = |low: u64| 0xdead_beef_0000_0000 | low;
    let add = |fd: &EventFd, flags, low| epoll.add(fd, EpollEvent::new(flags, data(low)));
    add(&level, EpollFlags::EPOLLIN, 1)?;
    add(&edge, EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 2)?;
    add(&fired, EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 3)?;
    add(&armed, EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 4)?;
    add(&quiet, EpollFlags::EPOLLIN, 5)?;
    add(&removed, EpollFlags::EPOLLIN, 6)?;
    epoll.delete(&removed)?;
    removed.write(1)?;
    fired.write(1)?;
    ensure!(
        ready(&epoll)? == [data(3)],
        "The one-shot item did not fire"
    );
    level.write(1)?;
    // An edge that nobody has seen yet.
    edge.write(1)?;
    let copy = quiet.as_fd_clone()?;

    case.ready()?;

    ensure!(
        ready(&epoll)? == [data(1), data(2)],
        "Wrong events at first"
    );
    ensure!(
        ready(&epoll)? == [data(1)],
        "The edge came twice, or the level did not"
    );
    level.read()?;
    ensure!(ready(&epoll)? == [0u64; 0], "A drained eventfd is ready");
    edge.write(1)?;
    ensure!(ready(&epoll)? == [data(2)], "A new edge is not seen");
    armed.write(1)?;
    ensure!(
        ready(&epoll)? == [data(4)],
        "The armed one-shot item did not fire"
    );
    ensure!(ready(&epoll)? == [0u64; 0], "A one-shot item fired twice");
    epoll.modify(
        &fired,
        &mut EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, 33),
    )?;
    ensure!(
        ready(&epoll)? == [33],
        "A one-shot item cannot be armed again"
    );
    quiet.write(1)?;
    ensure!(ready(&epoll)? == [data(5)], "The quiet item is deaf");
    ensure!(
        epoll.delete(&removed) == Err(Errno::ENOENT),
        "A removed item is back"
    );
    epoll.delete(&quiet)?;
    drop(copy);
    ensure!(ready(&epoll)? == [0u64; 0], "A deleted item reports");
    Ok(())
}

/// A second descriptor of an eventfd.
trait CloneFd {
    fn as_fd_clone(&self) -> Result<std::os::fd::OwnedFd>;
}

impl CloneFd for EventFd {
    fn as_fd_clone(&self) -> Result<std::os::fd::OwnedFd> {
        use std::os::fd::AsFd;
        self.as_fd()
            .try_clone_to_owned()
            .context("Clone an eventfd")
    }
}

/// An epoll in an epoll, and a pipe and a timer in the inner one.
fn nested(case: &Case) -> Result<()> {
    let outer = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let inner = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let event = EventFd::from_flags(EfdFlags::EFD_NONBLOCK)?;
    inner.add(&event, EpollEvent::new(EpollFlags::EPOLLIN, 10))?;
    outer.add(&inner.0, EpollEvent::new(EpollFlags::EPOLLIN, 20))?;
    case.ready()?;
    ensure!(ready(&outer)? == [0u64; 0], "Ready without a reason");
    event.write(1)?;
    ensure!(
        ready(&outer)? == [20],
        "The outer one does not see the inner one"
    );
    ensure!(
        ready(&inner)? == [10],
        "The inner one does not see the eventfd"
    );
    event.read()?;
    ensure!(ready(&outer)? == [0u64; 0], "Still ready");
    Ok(())
}

/// Time left of a timer, in nanoseconds.
fn left(timer: &TimerFd) -> Result<i128> {
    match timer.get()?.context("The timer is not armed")? {
        Expiration::OneShot(time)
        | Expiration::IntervalDelayed(time, _)
        | Expiration::Interval(time) => {
            Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
        }
    }
}

/// CLOCK_MONOTONIC in nanoseconds.
fn monotonic() -> Result<i128> {
    let time = clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(i128::from(time.tv_sec()) * 1_000_000_000 + i128::from(time.tv_nsec()))
}

/// One-shot, periodic, absolute, unarmed and expired timers.
fn timerfd(case: &Case) -> Result<()> {
    let make = || {
        TimerFd::new(
            ClockId::CLOCK_MONOTONIC,
            TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK,
        )
    };
    let one_shot = make()?;
    one_shot.set(
        Expiration::OneShot(Duration::from_secs(100_000).into()),
        TimerSetTimeFlags::empty(),
    )?;
    let periodic = make()?;
    periodic.set(
        Expiration::Interval(Duration::from_millis(200).into()),
        TimerSetTimeFlags::empty(),
    )?;
    let absolute = TimerFd::new(ClockId::CLOCK_REALTIME, TimerFlags::TFD_CLOEXEC)?;
    let wall = clock_gettime(nix::time::ClockId::CLOCK_REALTIME)?;
    let at = Duration::new(u64::try_from(wall.tv_sec())? + 50_000, 0);
    absolute.set(
        Expiration::OneShot(at.into()),
        TimerSetTimeFlags::TFD_TIMER_ABSTIME,
    )?;
    let unarmed = make()?;
    let expired = make()?;
    expired.set(
        Expiration::OneShot(Duration::from_millis(1).into()),
        TimerSetTimeFlags::empty(),
    )?;
    eventually("a timer of one millisecond", || {
        Ok(expired.get()?.is_none())
    })?;
    let (left_before, clock_before) = (left(&one_shot)?, monotonic()?);

    case.ready()?;

    let (left_after, clock_after) = (left(&one_shot)?, monotonic()?);
    let drift = (left_before - left_after) - (clock_after - clock_before);
    ensure!(
        drift.abs() < 1_000_000_000,
        "The one-shot timer is off by {drift} ns against the clock"
    );
    eventually("the periodic timer ticks", || {
        let mut ticks = [0u8; 8];
        match nix::unistd::read(&periodic, &mut ticks) {
            Ok(_) => Ok(u64::from_ne_bytes(ticks) > 0),
            Err(Errno::EAGAIN) => Ok(false),
            Err(error) => Err(error).context("Read the periodic timer"),
        }
    })?;
    ensure!(
        matches!(periodic.get()?, Some(Expiration::IntervalDelayed(_, every)) if every.tv_nsec() == 200_000_000),
        "The interval is lost"
    );
    ensure!(
        left(&periodic)? <= 200_000_000,
        "More time left than the interval"
    );
    let wall = clock_gettime(nix::time::ClockId::CLOCK_REALTIME)?;
    let until = i128::from(at.as_secs()) * 1_000_000_000
        - (i128::from(wall.tv_sec()) * 1_000_000_000 + i128::from(wall.tv_nsec()));
    let drift = left(&absolute)? - until;
    ensure!(
        drift.abs() < 1_000_000_000,
        "The absolute timer is off by {drift} ns"
    );
    ensure!(unarmed.get()?.is_none(), "The unarmed timer is armed");
    let mut ticks = [0u8; 8];
    nix::unistd::read(&expired, &mut ticks).context("The expiration of before is lost")?;
    ensure!(
        u64::from_ne_bytes(ticks) == 1,
        "The expired timer counts {}",
        u64::from_ne_bytes(ticks)
    );
    unarmed.set(
        Expiration::OneShot(Duration::from_millis(1).into()),
        TimerSetTimeFlags::empty(),
    )?;
    eventually("the unarmed timer after being armed", || {
        Ok(nix::unistd::read(&unarmed, &mut ticks).is_ok())
    })
}

/// A signalfd with signals queued for it, one with a value.
fn signalfd(case: &Case) -> Result<()> {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR2);
    mask.add(Signal::SIGHUP);
    mask.thread_block()?;
    let fd = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
    let me = nix::unistd::getpid();
    let value = libc::sigval {
        sival_ptr: 0x1234_5678 as *mut libc::c_void,
    };
    sys(
        "sigqueue",
        // SAFETY: a signal to ourselves with a plain number as its value.
        unsafe { libc::sigqueue(me.as_raw(), libc::SIGUSR2, value) }.into(),
    )?;

    case.ready()?;

    let info = fd.read_signal()?.context("The queued signal is lost")?;
    ensure!(
        info.ssi_signo == libc::SIGUSR2.cast_unsigned(),
        "Signal {}",
        info.ssi_signo
    );
    ensure!(info.ssi_ptr == 0x1234_5678, "Value {:#x}", info.ssi_ptr);
    ensure!(
        info.ssi_pid == me.as_raw().cast_unsigned(),
        "Sent by {}",
        info.ssi_pid
    );
    ensure!(info.ssi_code == libc::SI_QUEUE, "Code {}", info.ssi_code);
    ensure!(fd.read_signal()?.is_none(), "The signal came twice");
    nix::sys::signal::kill(me, Signal::SIGHUP)?;
    let info = fd.read_signal()?.context("A new signal does not arrive")?;
    ensure!(
        info.ssi_signo == libc::SIGHUP.cast_unsigned(),
        "Signal {}",
        info.ssi_signo
    );
    Ok(())
}

/// Watches go on with their descriptors and masks.
fn inotify(case: &Case) -> Result<()> {
    let (first, second) = (case.dir().join("first"), case.dir().join("second"));
    fs::create_dir_all(&first)?;
    fs::create_dir_all(&second)?;
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let gone = inotify.add_watch(case.dir(), AddWatchFlags::IN_CREATE)?;
    let one = inotify.add_watch(&first, AddWatchFlags::IN_CREATE)?;
    let two = inotify.add_watch(
        &second,
        AddWatchFlags::IN_DELETE | AddWatchFlags::IN_CLOSE_WRITE,
    )?;
    inotify.rm_watch(gone)?;
    inotify.read_events()?;

    case.ready()?;

    ensure!(
        matches!(inotify.read_events(), Err(Errno::EAGAIN)),
        "Events without a reason, or reading blocks"
    );
    fs::write(first.join("a"), b"")?;
    fs::write(second.join("b"), b"")?;
    fs::remove_file(second.join("b"))?;
    let events: Vec<_> = inotify
        .read_events()?
        .into_iter()
        .map(|e| (e.wd, e.mask, e.name))
        .collect();
    let name = |text: &str| Some(text.into());
    let wanted = [
        (one, AddWatchFlags::IN_CREATE, name("a")),
        (two, AddWatchFlags::IN_CLOSE_WRITE, name("b")),
        (two, AddWatchFlags::IN_DELETE, name("b")),
    ];
    ensure!(events == wanted, "Events {events:?}, not {wanted:?}");
    let again = inotify.add_watch(&first, AddWatchFlags::IN_CREATE)?;
    ensure!(again == one, "The first directory's watch is a new one");
    ensure!(
        std::fs::read_to_string(format!(
            "/proc/self/fdinfo/{}",
            std::os::fd::AsFd::as_fd(&inotify).as_raw_fd()
        ))?
        .matches("inotify wd:")
        .count()
            == 2,
        "Wrong number of watches"
    );
    Ok(())
}

/// Who watches for everything is not told of what a restore does: files that it opens, reads and
/// maps.
fn inotify_quiet(case: &Case) -> Result<()> {
    let watched = case.path("watched");
    fs::create_dir(&watched)?;
    let path = watched.join("used");
    fs::write(&path, [7; 8192])?;
    let mut used = fs::File::options().read(true).write(true).open(&path)?;
    let reader = fs::File::open(&path)?;
    // SAFETY: a new mapping of a file that nobody makes shorter.
    let mapped = unsafe {
        mmap(
            None,
            NonZeroUsize::new(8192).context("A size")?,
            ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            MapFlags::MAP_PRIVATE,
            &used,
            0,
        )
    }?;
    // SAFETY: inside the mapping.
    unsafe { mapped.cast::<u8>().write(8) };
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let all = AddWatchFlags::IN_ALL_EVENTS;
    let (dir, file) = (
        inotify.add_watch(&watched, all)?,
        inotify.add_watch(&path, all)?,
    );
    case.ready()?;
    let told = inotify.read_events();
    ensure!(matches!(told, Err(Errno::EAGAIN)), "It is told {told:?}");
    used.write_all(b"more")?;
    let told = inotify.read_events()?;
    let wanted = [dir, file].map(|wd| (wd, AddWatchFlags::IN_MODIFY));
    let told: Vec<_> = told
        .into_iter()
        .map(|event| (event.wd, event.mask))
        .collect();
    ensure!(told == wanted, "It is told {told:?}");
    drop(reader);
    Ok(())
}

/// What nobody has read of a watch.
fn inotify_unread(case: &Case) -> Result<()> {
    let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let watched = case.path("watched");
    fs::create_dir(&watched)?;
    inotify.add_watch(&watched, AddWatchFlags::IN_CREATE)?;
    fs::write(watched.join("made"), b"")?;
    case.ready()?;
    let told = inotify.read_events()?;
    ensure!(told.len() == 1, "It is told {told:?}");
    Ok(())
}
