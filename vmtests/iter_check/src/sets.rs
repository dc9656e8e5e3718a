//! Objects that hold any number of others: epoll, inotify, locks.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tracker::bpf::events::LockClass;
use tracker::bpf::iter::{Files, Iterators, ReadError};

use crate::files::{find, me, tempdir};
use crate::sys::{check, own};

fn new_epoll() -> Result<OwnedFd> {
    // SAFETY: makes a descriptor.
    own(unsafe { libc::epoll_create1(0) }, "epoll_create1")
}

fn watch(epoll: &OwnedFd, target: &OwnedFd, data: u64) -> Result<()> {
    let mut event = libc::epoll_event {
        events: libc::EPOLLIN as u32,
        u64: data,
    };
    // SAFETY: both descriptors and the event are valid.
    let result = unsafe {
        libc::epoll_ctl(
            epoll.as_raw_fd(),
            libc::EPOLL_CTL_ADD,
            target.as_raw_fd(),
            &raw mut event,
        )
    };
    check(result.into(), "epoll_ctl")?;
    Ok(())
}

fn raise_descriptor_limit() -> Result<()> {
    let limit = getrlimit(Resource::RLIMIT_NOFILE)?.1;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, limit, limit)?)
}

pub fn epoll(iterators: &mut Iterators) -> Result<()> {
    const ITEMS: usize = 2000;
    let instance = new_epoll()?;
    // SAFETY: makes a descriptor.
    let eventfd = own(unsafe { libc::eventfd(0, 0) }, "eventfd")?;
    let mut copies: Vec<OwnedFd> = Vec::new();
    raise_descriptor_limit()?;
    let mut expected = BTreeSet::new();
    for index in 0..ITEMS {
        let copy = eventfd
            .try_clone()
            .context("RLIMIT_NOFILE is too low for the check")?;
        let data = 0xabcd_0000_0000 + u64::try_from(index)?;
        watch(&instance, &copy, data)?;
        expected.insert((u32::try_from(copy.as_raw_fd())?, data));
        copies.push(copy);
    }
    let id = find(iterators, &instance)?.rec.file;
    let target = find(iterators, &eventfd)?.rec.file;
    let of = |files: Files| {
        files
            .epoll_items
            .into_iter()
            .filter(move |item| item.epoll == id)
            .collect::<Vec<_>>()
    };
    let items = of(iterators.files(me())?);
    ensure!(items.len() == ITEMS, "{} items", items.len());
    ensure!(
        items
            .iter()
            .map(|i| (i.fd, i.data))
            .collect::<BTreeSet<_>>()
            == expected,
        "items"
    );
    ensure!(
        items.iter().all(|i| i.target == target && i.ready == 0),
        "target and not ready"
    );
    let mut writer = fs::File::from(eventfd);
    writer.write_all(&1u64.to_ne_bytes())?;
    let items = of(iterators.files(me())?);
    ensure!(items.iter().all(|i| i.ready == 1), "ready");
    let mut count = [0; 8];
    writer.read_exact(&mut count)?;
    Ok(())
}

/// More items than the ring holds: the pass says so, and the next one is right again.
pub fn epoll_overflow(iterators: &mut Iterators) -> Result<()> {
    const TARGETS: usize = 2000;
    const INSTANCES: usize = 80;
    raise_descriptor_limit()?;
    // SAFETY: makes a descriptor.
    let eventfd = own(unsafe { libc::eventfd(0, 0) }, "eventfd")?;
    let targets: Vec<OwnedFd> = (0..TARGETS)
        .map(|_| eventfd.try_clone())
        .collect::<Result<_, _>>()?;
    let mut instances = Vec::new();
    for _ in 0..INSTANCES {
        let instance = new_epoll()?;
        for (index, target) in targets.iter().enumerate() {
            watch(&instance, target, u64::try_from(index)?)?;
        }
        instances.push(instance);
    }
    let result = iterators.files(me());
    ensure!(
        matches!(result, Err(ReadError::Overflow { .. })),
        "{} items fit",
        INSTANCES * TARGETS
    );
    instances.truncate(2);
    let items = iterators.files(me())?.epoll_items;
    let ours: BTreeSet<u64> = instances
        .iter()
        .map(|instance| Ok(find(iterators, instance)?.rec.file))
        .collect::<Result<_>>()?;
    let found = items
        .iter()
        .filter(|item| ours.contains(&item.epoll))
        .count();
    ensure!(found == 2 * TARGETS, "{found} items after the overflow");
    Ok(())
}

pub fn inotify(iterators: &mut Iterators) -> Result<()> {
    use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
    let (first, second) = (tempdir()?, tempdir()?);
    let instance = Inotify::init(InitFlags::empty())?;
    let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE;
    instance.add_watch(&first, flags)?;
    instance.add_watch(&second, AddWatchFlags::IN_MOVED_TO)?;
    let group = find(iterators, &instance)?.rec.file;
    let mut found: Vec<_> = iterators
        .files(me())?
        .watches
        .into_iter()
        .filter(|w| w.group == group)
        .collect();
    found.sort_by_key(|watch| watch.wd);
    ensure!(found.len() == 2, "{found:?}");
    for (watch, (dir, mask)) in found.iter().zip([
        (&first, flags.bits()),
        (&second, AddWatchFlags::IN_MOVED_TO.bits()),
    ]) {
        ensure!(watch.ino == nix::sys::stat::stat(dir)?.st_ino, "{watch:?}");
        ensure!(watch.mask & mask == mask, "{watch:?}");
    }
    ensure!(found[0].wd == 1 && found[1].wd == 2, "{found:?}");
    fs::remove_dir(&first)?;
    fs::remove_dir(&second)?;
    Ok(())
}

pub fn locks(iterators: &mut Iterators) -> Result<()> {
    let dir = tempdir()?;
    let file = fs::File::create(dir.join("locked"))?;
    ensure!(find(iterators, &file)?.rec.has_locks == 0, "not locked yet");
    let range = |kind: i32, start, len| libc::flock {
        l_type: libc::c_short::try_from(kind).unwrap_or_default(),
        l_whence: 0,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    let (posix, ofd) = (range(libc::F_WRLCK, 10, 5), range(libc::F_WRLCK, 100, 0));
    // SAFETY: the descriptor is ours and the locks are valid.
    unsafe {
        let fd = file.as_raw_fd();
        check(libc::flock(fd, libc::LOCK_EX).into(), "flock")?;
        check(
            libc::fcntl(fd, libc::F_SETLK, &raw const posix).into(),
            "F_SETLK",
        )?;
        check(
            libc::fcntl(fd, libc::F_OFD_SETLK, &raw const ofd).into(),
            "F_OFD_SETLK",
        )?;
    }
    let rec = find(iterators, &file)?.rec;
    ensure!(rec.has_locks != 0, "locked");
    let mut found: Vec<_> = iterators
        .files(me())?
        .locks
        .into_iter()
        .filter(|l| l.inode == rec.inode)
        .collect();
    found.sort_by_key(|lock| (lock.class, lock.start));
    let summary: Vec<_> = found
        .iter()
        .map(|l| (l.class, l.start, l.end, l.type_))
        .collect();
    let max = i64::MAX;
    ensure!(
        summary
            == [
                (LockClass::FLOCK, 0, max, 1),
                (LockClass::POSIX, 10, 14, 1),
                (LockClass::POSIX, 100, max, 1),
            ],
        "{found:?}"
    );
    ensure!(
        found.iter().all(|l| l.file == rec.file && l.ino == rec.ino),
        "{found:?}"
    );
    ensure!(
        found[0].owner == rec.file && found[1].owner == rec.files,
        "{found:?}"
    );
    ensure!(found[2].owner == rec.file, "{found:?}");
    // a lease wants a file nobody has open for writing
    fs::write(dir.join("leased"), b"")?;
    let leased = fs::File::open(dir.join("leased"))?;
    // SAFETY: the descriptor is ours.
    let result = unsafe { libc::fcntl(leased.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
    check(result.into(), "F_SETLEASE")?;
    let rec = find(iterators, &leased)?.rec;
    let found = iterators.files(me())?.locks;
    let lease = found
        .iter()
        .find(|lock| lock.inode == rec.inode)
        .context("no lease")?;
    ensure!(
        lease.class == LockClass::LEASE && lease.type_ == 0,
        "{lease:?}"
    );
    ensure!(lease.file == rec.file, "{lease:?}");
    drop(leased);
    fs::remove_dir_all(&dir)?;
    Ok(())
}
