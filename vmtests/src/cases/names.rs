//! Names: programs that were replaced while they run, root directories, files that are not where
//! their name leads.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::mman::{MapFlags, ProtFlags};
use nix::unistd::{chdir, chroot};

use super::child::Child;
use super::mapping::Mapping;
use super::probe::pattern;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("program_replaced", replaced),
    Entry::carried("program_removed", removed),
    Entry::carried("process_chroot", in_chroot),
    Entry::refused("refused_name_elsewhere", "leads elsewhere", elsewhere),
    Entry::refused(
        "refused_directory_gone",
        "working directory",
        directory_gone,
    ),
    Entry::refused("refused_unix_relative", "a relative name", unix_relative),
    Entry::refused(
        "refused_unix_in_chroot",
        "below another root",
        unix_in_chroot,
    ),
];

/// A shell, copied and started; then `change` is done to the copy. It must go on as what it was.
fn shell(case: &Case, change: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    const SHELL: &str = "/bin/dash";
    let dir = case.path("bin");
    fs::create_dir(&dir)?;
    let program = dir.join("shell");
    fs::copy(SHELL, &program)?;
    let mut child = Command::new(&program)
        .args([
            "-c",
            "count=5; while read line; do count=$((count + 1)); echo $count $line; done",
        ])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut input = child.stdin.take().context("No input")?;
    let mut output = BufReader::new(child.stdout.take().context("No output")?);
    let mut ask = |line: &str| -> Result<String> {
        writeln!(input, "{line}")?;
        let mut answer = String::new();
        output.read_line(&mut answer)?;
        Ok(answer.trim().to_owned())
    };
    let answer = ask("before")?;
    ensure!(answer == "6 before", "It says {answer:?}");
    change(&program)?;

    case.ready()?;

    let answer = ask("after")?;
    ensure!(answer == "7 after", "It says {answer:?}");
    let exe = fs::read(format!("/proc/{}/exe", child.id()))?;
    ensure!(exe == fs::read(SHELL)?, "It is another program");
    drop(input);
    let mut rest = String::new();
    output.read_to_string(&mut rest)?;
    let status = child.wait()?;
    ensure!(
        status.success() && rest.is_empty(),
        "It ended with {status}: {rest:?}"
    );
    Ok(())
}

/// As an upgrade of its package does it.
fn replaced(case: &Case) -> Result<()> {
    let new = case.path("new");
    shell(case, |program| {
        fs::write(&new, "#!/bin/false\n")?;
        Ok(fs::rename(&new, program)?)
    })
}

/// With the directory that it was in.
fn removed(case: &Case) -> Result<()> {
    shell(case, |program| {
        fs::remove_file(program)?;
        Ok(fs::remove_dir(program.parent().context("No directory")?)?)
    })
}

/// A child that has a root directory of its own, where it maps files.
fn in_chroot(case: &Case) -> Result<()> {
    let jail = case.path("jail");
    fs::create_dir_all(jail.join("inner"))?;
    fs::write(jail.join("shared"), pattern(1, 8192))?;
    let number = fs::metadata(&jail)?.ino();
    let (map, inside) = (MapFlags::MAP_SHARED, jail.clone());
    let child = Child::start(case.dir(), "chroot", |turn| {
        chroot(&inside)?;
        chdir("/inner")?;
        let file = fs::File::options().read(true).write(true).open("/shared")?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let mut shared = Mapping::new(&file, 0, 8192, prot, map)?;
        turn.wait();
        ensure!(fs::metadata("/")?.ino() == number, "Another root directory");
        ensure!(
            fs::metadata("..")?.ino() == number,
            "Another working directory"
        );
        ensure!(
            std::env::current_dir()?.as_os_str() == "/inner",
            "It has another name"
        );
        ensure!(shared.bytes() == pattern(1, 8192), "Other bytes are mapped");
        shared.bytes_mut()[5000..5005].copy_from_slice(b"hello");
        let mut found = [0; 5];
        file.read_exact_at(&mut found, 5000)?;
        ensure!(&found == b"hello", "It does not map the file");
        Ok(())
    })?;
    child.waits()?;

    case.ready()?;

    child.go()?;
    child.join()?;
    let found = fs::read(jail.join("shared"))?;
    ensure!(
        &found[5000..5005] == b"hello",
        "The file was not written to"
    );
    Ok(())
}

/// A file that was opened by a name that is gone, and has another one.
fn elsewhere(case: &Case) -> Result<()> {
    let (first, second) = (case.path("first"), case.path("second"));
    let file = fs::File::create(&first)?;
    fs::hard_link(&first, &second)?;
    fs::remove_file(&first)?;
    case.ready()?;
    ensure!(file.metadata()?.nlink() == 1, "Links");
    Ok(())
}

/// A child that keeps what `set_up` makes until it may end.
fn with_child<T>(case: &Case, set_up: impl FnOnce() -> Result<T>) -> Result<()> {
    let child = Child::start(case.dir(), "names", |turn| {
        let _kept = set_up()?;
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    case.ready()?;
    child.go()?;
    child.join()
}

/// A child whose working directory was removed.
fn directory_gone(case: &Case) -> Result<()> {
    let dir = case.path("gone");
    fs::create_dir(&dir)?;
    with_child(case, || {
        chdir(&dir)?;
        Ok(fs::remove_dir(&dir)?)
    })
}

/// A Unix socket bound in the working directory.
fn unix_relative(case: &Case) -> Result<()> {
    chdir(case.dir())?;
    let listener = UnixListener::bind("socket here")?;
    case.ready()?;
    let name = listener.local_addr()?;
    ensure!(
        name.as_pathname() == Some(Path::new("socket here")),
        "{name:?}"
    );
    Ok(())
}

/// One bound by a child with a root directory of its own.
fn unix_in_chroot(case: &Case) -> Result<()> {
    let jail = case.path("jail");
    fs::create_dir(&jail)?;
    with_child(case, || {
        chroot(&jail)?;
        Ok(UnixListener::bind("/socket")?)
    })
}
