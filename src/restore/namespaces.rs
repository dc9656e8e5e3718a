//! The namespaces that an application has for itself, made again around its processes.
//!
//! The restorer makes the mount namespace and leaves it again: it works in the machine's, enters
//! the other one for what is done by name, and has its children born there. Mounts are put
//! together while nothing propagates; the groups they were in follow at the end.

use super::RestoreError;
use super::sources::os_path;
use super::tmpfs;
use crate::model::frozen::{
    Application, Arrival, Mount, MountSource, Namespaces, PathRef, PeerGroup, Through, UtsNames,
};
use crate::model::ids::Pid;
use crate::sys::mount::{
    self as sys, Propagation, mount_id, set_attributes, set_domain_name, set_propagation,
};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{chdir, fchdir, pivot_root, sethostname};
use procfs::process::{MountInfo, MountOptFields};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, open, statx};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, FsPickFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags,
    fsconfig_create, fsconfig_reconfigure, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
    fspick, move_mount, open_tree,
};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

type Result<T> = std::result::Result<T, RestoreError>;

/// Where a name of the image leads for who is in the application's mount namespace, or would be if
/// it had one; `outside` is a process in the machine's.
#[must_use]
pub fn place(at: &PathRef, outside: Pid) -> PathBuf {
    let path = os_path(&at.path);
    match at.through {
        Through::Own | Through::Remade => path.to_owned(),
        Through::Machine => {
            let root = PathBuf::from(format!("/proc/{outside}/root"));
            root.join(path.strip_prefix("/").unwrap_or(path))
        }
    }
}

/// The mount namespaces of an application and of the machine, which are often the same.
#[derive(Debug)]
pub struct Entrance {
    /// The application's and the machine's, if they are two.
    both: Option<(OwnedFd, OwnedFd)>,
}

impl Entrance {
    /// Makes the namespaces of an application for this process: the UTS namespace at once, the
    /// mount namespace to be entered. `early`: nothing of the machine has been set up by its init.
    ///
    /// # Errors
    /// What the mounts show is not there any more, or the kernel refuses.
    pub fn make(app: &Application, early: bool) -> Result<Self> {
        let namespaces = &app.header.namespaces;
        if let Some(names) = &namespaces.uts {
            name(names)?;
        }
        if namespaces.mounts.is_empty() {
            return Ok(Self { both: None });
        }
        let own = || open_namespace().map_err(RestoreError::io("open /proc/self/ns/mnt"));
        let machine = own()?;
        let tree = Tree::open(namespaces, early)?;
        unshare(CloneFlags::CLONE_NEWNS).map_err(RestoreError::system("unshare(CLONE_NEWNS)"))?;
        tree.build()?;
        let both = Some((own()?, machine));
        let entrance = Self { both };
        entrance.leave()?;
        Ok(entrance)
    }

    /// Runs `act` in the application's mount namespace.
    ///
    /// # Errors
    /// Those of `act`, or the kernel refuses to enter.
    pub fn inside<T>(&self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        let Some((own, _)) = &self.both else {
            return act();
        };
        enter(own.as_fd())?;
        let done = act();
        self.leave()?;
        done
    }

    fn leave(&self) -> Result<()> {
        self.both
            .as_ref()
            .map_or(Ok(()), |(_, machine)| enter(machine.as_fd()))
    }
}

fn open_namespace() -> io::Result<OwnedFd> {
    File::open("/proc/self/ns/mnt").map(OwnedFd::from)
}

fn enter(namespace: BorrowedFd<'_>) -> Result<()> {
    setns(namespace, CloneFlags::CLONE_NEWNS).map_err(RestoreError::system("setns(CLONE_NEWNS)"))
}

fn name(names: &UtsNames) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWUTS).map_err(RestoreError::system("unshare(CLONE_NEWUTS)"))?;
    sethostname(OsStr::from_bytes(&names.node)).map_err(RestoreError::system("sethostname"))?;
    set_domain_name(&names.domain).map_err(RestoreError::system("setdomainname"))
}

/// Both libraries' errors.
fn refused<E: Into<io::Error>>(
    mount: &Mount,
    call: &'static str,
) -> impl FnOnce(E) -> RestoreError {
    let point = os_path(&mount.point).to_owned();
    move |error| {
        let number = error.into().raw_os_error();
        RestoreError::Mount {
            point,
            call,
            errno: Errno::from_raw(number.unwrap_or(nix::libc::EIO)),
        }
    }
}

fn unmounted(mount: &Mount, at: &[u8]) -> RestoreError {
    RestoreError::NotMounted {
        point: os_path(&mount.point).to_owned(),
        at: os_path(at).to_owned(),
    }
}

/// The mounts of an application on their way into a namespace.
struct Tree<'a> {
    mounts: &'a [Mount],
    /// What they show, by number, but for parts of others; nothing else is mounted on it.
    shown: BTreeMap<usize, OwnedFd>,
    /// Those left out, since they come from the machine as soon as it has them.
    awaited: Vec<bool>,
    /// The machine's mounts whose groups are joined, by where they are.
    peers: BTreeMap<&'a [u8], OwnedFd>,
}

impl<'a> Tree<'a> {
    /// Finds in the machine's namespace what the mounts show, or makes it.
    fn open(namespaces: &'a Namespaces, early: bool) -> Result<Self> {
        let machine = File::open("/proc/self/mountinfo").and_then(sys::mounts);
        let machine = machine.map_err(RestoreError::io("read /proc/self/mountinfo"))?;
        let there = |point: &[u8], kind: &str| {
            let found = on_top(&machine, point);
            found.filter(|(_, found)| found.fs_type == kind)
        };
        let arrivals = namespaces.arrivals(|point, _, kind| there(point, kind).is_some());
        let mounts = &namespaces.mounts;
        let mut tree = Self {
            mounts,
            shown: BTreeMap::new(),
            awaited: Vec::with_capacity(mounts.len()),
            peers: BTreeMap::new(),
        };
        for (number, (mount, arrival)) in mounts.iter().zip(arrivals).enumerate() {
            let parent = mount.parent.map(|parent| parent as usize);
            if parent.is_some_and(|parent| parent >= number) || parent.is_none() != (number == 0) {
                return Err(RestoreError::NoMounts);
            }
            tree.awaited.push(arrival == Arrival::Later);
            if arrival == Arrival::Later {
                continue;
            }
            match &mount.source {
                MountSource::Machine { point, .. } if arrival == Arrival::Never => {
                    return Err(unmounted(mount, point));
                }
                MountSource::Machine { point, path, kind } => {
                    let tree_of = if let Some((id, _)) = there(point, kind) {
                        let from = os_path(point).join(os_path(path));
                        if mount_id(&from).is_some_and(|through| through != id) {
                            // Something else is mounted on the way.
                            return Err(unmounted(mount, point));
                        }
                        open_tree(CWD, &from, CLONE).map_err(refused(mount, "open_tree"))?
                    } else {
                        instance(mount, kind, "none", &[])?
                    };
                    tree.shown.insert(number, tree_of);
                }
                MountSource::Proc { options } => {
                    let made = instance(mount, "proc", "proc", options)?;
                    tree.shown.insert(number, made);
                }
                MountSource::Tmpfs {
                    options,
                    name,
                    read_only,
                    entries,
                } => {
                    let made = instance(mount, "tmpfs", name, options)?;
                    tmpfs::fill(&made, entries).map_err(|error| RestoreError::Tmpfs {
                        point: os_path(&mount.point).to_owned(),
                        error,
                    })?;
                    if *read_only {
                        make_read_only(&made).map_err(refused(mount, "fsconfig"))?;
                    }
                    tree.shown.insert(number, made);
                }
                MountSource::Own { .. } => {}
            }
            for group in [&mount.shared, &mount.master].into_iter().flatten() {
                if let PeerGroup::Machine(point) = group {
                    let found = on_top(&machine, point);
                    let (_, found) = found.ok_or_else(|| unmounted(mount, point))?;
                    let peer = open(
                        os_path(point),
                        OFlags::PATH | OFlags::CLOEXEC,
                        Mode::empty(),
                    );
                    let peer = peer.map_err(refused(mount, "open"))?;
                    if !is_shared(found) {
                        if !early {
                            return Err(RestoreError::NotShared(os_path(point).to_owned()));
                        }
                        // As init will do: it makes all shared that there is.
                        set_propagation(peer.as_fd(), Propagation::Shared)
                            .map_err(refused(mount, "mount_setattr"))?;
                    }
                    tree.peers.insert(point, peer);
                }
            }
        }
        Ok(tree)
    }

    /// Replaces all mounts of this process's namespace.
    fn build(mut self) -> Result<()> {
        let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        let nothing = None::<&str>;
        mount(nothing, "/", nothing, all, nothing).map_err(RestoreError::system("mount /"))?;
        let mut made: BTreeMap<usize, OwnedFd> = BTreeMap::new();
        for (number, mount) in self.mounts.iter().enumerate() {
            if self.awaited[number] {
                continue;
            }
            let tree = match &mount.source {
                MountSource::Own { mount: whole, path } => {
                    let whole = made.get(&(*whole as usize));
                    whole.map(|whole| part(mount, whole, path)).transpose()?
                }
                _ => self.shown.remove(&number),
            };
            let tree = tree.ok_or(RestoreError::NoMounts)?;
            set_propagation(tree.as_fd(), Propagation::Private)
                .and_then(|()| set_attributes(tree.as_fd(), mount.attributes))
                .map_err(refused(mount, "mount_setattr"))?;
            let parent = mount.parent.map(|parent| parent as usize);
            let on = parent.and_then(|parent| Some((&self.mounts[parent], made.get(&parent)?)));
            attach(mount, &tree, on)?;
            made.insert(number, tree);
        }
        let root = made.get(&0).ok_or(RestoreError::NoMounts)?;
        // Stacked upon each other, the old one above (pivot_root(2)).
        fchdir(root)
            .and_then(|()| pivot_root(".", "."))
            .and_then(|()| umount2(".", MntFlags::MNT_DETACH))
            .and_then(|()| chdir("/"))
            .map_err(RestoreError::system("pivot_root"))?;
        self.propagate(&made)
    }

    /// Puts the mounts into the groups they were in.
    fn propagate(&self, made: &BTreeMap<usize, OwnedFd>) -> Result<()> {
        let mut left: Vec<_> = made
            .iter()
            .map(|(at, tree)| (&self.mounts[*at], tree))
            .collect();
        // A group is joined through a mount that shows as much (do_set_group()).
        left.sort_by_key(|(mount, _)| way(mount).len());
        let mut leaders = BTreeMap::new();
        while !left.is_empty() {
            let before = left.len();
            let mut later = Vec::new();
            for (mount, tree) in left {
                if !self.enter_groups(mount, tree, &mut leaders)? {
                    later.push((mount, tree));
                }
            }
            if later.len() == before {
                return Err(RestoreError::NoMounts);
            }
            left = later;
        }
        Ok(())
    }

    /// Puts a mount into its groups, of which `leaders` are one each; false while the one that it is
    /// a slave of has none.
    fn enter_groups<'b>(
        &self,
        mount: &Mount,
        tree: &'b OwnedFd,
        leaders: &mut BTreeMap<u32, &'b OwnedFd>,
    ) -> Result<bool> {
        let change =
            |to| set_propagation(tree.as_fd(), to).map_err(refused(mount, "mount_setattr"));
        // What a peer is a slave of comes with it.
        let peer = match &mount.shared {
            Some(PeerGroup::Machine(point)) => Some(self.peer(point)?),
            Some(PeerGroup::Own(group)) => leaders.get(group).copied(),
            None => None,
        };
        if let Some(peer) = peer {
            return join(mount, peer, tree).map(|()| true);
        }
        let master = match &mount.master {
            Some(PeerGroup::Machine(point)) => Some(self.peer(point)?),
            Some(PeerGroup::Own(group)) => match leaders.get(group) {
                None => return Ok(false),
                leader => leader.copied(),
            },
            None => None,
        };
        if let Some(master) = master {
            join(mount, master, tree)?;
            change(Propagation::Slave)?;
        }
        if let Some(PeerGroup::Own(group)) = &mount.shared {
            change(Propagation::Shared)?;
            leaders.insert(*group, tree);
        } else if mount.unbindable {
            change(Propagation::Unbindable)?;
        }
        Ok(true)
    }

    fn peer(&self, point: &[u8]) -> Result<&OwnedFd> {
        self.peers.get(point).ok_or(RestoreError::NoMounts)
    }
}

/// The way to what a mount shows, from the root of a filesystem.
fn way(mount: &Mount) -> &[u8] {
    match &mount.source {
        MountSource::Machine { path, .. } | MountSource::Own { path, .. } => path,
        MountSource::Proc { .. } | MountSource::Tmpfs { .. } => &[],
    }
}

/// Has a mount join the group of another.
fn join(mount: &Mount, peer: &OwnedFd, tree: &OwnedFd) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_SET_GROUP
        | MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH
        | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(peer, "", tree, "", flags).map_err(refused(mount, "move_mount(SET_GROUP)"))
}

/// The mount whose root a name leads to: the last of those in one place.
fn on_top<'a>(machine: &'a BTreeMap<u64, MountInfo>, point: &[u8]) -> Option<(u64, &'a MountInfo)> {
    let point = os_path(point);
    let id = mount_id(point)?;
    let found = machine.get(&id)?;
    (found.mount_point == point).then_some((id, found))
}

fn is_shared(mount: &MountInfo) -> bool {
    let mut fields = mount.opt_fields.iter();
    fields.any(|field| matches!(field, MountOptFields::Shared(_)))
}

const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);

/// A part of a filesystem that is mounted already.
fn part(mount: &Mount, whole: &OwnedFd, path: &[u8]) -> Result<OwnedFd> {
    let id = |path: &Path| {
        let found = statx(whole, path, AtFlags::EMPTY_PATH, StatxFlags::MNT_ID);
        found.map(|found| found.stx_mnt_id)
    };
    let path = os_path(path);
    let way = id(path).map_err(refused(mount, "statx"))?;
    if id(Path::new("")) != Ok(way) {
        // Something that was not in its way is mounted there already.
        return Err(unmounted(mount, path.as_os_str().as_bytes()));
    }
    let flags = CLONE | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(whole, path, flags).map_err(refused(mount, "open_tree"))
}

/// A new instance of a filesystem.
fn instance(mount: &Mount, kind: &str, name: &str, options: &[String]) -> Result<OwnedFd> {
    let make = || {
        let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(context.as_fd(), "source", name)?;
        for option in options {
            match option.split_once('=') {
                Some((key, value)) => fsconfig_set_string(context.as_fd(), key, value)?,
                None => fsconfig_set_flag(context.as_fd(), option.as_str())?,
            }
        }
        fsconfig_create(context.as_fd())?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        fsmount(context.as_fd(), flags, MountAttrFlags::empty())
    };
    make().map_err(refused(mount, "fsopen, fsconfig or fsmount"))
}

fn make_read_only(tree: &OwnedFd) -> rustix::io::Result<()> {
    let flags = FsPickFlags::FSPICK_CLOEXEC | FsPickFlags::FSPICK_EMPTY_PATH;
    let context = fspick(tree, "", flags)?;
    fsconfig_set_flag(context.as_fd(), "ro")?;
    fsconfig_reconfigure(context.as_fd())
}

/// Mounts a tree where it was; the root over something that is there everywhere.
fn attach(mount: &Mount, tree: &OwnedFd, on: Option<(&Mount, &OwnedFd)>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let moved = match on {
        None => move_mount(tree, "", CWD, "/proc", flags),
        Some((parent, below)) => {
            let way = os_path(&mount.point).strip_prefix(os_path(&parent.point));
            let way = way.map_err(|_| RestoreError::NoMounts)?;
            let flags = flags | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
            move_mount(tree, "", below, way, flags)
        }
    };
    moved.map_err(refused(mount, "move_mount"))
}
