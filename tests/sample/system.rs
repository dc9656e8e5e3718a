//! What belongs to no process: terminals, System V objects, cgroups; and netlink sockets.

use super::path;
use serde_bytes::ByteBuf;
use tracker::model::frozen::{
    AioRing, Backing, BusyPoll, CgroupBelow, ContentKind, Fanotify, FanotifyMark, FileHints,
    FileKind, IoUring, MarkOn, Message, MessageQueue, Mount, MountSource, MqueueNotify,
    MqueueState, Namespaces, NetlinkSocket, PeerGroup, PressureTrigger, PtyInput, PtyState,
    QueuedMessage, Segment, SemaphoreSet, Termios, TmpfsEntry, TmpfsNode, UtsNames,
};
use tracker::model::ids::{OfdId, Pid};

pub const HINTS: FileHints = FileHints {
    sequential: true,
    random: true,
    noreuse: true,
    write_life: 3,
};

pub const BUSY_POLL: BusyPoll = BusyPoll {
    usecs: 70,
    budget: 16,
    prefer: true,
};

pub fn fanotify() -> FileKind {
    let mark = |on| FanotifyMark {
        on,
        at: path("/srv", 19),
        mask: 0x800_0020,
        ignored: 8,
        flags: 0x40,
    };
    FileKind::Fanotify(Box::new(Fanotify {
        flags: 0xa02,
        event_flags: 0x8000,
        unprivileged: true,
        marks: [MarkOn::Inode, MarkOn::Mount, MarkOn::Filesystem]
            .map(mark)
            .to_vec(),
    }))
}

pub fn netlink() -> NetlinkSocket {
    NetlinkSocket {
        protocol: 15,
        datagram: true,
        port: 20_001,
        groups: 1,
        more_groups: vec![33],
        remote: Some((20_002, 4)),
    }
}

pub fn cgroups() -> Vec<CgroupBelow> {
    let below = |path: &str| CgroupBelow {
        path: path.into(),
        ..CgroupBelow::default()
    };
    vec![below("workers"), below("workers/a")]
}

pub fn semaphores() -> Vec<SemaphoreSet> {
    vec![SemaphoreSet {
        id: 32_769,
        key: 0x1234,
        mode: 0o600,
        uid: 1,
        gid: 2,
        creator_uid: 3,
        creator_gid: 4,
        semaphores: vec![(5, Pid(20_001)), (6, Pid(0))],
        adjustments: vec![(Pid(20_001), 0, -2)],
    }]
}

pub fn message_queues() -> Vec<MessageQueue> {
    vec![MessageQueue {
        id: 32_771,
        key: 0x9abc,
        mode: 0o620,
        uid: 1,
        gid: 2,
        creator_uid: 3,
        creator_gid: 4,
        qbytes: 16_384,
        sender: Pid(20_001),
        receiver: Pid(20_002),
        messages: vec![Message {
            mtype: i64::MAX,
            mtext: b"queued".to_vec().into(),
        }],
    }]
}

pub fn segment() -> ContentKind {
    ContentKind::SysvShm(Segment {
        id: 32_770,
        key: 0x5678,
        destroyed: true,
        creator_uid: 1,
        creator_gid: 2,
    })
}

pub fn aio_ring() -> Backing {
    Backing::AioRing(AioRing {
        max_reqs: Some(16),
        nr: 127,
        head: 126,
        events: ByteBuf::from(vec![0x5a; 64]),
    })
}

pub fn uring() -> FileKind {
    FileKind::IoUring(Box::new(IoUring {
        flags: 8,
        sq_entries: 1,
        cq_entries: 2,
        sq_head: 77,
        cq_tail: 78,
        sq_array: 96,
        cqes: 64,
        ring: ByteBuf::from(vec![0xa5; 100]),
        sqes: ByteBuf::from(vec![0x5a; 64]),
    }))
}

pub fn pressure() -> FileKind {
    FileKind::Pressure {
        at: path("/proc/pressure/memory", 0),
        trigger: PressureTrigger {
            full: true,
            threshold: 20_000,
            window: 500_000,
        },
    }
}

pub fn mapped_uring() -> Backing {
    Backing::IoUring {
        ring: OfdId(1),
        offset: 0x1000_0000,
    }
}

pub fn mqueue() -> FileKind {
    let state = MqueueState {
        name: b"jobs".to_vec().into(),
        unlinked: true,
        mode: 0o640,
        uid: 1,
        gid: 2,
        account: 3,
        maxmsg: 10,
        msgsize: 8192,
        messages: vec![QueuedMessage {
            priority: 32_767,
            text: b"queued".to_vec().into(),
        }],
        notify: Some(MqueueNotify {
            pid: Pid(20_001),
            signal: Some(12),
            value: 0xfeed,
        }),
    };
    FileKind::Mqueue {
        id: 0xffff_8880_0000_c000,
        state: Some(Box::new(state)),
    }
}

pub fn terminal() -> FileKind {
    let mut cc = [0; 19];
    cc[..4].copy_from_slice(&[3, 28, 127, 21]);
    let state = PtyState {
        index: 7,
        uid: 1,
        gid: 5,
        mode: 0o620,
        hung_up: true,
        slave_opened: true,
        termios: Termios {
            iflag: 0x500,
            oflag: 5,
            cflag: 0xbf,
            lflag: 0x8a3b,
            line: 1,
            cc,
            ispeed: 38_400,
            ospeed: 38_401,
        },
        winsize: [24, 80, 480, 640],
        exclusive: [true, false],
        locked: true,
        packet: true,
        stopped: true,
        output_off: [false, true],
        session: Some(Pid(19_999)),
        foreground: Some(Pid(20_001)),
        output: b"$ ".to_vec().into(),
        input: PtyInput {
            bytes: b"ls\nmake".to_vec().into(),
            line_ends: vec![2],
            complete: 3,
            pushed: true,
            waiting: b"more".to_vec().into(),
        },
        column: 2,
        canon_column: 1,
    };
    FileKind::Pty {
        id: 0xffff_8880_0000_b000,
        master: true,
        at: path("/dev/ptmx", 20),
        state: Some(Box::new(state)),
    }
}

pub fn namespaces() -> Namespaces {
    let entry = |path: &str, node| TmpfsEntry {
        path: ByteBuf::from(path),
        node,
        mode: 0o640,
        uid: 5,
        gid: 6,
        mtime: 1_700_000_000_000_000_007,
    };
    let bytes = |text: &str| ByteBuf::from(text);
    let sources = [
        MountSource::Machine {
            point: bytes("/"),
            path: bytes("srv/root"),
            kind: "ext4".into(),
        },
        MountSource::Proc {
            options: vec!["hidepid=invisible".into()],
        },
        MountSource::Tmpfs {
            options: vec!["mode=755".into(), "size=4096k".into()],
            name: "tmpfs".into(),
            read_only: true,
            entries: vec![
                entry("", TmpfsNode::Directory),
                entry("file", TmpfsNode::File(bytes("content"))),
                entry("link", TmpfsNode::Link(bytes("file"))),
                entry("null", TmpfsNode::Special(0o20_000, 0x103)),
                entry("symlink", TmpfsNode::Symlink(bytes("file"))),
            ],
        },
        MountSource::Own {
            mount: 1,
            path: bytes("sys"),
        },
    ];
    let mounts = sources.into_iter().zip(0..).map(|(source, number)| Mount {
        parent: Some(number),
        point: bytes("/dev"),
        source,
        attributes: 7,
        shared: Some(PeerGroup::Own(41)),
        master: Some(PeerGroup::Machine(bytes("/"))),
        unbindable: true,
    });
    Namespaces {
        uts: Some(UtsNames {
            node: bytes("elsewhere"),
            domain: bytes("example.org"),
        }),
        mounts: mounts.collect(),
    }
}
