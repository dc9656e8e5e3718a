//! Fault points: places where a test makes a checkpoint, an update or a restore fail.
//!
//! `TRACKER_FAULT=name` makes that place return an error, `name:kill` makes tracker kill itself
//! there, which no error path can clean up after, and `name:hang` never returns. `name:term` and
//! `name:int` have it get that signal there, `name:slow` has it take 1.5 s; it goes on. For a
//! restore, `name@application` confines it to one application. The kernel hands words of its command
//! line that it does not know to init as environment, so `tracker update --append
//! TRACKER_FAULT=...` reaches the points of the next kernel's early boot.

use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::getpid;
use std::sync::OnceLock;
use std::time::Duration;

/// Where an operation can be made to fail. One call site each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Everything is loaded, nothing was touched.
    Prepare,
    /// Pages were copied while the application ran.
    Precopy,
    /// New connections are held off.
    Lock,
    /// The application is frozen.
    Freeze,
    /// Its threads are stopped and their registers read.
    Threads,
    /// Its processes were read.
    Tasks,
    /// Its network is silent.
    Silence,
    /// Its descriptors and sockets were read.
    Files,
    /// Page selection is done.
    Memory,
    /// A batch of pages is about to be written.
    PageWrite,
    /// Metadata is about to be encoded.
    Encode,
    /// The image is about to be sealed.
    Commit,
    /// The image is sealed, the application still there.
    Kill,
    /// The next kernel is about to be loaded.
    KexecLoad,
    /// The next kernel is about to be started.
    BeforeKexec,
    /// In early boot: nothing was restored yet.
    Stage,
    /// The restorer was born in the application's cgroup; `kill` is what some kernels do to it.
    RestoreBirth,
    /// Everything the application had open was opened; it has no process yet.
    RestoreFiles,
    /// Its processes and their memory are back.
    RestoreMemory,
    /// All that is left is to let it run.
    RestoreRelease,
}

/// What a hit point does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Fail,
    Kill,
    Hang,
    Signal(Signal),
    Slow,
}

/// What `slow` takes at each hit.
const SLOW: Duration = Duration::from_millis(1500);

/// What the environment asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    name: String,
    application: Option<String>,
    action: Action,
}

impl Wanted {
    fn parse(text: &str) -> Self {
        let (place, action) = match text.rsplit_once(':') {
            Some((place, "kill")) => (place, Action::Kill),
            Some((place, "hang")) => (place, Action::Hang),
            Some((place, "term")) => (place, Action::Signal(Signal::SIGTERM)),
            Some((place, "int")) => (place, Action::Signal(Signal::SIGINT)),
            Some((place, "slow")) => (place, Action::Slow),
            _ => (text, Action::Fail),
        };
        let (name, application) = match place.split_once('@') {
            Some((name, application)) => (name, Some(application.to_owned())),
            None => (place, None),
        };
        Self {
            name: name.to_owned(),
            application,
            action,
        }
    }
}

/// A fault point did what it was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Fault point {0:?} was hit; unset TRACKER_FAULT")]
pub struct FaultHit(pub Fault);

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Precopy => "precopy",
            Self::Lock => "lock",
            Self::Freeze => "freeze",
            Self::Threads => "threads",
            Self::Tasks => "tasks",
            Self::Silence => "silence",
            Self::Files => "files",
            Self::Memory => "memory",
            Self::PageWrite => "page-write",
            Self::Encode => "encode",
            Self::Commit => "commit",
            Self::Kill => "kill",
            Self::KexecLoad => "kexec-load",
            Self::BeforeKexec => "before-kexec",
            Self::Stage => "stage",
            Self::RestoreBirth => "restore-birth",
            Self::RestoreFiles => "restore-files",
            Self::RestoreMemory => "restore-memory",
            Self::RestoreRelease => "restore-release",
        }
    }

    /// Fails when the environment asks for it.
    ///
    /// # Errors
    /// [`FaultHit`].
    pub fn point(self) -> Result<(), FaultHit> {
        self.point_of("")
    }

    /// As [`Fault::point`], in the restore of this application.
    ///
    /// # Errors
    /// [`FaultHit`].
    pub fn point_of(self, application: &str) -> Result<(), FaultHit> {
        static WANTED: OnceLock<Option<Wanted>> = OnceLock::new();
        let read = || std::env::var("TRACKER_FAULT").ok();
        let Some(wanted) = WANTED.get_or_init(|| read().map(|text| Wanted::parse(&text))) else {
            return Ok(());
        };
        let other = wanted
            .application
            .as_deref()
            .is_some_and(|name| name != application);
        if wanted.name != self.name() || other {
            return Ok(());
        }
        match wanted.action {
            Action::Fail => {}
            Action::Signal(signal) => {
                // As from somebody else: to the process, not to this thread.
                let _ = kill(getpid(), signal);
                return Ok(());
            }
            Action::Slow => {
                std::thread::sleep(SLOW);
                return Ok(());
            }
            Action::Kill => {
                // Does not return.
                let _ = raise(Signal::SIGKILL);
            }
            Action::Hang => loop {
                std::thread::sleep(Duration::from_secs(3600));
            },
        }
        Err(FaultHit(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wanted_is_read() {
        let check = |text: &str, name: &str, application: Option<&str>, action| {
            let wanted = Wanted {
                name: name.to_owned(),
                application: application.map(str::to_owned),
                action,
            };
            assert_eq!(Wanted::parse(text), wanted, "{text}");
        };
        check("freeze", "freeze", None, Action::Fail);
        check("freeze:kill", "freeze", None, Action::Kill);
        check("stage:hang", "stage", None, Action::Hang);
        check("lock:term", "lock", None, Action::Signal(Signal::SIGTERM));
        check("lock:int", "lock", None, Action::Signal(Signal::SIGINT));
        check("lock:slow", "lock", None, Action::Slow);
        check(
            "restore-files@a:hang",
            "restore-files",
            Some("a"),
            Action::Hang,
        );
        check("restore-files@a", "restore-files", Some("a"), Action::Fail);
    }
}
