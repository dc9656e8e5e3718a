//! The namespaces of an application: those that all its processes share with each other and not
//! with the machine.

use super::eligibility::{Namespaces as Ours, blocker};
use super::error::CheckpointError;
use super::tmpfs;
use super::view::{OwnMounts, View};
use crate::bpf::events::ThreadRec;
use crate::bpf::iter::Tasks;
use crate::model::frozen::{Blocker, Mount, MountSource, Namespaces, PeerGroup, UtsNames};
use crate::sys::mount::attr;
use crate::sys::process::apart;
use nix::sched::{CloneFlags, setns};
use nix::sys::utsname::uname;
use procfs::process::{MountInfo, MountOptFields};
use serde_bytes::ByteBuf;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Living leaders, whose namespaces are those of all their threads.
pub(super) fn leaders(tasks: &Tasks) -> impl Iterator<Item = &ThreadRec> {
    let threads = tasks.threads.iter();
    threads.filter(|rec| rec.tid == rec.tgid && !rec.is_zombie())
}

/// Namespaces that not all processes are in: of those kinds that are carried when all are.
pub fn divided(tasks: &Tasks) -> Vec<Blocker> {
    type Of = fn(&ThreadRec) -> u32;
    let kinds: [(&str, Of); 2] = [("mount", |rec| rec.mnt_ns), ("UTS", |rec| rec.uts_ns)];
    let mut found = Vec::new();
    for (name, of) in kinds {
        let first = leaders(tasks).next().map(of);
        let other = leaders(tasks).find(|rec| Some(of(rec)) != first);
        found.extend(other.map(|rec| {
            let object = format!("{name} namespace");
            let reason = "it is not that of all processes of the application; such ones are not \
                          carried yet";
            blocker(rec.tgid, &object, reason)
        }));
    }
    found
}

/// What of the application's namespaces is not carried.
///
/// # Errors
/// One cannot be read.
pub fn blockers(tasks: &Tasks, ours: &Ours, view: &View) -> Result<Vec<Blocker>, CheckpointError> {
    match read(tasks, ours, view) {
        Err(CheckpointError::Blocked(found)) => Ok(found),
        other => other.map(|_| Vec::new()),
    }
}

/// Reads the namespaces that the application does not share with the machine.
///
/// # Errors
/// One cannot be read, or has something that is not carried.
pub fn read(tasks: &Tasks, ours: &Ours, view: &View) -> Result<Namespaces, CheckpointError> {
    let Some(leader) = leaders(tasks).next() else {
        return Ok(Namespaces::default());
    };
    let uts = match ours.has_uts_of(leader) {
        true => None,
        false => {
            let path = format!("/proc/{}/ns/uts", leader.tgid);
            Some(uts_names(&path).map_err(CheckpointError::io("enter", path))?)
        }
    };
    let mounts = view.own().map_or(Ok(Vec::new()), |own| {
        Table::read(own).map_err(|refused| {
            let (point, reason) = *refused;
            let object = format!("mount {point}");
            CheckpointError::Blocked(vec![blocker(leader.tgid, &object, &reason)])
        })
    })?;
    Ok(Namespaces { uts, mounts })
}

/// Mounts that show what is not there yet, as `is_there` tells of a place, the way from there and
/// a type.
///
/// # Errors
/// A namespace cannot be read.
pub fn too_early(
    tasks: &Tasks,
    ours: &Ours,
    is_there: impl Fn(&[u8], &[u8], &str) -> bool,
) -> Result<Vec<Blocker>, CheckpointError> {
    let namespaces = match read(tasks, ours, &View::of(tasks, ours)?) {
        // Not carried at all, which is told elsewhere.
        Err(CheckpointError::Blocked(_)) => return Ok(Vec::new()),
        read => read?,
    };
    let pid = leaders(tasks).next().map_or(0, |leader| leader.tgid);
    let found = namespaces.too_early(is_there).into_iter();
    let found = found
        .map(|mount| {
            let object = format!("mount {}", String::from_utf8_lossy(&mount.point));
            let reason = "what it shows is not there yet when an update restores, and would not \
                          follow later; unmount it, or let mounting propagate to what it is on \
                          (mount --make-rslave)";
            blocker(pid, &object, reason)
        })
        .collect();
    Ok(found)
}

fn uts_names(path: &str) -> io::Result<UtsNames> {
    let namespace = File::open(path)?;
    let look = || {
        setns(&namespace, CloneFlags::CLONE_NEWUTS)?;
        let names = uname()?;
        Ok(UtsNames {
            node: ByteBuf::from(names.nodename().as_bytes()),
            domain: ByteBuf::from(names.domainname().as_bytes()),
        })
    };
    apart(look)
}

/// A mount and why it is not carried.
type Refused = Box<(String, String)>;

/// The mounts of a namespace on their way into an image.
struct Table<'a> {
    own: &'a OwnMounts,
    /// Numbers in the list by id.
    numbers: HashMap<u64, u32>,
    /// Which of the list has the root of a filesystem that only this namespace has, by device.
    roots: HashMap<&'a str, u32>,
}

impl<'a> Table<'a> {
    fn read(own: &'a OwnMounts) -> Result<Vec<Mount>, Refused> {
        let order = order(&own.mounts);
        let mut table = Self {
            own,
            numbers: order.iter().copied().zip(0..).collect(),
            roots: HashMap::new(),
        };
        let mut found = Vec::new();
        for (id, number) in order.into_iter().zip(0..) {
            let mount = &own.mounts[&id];
            let one = table.mount(id, number, mount);
            found.push(one.map_err(|reason| {
                let point = mount.mount_point.display().to_string();
                Box::new((point, reason))
            })?);
        }
        if !found.iter().any(|mount| *mount.point == *b"/proc") {
            let reason = "the namespace has no /proc, which a restore needs";
            return Err(Box::new(("/proc".to_owned(), reason.to_owned())));
        }
        Ok(found)
    }

    fn mount(&mut self, id: u64, number: u32, mount: &'a MountInfo) -> Result<Mount, String> {
        let parent = u64::try_from(mount.pid).ok();
        let parent = parent.and_then(|parent| self.numbers.get(&parent).copied());
        if parent.is_none() && number > 0 {
            return Err("what it is mounted on is not in its namespace".into());
        }
        let source = self.source(id, number, mount)?;
        let (mut shared, mut master, mut unbindable) = (None, None, false);
        for field in &mount.opt_fields {
            match field {
                MountOptFields::Shared(group) => shared = Some(self.peers(*group, mount)?),
                MountOptFields::Master(group) => master = Some(self.peers(*group, mount)?),
                MountOptFields::Unbindable => unbindable = true,
                // Follows from the others.
                MountOptFields::PropagateFrom(_) => {}
            }
        }
        Ok(Mount {
            parent,
            point: bytes(&mount.mount_point),
            source,
            attributes: attributes(mount)?,
            shared,
            master,
            unbindable,
        })
    }

    fn source(
        &mut self,
        id: u64,
        number: u32,
        mount: &'a MountInfo,
    ) -> Result<MountSource, String> {
        if self.own.is_the_machines(mount) {
            let (at, way) = self.own.at_the_machines(mount).ok_or(
                "the machine has mounted its filesystem, but no name there leads to what it shows",
            )?;
            return Ok(MountSource::Machine {
                point: bytes(&at.mount_point),
                path: bytes(&way),
                kind: at.fs_type.clone(),
            });
        }
        if let Some(root) = self.roots.get(&*mount.majmin) {
            let path = Path::new(&mount.root).strip_prefix("/");
            return Ok(MountSource::Own {
                mount: *root,
                path: bytes(path.map_err(|_| "its root has no name")?),
            });
        }
        if mount.root != "/" {
            return Err("only a part of its filesystem is mounted".into());
        }
        let source = match &*mount.fs_type {
            "proc" => MountSource::Proc {
                options: options(mount),
            },
            "tmpfs" => {
                let tree = self.own.tmpfs.get(&id);
                let tree = tree.ok_or("other mounts hide what is in it")?;
                MountSource::Tmpfs {
                    options: options(mount),
                    name: mount.mount_source.clone().unwrap_or("none".into()),
                    read_only: mount.super_options.contains_key("ro"),
                    entries: tmpfs::read(tree)?,
                }
            }
            other => return Err(format!("a filesystem of type {other} that only it has")),
        };
        self.roots.insert(&mount.majmin, number);
        Ok(source)
    }

    /// Who a group is made of.
    fn peers(&self, group: u32, of: &MountInfo) -> Result<PeerGroup, String> {
        let is_in = |mount: &MountInfo| {
            let mut fields = mount.opt_fields.iter();
            fields.any(|field| matches!(field, MountOptFields::Shared(one) if *one == group))
        };
        let machines: Vec<_> = self.own.machine.values().filter(|one| is_in(one)).collect();
        if machines.is_empty() {
            if self.own.mounts.values().any(is_in) {
                return Ok(PeerGroup::Own(group));
            }
            return Err("mounting propagates to it from a namespace that is not carried".into());
        }
        // A group is joined through one that shows as much (do_set_group()).
        let root = Path::new(&of.root);
        let wider = machines.iter().filter(|one| root.starts_with(&one.root));
        let first = wider.min_by_key(|one| one.mount_point.components().count());
        let first = first.ok_or("what propagates to it shows less than it")?;
        Ok(PeerGroup::Machine(bytes(&first.mount_point)))
    }
}

fn bytes(path: &Path) -> ByteBuf {
    ByteBuf::from(path.as_os_str().as_bytes())
}

/// Parents before what is mounted on them; of what is mounted on the same one, the deeper first,
/// which what is above might hide.
fn order(mounts: &BTreeMap<u64, MountInfo>) -> Vec<u64> {
    let mut children: BTreeMap<Option<u64>, Vec<u64>> = BTreeMap::new();
    for (id, mount) in mounts {
        let parent = u64::try_from(mount.pid).ok();
        let parent = parent.filter(|parent| mounts.contains_key(parent) && parent != id);
        children.entry(parent).or_default().push(*id);
    }
    let mut order = Vec::new();
    let mut next = children.remove(&None).unwrap_or_default();
    while let Some(id) = next.pop() {
        order.push(id);
        let mut on_it = children.remove(&Some(id)).unwrap_or_default();
        // The last is the next.
        on_it.sort_by_key(|id| mounts[id].mount_point.components().count());
        next.extend(on_it);
    }
    order
}

/// `MOUNT_ATTR_*` by the names in mountinfo (show_mnt_opts()).
fn attributes(mount: &MountInfo) -> Result<u64, String> {
    let mut found = attr::STRICTATIME;
    for name in mount.mount_options.keys() {
        match &**name {
            "rw" => {}
            "ro" => found |= attr::RDONLY,
            "nosuid" => found |= attr::NOSUID,
            "nodev" => found |= attr::NODEV,
            "noexec" => found |= attr::NOEXEC,
            "nodiratime" => found |= attr::NODIRATIME,
            "nosymfollow" => found |= attr::NOSYMFOLLOW,
            "relatime" => found &= !attr::ATIME,
            "noatime" => found = found & !attr::ATIME | attr::NOATIME,
            other => return Err(format!("the mount option {other} is not carried")),
        }
    }
    Ok(found)
}

/// The options of a superblock that an instance of the same can be made with.
fn options(mount: &MountInfo) -> Vec<String> {
    let own = |name: &str| !["rw", "ro", "seclabel"].contains(&name);
    let all = mount.super_options.iter();
    let mut options: Vec<_> = all
        .filter(|(name, _)| own(name))
        .map(|(name, value)| match value {
            Some(value) => format!("{name}={value}"),
            None => name.clone(),
        })
        .collect();
    options.sort_unstable();
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(lines: &[&str]) -> BTreeMap<u64, MountInfo> {
        let mounts = lines.iter().map(|line| MountInfo::from_line(line).unwrap());
        mounts
            .map(|one| (u64::try_from(one.mnt_id).unwrap(), one))
            .collect()
    }

    #[test]
    fn what_others_might_hide_is_mounted_first() {
        let mounts = table(&[
            "30 29 8:1 / / rw,relatime - ext4 /dev/vda rw",
            "31 30 0:5 / /x rw - tmpfs none rw",
            "32 30 0:6 / /x/y rw - tmpfs none rw",
            "33 31 0:7 / /x/y rw - tmpfs none rw",
        ]);
        assert_eq!(order(&mounts), [30, 32, 31, 33]);
    }

    #[test]
    fn attributes_are_told_by_their_names() {
        let of = |options: &str| {
            let line = format!("30 29 8:1 / / {options} - ext4 /dev/vda rw");
            attributes(&MountInfo::from_line(&line).unwrap())
        };
        assert_eq!(of("rw,relatime"), Ok(0));
        assert_eq!(of("rw"), Ok(attr::STRICTATIME));
        let few = attr::RDONLY | attr::NOSUID | attr::NOATIME;
        assert_eq!(of("ro,nosuid,noatime"), Ok(few));
        assert!(of("rw,idmapped").is_err());
    }

    #[test]
    fn options_are_those_of_a_superblock() {
        let line = "30 29 0:5 / /dev ro,nosuid - tmpfs tmpfs rw,seclabel,size=4096k,mode=755";
        let mount = MountInfo::from_line(line).unwrap();
        assert_eq!(options(&mount), ["mode=755", "size=4096k"]);
    }
}
