//! fanotify groups.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::unistd::{Uid, getpid, seteuid};

use super::child::Child;
use super::namespaces::{separate, tmpfs};
use super::probe::{owned, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("fanotify", inodes),
    Entry::carried("fanotify_mounts", mounts),
    Entry::carried("fanotify_unprivileged", unprivileged),
    Entry::refused(
        "fanotify_unread",
        "events that it has not read, or not answered",
        unread,
    ),
    Entry::refused("fanotify_permission", "FAN_OPEN_PERM", permission),
];

const FID: u32 = libc::FAN_REPORT_FID | libc::FAN_REPORT_DIR_FID | libc::FAN_REPORT_NAME;
const IGNORE: u32 = libc::FAN_MARK_IGNORED_MASK | libc::FAN_MARK_IGNORED_SURV_MODIFY;
const USED: u64 = libc::FAN_OPEN | libc::FAN_CLOSE_WRITE;
const MADE: u64 = libc::FAN_CREATE | libc::FAN_DELETE;

/// A group, whose events open files for reading.
struct Group(File);

/// What happened to something, and who did it; the name is the file's, or as the event tells it.
#[derive(Debug, PartialEq, Eq)]
struct Event {
    mask: u64,
    pid: i32,
    name: String,
}

impl Group {
    fn new(flags: u32) -> Result<Self> {
        let flags = flags | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;
        let opened = libc::O_RDONLY | libc::O_CLOEXEC;
        // SAFETY: takes integers.
        let fd = unsafe { libc::fanotify_init(flags, opened.cast_unsigned()) };
        Ok(Self(owned("fanotify_init", fd.into())?.into()))
    }

    fn mark(&self, flags: u32, mask: u64, path: &Path) -> Result<()> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let (fd, flags) = (self.0.as_raw_fd(), flags | libc::FAN_MARK_ADD);
        // SAFETY: the path is a C string.
        let marked = unsafe { libc::fanotify_mark(fd, flags, mask, libc::AT_FDCWD, path.as_ptr()) };
        sys("fanotify_mark", marked.into()).map(drop)
    }

    /// What the kernel shows of it, without its own numbers.
    fn shown(&self) -> Result<Vec<String>> {
        let text = fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        let lines = text.lines().filter(|line| line.starts_with("fanotify "));
        let own = |field: &&str| {
            let numbers = ["ino:", "sdev:", "mnt_id:", "f_handle:"];
            !numbers.iter().any(|name| field.starts_with(name))
        };
        let line = |line: &str| line.split(' ').filter(own).collect::<Vec<_>>().join(" ");
        let mut lines: Vec<_> = lines.map(line).collect();
        lines.sort_unstable();
        Ok(lines)
    }

    /// What there is to read.
    fn events(&mut self) -> Result<Vec<Event>> {
        let mut bytes = [0; 4096];
        let got = match self.0.read(&mut bytes) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
            got => got?,
        };
        let mut rest = bytes.get(..got).context("More than there is room")?;
        let mut events = Vec::new();
        while let Some(length) = rest.first_chunk() {
            let length = usize::try_from(u32::from_ne_bytes(*length))?;
            let (event, others) = rest.split_at_checked(length).context("Cut off")?;
            events.push(Event::parse(event)?);
            rest = others;
        }
        Ok(events)
    }
}

impl Event {
    /// `struct fanotify_event_metadata`, and what follows it.
    fn parse(bytes: &[u8]) -> Result<Self> {
        let (head, rest) = bytes.split_at_checked(24).context("Cut off")?;
        let fd = i32::from_ne_bytes(number(head, 16)?);
        let name = if fd >= 0 {
            // SAFETY: read(2) has made it for us.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            let path = fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
            let name = path.file_name().context("No name")?;
            name.to_string_lossy().into_owned()
        } else {
            // `struct fanotify_event_info_fid`: header, filesystem, handle, and a name behind it.
            let (info, handle) = rest.split_at_checked(20).context("No handle")?;
            let length = usize::try_from(u32::from_ne_bytes(number(info, 12)?))?;
            let name = handle.get(length..).unwrap_or_default();
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(name).into_owned()
        };
        Ok(Self {
            mask: u64::from_ne_bytes(number(head, 8)?),
            pid: i32::from_ne_bytes(number(head, 20)?),
            name,
        })
    }

    fn own(mask: u64, name: &str) -> Self {
        Self {
            mask,
            pid: getpid().as_raw(),
            name: name.to_owned(),
        }
    }
}

/// The bytes of a number.
fn number<const N: usize>(bytes: &[u8], at: usize) -> Result<[u8; N]> {
    let number = bytes.get(at..).and_then(|rest| rest.first_chunk());
    number.copied().context("Cut off")
}

fn told(group: &mut Group, wanted: &[Event]) -> Result<()> {
    let events = group.events()?;
    ensure!(events == wanted, "It is told {events:?}, not {wanted:?}");
    Ok(())
}

/// Marks of files and directories, with what is left out, of groups of both kinds.
fn inodes(case: &Case) -> Result<()> {
    let dir = case.path("dir");
    fs::create_dir(&dir)?;
    for name in ["loud", "quiet", "evictable"] {
        fs::write(dir.join(name), name)?;
    }
    let mut files = Group::new(libc::FAN_CLASS_NOTIF | libc::FAN_UNLIMITED_MARKS)?;
    files.mark(0, USED | libc::FAN_EVENT_ON_CHILD, &dir)?;
    files.mark(IGNORE, USED, &dir.join("quiet"))?;
    let mut names = Group::new(libc::FAN_CLASS_NOTIF | FID)?;
    names.mark(libc::FAN_MARK_ONLYDIR, MADE | libc::FAN_ONDIR, &dir)?;
    let flags = libc::FAN_MARK_EVICTABLE;
    names.mark(flags, libc::FAN_MODIFY, &dir.join("evictable"))?;
    let flags = libc::FAN_MARK_EVICTABLE | libc::FAN_MARK_IGNORE_SURV;
    names.mark(flags, libc::FAN_ATTRIB, &dir.join("evictable"))?;
    let shown = [files.shown()?, names.shown()?];

    case.ready()?;

    told(&mut files, &[])?;
    told(&mut names, &[])?;
    let now = [files.shown()?, names.shown()?];
    ensure!(now == shown, "{now:?}, not {shown:?}");
    for name in ["quiet", "loud", "quiet"] {
        File::options().write(true).open(dir.join(name))?;
    }
    told(&mut files, &[Event::own(USED, "loud")])?;
    fs::create_dir(dir.join("made"))?;
    fs::write(dir.join("evictable"), "more")?;
    let made = libc::FAN_CREATE | libc::FAN_ONDIR;
    let events = names.events()?;
    ensure!(
        events.first() == Some(&Event::own(made, "made")),
        "{events:?}"
    );
    ensure!(
        events
            .get(1)
            .is_some_and(|event| event.mask & libc::FAN_MODIFY != 0),
        "{events:?}"
    );
    told(&mut files, &[Event::own(USED, "evictable")])
}

/// Marks of a mount and of a whole filesystem, which only it has.
fn mounts(case: &Case) -> Result<()> {
    let (own, deep) = (case.path("own"), case.path("own/deep"));
    fs::create_dir(&own)?;
    separate()?;
    tmpfs(&own, "size=64k")?;
    fs::create_dir(&deep)?;
    let mut mount = Group::new(libc::FAN_CLASS_NOTIF)?;
    mount.mark(libc::FAN_MARK_MOUNT, USED, &own)?;
    let mut filesystem = Group::new(libc::FAN_CLASS_NOTIF)?;
    filesystem.mark(libc::FAN_MARK_FILESYSTEM, libc::FAN_CLOSE_WRITE, &deep)?;
    let shown = [mount.shown()?, filesystem.shown()?];

    case.ready()?;

    told(&mut mount, &[])?;
    told(&mut filesystem, &[])?;
    let now = [mount.shown()?, filesystem.shown()?];
    ensure!(now == shown, "{now:?}, not {shown:?}");
    fs::write(case.path("outside"), "")?;
    File::create(deep.join("inside"))?;
    told(&mut mount, &[Event::own(USED, "inside")])?;
    told(
        &mut filesystem,
        &[Event::own(libc::FAN_CLOSE_WRITE, "inside")],
    )
}

/// Who had no privilege when the group was made is not told who did something.
fn unprivileged(case: &Case) -> Result<()> {
    let dir = case.path("dir");
    fs::create_dir(&dir)?;
    seteuid(Uid::from_raw(1))?;
    let group = Group::new(libc::FAN_CLASS_NOTIF | FID);
    seteuid(Uid::from_raw(0))?;
    let mut group = group?;
    group.mark(0, MADE, &dir)?;
    let at = dir.clone();
    let child = Child::start(case.dir(), "other", move |turn| {
        fs::write(at.join("before"), "")?;
        turn.wait();
        fs::write(at.join("after"), "")?;
        Ok(())
    })?;
    let others = |name: &str| Event {
        pid: 0,
        ..Event::own(libc::FAN_CREATE, name)
    };
    child.waits()?;
    told(&mut group, &[others("before")])?;

    case.ready()?;

    child.finish()?;
    told(&mut group, &[others("after")])?;
    fs::write(dir.join("own"), "")?;
    told(&mut group, &[Event::own(libc::FAN_CREATE, "own")])
}

/// What nobody has read of a mark.
fn unread(case: &Case) -> Result<()> {
    let dir = case.path("dir");
    fs::create_dir(&dir)?;
    let mut group = Group::new(libc::FAN_CLASS_NOTIF)?;
    group.mark(0, USED | libc::FAN_EVENT_ON_CHILD, &dir)?;
    File::create(dir.join("made"))?;
    case.ready()?;
    told(&mut group, &[Event::own(USED, "made")])
}

/// Whoever opens the file waits for an answer.
fn permission(case: &Case) -> Result<()> {
    let path = case.path("asked");
    fs::write(&path, "")?;
    let mut group = Group::new(libc::FAN_CLASS_CONTENT)?;
    group.mark(0, libc::FAN_OPEN_PERM, &path)?;
    case.ready()?;
    told(&mut group, &[])
}
