//! Mount and UTS namespaces that a program has for itself, as services in a sandbox do.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::utsname::uname;
use nix::unistd::{fchdir, gethostname, mkfifo, sethostname};

use super::child::Child;
use super::mapping::Mapping;
use super::probe::{check_pattern, pattern, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("namespace_uts", uts),
    Entry::carried("namespace_mount", own_mounts),
    Entry::carried("namespace_mount_tmpfs", own_tmpfs),
    Entry::carried("namespace_mount_slave", slave),
    Entry::carried("namespace_mount_groups", groups),
    Entry::carried("namespace_mount_family", family),
    Entry::refused(
        "refused_namespace_divided",
        "not that of all processes",
        divided,
    ),
    Entry::refused(
        "refused_namespace_ramfs",
        "a filesystem of type ramfs that only it has",
        ramfs,
    ),
    Entry::refused("refused_namespace_large", "more than 16 MiB", large),
];

const NOTHING: Option<&str> = None;

/// A mount namespace from which nothing gets out, without what an update has not mounted again when
/// it restores.
pub fn separate() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(NOTHING, "/", NOTHING, flags, NOTHING)?;
    leave_out_late_ones()?;
    // Those of other cases, the last first.
    for point in points()?.iter().rev().filter(|one| is_another_cases(one)) {
        umount2(point.as_str(), MntFlags::MNT_DETACH)
            .with_context(|| format!("Unmount {point}"))?;
    }
    Ok(())
}

/// Where cases mount something; the directory itself may be on a disk of its own.
fn is_another_cases(point: &str) -> bool {
    point.starts_with("/var/lib/") && point != "/var/lib/cases"
}

fn is_mounted(at: &Path) -> Result<bool> {
    Ok(points()?.contains(&at.display().to_string()))
}

/// Where something is mounted.
fn points() -> Result<Vec<String>> {
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let points = text.lines().filter_map(|line| line.split(' ').nth(4));
    Ok(points.map(str::to_owned).collect())
}

fn leave_out_late_ones() -> Result<()> {
    for point in ["/dev/hugepages", "/run/lock"] {
        umount2(point, MntFlags::MNT_DETACH).with_context(|| format!("Unmount {point}"))?;
    }
    Ok(())
}

fn bind(from: &Path, to: &Path, flags: MsFlags) -> Result<()> {
    mount(Some(from), to, NOTHING, MsFlags::MS_BIND, NOTHING)
        .with_context(|| format!("Bind {}", to.display()))?;
    let flags = flags | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
    mount(NOTHING, to, NOTHING, flags, NOTHING)?;
    Ok(())
}

/// Mounts a tmpfs with these options.
pub fn tmpfs(at: &Path, options: &str) -> Result<()> {
    let flags = MsFlags::MS_NOSUID;
    mount(Some("own"), at, Some("tmpfs"), flags, Some(options))
        .with_context(|| format!("Mount {}", at.display()))
}

/// What mountinfo shows of each mount but for numbers: root, mount point, options, propagation,
/// type; without those of other cases, which come and go.
fn table(case: &Case) -> Result<Vec<String>> {
    let own = case.dir().display().to_string();
    let text = fs::read_to_string("/proc/self/mountinfo")?;
    let line = |line: &str| -> Option<String> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point, options) = (fields.next()?, fields.next()?, fields.next()?);
        let groups = fields.map(|field| field.split(':').next().unwrap_or_default());
        let groups: Vec<_> = groups.collect();
        let kind = filesystem.split(' ').next()?;
        Some(format!("{root} {point} {options} {groups:?} {kind}"))
    };
    let lasting = text.lines().filter(|line| {
        let point = line.split(' ').nth(4).unwrap_or_default();
        point.starts_with(&own) || !is_another_cases(point)
    });
    let mut lines: Vec<_> = lasting.filter_map(line).collect();
    lines.sort_unstable();
    Ok(lines)
}

fn same_table(case: &Case, before: &[String]) -> Result<()> {
    let after = table(case)?;
    let missing: Vec<_> = before.iter().filter(|one| !after.contains(one)).collect();
    let new: Vec<_> = after.iter().filter(|one| !before.contains(one)).collect();
    ensure!(
        after == before,
        "The mounts differ: missing {missing:#?}, new {new:#?}"
    );
    Ok(())
}

/// A path of this namespace as the machine sees it.
fn machines(path: &Path) -> PathBuf {
    Path::new("/proc/1/root").join(path.strip_prefix("/").unwrap_or(path))
}

fn uts(case: &Case) -> Result<()> {
    let machines = gethostname()?;
    unshare(CloneFlags::CLONE_NEWUTS)?;
    sethostname("elsewhere")?;
    let domain = b"example.org";
    // SAFETY: the kernel reads as many bytes.
    sys("setdomainname", unsafe {
        libc::setdomainname(domain.as_ptr().cast(), domain.len()).into()
    })?;

    case.ready()?;

    let names = uname()?;
    ensure!(names.nodename() == "elsewhere", "{names:?}");
    ensure!(names.domainname() == "example.org", "{names:?}");
    sethostname("again")?;
    let child = Child::start(case.dir(), "outside", |_| {
        setns(File::open("/proc/1/ns/uts")?, CloneFlags::CLONE_NEWUTS)?;
        let name = gethostname()?;
        ensure!(name == machines, "The machine is called {name:?}");
        Ok(())
    })?;
    child.join()
}

/// Directories and files that are mounted elsewhere, some read-only, an instance of procfs, and a
/// file that was opened before.
fn own_mounts(case: &Case) -> Result<()> {
    let [data, view, secret, hidden, proc, bare] =
        ["data", "view", "secret", "hidden", "proc", "a b\\c"].map(|name| case.path(name));
    for dir in [&data, &view, &hidden, &proc, &bare] {
        fs::create_dir(dir)?;
    }
    fs::write(data.join("file"), "content")?;
    fs::write(&secret, "secret")?;
    fs::write(hidden.join("file"), "hidden")?;
    let outside = File::options()
        .read(true)
        .write(true)
        .open(hidden.join("file"))?;

    separate()?;
    let few = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NOATIME;
    bind(&data, &view, few)?;
    bind(Path::new("/dev/null"), &secret, MsFlags::MS_STRICTATIME)?;
    bind(&data, &bare, MsFlags::MS_NODEV | MsFlags::MS_NODIRATIME)?;
    // The name of the file that is open leads to another one here.
    bind(&data, &hidden, MsFlags::empty())?;
    let options = Some("hidepid=invisible");
    mount(
        Some("proc"),
        &proc,
        Some("proc"),
        MsFlags::MS_NOSUID,
        options,
    )?;
    bind(&proc.join("sys"), &proc.join("sys"), MsFlags::MS_RDONLY)?;
    let view_file = File::open(view.join("file"))?;
    std::env::set_current_dir(&view)?;
    let before = table(case)?;

    case.ready()?;

    same_table(case, &before)?;
    let text = fs::read_to_string("file").context("Through the working directory")?;
    ensure!(text == "content", "It holds {text:?}");
    let written = fs::write(view.join("new"), "text").map_err(|error| error.raw_os_error());
    ensure!(written == Err(Some(libc::EROFS)), "It is {written:?}");
    ensure!(fs::read(&secret)?.is_empty(), "It is no secret any more");
    fs::write(bare.join("new"), "new")?;
    ensure!(fs::read_to_string(view.join("new"))? == "new", "Two files");
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(
        mounts.contains("hidepid=invisible"),
        "Every process is seen"
    );
    let set = fs::write(proc.join("sys/kernel/hostname"), "x");
    ensure!(set.is_err(), "Parameters of the kernel can be changed");
    let mut text = String::new();
    (&view_file).read_to_string(&mut text)?;
    ensure!(text == "content", "The open one holds {text:?}");

    let mut found = [0; 6];
    outside.read_exact_at(&mut found, 0)?;
    ensure!(&found == b"hidden", "The file from before holds {found:?}");
    outside.write_all_at(b"HIDDEN", 0)?;
    let text = fs::read_to_string(machines(&hidden.join("file")))?;
    ensure!(text == "HIDDEN", "The machine's holds {text:?}");
    ensure!(!machines(&view.join("file")).exists(), "It got out");
    Ok(())
}

/// Whatever can be in a tmpfs, open and mapped.
fn own_tmpfs(case: &Case) -> Result<()> {
    let own = case.path("own");
    fs::create_dir(&own)?;
    separate()?;
    tmpfs(&own, "size=1m,nr_inodes=100,mode=0750,uid=7")?;
    let at = |name: &str| own.join(name);
    fs::write(at("file"), pattern(3, 5000))?;
    chown(at("file"), Some(5), Some(6))?;
    fs::set_permissions(at("file"), fs::Permissions::from_mode(0o4711))?;
    fs::hard_link(at("file"), at("link"))?;
    symlink("file", at("symlink"))?;
    let (mode, device) = (Mode::from_bits_truncate(0o666), makedev(1, 5));
    mknod(&at("zero"), SFlag::S_IFCHR, mode, device)?;
    mkfifo(&at("fifo"), Mode::from_bits_truncate(0o600))?;
    fs::create_dir(at("watched"))?;
    let watch = Inotify::init(InitFlags::IN_NONBLOCK)?;
    watch.add_watch(&at("watched"), AddWatchFlags::IN_CREATE)?;
    fs::create_dir(at("sub"))?;
    fs::write(at("sub/covered"), "covered")?;
    tmpfs(&at("sub"), "size=64k")?;
    fs::write(at("sub/above"), "above")?;
    let mut file = File::options().read(true).write(true).open(at("file"))?;
    file.read_exact(&mut [0; 1000])?;
    let fifo = File::options().read(true).write(true).open(at("fifo"))?;
    (&fifo).write_all(b"waiting")?;
    let listener = UnixListener::bind(at("socket"))?;
    fs::set_permissions(at("socket"), fs::Permissions::from_mode(0o622))?;
    let gone = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(at("gone"))?;
    (&gone).write_all(b"still here")?;
    fs::remove_file(at("gone"))?;
    let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let mut shared = Mapping::new(&file, 0, 5000, prot, MapFlags::MAP_SHARED)?;
    let numbers = |name: &str| -> Result<_> {
        let found = fs::symlink_metadata(at(name))?;
        Ok((
            found.mode(),
            found.uid(),
            found.gid(),
            found.nlink(),
            found.rdev(),
        ))
    };
    let names = [
        "", "file", "link", "symlink", "zero", "fifo", "socket", "sub",
    ];
    let nodes = names.map(numbers).into_iter().collect::<Result<Vec<_>>>()?;
    let changed = fs::metadata(at("file"))?.modified()?;
    let before = table(case)?;

    case.ready()?;

    same_table(case, &before)?;
    let after = names.map(numbers).into_iter().collect::<Result<Vec<_>>>()?;
    ensure!(after == nodes, "{names:?} were {nodes:?} and are {after:?}");
    ensure!(
        fs::metadata(at("file"))?.modified()? == changed,
        "Another time"
    );
    let mut rest = Vec::new();
    file.read_to_end(&mut rest)?;
    ensure!(
        rest.len() == 4000,
        "{} bytes from the offset on",
        rest.len()
    );
    check_pattern("the file", 3, &fs::read(at("link"))?)?;
    ensure!(
        fs::read_link(at("symlink"))? == Path::new("file"),
        "Another link"
    );
    let mut zeroes = [1; 4];
    File::open(at("zero"))?.read_exact(&mut zeroes)?;
    ensure!(zeroes == [0; 4], "No zeroes");
    let mut waiting = [0; 7];
    (&fifo).read_exact(&mut waiting)?;
    ensure!(&waiting == b"waiting", "In the FIFO is {waiting:?}");
    // The name is that of the FIFO that is open.
    File::options()
        .write(true)
        .open(at("fifo"))?
        .write_all(b"x")?;
    (&fifo).read_exact(&mut [0])?;
    fs::write(at("watched/new"), "")?;
    let events = watch.read_events()?;
    let [event] = events.as_slice() else {
        bail!("Events of the watched directory: {events:?}");
    };
    ensure!(event.name.as_deref() == Some("new".as_ref()), "{event:?}");
    let mut client = UnixStream::connect(at("socket"))?;
    client.write_all(b"y")?;
    listener.accept()?.0.read_exact(&mut [0])?;
    let mut text = [0; 10];
    gone.read_exact_at(&mut text, 0)?;
    ensure!(&text == b"still here", "The removed one has {text:?}");
    shared.bytes_mut()[0] = 99;
    ensure!(
        fs::read(at("file"))?[0] == 99,
        "The mapping is of another file"
    );
    ensure!(fs::read_to_string(at("sub/above"))? == "above", "Not above");
    umount2(&at("sub"), MntFlags::empty())?;
    ensure!(
        fs::read_to_string(at("sub/covered"))? == "covered",
        "Not covered"
    );
    ensure!(
        fs::symlink_metadata(at("fifo"))?.file_type().is_fifo(),
        "No FIFO"
    );
    ensure!(
        fs::write(at("large"), vec![1; 2 << 20]).is_err(),
        "It has no limit"
    );
    ensure!(fs::read_dir(machines(&own))?.next().is_none(), "It got out");
    Ok(())
}

/// Mounts or unmounts in the machine's namespace.
fn outside(case: &Case, name: &str, act: impl FnOnce() -> Result<()>) -> Result<()> {
    let child = Child::start(case.dir(), name, |_| {
        setns(File::open("/proc/1/ns/mnt")?, CloneFlags::CLONE_NEWNS)?;
        act()
    })?;
    child.join()
}

/// What is mounted for the machine arrives, and nothing gets out.
fn slave(case: &Case) -> Result<()> {
    let pid = std::process::id();
    let [early, late, own] =
        ["early", "late", "own"].map(|name| PathBuf::from(format!("/var/lib/{name}.{pid}")));
    for dir in [&early, &late, &own] {
        fs::create_dir(dir)?;
    }
    // As a distribution's init does.
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SHARED, NOTHING)?;
    tmpfs(&early, "size=64k")?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    let flags = MsFlags::MS_REC | MsFlags::MS_SLAVE;
    mount(NOTHING, "/", NOTHING, flags, NOTHING)?;
    mount(NOTHING, "/", NOTHING, MsFlags::MS_SHARED, NOTHING)?;
    leave_out_late_ones()?;
    let before = table(case)?;

    case.ready()?;

    if !is_mounted(&early)? {
        // Another kernel has not mounted it yet.
        outside(case, "early", || tmpfs(&early, "size=64k"))?;
    }
    same_table(case, &before)?;
    outside(case, "late", || tmpfs(&late, "size=64k"))?;
    ensure!(
        is_mounted(&late)?,
        "What the machine mounts does not arrive"
    );
    tmpfs(&own, "size=64k")?;
    fs::write(own.join("file"), "own")?;
    ensure!(!machines(&own.join("file")).exists(), "It got out");
    for at in [&early, &late] {
        outside(case, "unmount", || Ok(umount2(at, MntFlags::empty())?))?;
        ensure!(!is_mounted(at)?, "What the machine unmounts stays");
    }
    Ok(())
}

/// Mounts among which mounting propagates, some of them in one direction only.
fn groups(case: &Case) -> Result<()> {
    let [whole, part, slave, unbindable] =
        ["z", "part", "slave", "unbindable"].map(|name| case.path(name));
    for dir in [&whole, &part, &slave, &unbindable] {
        fs::create_dir(dir)?;
    }
    separate()?;
    tmpfs(&whole, "size=64k")?;
    for name in ["sub", "sub/inner", "other"] {
        fs::create_dir(whole.join(name))?;
    }
    let change = |at: &Path, flags: MsFlags| -> Result<()> {
        Ok(mount(NOTHING, at, NOTHING, flags, NOTHING)?)
    };
    change(&whole, MsFlags::MS_SHARED)?;
    bind(&whole.join("sub"), &part, MsFlags::MS_NOEXEC)?;
    bind(&whole, &slave, MsFlags::empty())?;
    change(&slave, MsFlags::MS_SLAVE)?;
    change(&slave, MsFlags::MS_SHARED)?;
    tmpfs(&unbindable, "size=64k")?;
    change(&unbindable, MsFlags::MS_UNBINDABLE)?;
    let before = table(case)?;

    case.ready()?;

    same_table(case, &before)?;
    tmpfs(&part.join("inner"), "size=64k")?;
    ensure!(is_mounted(&whole.join("sub/inner"))?, "Not from the part");
    ensure!(is_mounted(&slave.join("sub/inner"))?, "Not to the slave");
    tmpfs(&slave.join("other"), "size=64k")?;
    ensure!(!is_mounted(&whole.join("other"))?, "From the slave");
    let bound = bind(&unbindable, &whole.join("other"), MsFlags::empty());
    ensure!(bound.is_err(), "It is no longer unbindable");
    Ok(())
}

/// Processes that share one mount namespace: one of them has another root directory, one is in a
/// directory of the machine's that something hides from it.
fn family(case: &Case) -> Result<()> {
    let (own, hidden) = (case.path("own"), case.path("hidden"));
    fs::create_dir(&own)?;
    fs::create_dir(&hidden)?;
    fs::write(hidden.join("file"), "outside")?;
    let outside = File::open(&hidden)?;
    separate()?;
    tmpfs(&own, "size=1m")?;
    bind(&own, &hidden, MsFlags::empty())?;
    let stranger = Child::start(case.dir(), "outside", |turn| {
        fchdir(&outside)?;
        turn.wait();
        let text = fs::read_to_string("file")?;
        ensure!(text == "outside", "It reads {text:?}");
        Ok(())
    })?;
    drop(outside);
    stranger.waits()?;
    fs::create_dir(own.join("inner"))?;
    fs::write(own.join("inner/file"), "inner")?;
    let inner = own.join("inner");
    let child = Child::start(case.dir(), "chroot", |turn| {
        nix::unistd::chroot(&inner)?;
        std::env::set_current_dir("/")?;
        turn.wait();
        let text = fs::read_to_string("/file")?;
        ensure!(text == "inner", "It reads {text:?}");
        Ok(fs::write("file", "changed")?)
    })?;
    child.waits()?;

    case.ready()?;

    stranger.finish()?;
    child.finish()?;
    let text = fs::read_to_string(own.join("inner/file"))?;
    ensure!(text == "changed", "It is {text:?}");
    Ok(())
}

/// A child with mounts of its own.
fn divided(case: &Case) -> Result<()> {
    let own = case.path("own");
    fs::create_dir(&own)?;
    let child = Child::start(case.dir(), "own", |turn| {
        separate()?;
        tmpfs(&own, "size=64k")?;
        fs::write(own.join("file"), "own")?;
        turn.wait();
        ensure!(fs::read_to_string(own.join("file"))? == "own", "Not own");
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    ensure!(!own.join("file").exists(), "It got out");
    child.finish()
}

fn ramfs(case: &Case) -> Result<()> {
    let own = case.path("own");
    fs::create_dir(&own)?;
    separate()?;
    mount(Some("own"), &own, Some("ramfs"), MsFlags::empty(), NOTHING)?;
    fs::write(own.join("file"), "own")?;
    case.ready()?;
    ensure!(fs::read_to_string(own.join("file"))? == "own", "Not own");
    Ok(())
}

fn large(case: &Case) -> Result<()> {
    let own = case.path("own");
    fs::create_dir(&own)?;
    separate()?;
    tmpfs(&own, "size=32m")?;
    fs::write(own.join("file"), pattern(9, 17 << 20))?;
    case.ready()?;
    check_pattern("the file", 9, &fs::read(own.join("file"))?)
}
