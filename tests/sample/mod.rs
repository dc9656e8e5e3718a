//! An image that has everything: each kind of record, object and state, and no field at its
//! default where it has one.

#![allow(
    clippy::needless_update,
    reason = "a field that comes later has a default, or old images cannot be read"
)]

mod memory;
mod system;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use tracker::image::{Image, Store};
use tracker::model::frozen::{
    AltStack, Application, ApplicationHeader, Clocks, ContentId, Credentials, Datagram, EpollItem,
    FdEntry, FileIdentity, FileKind, FileLock, FileOwner, FilesTable, HugePool, InotifyWatch,
    Interface, Interfaces, IntervalTimer, JobStop, Lease, LockKind, Membership, Milestone, Mm,
    OpenFile, Origin, Outgoing, PathRef, PeerCredentials, PipeState, PosixTimer, Process, Ptracer,
    Registers, Route, Rseq, Scheduling, SeccompFilter, SigAction, SigInfo, SockOption, Socket,
    SocketFilter, SocketState, SyscallInProgress, System, TcpConnection, TcpEnded, TcpOptions,
    TcpWindow, Thread, Through, Timerfd, UnixAddress, UnixMessage, UnixSocket, UnixState,
    WaitingConnection, WaitingEnd, WaitingUnix,
};
use tracker::model::ids::{Fd, FilesId, FsId, InodeId, MmId, OfdId, Pid, Tid};
use tracker::model::verify::Verification;

/// Page slots that [`everything`] points to.
pub const SLOTS: u64 = 3;

const PAGE: usize = 4096;

/// The pages of [`everything`], no two alike.
pub fn pages() -> Vec<u8> {
    let slots = u8::try_from(SLOTS).unwrap();
    (1..=slots).flat_map(|slot| [slot; PAGE]).collect()
}

/// The image, its pages written to `store`.
pub fn everything(store: &impl Store) -> Image {
    store.write_pages(0, &pages()).unwrap();
    Image {
        system: Some(system()),
        slots: store.written().first(SLOTS),
        applications: vec![application(), small()],
    }
}

fn system() -> System {
    System {
        hostname: "old".into(),
        interfaces: vec![Interface {
            name: "eth0".into(),
            mac: vec![2, 0, 0, 0, 0, 1].into(),
            mtu: 1500,
            up: true,
            addresses: vec!["10.0.2.15/24".into(), "fe80::1/64".into()],
            driver: Some("virtio_net".into()),
        }],
        routes: vec![Route {
            destination: Some("10.7.0.0/16".into()),
            v6: true,
            gateway: Some("10.0.2.2".into()),
            interface: "eth0".into(),
            source: Some("10.0.2.15".into()),
            priority: 5,
            table: 254,
            scope: 253,
            protocol: 3,
        }],
        sysctls: vec![("net/ipv4/ip_forward".into(), "1".into())],
        orphans: vec![connection()],
        huge_pages: vec![HugePool {
            page: 2 << 20,
            pages: 3,
        }],
        origin: Origin {
            kernel_release: "6.1.0".into(),
            timeline: vec![Milestone {
                step: "frozen".into(),
                at: 1_700_000_000_000_000_001,
            }],
            realtime: 1_700_000_000_000_000_002,
            tsc: 0x1234_5678_9abc,
            tsc_hz: 2_400_000_000,
        },
        verification: Some(Verification {
            objects: 40,
            differing: 1,
            suspect: 2,
            examples: vec!["fd 3".into()],
        }),
        ..System::default()
    }
}

fn application() -> Application {
    let process = process();
    let (mm, files) = (process.mm, process.files);
    Application {
        header: ApplicationHeader {
            name: "redis".into(),
            cgroup: "tracker/redis".into(),
            command: vec!["redis-server".into(), "--port".into()],
            directory: "/var/lib/redis".into(),
            kernel_release: "6.1.0-56-cloud-amd64".into(),
            clocks: Clocks {
                monotonic: 17,
                boottime: 18,
                realtime: 19,
            },
            cgroups: system::cgroups(),
            cgroup_settings: vec![("pids.max".into(), "77".into())],
            semaphores: system::semaphores(),
            message_queues: system::message_queues(),
            namespaces: system::namespaces(),
            ..ApplicationHeader::default()
        },
        processes: vec![process, zombie()],
        mms: BTreeMap::from([(mm, memory::address_space())]),
        files: BTreeMap::from([(files, table())]),
        ofds: (1..).map(OfdId).zip(open_files()).collect(),
        contents: (1..).map(ContentId).zip(memory::contents()).collect(),
        ..Application::default()
    }
}

/// What a second application takes at least.
fn small() -> Application {
    Application {
        header: ApplicationHeader {
            name: "memcached".into(),
            ..ApplicationHeader::default()
        },
        processes: vec![Process {
            pid: Pid(20_010),
            mm: MmId(0xffff_8880_0000_9000),
            files: FilesId(0xffff_8880_0000_a000),
            threads: vec![Thread {
                tid: Tid(20_010),
                ..Thread::default()
            }],
            ..Process::default()
        }],
        mms: BTreeMap::from([(MmId(0xffff_8880_0000_9000), Mm::default())]),
        files: BTreeMap::from([(FilesId(0xffff_8880_0000_a000), FilesTable::default())]),
        ..Application::default()
    }
}

fn path(path: &str, ino: u64) -> PathRef {
    PathRef {
        path: path.into(),
        inode: InodeId { dev: 0xfe00, ino },
        through: if ino == 0 {
            Through::Machine
        } else {
            Through::Remade
        },
    }
}

fn process() -> Process {
    Process {
        pid: Pid(20_001),
        parent: Some(Pid(20_000)),
        pgid: Pid(20_001),
        sid: Pid(19_999),
        exit_signal: 17,
        stopped: Some(JobStop {
            signal: 20,
            reported: true,
        }),
        continued: true,
        fs: FsId(0xffff_8880_0000_3000),
        cgroup: "workers/a".into(),
        mm: MmId(0xffff_8880_0000_1000),
        files: FilesId(0xffff_8880_0000_2000),
        exe: path("/usr/bin/redis-server", 11),
        cwd: path("/var/lib/redis", 12),
        root: path("/", 2),
        umask: 0o27,
        personality: 0x4_0000,
        dumpable: 1,
        child_subreaper: true,
        thp_disable: true,
        seccomp: vec![SeccompFilter {
            program: vec![6, 0, 0, 0, 0, 0, 0xff, 0x7f].into(),
            log: true,
        }],
        oom_score_adj: -100,
        coredump_filter: Some(0x33),
        loginuid: Some(1000),
        ptracer: Some(Ptracer::Thread(Tid(20_001))),
        autogroup_nice: -2,
        rlimits: vec![(1024, 4096), (u64::MAX, u64::MAX)],
        sigactions: vec![SigAction {
            handler: 0x5555_1000,
            flags: 0x0400_0000,
            restorer: 0x7fff_2000,
            mask: 0x4000,
        }],
        pending: vec![SigInfo(vec![9; 128])],
        itimers: [1, 2, 3].map(|n| IntervalTimer {
            remaining: n,
            interval: n + 10,
        }),
        posix_timers: vec![PosixTimer {
            id: 2,
            clock: 1,
            notify: 4,
            signo: 34,
            value: 0x77,
            thread: Tid(20_002),
            remaining: 5_000,
            interval: 6_000,
            overrun: 7,
        }],
        threads: vec![
            thread(20_001, SyscallInProgress::None),
            thread(
                20_002,
                SyscallInProgress::RestartBlock { deadline: Some(5) },
            ),
            thread(20_003, SyscallInProgress::Reissue { deadline: Some(6) }),
        ],
        ..Process::default()
    }
}

fn zombie() -> Process {
    Process {
        pid: Pid(20_004),
        parent: Some(Pid(20_001)),
        zombie: Some(0x100),
        threads: vec![Thread {
            tid: Tid(20_004),
            comm: b"dead".into(),
            ..Thread::default()
        }],
        ..Process::default()
    }
}

fn thread(tid: i32, syscall: SyscallInProgress) -> Thread {
    Thread {
        tid: Tid(tid),
        comm: b"io_thd_1".into(),
        regs: registers(),
        xstate: vec![0xaa; 832],
        syscall,
        sigmask: 0x8000,
        pending: vec![SigInfo(vec![7; 128])],
        altstack: AltStack {
            sp: 0x7ff0_0000,
            flags: 2,
            size: 8192,
        },
        robust_list: (0x7ff0_1000, 24),
        clear_child_tid: 0x7ff0_2000,
        rseq: Some(Rseq {
            addr: 0x7ff0_3000,
            len: 32,
            sig: 0x5305_3053,
            cs: 0x5555_3000,
        }),
        creds: Credentials {
            uids: [1, 2, 3, 4],
            gids: [5, 6, 7, 8],
            groups: vec![9, 10],
            caps: [11, 12, 13, 14, 15],
            securebits: 16,
            no_new_privs: true,
        },
        sched: Scheduling {
            policy: 2,
            nice: -5,
            priority: 20,
            affinity: vec![3, 0],
            slice: 3_000_000,
        },
        pdeathsig: 15,
        timer_slack: 50_000,
        ioprio: 0x4004,
        policy: Some(memory::POLICY),
        io_flusher: true,
        mce_kill_early: Some(true),
        ..Thread::default()
    }
}

fn registers() -> Registers {
    Registers {
        r15: 1,
        r14: 2,
        r13: 3,
        r12: 4,
        rbp: 5,
        rbx: 6,
        r11: 7,
        r10: 8,
        r9: 9,
        r8: 10,
        rax: 11,
        rcx: 12,
        rdx: 13,
        rsi: 14,
        rdi: 15,
        orig_rax: u64::MAX,
        rip: 0x5555_5000,
        cs: 0x33,
        eflags: 0x246,
        rsp: 0x7ffd_0000,
        ss: 0x2b,
        fs_base: 0x7f00_0000,
        gs_base: 16,
        ds: 17,
        es: 18,
        fs: 19,
        gs: 20,
    }
}

fn table() -> FilesTable {
    FilesTable {
        fds: vec![FdEntry {
            fd: Fd(3),
            ofd: OfdId(2),
            cloexec: true,
        }],
        ..FilesTable::default()
    }
}

fn open_files() -> Vec<OpenFile> {
    let lock = |kind| FileLock {
        kind,
        exclusive: true,
        start: 100,
        len: 200,
        pid: Pid(20_001),
    };
    let identity = FileIdentity {
        at: path("/var/log/redis", 14),
        size: 77,
        mtime: 78,
    };
    let state = || {
        Some(PipeState {
            capacity: 65_536,
            packets: vec![b"one".to_vec().into(), b"two".to_vec().into()],
        })
    };
    let mut kinds = vec![
        FileKind::Regular(identity),
        FileKind::Directory(path("/var", 15)),
        FileKind::CharDevice {
            at: path("/dev/null", 16),
            rdev: 0x10_0003,
        },
        FileKind::Content(ContentId(2)),
        FileKind::Pipe {
            id: 99,
            state: state(),
        },
        FileKind::Fifo {
            at: path("/run/fifo", 17),
            state: state(),
        },
        FileKind::Eventfd {
            count: 3,
            semaphore: true,
        },
        FileKind::Timerfd(Timerfd {
            clock: 1,
            settime_flags: 2,
            remaining: 3,
            interval: 4,
            ticks: 5,
        }),
        FileKind::Signalfd { mask: 0x200 },
        FileKind::Epoll {
            items: vec![EpollItem {
                fd: Fd(3),
                ofd: OfdId(2),
                events: 0x4000_0001,
                data: 0xdead_beef,
            }],
            busy_poll: Some(system::BUSY_POLL),
        },
        FileKind::Inotify {
            watches: vec![InotifyWatch {
                wd: 1,
                mask: 0x100,
                at: path("/etc", 18),
            }],
        },
        system::fanotify(),
        FileKind::Pidfd { pid: Pid(20_001) },
        system::terminal(),
        system::uring(),
        system::pressure(),
    ];
    kinds.extend(sockets().into_iter().map(|state| {
        FileKind::Socket(Box::new(Socket {
            inode: 4711,
            options: vec![SockOption {
                level: 1,
                name: 9,
                value: vec![1, 0, 0, 0].into(),
            }],
            filter: Some(SocketFilter {
                program: vec![6, 0, 0, 0, 0xff, 0xff, 0, 0].into(),
                locked: true,
            }),
            interfaces: Interfaces {
                joined: vec![Membership {
                    group: core::net::Ipv4Addr::new(239, 1, 2, 3).into(),
                    interface: b"eth0".to_vec().into(),
                }],
                outgoing: vec![Outgoing {
                    v6: false,
                    multicast: true,
                    interface: b"eth0".to_vec().into(),
                    address: Some(core::net::Ipv4Addr::LOCALHOST),
                }],
            },
            state,
        }))
    }));
    kinds.push(system::mqueue());
    let open = |kind| OpenFile {
        flags: 0o2_0002,
        pos: 4097,
        owner: Some(FileOwner {
            kind: 1,
            id: 20_001,
            signal: 34,
        }),
        locks: [LockKind::Flock, LockKind::Posix, LockKind::Ofd]
            .map(lock)
            .to_vec(),
        lease: Some(Lease {
            exclusive: true,
            pid: Pid(20_001),
            fd: Fd(3),
        }),
        hints: system::HINTS,
        kind,
    };
    kinds.into_iter().map(open).collect()
}

fn ends() -> (SocketAddr, SocketAddr) {
    let [v4, v6] = ["10.0.2.15:6379", "[fe80::1]:6379"].map(|end| end.parse().unwrap());
    (v4, v6)
}

fn negotiated() -> TcpOptions {
    TcpOptions {
        mss_clamp: 1460,
        wscale: Some((7, 8)),
        sack: true,
        timestamp: Some(9),
    }
}

fn connection() -> TcpConnection {
    TcpConnection {
        v6: true,
        local: ends().0,
        remote: ends().1,
        state: 1,
        shutdown: 1,
        write_seq: 1000,
        rcv_nxt: 2000,
        send_queue: b"to be sent".to_vec().into(),
        unsent: 4,
        recv_queue: b"to be read".to_vec().into(),
        window: TcpWindow {
            snd_wl1: 1,
            snd_wnd: 2,
            max_window: 3,
            rcv_wnd: 4,
            rcv_wup: 5,
        },
        negotiated: negotiated(),
    }
}

fn sockets() -> Vec<SocketState> {
    let v4 = || ends().0;
    let v6 = || ends().1;
    let waiting = |end| WaitingConnection {
        local: v4(),
        remote: v6(),
        write_seq: 1000,
        received_seq: 2000,
        received: b"to be read".to_vec().into(),
        end,
        window: 3000,
        negotiated: negotiated(),
        peer_timestamp: 10,
    };
    let someone = || PeerCredentials {
        pid: Pid(77),
        uid: 1000,
        gid: 1001,
        groups: vec![4, 27],
    };
    let unix = |address, state| {
        SocketState::Unix(UnixSocket {
            socktype: 1,
            address,
            state,
            queue: vec![UnixMessage {
                data: b"message".to_vec().into(),
                fds: vec![OfdId(2)],
                sender: Some(UnixAddress::Abstract(b"sender".to_vec().into())),
                credentials: Some(someone()),
            }],
            shutdown: 2,
            peer: Some(someone()),
            waiting: vec![WaitingUnix {
                client: Some(OfdId(17)),
                peer: Some(someone()),
                queue: Vec::new(),
            }],
        })
    };
    let path = Some(UnixAddress::Path(b"/run/redis".to_vec().into()));
    let name = Some(UnixAddress::Abstract(b"redis".to_vec().into()));
    vec![
        SocketState::TcpIdle {
            v6: true,
            local: Some(v4()),
        },
        SocketState::TcpListen {
            local: v6(),
            backlog: 511,
            v6: true,
            waiting: [
                WaitingEnd::Open,
                WaitingEnd::Closed,
                WaitingEnd::Reset,
                WaitingEnd::ClosedAndReset,
            ]
            .map(waiting)
            .into(),
        },
        SocketState::TcpConnection(Box::new(connection())),
        SocketState::TcpEnded(Box::new(TcpEnded {
            v6: true,
            local: ends().0,
            remote: ends().1,
            received: b"the rest".to_vec().into(),
            fin: true,
            error: 32,
        })),
        unix(path, UnixState::Unconnected),
        unix(name, UnixState::Listening { backlog: 5 }),
        unix(None, UnixState::Connected { peer: OfdId(16) }),
        unix(None, UnixState::PeerClosed),
        unix(None, UnixState::PeerReset),
        unix(
            None,
            UnixState::Waiting {
                listener: OfdId(15),
            },
        ),
        SocketState::Udp {
            v6: true,
            local: Some(v6()),
            remote: Some(v4()),
            queue: vec![Datagram {
                from: v4(),
                to: Some(v6().ip()),
                ttl: Some(64),
                tos: Some(2),
                data: b"datagram".to_vec().into(),
            }],
        },
        SocketState::Netlink(system::netlink()),
        SocketState::Raw {
            v6: true,
            protocol: 58,
            local: Some(core::net::Ipv6Addr::LOCALHOST.into()),
            remote: Some(v6()),
        },
        SocketState::Packet {
            socktype: 2,
            protocol: 0x806,
            interface: Some(b"eth0".to_vec().into()),
        },
    ]
}
