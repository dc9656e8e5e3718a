//! The part of the machine's own state that restored applications need.

use super::TcpConnection;
use crate::model::verify::Verification;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// Network and identity of the machine, put back before any application is restored.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct System {
    /// `uname -n`.
    pub hostname: String,
    /// Network interfaces that carry addresses.
    pub interfaces: Vec<Interface>,
    /// Routes of the main and other tables, except the local table and what
    /// the kernel derives from addresses; in the order they must be added.
    pub routes: Vec<Route>,
    /// `net.*` and other sysctls that must be as they were: (path below /proc/sys, value).
    pub sysctls: Vec<(String, String)>,
    /// TCP connections that applications have closed and that still send.
    pub orphans: Vec<TcpConnection>,
    /// Pools of huge pages.
    pub huge_pages: Vec<HugePool>,
    /// The update as the old kernel knew it.
    pub origin: Origin,
    /// How the agent's model compared with the frozen applications.
    pub verification: Option<Verification>,
}

/// A pool of huge pages that has any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePool {
    /// Bytes of one page.
    pub page: u64,
    /// How many the machine keeps (`nr_hugepages`).
    pub pages: u64,
}

/// What the early-boot stage tells of the update's first half.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Origin {
    /// `uname -r` of the old kernel.
    pub kernel_release: String,
    /// Steps done there, in order.
    pub timeline: Vec<Milestone>,
    /// `CLOCK_REALTIME` in nanoseconds when `tsc` was read.
    pub realtime: u64,
    /// Time stamp counter of the CPU, which goes on through kexec.
    pub tsc: u64,
    /// Counts of it per second.
    pub tsc_hz: u64,
}

/// One step of an update.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Milestone {
    /// What was done, e.g. `frozen`.
    pub step: String,
    /// `CLOCK_REALTIME` in nanoseconds when it was done.
    pub at: u64,
}

/// One network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name, e.g. `eth0`.
    pub name: String,
    /// Hardware address, by which the interface is found again if its name differs.
    pub mac: ByteBuf,
    /// MTU in bytes.
    pub mtu: u32,
    /// `IFF_UP`.
    pub up: bool,
    /// Addresses in `ADDR/PREFIX` text form (both families).
    pub addresses: Vec<String>,
    /// Kernel module of its driver; `None` where that is built in or there is none.
    pub driver: Option<String>,
}

/// One route.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Destination as `ADDR/PREFIX`; `None` = default route.
    pub destination: Option<String>,
    /// IPv6 rather than IPv4.
    pub v6: bool,
    /// Gateway address.
    pub gateway: Option<String>,
    /// Outgoing interface.
    pub interface: String,
    /// Preferred source address.
    pub source: Option<String>,
    /// Metric.
    pub priority: u32,
    /// Routing table.
    pub table: u32,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTPROT_*`: who added it.
    pub protocol: u8,
}
