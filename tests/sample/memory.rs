//! Memory of the sample: mappings of every backing, and bytes that only memory keeps.

use super::path;
use tracker::model::frozen::{
    Backing, Content, ContentId, ContentKind, FileIdentity, MemoryPolicy, Mm, MmBounds, PageRun,
    Vdso, Vma,
};

pub(super) const POLICY: MemoryPolicy = MemoryPolicy {
    mode: 0x8002,
    nodes: 5,
    home: Some(2),
};

pub(super) fn address_space() -> Mm {
    let vma = |start: u64, backing| Vma {
        start,
        end: start + 0x2000,
        prot: 3,
        backing,
        ..Vma::default()
    };
    let file = FileIdentity {
        at: path("/lib/libc.so.6", 13),
        size: 1_900_000,
        mtime: 1_600_000_000_000_000_003,
    };
    let flagged = Vma {
        shared: true,
        growsdown: true,
        noreserve: true,
        locked: true,
        on_fault: true,
        droppable: true,
        pkey: 3,
        policy: Some(POLICY),
        advice: vec![10, 14],
        ..vma(0x10_0000, Backing::Anonymous)
    };
    let mapped = Backing::File {
        file,
        offset: 0x3000,
        writable: true,
    };
    let shared = Backing::Content {
        id: ContentId(2),
        offset: 0x1000,
    };
    Mm {
        bounds: MmBounds {
            start_code: 1,
            end_code: 2,
            start_data: 3,
            end_data: 4,
            start_brk: 5,
            brk: 6,
            start_stack: 7,
            arg_start: 8,
            arg_end: 9,
            env_start: 10,
            env_end: 11,
        },
        auxv: vec![33; 320],
        vmas: vec![
            flagged,
            vma(0x20_0000, mapped),
            vma(0x30_0000, shared),
            vma(0x40_0000, Backing::Vdso),
            vma(0x50_0000, Backing::Vvar),
            vma(0x60_0000, super::system::aio_ring()),
            vma(0x70_0000, super::system::mapped_uring()),
            vma(0x400_0000, Backing::AnonymousHuge { page: 1 << 21 }),
        ],
        pages: vec![PageRun {
            addr: 0x10_0000,
            pages: 2,
            slot: 1,
        }],
        vdso: Some(Vdso {
            addr: 0x40_0000,
            code: vec![0xcc; 64],
        }),
        def_flags: 0x2000,
        pkeys: 0b1010,
        mdwe: 1,
        merge_any: true,
        membarrier: 0x10,
        ..Mm::default()
    }
}

pub(super) fn contents() -> Vec<Content> {
    let content = |kind| Content {
        kind,
        size: 5000,
        mode: 0o640,
        uid: 1,
        gid: 2,
        pages: Vec::new(),
        ..Content::default()
    };
    let memfd = ContentKind::Memfd {
        name: "jit".into(),
        seals: 3,
    };
    let filled = Content {
        pages: vec![PageRun {
            addr: 4096,
            pages: 1,
            slot: 0,
        }],
        ..content(memfd)
    };
    let huge = Content {
        huge_page: 1 << 21,
        ..content(ContentKind::SharedAnonymous)
    };
    let deleted = ContentKind::Deleted {
        at: path("/tmp/gone", 19),
    };
    vec![
        content(ContentKind::SharedAnonymous),
        filled,
        content(super::system::segment()),
        content(deleted),
        huge,
    ]
}
