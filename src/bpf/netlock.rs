//! The network lock: nothing of a locked application leaves the machine or reaches it.
//!
//! Two `cgroup_skb` programs on the root cgroup drop the packets of chosen connections, ports and
//! cgroups. In the old kernel the lock holds off new connections from just before the freeze, and
//! everything from when the first socket is read: what a peer sends in between is acknowledged,
//! and in the image, so that it need not be sent again after the peer's timeout. In the next
//! kernel it is engaged before any interface comes up, in the mode that drops all TCP, until the
//! sockets are back. Peers see a few lost packets and retransmit. The root cgroup covers also what
//! the kernel sends by itself (a RST for a socket that is not there) and sockets older than their
//! process' cgroup.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{Link, MapCore, MapFlags, MapHandle};

use super::events::{LockControl, LockDirection, LockFlowKey, LockMode, LockPortKey};
use super::features::cgroup2_mount;
use super::programs::Programs;
use super::record::bytes_of;
use super::skeleton::netlock::{NetlockSkel, NetlockSkelBuilder};

const LINKS: [&str; 2] = ["ingress", "egress"];

/// Connections that a lock has room for beyond what it is loaded for. The kernel makes a bucket
/// for each at once, which for hundreds of thousands takes longer than all else of loading.
pub const SPARE_FLOWS: u32 = 1 << 14;

const IPPROTO_TCP: u8 = 6;
const IPPROTO_UDP: u8 = 17;

/// Why the network lock failed.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The programs did not load.
    #[error(
        "Loading the network lock failed at {step}; it needs CAP_BPF with CAP_NET_ADMIN, or root"
    )]
    Load {
        /// What was being done.
        step: &'static str,
        /// From libbpf.
        source: libbpf_rs::Error,
    },
    /// An entry could not be added.
    #[error("Adding {entry} to the network lock failed; is the map full?")]
    Add {
        /// The connection, port or cgroup.
        entry: String,
        /// From bpf(2).
        source: libbpf_rs::Error,
    },
    /// There is no cgroup v2 hierarchy to attach to.
    #[error("Opening the root of the cgroup v2 hierarchy failed; mount cgroup2 on /sys/fs/cgroup")]
    Cgroup(#[source] io::Error),
    /// The kernel refused to attach.
    #[error(
        "Attaching the network lock to the root cgroup failed; check for an exclusive program with bpftool cgroup tree"
    )]
    Attach(#[source] libbpf_rs::Error),
    /// Pinning, or opening or removing what was pinned, failed.
    #[error("Pinned network lock {path}: {step} failed; the directory must be on a bpf filesystem")]
    Pin {
        /// What was being done.
        step: &'static str,
        /// The file.
        path: PathBuf,
        /// From libbpf or the file system.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The drop counters could not be read.
    #[error("Reading the drop counters of the network lock failed")]
    Counters(#[source] libbpf_rs::Error),
}

/// Packets dropped since the lock was loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drops {
    /// On the way in.
    pub ingress: u64,
    /// On the way out.
    pub egress: u64,
}

/// A loaded network lock. Dropping one that is engaged and not pinned releases it.
pub struct NetLock {
    links: Vec<Link>,
    pinned: Option<PathBuf>,
    maps: Maps,
    /// What was added already: asking the kernel again takes it a microsecond for each.
    flows: HashSet<LockFlowKey>,
    ports: HashSet<LockPortKey>,
    control: LockControl,
    /// Absent in a lock opened from its pins, which is engaged already.
    skel: Option<NetlockSkel<'static>>,
}

struct Maps {
    flows: MapHandle,
    ports: MapHandle,
    cgroups: MapHandle,
    control: MapHandle,
    drops: MapHandle,
}

impl std::fmt::Debug for NetLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NetLock")
            .field("engaged", &self.is_engaged())
            .field("pinned", &self.pinned)
            .finish_non_exhaustive()
    }
}

impl NetLock {
    /// Loads the programs without attaching them, with room for this many connections, as many
    /// again and [`SPARE_FLOWS`] more: some may be made before the last are added.
    ///
    /// # Errors
    ///
    /// [`LockError::Load`].
    pub fn load(connections: usize) -> Result<Self, LockError> {
        let at = |step| move |source| LockError::Load { step, source };
        super::redirect_libbpf_log();
        // See Instance::load for why the storage is left behind.
        let storage = Box::leak(Box::new(MaybeUninit::uninit()));
        let mut open = NetlockSkelBuilder::default()
            .open(storage)
            .map_err(at("open"))?;
        let flows = u32::try_from(connections).unwrap_or(u32::MAX / 2);
        let flows = flows.saturating_mul(2).saturating_add(SPARE_FLOWS);
        open.maps
            .flows
            .set_max_entries(flows)
            .map_err(at("sizing"))?;
        let skel = open.load().map_err(at("load"))?;
        let maps = Maps {
            flows: MapHandle::try_from(&skel.maps.flows).map_err(at("map"))?,
            ports: MapHandle::try_from(&skel.maps.ports).map_err(at("map"))?,
            cgroups: MapHandle::try_from(&skel.maps.cgroups).map_err(at("map"))?,
            control: MapHandle::try_from(&skel.maps.control).map_err(at("map"))?,
            drops: MapHandle::try_from(&skel.maps.drops).map_err(at("map"))?,
        };
        Ok(Self {
            links: Vec::new(),
            pinned: None,
            maps,
            flows: HashSet::new(),
            ports: HashSet::new(),
            control: LockControl::default(),
            skel: Some(skel),
        })
    }

    /// The loaded programs; none of a lock opened from its pins.
    ///
    /// # Errors
    ///
    /// This process has no descriptors left.
    pub fn programs(&self) -> io::Result<Programs> {
        let skel = self.skel.as_ref();
        skel.map_or(Ok(Programs::default()), |skel| Programs::of(skel.object()))
    }

    /// Locks a TCP connection by its two ends. An IPv4-mapped address counts as IPv4, which is
    /// what such a socket speaks.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn add_connection(
        &mut self,
        local: SocketAddr,
        remote: SocketAddr,
    ) -> Result<(), LockError> {
        let (local_ip, remote_ip) = (local.ip().to_canonical(), remote.ip().to_canonical());
        let key = LockFlowKey {
            local: octets(local_ip),
            remote: octets(remote_ip),
            local_port: local.port(),
            remote_port: remote.port(),
            version: version(local_ip),
            protocol: IPPROTO_TCP,
            pad: 0,
        };
        if self.flows.contains(&key) {
            return Ok(());
        }
        add(&self.maps.flows, bytes_of(&key), || {
            format!("the connection {local} - {remote}")
        })?;
        self.flows.insert(key);
        Ok(())
    }

    /// Locks a local TCP port: SYNs to it, what answers them, and connections accepted from it.
    /// `[::]` locks `0.0.0.0` too, since a socket bound so usually takes IPv4 as well.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn add_listener(&mut self, local: SocketAddr) -> Result<(), LockError> {
        self.add_port(local, IPPROTO_TCP)
    }

    /// Locks a bound UDP port, likewise.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn add_udp(&mut self, local: SocketAddr) -> Result<(), LockError> {
        self.add_port(local, IPPROTO_UDP)
    }

    fn add_port(&mut self, local: SocketAddr, protocol: u8) -> Result<(), LockError> {
        let ip = local.ip().to_canonical();
        let both = ip.is_ipv6() && ip.is_unspecified();
        let also = both.then_some(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        for ip in [Some(ip), also].into_iter().flatten() {
            let key = LockPortKey {
                local: octets(ip),
                port: local.port(),
                version: version(ip),
                protocol,
            };
            if self.ports.contains(&key) {
                continue;
            }
            add(&self.maps.ports, bytes_of(&key), || {
                format!("the port {local}")
            })?;
            self.ports.insert(key);
        }
        Ok(())
    }

    /// Locks every packet, of any protocol, of sockets made in this cgroup v2 or below it. A
    /// socket belongs to the cgroup its maker was in at the time.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn add_cgroup(&mut self, id: u64) -> Result<(), LockError> {
        add(&self.maps.cgroups, &id.to_ne_bytes(), || {
            format!("cgroup {id}")
        })?;
        self.control.cgroups = 1;
        self.write_control()
    }

    /// Locks all TCP of the machine, loopback included: for the next kernel before the sockets
    /// are back.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn add_all_tcp(&mut self) -> Result<(), LockError> {
        self.control.mode |= LockMode::ALL_TCP;
        self.write_control()
    }

    /// Locks all UDP of the machine and the ICMP errors it would draw.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn add_all_udp(&mut self) -> Result<(), LockError> {
        self.control.mode |= LockMode::ALL_UDP;
        self.write_control()
    }

    /// Holds off only what brings the application something new: connection attempts and
    /// datagrams. What it has goes on, until [`Self::silence`].
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn hold_new(&mut self) -> Result<(), LockError> {
        self.control.mode |= LockMode::NEW;
        self.write_control()
    }

    /// Ends [`Self::hold_new`]: from here on every packet is dropped.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn silence(&mut self) -> Result<(), LockError> {
        self.control.mode &= !LockMode::NEW;
        self.write_control()
    }

    /// Ends [`Self::add_all_tcp`] and [`Self::add_all_udp`]; what was added one by one stays.
    ///
    /// # Errors
    ///
    /// [`LockError::Add`].
    pub fn narrow(&mut self) -> Result<(), LockError> {
        self.control.mode = 0;
        self.write_control()
    }

    fn write_control(&self) -> Result<(), LockError> {
        let index = 0u32.to_ne_bytes();
        self.maps
            .control
            .update(&index, bytes_of(&self.control), MapFlags::ANY)
            .map_err(|source| LockError::Add {
                entry: "the mode".to_owned(),
                source,
            })
    }

    /// Whether packets are being dropped.
    #[must_use]
    pub fn is_engaged(&self) -> bool {
        !self.links.is_empty()
    }

    /// Starts dropping. Entries may be added before and after.
    ///
    /// # Errors
    ///
    /// [`LockError::Cgroup`], [`LockError::Attach`]; nothing is attached then.
    pub fn engage(&mut self) -> Result<(), LockError> {
        let Some(skel) = self.skel.as_ref().filter(|_| self.links.is_empty()) else {
            return Ok(());
        };
        let root = cgroup2_mount()
            .and_then(File::open)
            .map_err(LockError::Cgroup)?;
        let attach = |program: &libbpf_rs::ProgramMut<'_>| {
            program
                .attach_cgroup(root.as_raw_fd())
                .map_err(LockError::Attach)
        };
        // egress first: what the kernel would send does the damage
        let egress = attach(&skel.progs.lock_egress)?;
        let ingress = attach(&skel.progs.lock_ingress)?;
        self.links = vec![ingress, egress];
        Ok(())
    }

    /// Stops dropping and removes the pins. Safe to call on a lock that is not engaged.
    ///
    /// # Errors
    ///
    /// [`LockError::Pin`] if a pin could not be removed: the lock may then still be engaged.
    pub fn release(&mut self) -> Result<(), LockError> {
        self.links.clear();
        let Some(dir) = self.pinned.take() else {
            return Ok(());
        };
        for name in LINKS.iter().chain(&MAPS) {
            remove_pin(&dir.join(name))?;
        }
        fs::remove_dir(&dir).map_err(pin_error("remove", &dir))
    }

    /// Lets the lock outlive this process: [`Self::open_pinned`] takes it over.
    ///
    /// `dir` is made; it must be on a bpf filesystem and not exist yet.
    ///
    /// # Errors
    ///
    /// [`LockError::Pin`]; what was pinned so far is removed.
    pub fn pin(&mut self, dir: &Path) -> Result<(), LockError> {
        fs::create_dir(dir).map_err(pin_error("create", dir))?;
        self.pinned = Some(dir.to_owned());
        let pinned = self.pin_into(dir);
        if pinned.is_err() {
            for name in LINKS.iter().chain(&MAPS) {
                remove_pin(&dir.join(name))?;
            }
            fs::remove_dir(dir).map_err(pin_error("remove", dir))?;
            self.pinned = None;
        }
        pinned
    }

    fn pin_into(&mut self, dir: &Path) -> Result<(), LockError> {
        for (link, name) in self.links.iter_mut().zip(LINKS) {
            let path = dir.join(name);
            link.pin(&path).map_err(pin_error("pin", &path))?;
        }
        for (map, name) in self.maps.named() {
            let path = dir.join(name);
            map.pin(&path).map_err(pin_error("pin", &path))?;
        }
        Ok(())
    }

    /// Takes over a lock another process pinned. It is engaged.
    ///
    /// # Errors
    ///
    /// [`LockError::Pin`] if `dir` does not hold a complete lock.
    pub fn open_pinned(dir: &Path) -> Result<Self, LockError> {
        let map = |name: &str| {
            let path = dir.join(name);
            MapHandle::from_pinned_path(&path).map_err(pin_error("open", &path))
        };
        let link = |name: &str| {
            let path = dir.join(name);
            Link::open(&path).map_err(pin_error("open", &path))
        };
        let [flows, ports, cgroups, control, drops] = MAPS;
        let maps = Maps {
            flows: map(flows)?,
            ports: map(ports)?,
            cgroups: map(cgroups)?,
            control: map(control)?,
            drops: map(drops)?,
        };
        let links = LINKS
            .iter()
            .map(|name| link(name))
            .collect::<Result<Vec<_>, _>>()?;
        let stored = maps
            .control
            .lookup(&0u32.to_ne_bytes(), MapFlags::ANY)
            .map_err(pin_error("read", dir))?
            .unwrap_or_default();
        let word = |at: usize| {
            stored
                .get(at..)
                .and_then(|rest| rest.first_chunk())
                .map_or(0, |b| u32::from_ne_bytes(*b))
        };
        let control = LockControl {
            mode: word(0),
            cgroups: word(4),
        };
        Ok(Self {
            links,
            pinned: Some(dir.to_owned()),
            maps,
            flows: HashSet::new(),
            ports: HashSet::new(),
            control,
            skel: None,
        })
    }

    /// How many packets were dropped so far.
    ///
    /// # Errors
    ///
    /// [`LockError::Counters`].
    pub fn drops(&self) -> Result<Drops, LockError> {
        let read = |direction: u32| -> Result<u64, LockError> {
            let per_cpu = self
                .maps
                .drops
                .lookup_percpu(&direction.to_ne_bytes(), MapFlags::ANY)
                .map_err(LockError::Counters)?
                .unwrap_or_default();
            Ok(per_cpu
                .iter()
                .filter_map(|v| v.first_chunk())
                .map(|v| u64::from_ne_bytes(*v))
                .sum())
        };
        Ok(Drops {
            ingress: read(LockDirection::INGRESS)?,
            egress: read(LockDirection::EGRESS)?,
        })
    }
}

/// Names of the pinned maps, in the order of [`Maps::named`].
const MAPS: [&str; 5] = ["flows", "ports", "cgroups", "control", "drops"];

impl Maps {
    fn named(&mut self) -> [(&mut MapHandle, &'static str); 5] {
        let [flows, ports, cgroups, control, drops] = MAPS;
        [
            (&mut self.flows, flows),
            (&mut self.ports, ports),
            (&mut self.cgroups, cgroups),
            (&mut self.control, control),
            (&mut self.drops, drops),
        ]
    }
}

fn add(map: &MapHandle, key: &[u8], entry: impl FnOnce() -> String) -> Result<(), LockError> {
    map.update(key, &[1], MapFlags::ANY)
        .map_err(|source| LockError::Add {
            entry: entry(),
            source,
        })
}

pub(super) fn octets(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(ip) => {
            let mut bytes = [0; 16];
            bytes[..4].copy_from_slice(&ip.octets());
            bytes
        }
        IpAddr::V6(ip) => ip.octets(),
    }
}

fn version(ip: IpAddr) -> u8 {
    if ip.is_ipv4() { 4 } else { 6 }
}

fn remove_pin(path: &Path) -> Result<(), LockError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(pin_error("remove", path)(error))
        }
        _ => Ok(()),
    }
}

fn pin_error<E: std::error::Error + Send + Sync + 'static>(
    step: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> LockError {
    let path = path.to_owned();
    move |source| LockError::Pin {
        step,
        path,
        source: Box::new(source),
    }
}
