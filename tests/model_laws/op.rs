//! What random steps try to do.

use proptest::prelude::*;

/// What a random step tries to do; the kernel below makes it something possible.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    Fork {
        who: u8,
        share_files: bool,
        share_fs: bool,
    },
    Unshare {
        who: u8,
    },
    Exec {
        who: u8,
    },
    Exit {
        who: u8,
    },
    Open {
        who: u8,
        kind: Kind,
        cloexec: bool,
    },
    Close {
        who: u8,
        fd: u8,
    },
    Dup2 {
        who: u8,
        from: u8,
        to: u8,
        cloexec: bool,
    },
    Cloexec {
        who: u8,
        fd: u8,
        on: bool,
    },
    RangeCloexec {
        who: u8,
        first: u8,
        last: u8,
    },
    Watch {
        who: u8,
        epfd: u8,
        fd: u8,
        add: bool,
        events: u32,
    },
    /// inotify_add_watch(2), inotify_rm_watch(2).
    Inotify {
        who: u8,
        fd: u8,
        wd: u8,
        add: bool,
        mask: u32,
    },
    /// setsockopt(2).
    Option {
        who: u8,
        fd: u8,
        mark: u32,
    },
    /// fcntl(2): `F_SETFL`, `F_SETOWN`.
    Status {
        who: u8,
        fd: u8,
        flags: u32,
    },
    /// chdir(2), umask(2).
    Directory {
        who: u8,
        ino: u8,
        umask: u32,
    },
    UnshareFs {
        who: u8,
    },
    /// setsid(2), setuid(2).
    Identity {
        who: u8,
        uid: u32,
        session: bool,
    },
    /// mmap(2), munmap(2).
    Map {
        who: u8,
        page: u8,
        flags: u64,
        add: bool,
    },
}

/// What is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Regular,
    Epoll,
    Inotify,
    Socket,
}

impl Op {
    /// The thread that does it, by a number to be reduced.
    pub fn who(self) -> usize {
        match self {
            Self::Fork { who, .. }
            | Self::Unshare { who }
            | Self::Exec { who }
            | Self::Exit { who }
            | Self::Open { who, .. }
            | Self::Close { who, .. }
            | Self::Dup2 { who, .. }
            | Self::Cloexec { who, .. }
            | Self::RangeCloexec { who, .. }
            | Self::Watch { who, .. }
            | Self::Inotify { who, .. }
            | Self::Option { who, .. }
            | Self::Status { who, .. }
            | Self::Directory { who, .. }
            | Self::UnshareFs { who }
            | Self::Identity { who, .. }
            | Self::Map { who, .. } => usize::from(who),
        }
    }
}

pub fn op() -> impl Strategy<Value = Op> {
    let who = any::<u8>();
    let kind = prop::sample::select(vec![
        Kind::Regular,
        Kind::Epoll,
        Kind::Inotify,
        Kind::Socket,
    ]);
    prop_oneof![
        2 => (who, any::<bool>(), any::<bool>())
            .prop_map(|(who, share_files, share_fs)| Op::Fork { who, share_files, share_fs }),
        1 => who.prop_map(|who| Op::Unshare { who }),
        1 => who.prop_map(|who| Op::Exec { who }),
        2 => who.prop_map(|who| Op::Exit { who }),
        8 => (who, kind, any::<bool>())
            .prop_map(|(who, kind, cloexec)| Op::Open { who, kind, cloexec }),
        5 => (who, any::<u8>()).prop_map(|(who, fd)| Op::Close { who, fd }),
        4 => (who, any::<u8>(), 0..12u8, any::<bool>())
            .prop_map(|(who, from, to, cloexec)| Op::Dup2 { who, from, to, cloexec }),
        2 => (who, any::<u8>(), any::<bool>()).prop_map(|(who, fd, on)| Op::Cloexec { who, fd, on }),
        1 => (who, 0..12u8, 0..12u8)
            .prop_map(|(who, first, last)| Op::RangeCloexec { who, first, last }),
        6 => (who, any::<u8>(), any::<u8>(), prop::bool::weighted(0.7), any::<u32>())
            .prop_map(|(who, epfd, fd, add, events)| Op::Watch { who, epfd, fd, add, events }),
        4 => (who, any::<u8>(), 0..4u8, prop::bool::weighted(0.7), any::<u32>())
            .prop_map(|(who, fd, wd, add, mask)| Op::Inotify { who, fd, wd, add, mask }),
        2 => (who, any::<u8>(), any::<u32>())
            .prop_map(|(who, fd, mark)| Op::Option { who, fd, mark }),
        2 => (who, any::<u8>(), any::<u32>())
            .prop_map(|(who, fd, flags)| Op::Status { who, fd, flags }),
        2 => (who, any::<u8>(), any::<u32>())
            .prop_map(|(who, ino, umask)| Op::Directory { who, ino, umask }),
        1 => who.prop_map(|who| Op::UnshareFs { who }),
        2 => (who, any::<u32>(), any::<bool>())
            .prop_map(|(who, uid, session)| Op::Identity { who, uid, session }),
        3 => (who, 0..16u8, any::<u64>(), any::<bool>())
            .prop_map(|(who, page, flags, add)| Op::Map { who, page, flags, add }),
    ]
}
