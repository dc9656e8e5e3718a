//! Where the names of an application lead, which may live in a mount namespace of its own.

use super::eligibility::Namespaces;
use super::error::CheckpointError;
use super::namespaces::leaders;
use crate::bpf::iter::{Tasks, user_dev};
use crate::model::frozen::Through;
use crate::model::ids::InodeId;
use crate::sys::mount::{mount_id, mounts};
use crate::sys::process::apart;
use nix::sched::{CloneFlags, setns, unshare};
use procfs::process::{MountInfo, MountOptFields};
use rustix::fs::{CWD, Mode, OFlags, open, openat};
use rustix::mount::{OpenTreeFlags, open_tree};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where names lead.
#[derive(Debug, Default)]
pub struct View {
    own: Option<OwnMounts>,
}

/// A mount namespace that is not the machine's, or not the one that tracker is in.
#[derive(Debug)]
pub(super) struct OwnMounts {
    root: OwnedFd,
    /// Its mounts and the machine's, by their ids, which are unique among all namespaces.
    pub mounts: BTreeMap<u64, MountInfo>,
    pub machine: BTreeMap<u64, MountInfo>,
    /// Those of tmpfs instances that the machine has not mounted, without what is mounted on
    /// them.
    pub tmpfs: BTreeMap<u64, OwnedFd>,
}

/// Where a name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// What it is called here.
    pub path: PathBuf,
    /// As images say it.
    pub through: Through,
}

impl View {
    /// Where the names of these processes lead, which are all in one mount namespace.
    ///
    /// # Errors
    /// They are in another than this process, and it cannot be entered or read.
    pub(super) fn of(tasks: &Tasks, ours: &Namespaces) -> Result<Self, CheckpointError> {
        let mut failure = None;
        // Those that end meanwhile leave no namespace behind.
        for rec in leaders(tasks) {
            if ours.has_mounts_of(rec) {
                return Ok(Self::default());
            }
            match OwnMounts::of(rec.tgid) {
                Ok(own) => return Ok(Self { own: Some(own) }),
                Err(error) => failure = failure.or(Some((rec.tgid, error))),
            }
        }
        failure.map_or(Ok(Self::default()), |(pid, error)| {
            let path = format!("/proc/{pid}/ns/mnt");
            Err(CheckpointError::io("enter", path)(error))
        })
    }

    /// The mount namespace, unless it is the one that tracker is in.
    pub(super) fn own(&self) -> Option<&OwnMounts> {
        self.own.as_ref()
    }

    /// What a name of the application's is called here.
    #[must_use]
    pub fn here(&self, path: &Path) -> PathBuf {
        let own = self.own.as_ref();
        own.map_or_else(|| path.to_owned(), |own| own.path(path))
    }

    /// Where a mount is that the application sees, by its id and its device as mountinfo says it; of
    /// several the one that shows most of its filesystem.
    ///
    /// # Errors
    /// The mounts cannot be read.
    pub fn mount_point(&self, wanted: impl Fn(u64, &str) -> bool) -> io::Result<Option<PathBuf>> {
        let machine;
        let all = match &self.own {
            Some(own) => &own.mounts,
            None => {
                machine = mounts(File::open("/proc/self/mountinfo")?)?;
                &machine
            }
        };
        let found = all
            .iter()
            .filter(|(id, mount)| wanted(**id, &mount.majmin))
            .map(|(id, mount)| (*id, mount))
            .filter(|(id, mount)| mount_id(&self.here(&mount.mount_point)) == Some(*id));
        let widest = found.min_by_key(|(_, mount)| mount.root.len());
        Ok(widest.map(|(_, mount)| mount.mount_point.clone()))
    }

    /// Whether a name leads to an inode in the application's mount namespace; where that is the one
    /// that tracker is in nobody looks.
    #[must_use]
    pub fn leads_to(&self, path: &[u8], inode: InodeId) -> bool {
        let Some(own) = &self.own else {
            return true;
        };
        let found = fs::metadata(own.path(Path::new(OsStr::from_bytes(path))));
        found.is_ok_and(|found| (found.dev(), found.ino()) == (user_dev(inode.dev), inode.ino))
    }

    /// Where `path` leads, which is what a link of procfs is read as; nothing if the link leads
    /// through a mount that is neither of the application's namespace nor of the machine's.
    #[must_use]
    pub fn find(&self, link: &Path, path: &Path) -> Option<Place> {
        let Some(own) = &self.own else {
            return Some(Place {
                path: path.to_owned(),
                through: Through::Own,
            });
        };
        let id = mount_id(link)?;
        if let Some(mount) = own.mounts.get(&id) {
            let remade = !own.is_the_machines(mount);
            return Some(Place {
                path: own.path(path),
                through: if remade {
                    Through::Remade
                } else {
                    Through::Own
                },
            });
        }
        own.machine.contains_key(&id).then(|| Place {
            path: path.to_owned(),
            through: Through::Machine,
        })
    }
}

impl OwnMounts {
    /// Reads those of a process's mount namespace.
    fn of(pid: u32) -> io::Result<Self> {
        let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let proc = open("/proc", flags, Mode::empty())?;
        let machine = mounts(File::open("/proc/self/mountinfo")?)?;
        let look = || {
            unshare(CloneFlags::CLONE_FS)?;
            setns(&namespace, CloneFlags::CLONE_NEWNS)?;
            let file = openat(
                &proc,
                "thread-self/mountinfo",
                OFlags::RDONLY,
                Mode::empty(),
            )?;
            let mut own = Self {
                root: open("/", flags, Mode::empty())?,
                mounts: mounts(File::from(file))?,
                machine,
                tmpfs: BTreeMap::new(),
            };
            for (id, mount) in &own.mounts {
                let alone = mount.fs_type == "tmpfs" && !own.is_the_machines(mount);
                if alone && mount_id(&mount.mount_point) == Some(*id) {
                    own.tmpfs
                        .extend(own.alone(*id, mount)?.map(|tree| (*id, tree)));
                }
            }
            Ok(own)
        };
        apart(look)
    }

    /// The root of a mount of the namespace that this thread is in, without what is mounted on it;
    /// nothing if that cannot be had.
    fn alone(&self, id: u64, mount: &MountInfo) -> io::Result<Option<OwnedFd>> {
        if !is_unbindable(mount) {
            let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            return Ok(Some(open_tree(CWD, &mount.mount_point, flags)?));
        }
        let mut others = self.mounts.values();
        if others.any(|other| u64::try_from(other.pid) == Ok(id)) {
            return Ok(None);
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Some(open(&mount.mount_point, flags, Mode::empty())?))
    }

    /// What a name in this namespace is called here.
    pub fn path(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd()));
        root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Whether the machine has mounted the filesystem, too.
    pub fn is_the_machines(&self, mount: &MountInfo) -> bool {
        self.machine.values().any(|one| one.majmin == mount.majmin)
    }

    /// The machine's name of what a mount shows: where a mount of it is, and the way from there.
    pub fn at_the_machines(&self, mount: &MountInfo) -> Option<(&MountInfo, PathBuf)> {
        let same = |one: &&MountInfo| one.majmin == mount.majmin && !is_unbindable(one);
        let shown = self.machine.iter().filter(|(_, one)| same(one));
        let mut found: Vec<_> = shown
            .filter_map(|(id, one)| {
                let way = Path::new(&mount.root).strip_prefix(&one.root).ok()?;
                let leads = mount_id(&one.mount_point.join(way)) == Some(*id);
                leads.then(|| (one, way.to_owned()))
            })
            .collect();
        // Another kernel has mounted early what all have.
        found.sort_by_key(|(one, way)| {
            let elsewhere = !way.as_os_str().is_empty() || one.mount_point != mount.mount_point;
            (elsewhere, one.mount_point.components().count())
        });
        found.into_iter().next()
    }
}

/// A restore could not clone it.
fn is_unbindable(mount: &MountInfo) -> bool {
    let mut fields = mount.opt_fields.iter();
    fields.any(|field| matches!(field, MountOptFields::Unbindable))
}
