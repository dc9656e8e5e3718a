//! What a case program has to hand: a directory, `ready`, a verdict.
//!
//! A case sets something up, says that it is ready, and sleeps until told to
//! go on. Meanwhile it may be frozen, written to an image, killed, and started
//! again by another kernel. Then it looks whether everything is as before.
//!
//! The library itself holds nothing that would need restoring: descriptors 0
//! to 2 (`/dev/null` and a log file), and while waiting a `nanosleep`.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

use crate::cases;
use crate::image::Kernel;

/// File in the case's directory that says the set-up is complete; holds the PID.
pub const READY: &str = "ready";
/// File that tells the case to verify.
pub const GO: &str = "go";
/// File with the verdict: `PASS`, or `FAIL: ` and why.
pub const RESULT: &str = "result";
/// File that the case's stdout and stderr are appended to.
pub const LOG: &str = "log";

/// What `tracker` must do with the case's program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// Checkpoint and restore it.
    Carried,
    /// The same, but not when it has run on in between: what only the kernel has is over then.
    CarriedOnce,
    /// Checkpoint and restore it; but another kernel may keep it in another form: an update to
    /// that is refused.
    CarriedAlike,
    /// The same, but only the newer of the kernels can make it again: refuse what the older one
    /// would have to restore, with this text.
    CarriedByNewer(&'static str),
    /// Refuse to checkpoint it, with this text on stderr, and leave it alone.
    Refused(&'static str),
    /// The same, but only once it stands still: before, nobody can tell.
    RefusedFrozen(&'static str),
}

/// One case.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Kernel object kind first: `pipe_data`, `epoll_nested`.
    pub name: &'static str,
    /// What is to happen to it.
    pub expect: Expect,
    /// Runs in the guest, as root, in a process of its own.
    pub run: fn(&Case) -> Result<()>,
}

impl Entry {
    const fn new(name: &'static str, expect: Expect, run: fn(&Case) -> Result<()>) -> Entry {
        Entry { name, expect, run }
    }

    /// A case whose state is carried over.
    pub const fn carried(name: &'static str, run: fn(&Case) -> Result<()>) -> Entry {
        Entry::new(name, Expect::Carried, run)
    }

    /// A case whose state is carried over unless it has run on since.
    pub const fn carried_once(name: &'static str, run: fn(&Case) -> Result<()>) -> Entry {
        Entry::new(name, Expect::CarriedOnce, run)
    }

    /// A case whose state is carried over where the kernels keep it in one form.
    pub const fn carried_alike(name: &'static str, run: fn(&Case) -> Result<()>) -> Entry {
        Entry::new(name, Expect::CarriedAlike, run)
    }

    /// A case whose state only the newer kernel can make again; `text` is in the other's refusal.
    pub const fn carried_by_newer(
        name: &'static str,
        text: &'static str,
        run: fn(&Case) -> Result<()>,
    ) -> Entry {
        Entry::new(name, Expect::CarriedByNewer(text), run)
    }

    /// A case that holds something not supported, named by `text` in the refusal.
    pub const fn refused(
        name: &'static str,
        text: &'static str,
        run: fn(&Case) -> Result<()>,
    ) -> Entry {
        Entry::new(name, Expect::Refused(text), run)
    }

    /// The same of what can be told only once it stands still.
    pub const fn refused_frozen(
        name: &'static str,
        text: &'static str,
        run: fn(&Case) -> Result<()>,
    ) -> Entry {
        Entry::new(name, Expect::RefusedFrozen(text), run)
    }
}

impl Expect {
    /// Of a program that is checkpointed and restored on this kernel: why it is refused, or
    /// nothing if it is carried.
    pub fn refusal(self, kernel: Kernel) -> Option<&'static str> {
        match self {
            Expect::Carried | Expect::CarriedOnce | Expect::CarriedAlike => None,
            Expect::CarriedByNewer(text) => (kernel == Kernel::V6_1).then_some(text),
            Expect::Refused(text) | Expect::RefusedFrozen(text) => Some(text),
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("name", &self.name)
            .field("expect", &self.expect)
            .finish()
    }
}

/// The running case.
#[derive(Debug)]
pub struct Case {
    dir: PathBuf,
}

impl Case {
    /// A directory of the case's own, on the root filesystem.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path in that directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// A file of that directory for reading and writing, made if there is none.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub fn open(&self, name: &str) -> Result<File> {
        let mut options = OpenOptions::new();
        let options = options.read(true).write(true).create(true);
        let path = self.path(name);
        options
            .open(&path)
            .with_context(|| format!("Open {}", path.display()))
    }

    /// Says that the set-up is complete and sleeps until told to go on. All
    /// that counts happens to the process in here.
    ///
    /// # Errors
    /// If the marker cannot be written, nobody says go, or the PID is another
    /// one afterwards.
    pub fn ready(&self) -> Result<()> {
        /// Of the time that it has waited; a hundred cases that look often are a load of their own.
        const SHARE: u32 = 50;
        let (least, most) = (Duration::from_millis(20), Duration::from_millis(500));
        self.wait(|waited| (waited / SHARE).clamp(least, most), || ())
    }

    /// As [`Case::ready`], calling `work` after each sleep of `interval`: for
    /// programs that must be caught in the middle of something.
    ///
    /// # Errors
    /// As [`Case::ready`].
    pub fn ready_polling(&self, interval: Duration, work: impl FnMut()) -> Result<()> {
        self.wait(|_| interval, work)
    }

    /// Sleeps for as long as `interval` makes of the time waited so far, until told to go on.
    fn wait(&self, interval: impl Fn(Duration) -> Duration, mut work: impl FnMut()) -> Result<()> {
        /// Ends with the VM anyway; a loaded machine may take long over a batch.
        const PATIENCE: Duration = Duration::from_secs(7200);
        let pid = std::process::id();
        publish(&self.path(READY), &pid.to_string())?;
        let (go, begun) = (self.path(GO), Instant::now());
        // access(2) and nanosleep(2): no descriptor is ever held here.
        while nix::unistd::access(&go, nix::unistd::AccessFlags::F_OK).is_err() {
            let waited = begun.elapsed();
            if waited > PATIENCE {
                bail!("Nobody said go within {PATIENCE:?}");
            }
            std::thread::sleep(interval(waited));
            work();
        }
        if std::process::id() != pid {
            bail!("The PID was {pid} and is {} now", std::process::id());
        }
        Ok(())
    }
}

/// Entry point of the `cases` program: `cases NAME DIR`, or `cases --list`.
///
/// # Errors
/// If there is no such case or its directory cannot be used. The verdict of
/// the case itself goes into its result file.
pub fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--list"] => {
            for entry in cases::all() {
                println!("{}", entry.name);
            }
            Ok(())
        }
        [name, dir] => run(name, dir.into()),
        _ => bail!("Usage: cases NAME DIR, or cases --list"),
    }
}

fn run(name: &str, dir: PathBuf) -> Result<()> {
    let entry = cases::find(name).with_context(|| format!("No case {name}"))?;
    fs::create_dir_all(&dir).with_context(|| format!("Create {}", dir.display()))?;
    hold_only_stdio(&dir.join(LOG))?;
    let case = Case { dir };
    if case.path(READY).exists() {
        // `tracker` starts afresh what it cannot restore: not a pass.
        return publish(
            &case.path(RESULT),
            "FAIL: The program was started afresh instead of being restored",
        );
    }
    // A panic is a verdict too, and its message is in the log.
    let outcome = std::panic::catch_unwind(|| (entry.run)(&case))
        .unwrap_or_else(|_| Err(anyhow!("The case panicked, see its log")));
    let verdict = match &outcome {
        Ok(()) => "PASS".to_owned(),
        Err(error) => format!("FAIL: {error:#}"),
    };
    publish(&case.path(RESULT), &verdict)
}

/// Makes descriptors 0 to 2 what cases may rely on and closes all others.
fn hold_only_stdio(log: &Path) -> Result<()> {
    let null = OpenOptions::new()
        .read(true)
        .open("/dev/null")
        .context("Open /dev/null")?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .context("Open the log")?;
    nix::unistd::dup2_stdin(null.as_fd())?;
    nix::unistd::dup2_stdout(log.as_fd())?;
    nix::unistd::dup2_stderr(log.as_fd())?;
    drop((null, log));
    // SAFETY: nothing in this process owns a descriptor above 2 yet.
    let result = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, 0) };
    if result != 0 {
        return Err(std::io::Error::last_os_error()).context("close_range");
    }
    Ok(())
}

/// Writes a small file so that it is seen whole or not at all.
///
/// # Errors
/// If it cannot be written.
pub fn publish(path: &Path, text: &str) -> Result<()> {
    let part = path.with_extension("part");
    fs::write(&part, text).with_context(|| format!("Write {}", part.display()))?;
    fs::rename(&part, path).with_context(|| format!("Rename {}", part.display()))
}
