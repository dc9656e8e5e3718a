//! What a process maps: opened by itself, before its address space is replaced, at descriptor
//! numbers that its supervisor can compute.

use super::RestoreError;
use super::namespaces::place;
use crate::model::frozen::{
    Application, Backing, Content, ContentId, ContentKind, FileIdentity, PathRef, Process, Through,
    Vma,
};
use crate::model::ids::{Fd, OfdId, Pid};
use crate::sys::pidfds::Pidfds;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::libc;
use nix::sys::stat::{FileStat, Mode, stat};
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Something a descriptor is needed for while memory is put back.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Source {
    /// Bytes held in memory, for reading or for writing too.
    Content(ContentId, bool),
    /// An io_uring instance.
    Ring(OfdId),
    /// The program file.
    Exe,
    /// A mapped file, for reading or for writing too.
    File(PathRef, bool),
}

/// The sources of one process and the numbers they get.
#[derive(Debug)]
pub struct Sources {
    base: i32,
    list: Vec<Source>,
    exe: Source,
}

/// The content that a program without a name is.
fn nameless_program(app: &Application, process: &Process) -> Option<ContentId> {
    let is_it = |content: &Content| match &content.kind {
        ContentKind::Deleted { at } => at.inode == process.exe.inode,
        _ => false,
    };
    let mut contents = app.contents.iter();
    contents.find_map(|(id, content)| is_it(content).then_some(*id))
}

/// The contents that are programs of the application: files that were replaced or removed.
#[must_use]
pub fn programs(app: &Application) -> BTreeSet<ContentId> {
    let processes = app.processes.iter().filter(|p| p.zombie.is_none());
    processes
        .filter_map(|process| nameless_program(app, process))
        .collect()
}

impl Sources {
    /// Reads off the image what `process` needs.
    #[must_use]
    pub fn of(app: &Application, process: &Process) -> Self {
        let table = app.files.get(&process.files);
        let highest = table.and_then(|t| t.fds.iter().map(|e| e.fd.0).max());
        // Those before it that have the same table have their numbers first.
        let before = app.processes.iter().take_while(|p| p.pid != process.pid);
        let sharers = before.filter(|p| p.zombie.is_none() && p.files == process.files);
        let taken: usize = sharers.map(|p| list(app, p).len()).sum();
        let taken = i32::try_from(taken).unwrap_or(i32::MAX);
        Self {
            base: highest.map_or(0, |fd| fd + 1).saturating_add(taken),
            list: list(app, process),
            exe: exe(app, process),
        }
    }

    fn number(&self, source: &Source) -> Option<i32> {
        let index = self.list.binary_search(source).ok()?;
        Some(self.base + i32::try_from(index).ok()?)
    }

    /// Descriptor of the program file.
    #[must_use]
    pub fn exe(&self) -> Option<i32> {
        self.number(&self.exe)
    }

    /// Descriptor to map `vma` from; `None` for anonymous memory.
    #[must_use]
    pub fn of_vma(&self, vma: &Vma) -> Option<i32> {
        self.number(&source(vma)?)
    }

    /// First and last number in use.
    #[must_use]
    pub fn range(&self) -> (i32, i32) {
        let len = i32::try_from(self.list.len()).unwrap_or(i32::MAX);
        (self.base, self.base.saturating_add(len - 1))
    }

    /// Opens what is reached through the restorer's own descriptors.
    /// To be called by the process itself, with the machine's root directory, as
    /// [`Self::open_named`].
    ///
    /// # Errors
    /// One cannot be opened, or its number is taken.
    pub fn open_shared(
        &self,
        restorer: Pid,
        content: impl Fn(ContentId) -> Option<i32>,
        description: impl Fn(OfdId) -> Option<i32>,
    ) -> Result<(), String> {
        for source in &self.list {
            let (fd, flags) = match source {
                // It cannot be opened again.
                Source::Ring(id) => {
                    let fd = description(*id).ok_or_else(|| missing(source))?;
                    // Nothing of it may stay, which could have the number of another source.
                    let fd = Pidfds::default().duplicate(restorer, Fd(fd));
                    let fd = fd.map_err(|error| error.to_string())?;
                    self.settle(source, fd)?;
                    continue;
                }
                Source::Content(id, true) => (content(*id), OFlag::O_RDWR),
                Source::Content(id, false) => (content(*id), OFlag::O_RDONLY),
                Source::Exe | Source::File(..) => continue,
            };
            let fd = fd.ok_or_else(|| missing(source))?;
            self.place(source, format!("/proc/{restorer}/fd/{fd}"), flags)?;
        }
        Ok(())
    }

    /// Opens what has a name.
    ///
    /// # Errors
    /// One cannot be opened, or its number is taken.
    pub fn open_named(&self, restorer: Pid, exe: &PathRef) -> Result<(), String> {
        for source in &self.list {
            let (at, flags) = match source {
                Source::Exe => (exe, OFlag::O_RDONLY),
                Source::File(at, true) => (at, OFlag::O_RDWR),
                Source::File(at, false) => (at, OFlag::O_RDONLY),
                _ => continue,
            };
            self.place(source, place(at, restorer), flags)?;
        }
        Ok(())
    }

    fn place(&self, source: &Source, path: impl AsRef<Path>, flags: OFlag) -> Result<(), String> {
        let path = path.as_ref();
        let flags = flags | OFlag::O_CLOEXEC | OFlag::O_NOCTTY | OFlag::O_LARGEFILE;
        let fd = open(path, flags, Mode::empty())
            .map_err(|errno| format!("open {}: {errno}", path.display()))?;
        self.settle(source, fd)
    }

    /// Gives a descriptor the number of a source.
    fn settle(&self, source: &Source, fd: OwnedFd) -> Result<(), String> {
        let wanted = self.number(source).unwrap_or(-1);
        if fd.as_raw_fd() == wanted {
            let _ = fd.into_raw_fd();
            return Ok(());
        }
        match fcntl(&fd, FcntlArg::F_DUPFD_CLOEXEC(wanted)) {
            Ok(got) if got == wanted => Ok(()),
            Ok(got) => Err(format!("descriptor {wanted} is taken, {got} is the next")),
            Err(errno) => Err(format!("fcntl(F_DUPFD) to {wanted}: {errno}")),
        }
    }
}

fn missing(source: &Source) -> String {
    format!("{source:?} is not in the image")
}

/// The program: nothing that is open for writing can be one.
fn exe(app: &Application, process: &Process) -> Source {
    let content = |id| Source::Content(id, false);
    nameless_program(app, process).map_or(Source::Exe, content)
}

fn list(app: &Application, process: &Process) -> Vec<Source> {
    let mut list = vec![exe(app, process)];
    let vmas = app.mms.get(&process.mm).map_or(&[][..], |mm| &mm.vmas);
    list.extend(vmas.iter().filter_map(source));
    list.sort_unstable();
    list.dedup();
    list
}

fn source(vma: &Vma) -> Option<Source> {
    match &vma.backing {
        Backing::File { file, writable, .. } => {
            Some(Source::File(file.at.clone(), *writable && vma.shared))
        }
        Backing::Content { id, .. } => Some(Source::Content(*id, vma.shared)),
        Backing::IoUring { ring, .. } => Some(Source::Ring(*ring)),
        Backing::Anonymous
        | Backing::AnonymousHuge { .. }
        | Backing::SysvShm { .. }
        | Backing::AioRing(_)
        | Backing::Vdso
        | Backing::Vvar => None,
    }
}

/// A path of the image.
#[must_use]
pub fn os_path(bytes: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(bytes))
}

/// Checks that the files and directories every process lives in are there and unchanged. To be
/// called in its mount namespace; `outside` is a process in the machine's.
///
/// # Errors
/// The first that is gone or differs.
pub fn check_files(app: &Application, outside: Pid) -> Result<(), RestoreError> {
    for process in app.processes.iter().filter(|p| p.zombie.is_none()) {
        let check = Check {
            pid: process.pid,
            outside,
        };
        if nameless_program(app, process).is_none() {
            check.inode(&process.exe)?;
        }
        check.inode(&process.cwd)?;
        let Some(mm) = app.mms.get(&process.mm) else {
            continue;
        };
        // The segments of a library follow one another.
        let mut last = None;
        for vma in &mm.vmas {
            if let Backing::File { file, .. } = &vma.backing
                && last.replace((file, vma.shared)) != Some((file, vma.shared))
            {
                check.unchanged(file, vma.shared)?;
            }
        }
    }
    Ok(())
}

struct Check {
    pid: Pid,
    outside: Pid,
}

impl Check {
    fn inode(&self, file: &PathRef) -> Result<FileStat, RestoreError> {
        let path = os_path(&file.path).to_owned();
        let pid = self.pid;
        let numbered = file.inode.ino != 0 && file.through != Through::Remade;
        match stat(&place(file, self.outside)) {
            Err(errno) => Err(RestoreError::FileGone { pid, path, errno }),
            // The device number is the next kernel's choice, the inode number is on the disk.
            Ok(found) if numbered && found.st_ino != file.inode.ino => {
                Err(RestoreError::FileChanged {
                    pid,
                    path,
                    what: "inode",
                })
            }
            Ok(found) => Ok(found),
        }
    }

    fn unchanged(&self, file: &FileIdentity, shared: bool) -> Result<(), RestoreError> {
        let found = self.inode(&file.at)?;
        // Character devices have no content; a shared mapping shows what the file has now.
        if shared || found.st_mode & libc::S_IFMT != libc::S_IFREG {
            return Ok(());
        }
        let mtime = found.st_mtime * 1_000_000_000 + found.st_mtime_nsec;
        let what = if u64::try_from(found.st_size) != Ok(file.size) {
            "size"
        } else if mtime != file.mtime {
            "modification time"
        } else {
            return Ok(());
        };
        Err(RestoreError::FileChanged {
            pid: self.pid,
            path: os_path(&file.at.path).to_owned(),
            what,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::{FilesId, InodeId, MmId};

    fn file_vma(path: &Path, size: u64, mtime: i64, ino: u64) -> Vma {
        Vma {
            start: 0x1000,
            end: 0x2000,
            prot: 1,
            backing: Backing::File {
                file: FileIdentity {
                    at: PathRef {
                        path: path.as_os_str().as_bytes().to_vec(),
                        inode: InodeId { dev: 0, ino },
                        ..PathRef::default()
                    },
                    size,
                    mtime,
                },
                offset: 0,
                writable: false,
            },
            ..Vma::default()
        }
    }

    fn app(vma: Vma) -> Application {
        let mut app = Application::default();
        let root = PathRef {
            path: b"/".to_vec(),
            ..PathRef::default()
        };
        let mm = crate::model::frozen::Mm {
            vmas: vec![vma],
            ..Default::default()
        };
        app.mms.insert(MmId(1), mm);
        app.processes.push(Process {
            pid: Pid(9),
            mm: MmId(1),
            files: FilesId(1),
            exe: root.clone(),
            cwd: root.clone(),
            root,
            ..Process::default()
        });
        app
    }

    #[test]
    fn a_changed_file_is_told_apart_from_a_missing_one() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lib.so");
        std::fs::write(&path, b"code").unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        let mtime = meta.mtime() * 1_000_000_000 + meta.mtime_nsec();
        let run = |path: &Path, size, mtime, ino| {
            check_files(&app(file_vma(path, size, mtime, ino)), Pid(1))
        };
        run(&path, 4, mtime, meta.ino()).unwrap();
        let what = |result| match result {
            Err(RestoreError::FileChanged { what, .. }) => what,
            other => panic!("{other:?}"),
        };
        assert_eq!(what(run(&path, 5, mtime, meta.ino())), "size");
        assert_eq!(
            what(run(&path, 4, mtime + 1, meta.ino())),
            "modification time"
        );
        assert_eq!(what(run(&path, 4, mtime, meta.ino() + 1)), "inode");
        let gone = run(&dir.path().join("other"), 4, mtime, meta.ino());
        assert!(matches!(gone, Err(RestoreError::FileGone { .. })));
    }

    #[test]
    fn those_who_share_a_table_get_numbers_apart() {
        let mut app = app(file_vma(Path::new("/lib/a"), 1, 1, 1));
        let sharer = Process {
            pid: Pid(10),
            ..app.processes[0].clone()
        };
        app.processes.push(sharer);
        let ranges = [0, 1].map(|at| Sources::of(&app, &app.processes[at]).range());
        assert_eq!(ranges, [(0, 1), (2, 3)]);
    }

    #[test]
    fn one_file_gets_one_number() {
        let mut app = app(file_vma(Path::new("/lib/a"), 1, 1, 1));
        let vmas = &mut app.mms.get_mut(&MmId(1)).unwrap().vmas;
        vmas.push(vmas[0].clone());
        let sources = Sources::of(&app, &app.processes[0]);
        assert_eq!(sources.range(), (0, 1));
        let vma = &app.mms[&MmId(1)].vmas[1];
        assert!(
            sources
                .of_vma(vma)
                .is_some_and(|fd| Some(fd) != sources.exe())
        );
    }
}
