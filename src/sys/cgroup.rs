//! Control groups, version 2: membership, freezing, killing (cgroups(7),
//! Documentation/admin-guide/cgroup-v2.rst).

use crate::model::ids::Pid;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, ppoll};
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A cgroup operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {path}: {source}; check that it is a cgroup2 directory and that you are root")]
pub struct CgroupError {
    /// System call.
    pub operation: &'static str,
    /// File it was about.
    pub path: PathBuf,
    /// Why not.
    pub source: io::Error,
}

fn failed<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> CgroupError + 'a {
    move |source| CgroupError {
        operation,
        path: path.to_owned(),
        source,
    }
}

/// Why waiting for a cgroup ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// The condition holds.
    Reached,
    /// The deadline has passed.
    Late,
    /// The other descriptor became readable.
    Interrupted,
}

/// A line of `cgroup.events`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// All tasks are frozen.
    Frozen,
    /// All tasks run.
    Running,
    /// No live process is left.
    Empty,
}

impl Event {
    fn line(self) -> &'static str {
        match self {
            Self::Frozen => "frozen 1",
            Self::Running => "frozen 0",
            Self::Empty => "populated 0",
        }
    }
}

/// One existing cgroup.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
    events: File,
    id: u64,
}

impl Cgroup {
    /// Opens the cgroup of this directory.
    ///
    /// # Errors
    /// It does not exist, is no cgroup, or is the root (which cannot be frozen).
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let id = fs::metadata(path).map_err(failed("stat", path))?.ino();
        let name = path.join("cgroup.events");
        let events = File::open(&name).map_err(failed("open", &name))?;
        Ok(Self {
            path: path.to_owned(),
            events,
            id,
        })
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id, by which BPF knows it.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    fn write(&self, file: &str, text: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, text).map_err(failed("write", &path))
    }

    /// Asks for freezing or thawing; [`Cgroup::wait`] tells when it is done.
    ///
    /// # Errors
    /// write(2) fails.
    pub fn set_frozen(&self, frozen: bool) -> Result<(), CgroupError> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
    }

    /// Whether freezing was asked for, however far that has come.
    ///
    /// # Errors
    /// read(2) fails.
    pub fn is_to_be_frozen(&self) -> Result<bool, CgroupError> {
        let path = self.path.join("cgroup.freeze");
        let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
        Ok(text.trim_end() == "1")
    }

    /// Kills every process in it and below, frozen ones too (Linux 5.14).
    ///
    /// # Errors
    /// write(2) fails.
    pub fn kill(&self) -> Result<(), CgroupError> {
        self.write("cgroup.kill", "1")
    }

    /// Moves a whole process in.
    ///
    /// # Errors
    /// `ESRCH`: it is gone or a zombie; `EBUSY`: this cgroup has controllers for children.
    pub fn add(&self, pid: Pid) -> Result<(), CgroupError> {
        move_to(&self.path, pid)
    }

    /// Whether an event's condition holds now.
    ///
    /// # Errors
    /// read(2) fails.
    pub fn holds(&self, event: Event) -> Result<bool, CgroupError> {
        let mut text = String::new();
        let mut events = &self.events;
        events
            .rewind()
            .and_then(|()| events.read_to_string(&mut text))
            .map_err(failed("read cgroup.events of", &self.path))?;
        Ok(text.lines().any(|line| line == event.line()))
    }

    /// Waits for an event until the deadline, or until `other` becomes readable.
    ///
    /// # Errors
    /// read(2) or poll(2) fails.
    pub fn wait(
        &self,
        event: Event,
        deadline: Instant,
        other: Option<BorrowedFd<'_>>,
    ) -> Result<Waited, CgroupError> {
        /// The kernel tells of an event at once only if it has told of none for some 10 ms
        /// (`CGROUP_FILE_NOTIFY_MIN_INTV` of kernel/cgroup/cgroup.c): that long there is a look now
        /// and then.
        const UNTOLD: Duration = Duration::from_millis(20);
        let begun = Instant::now();
        loop {
            // Reading also arms the next POLLPRI (kernfs_notify).
            if self.holds(event)? {
                return Ok(Waited::Reached);
            }
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                return Ok(Waited::Late);
            }
            let waited = now - begun;
            let pause = match waited < UNTOLD {
                true => left.min(Duration::from_micros(50).max(waited / 8)),
                false => left,
            };
            let mut fds = vec![PollFd::new(self.events.as_fd(), PollFlags::POLLPRI)];
            fds.extend(other.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
            match ppoll(&mut fds, Some(pause.into()), None) {
                Err(Errno::EINTR) | Ok(_) => {}
                Err(e) => return Err(failed("poll cgroup.events of", &self.path)(e.into())),
            }
            if fds.get(1).and_then(PollFd::any).unwrap_or(false) {
                return Ok(Waited::Interrupted);
            }
        }
    }

    /// Processes in it (not below).
    ///
    /// # Errors
    /// read(2) fails.
    pub fn processes(&self) -> Result<Vec<Pid>, CgroupError> {
        let path = self.path.join("cgroup.procs");
        let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
        Ok(numbers(&text).map(Pid).collect())
    }

    /// Processes in it and below. A cgroup that goes away meanwhile has none.
    ///
    /// # Errors
    /// read(2) or readdir(3) fails.
    pub fn members(&self) -> Result<Vec<Pid>, CgroupError> {
        let mut members = self.processes()?;
        for path in below(&self.path).map_err(failed("readdir", &self.path))? {
            let path = self.path.join(path).join("cgroup.procs");
            match fs::read_to_string(&path) {
                Err(e) if is_gone(&e) => {}
                text => {
                    let text = text.map_err(failed("read", &path))?;
                    members.extend(numbers(&text).map(Pid));
                }
            }
        }
        Ok(members)
    }
}

/// `ENODEV` is what a file of a removed cgroup says that was open already.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ENODEV as i32)
}

/// Cgroups below another, parents before children, by their path below it.
///
/// # Errors
/// readdir(3) fails.
pub fn below(top: &Path) -> io::Result<Vec<String>> {
    let mut found: Vec<String> = Vec::new();
    let mut next = vec![String::new()];
    while let Some(path) = next.pop() {
        let entries = match fs::read_dir(top.join(&path)) {
            // One that was removed just now.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !path.is_empty() => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                let name = entry.file_name().to_string_lossy().into_owned();
                let child = Path::new(&path).join(name).to_string_lossy().into_owned();
                next.push(child.clone());
                found.push(child);
            }
        }
    }
    found.sort_unstable();
    Ok(found)
}

fn numbers(text: &str) -> impl Iterator<Item = i32> {
    text.lines().filter_map(|line| line.parse().ok())
}

/// Cgroup v2 path of a process below the mount, with leading slash.
///
/// # Errors
/// The process is gone, or the kernel has no cgroup2.
pub fn of_process(pid: Pid) -> Result<String, CgroupError> {
    let path = PathBuf::from(format!("/proc/{pid}/cgroup"));
    let text = fs::read_to_string(&path).map_err(failed("read", &path))?;
    text.lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(str::to_owned)
        .ok_or_else(|| failed("find cgroup2 in", &path)(io::ErrorKind::NotFound.into()))
}

/// Moves a whole process to the cgroup of this directory, which may be the root.
///
/// # Errors
/// As [`Cgroup::add`].
pub fn move_to(dir: &Path, pid: Pid) -> Result<(), CgroupError> {
    let path = dir.join("cgroup.procs");
    fs::write(&path, pid.to_string()).map_err(failed("write", &path))
}

/// Makes a cgroup, with its parents.
///
/// # Errors
/// mkdir(2) fails.
pub fn create(path: &Path) -> Result<Cgroup, CgroupError> {
    fs::create_dir_all(path).map_err(failed("mkdir", path))?;
    Cgroup::open(path)
}

/// Enables controllers in the cgroups below this directory, as far as that can be done: one that
/// another hierarchy holds cannot.
pub fn enable<'a>(dir: &Path, controllers: impl IntoIterator<Item = &'a str>) {
    for controller in controllers {
        let _ = fs::write(dir.join("cgroup.subtree_control"), format!("+{controller}"));
    }
}

/// Removes an empty cgroup.
///
/// # Errors
/// `EBUSY`: a process or another cgroup is in it.
pub fn remove(path: &Path) -> Result<(), CgroupError> {
    fs::remove_dir(path).map_err(failed("rmdir", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_before_their_children() {
        let top = tempfile::tempdir().unwrap();
        fs::create_dir_all(top.path().join("b/inner/most")).unwrap();
        fs::create_dir(top.path().join("a")).unwrap();
        fs::write(top.path().join("cgroup.procs"), "").unwrap();
        let found = below(top.path()).unwrap();
        assert_eq!(found, ["a", "b", "b/inner", "b/inner/most"]);
    }
}
