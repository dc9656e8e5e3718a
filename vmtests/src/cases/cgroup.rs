//! Cgroups that a program makes below its own.

use std::fs::{self, File, Permissions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use nix::unistd::Pid;

use super::child::Child;
use super::probe::eventually;
use super::refused::cgroup_root;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("cgroup_below", below),
    Entry::carried("cgroup_below_threads", threads),
    Entry::carried("cgroup_limits", limits),
    Entry::refused("refused_cgroup_setting", "cgroup.max.depth", setting),
];

/// The program's own cgroup as a directory.
fn own() -> Result<PathBuf> {
    Ok(PathBuf::from(format!(
        "{}{}",
        cgroup_root()?,
        path_of(&"self".to_owned())?
    )))
}

fn path_of(pid: &impl ToString) -> Result<String> {
    let path = format!("/proc/{}/cgroup", pid.to_string());
    let text = fs::read_to_string(&path).with_context(|| format!("Read {path}"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::"));
    Ok(path.context("No cgroup2")?.to_owned())
}

fn enter(dir: &std::path::Path, pid: Pid) -> Result<()> {
    let path = dir.join("cgroup.procs");
    fs::write(&path, pid.to_string()).with_context(|| format!("Write {}", path.display()))
}

/// What the program's own cgroup is allowed. The guest's machine has the controllers of
/// `tracker run`, and others only where somebody enables them.
fn limits(case: &Case) -> Result<()> {
    const LIMITS: [(&str, &str); 6] = [
        ("memory.max", "4294967296"),
        ("memory.low", "1048576"),
        ("memory.oom.group", "1"),
        ("pids.max", "4321"),
        ("cgroup.max.depth", "7"),
        ("cpu.weight", "321"),
    ];
    // Without `tracker run` it is in the root cgroup, which has no limits.
    if path_of(&"self")? == "/" {
        return case.ready();
    }
    let own = own()?;
    let root = PathBuf::from(cgroup_root()?);
    for above in [root.as_path(), own.parent().context("No parent")?] {
        fs::write(above.join("cgroup.subtree_control"), "+cpu").context("Enable cpu")?;
    }
    for (file, limit) in LIMITS {
        fs::write(own.join(file), limit).with_context(|| format!("Write {file}"))?;
    }
    case.ready()?;
    // The limits come when the program runs already.
    eventually("the cgroup has its limits", || {
        let now = |file| Ok(fs::read_to_string(own.join(file))?.trim_end().to_owned());
        let now: Vec<String> = LIMITS
            .iter()
            .map(|(file, _)| now(file))
            .collect::<Result<_>>()?;
        Ok(LIMITS
            .iter()
            .map(|(_, limit)| *limit)
            .eq(now.iter().map(String::as_str)))
    })
}

/// Children in two of them, a zombie in one, an empty one that was handed to another user.
fn below(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let top = own()?;
    let (outer, inner, empty) = (
        top.join("outer"),
        top.join("outer/inner"),
        top.join("empty"),
    );
    fs::create_dir_all(&inner)?;
    fs::create_dir_all(&empty)?;
    chown(&empty, Some(33), Some(44))?;
    fs::set_permissions(&empty, Permissions::from_mode(0o750))?;
    chown(empty.join("cgroup.procs"), Some(33), None)?;
    let start = |name| {
        Child::start(&dir, name, |turn| {
            turn.wait();
            Ok(())
        })
    };
    let (one, two, stays) = (start("one")?, start("two")?, start("stays")?);
    for child in [&one, &two, &stays] {
        child.waits()?;
    }
    enter(&outer, one.pid)?;
    enter(&inner, two.pid)?;
    let members = File::open(&inner)?;
    let mine = path_of(&"self".to_owned())?;

    case.ready()?;

    ensure!(path_of(&"self".to_owned())? == mine, "I was moved");
    // The root cgroup's path ends with a slash.
    let above = mine.trim_end_matches('/');
    ensure!(
        path_of(&stays.pid)? == mine,
        "The one that stayed was moved"
    );
    ensure!(path_of(&one.pid)? == format!("{above}/outer"), "The first");
    ensure!(
        path_of(&two.pid)? == format!("{above}/outer/inner"),
        "The second is in {}",
        path_of(&two.pid)?
    );
    let path = format!("/proc/self/fd/{}/cgroup.procs", members.as_raw_fd());
    let listed = fs::read_to_string(path)?;
    ensure!(
        listed.trim_end() == two.pid.to_string(),
        "The directory lists {listed:?}"
    );
    let stat = fs::metadata(&empty)?;
    ensure!(
        (stat.uid(), stat.gid(), stat.mode() & 0o777) == (33, 44, 0o750),
        "The empty one's owner or mode"
    );
    let procs = fs::metadata(empty.join("cgroup.procs"))?;
    ensure!(procs.uid() == 33, "Its cgroup.procs");
    // They work as before: move, freeze, remove.
    enter(&empty, two.pid)?;
    fs::remove_dir(&inner)?;
    fs::write(outer.join("cgroup.freeze"), "1")?;
    super::probe::eventually("a frozen cgroup", || {
        Ok(fs::read_to_string(outer.join("cgroup.events"))?.contains("frozen 1"))
    })?;
    fs::write(outer.join("cgroup.freeze"), "0")?;
    one.finish()?;
    two.finish()?;
    stays.finish()?;
    fs::remove_dir(&outer)?;
    fs::remove_dir(&empty)?;
    Ok(())
}

/// A process of several threads in one, and a child that was born there.
fn threads(case: &Case) -> Result<()> {
    let dir = case.dir().to_owned();
    let top = own()?;
    let group = top.join("workers");
    fs::create_dir_all(&group)?;
    let place = group.clone();
    let child_dir = dir.clone();
    let child = Child::start(&dir, "worker", move |turn| {
        enter(&place, Pid::this())?;
        let born = Child::start(&child_dir, "born", |turn| {
            turn.wait();
            Ok(())
        })?;
        born.waits()?;
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let _ = told.recv();
            path_of(&format!("self/task/{}", nix::unistd::gettid()))
        });
        turn.wait();
        let mine = path_of(&"self".to_owned())?;
        ensure!(mine.ends_with("/workers"), "The worker is in {mine}");
        ensure!(path_of(&born.pid)? == mine, "The one born there");
        drop(tell);
        let thread = thread.join().map_err(|_| anyhow::anyhow!("Panic"))??;
        ensure!(thread == mine, "The thread is in {thread}");
        born.finish()
    })?;
    child.waits()?;
    case.ready()?;
    child.finish()?;
    fs::remove_dir(&group)?;
    Ok(())
}

/// One that is no plain cgroup any more.
fn setting(case: &Case) -> Result<()> {
    let group = own()?.join("limited");
    fs::create_dir_all(&group)?;
    fs::write(group.join("cgroup.max.depth"), "3")?;
    case.ready()?;
    let depth = fs::read_to_string(group.join("cgroup.max.depth"))?;
    ensure!(depth.trim_end() == "3", "The depth is {depth}");
    fs::remove_dir(&group)?;
    Ok(())
}
