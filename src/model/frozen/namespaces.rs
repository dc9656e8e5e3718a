use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// Filesystems of which there is one: mounted again they show the same.
const ONLY_ONES: [&str; 9] = [
    "binfmt_misc",
    "configfs",
    "debugfs",
    "efivarfs",
    "fusectl",
    "pstore",
    "securityfs",
    "sysfs",
    "tracefs",
];

/// What an application does not share with the machine (namespaces(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Its UTS namespace.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uts: Option<UtsNames>,
    /// The mounts of its mount namespace, the root first and all before what is mounted on them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<Mount>,
}

impl Namespaces {
    /// Whether it shares all that is looked at here with the machine.
    #[must_use]
    pub fn are_the_machines(&self) -> bool {
        self.uts.is_none() && self.mounts.is_empty()
    }

    /// When each mount can be made again on a machine that has mounted only what `is_there` says, by
    /// place, way and type. What comes by itself is left to come, whatever could be made.
    pub fn arrivals(&self, is_there: impl Fn(&[u8], &[u8], &str) -> bool) -> Vec<Arrival> {
        let mut arrivals: Vec<Arrival> = Vec::with_capacity(self.mounts.len());
        for mount in &self.mounts {
            let parent = mount.parent.map(|parent| parent as usize);
            let waits = parent.and_then(|parent| arrivals.get(parent)) == Some(&Arrival::Later);
            let follows = parent.and_then(|parent| self.mounts.get(parent));
            let follows = follows.is_some_and(Mount::follows_the_machine);
            arrivals.push(match &mount.source {
                _ if waits => Arrival::Later,
                MountSource::Machine { point, path, kind } if !is_there(point, path, kind) => {
                    if follows {
                        Arrival::Later
                    } else if path.is_empty() && ONLY_ONES.contains(&kind.as_str()) {
                        Arrival::Now
                    } else {
                        Arrival::Never
                    }
                }
                _ => Arrival::Now,
            });
        }
        arrivals
    }

    /// The mounts that cannot be made again there and do not come by themselves, either.
    pub fn too_early(&self, is_there: impl Fn(&[u8], &[u8], &str) -> bool) -> Vec<&Mount> {
        let arrivals = self.arrivals(is_there);
        let mounts = self.mounts.iter().zip(arrivals);
        let never = mounts.filter(|(_, arrival)| *arrival == Arrival::Never);
        never.map(|(mount, _)| mount).collect()
    }
}

/// When a mount can be made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// What it shows is there, or is made anew.
    Now,
    /// It comes by itself, with what it is on, once the machine has mounted it.
    Later,
    /// Neither.
    Never,
}

/// The names of a UTS namespace (uts_namespaces(7)).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UtsNames {
    /// sethostname(2).
    pub node: ByteBuf,
    /// setdomainname(2).
    pub domain: ByteBuf,
}

/// A mount, as /proc/PID/mountinfo shows it (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Which of the list it is mounted on; none for the root.
    pub parent: Option<u32>,
    /// Where, from the root of the namespace.
    pub point: ByteBuf,
    /// What is mounted there.
    pub source: MountSource,
    /// `MOUNT_ATTR_*` of mount_setattr(2).
    pub attributes: u64,
    /// The group whose mounts get what is mounted here, and the other way round.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared: Option<PeerGroup>,
    /// The group from which it gets what is mounted there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master: Option<PeerGroup>,
    /// It cannot be the source of another mount.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unbindable: bool,
}

impl Mount {
    /// Whether what the machine mounts on its own mount of the same comes here by itself.
    #[must_use]
    pub fn follows_the_machine(&self) -> bool {
        let groups = [&self.shared, &self.master];
        let mut groups = groups.into_iter().flatten();
        groups.any(|group| matches!(group, PeerGroup::Machine(_)))
    }
}

/// Mounts among which mounting propagates (mount_namespaces(7)).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum PeerGroup {
    /// That of the machine's mount at this place.
    Machine(ByteBuf),
    /// One that the machine has no part in, by its number then.
    Own(u32),
}

/// Where the content of a mount comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountSource {
    /// A file or directory of a filesystem that the machine has mounted, too.
    Machine {
        /// Where.
        point: ByteBuf,
        /// The way from the root of that mount, without a leading slash; empty for the root.
        path: ByteBuf,
        /// Type of the filesystem.
        kind: String,
    },
    /// The same of a filesystem that only this namespace has.
    Own {
        /// Which of the list has its root.
        mount: u32,
        /// As above.
        path: ByteBuf,
    },
    /// An instance of procfs with options of its own.
    Proc {
        /// As its superblock shows them.
        options: Vec<String>,
    },
    /// A tmpfs that only this namespace has.
    Tmpfs {
        /// As its superblock shows them.
        options: Vec<String>,
        /// The device that was named when it was mounted.
        name: String,
        /// Nobody may write to it, by no mount of it.
        read_only: bool,
        /// All it has, directories before what is in them, its root first.
        entries: Vec<TmpfsEntry>,
    },
}

/// A name in a tmpfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TmpfsEntry {
    /// From its root, without a leading slash.
    pub path: ByteBuf,
    /// What it is.
    pub node: TmpfsNode,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Owner.
    pub gid: u32,
    /// Time of the last change, since 1970.
    pub mtime: i64,
}

/// What is in a tmpfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TmpfsNode {
    /// A directory.
    Directory,
    /// A regular file with this content.
    File(ByteBuf),
    /// Another name of the entry with this path.
    Link(ByteBuf),
    /// A symbolic link.
    Symlink(ByteBuf),
    /// A device, a FIFO or the name of a Unix socket: `S_IFMT` bits and device (makedev(3)).
    Special(u32, u64),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(parent: Option<u32>, point: &str, master: Option<PeerGroup>) -> Mount {
        Mount {
            parent,
            point: ByteBuf::from(point),
            source: MountSource::Machine {
                point: ByteBuf::from(point),
                path: ByteBuf::new(),
                kind: "tmpfs".into(),
            },
            attributes: 0,
            shared: None,
            master,
            unbindable: false,
        }
    }

    #[test]
    fn what_there_is_one_of_comes_or_is_made() {
        let debugfs = |way: &str| Mount {
            source: MountSource::Machine {
                point: ByteBuf::from("/sys/kernel/debug"),
                path: ByteBuf::from(way),
                kind: "debugfs".into(),
            },
            ..mount(Some(0), "/sys/kernel/debug", None)
        };
        let arrivals = |master| {
            let namespaces = Namespaces {
                uts: None,
                mounts: vec![mount(None, "/", master), debugfs(""), debugfs("tracing")],
            };
            namespaces.arrivals(|point, _, _| point == b"/")
        };
        use Arrival::{Later, Never, Now};
        assert_eq!(arrivals(None), [Now, Now, Never]);
        let machine = Some(PeerGroup::Machine(ByteBuf::from("/")));
        assert_eq!(arrivals(machine), [Now, Later, Later]);
    }

    #[test]
    fn what_comes_later_need_not_be_there() {
        let machine = Some(PeerGroup::Machine(ByteBuf::from("/")));
        let mut namespaces = Namespaces {
            uts: None,
            mounts: vec![
                mount(None, "/", machine),
                mount(Some(0), "/late", None),
                mount(Some(1), "/late/inner", None),
                mount(Some(0), "/early", None),
            ],
        };
        let is_there = |point: &[u8], _: &[u8], _: &str| !point.starts_with(b"/late");
        assert!(namespaces.too_early(is_there).is_empty());
        namespaces.mounts[0].master = None;
        let points = |found: Vec<&Mount>| found.iter().map(|one| one.point.clone()).collect();
        let found: Vec<ByteBuf> = points(namespaces.too_early(is_there));
        assert_eq!(found, ["/late", "/late/inner"].map(ByteBuf::from));
    }
}
