//! The image format: what is written is read back, and nothing else is accepted.

use proptest::prelude::*;
use std::collections::BTreeMap;
use tracker::image::{
    DirectoryStore, Header, Image, RangeStore, Store, StoreError, decode, encode,
};
use tracker::model::frozen::{
    Application, ApplicationHeader, Clocks, Content, ContentKind, FdEntry, FileKind, FilesTable,
    Mm, OpenFile, PageRun, Process, Registers, SigInfo, System, Thread,
};
use tracker::model::ids::{Fd, FilesId, MmId, OfdId, Pid, Tid};

/// One application with an object in every record kind.
fn sample() -> Image {
    let thread = |tid| Thread {
        tid: Tid(tid),
        comm: b"server".to_vec(),
        regs: Registers {
            rip: 0x5555_0000,
            orig_rax: u64::MAX,
            ..Registers::default()
        },
        xstate: vec![0xaa; 2696],
        pending: vec![SigInfo(vec![7; 128])],
        ..Thread::default()
    };
    let process = Process {
        pid: Pid(20_001),
        mm: MmId(0xffff_8880_0000_1000),
        files: FilesId(0xffff_8880_0000_2000),
        threads: vec![thread(20_001), thread(20_002)],
        ..Process::default()
    };
    let open = OpenFile {
        flags: 2,
        pos: 0,
        owner: None,
        locks: Vec::new(),
        kind: FileKind::Eventfd {
            count: 3,
            semaphore: true,
        },
    };
    let application = Application {
        header: ApplicationHeader {
            name: "redis".into(),
            clocks: Clocks {
                monotonic: 17,
                boottime: 18,
                realtime: 19,
            },
            ..ApplicationHeader::default()
        },
        mms: BTreeMap::from([(
            process.mm,
            Mm {
                pages: vec![PageRun {
                    addr: 0x7000,
                    pages: 2,
                    slot: 0,
                }],
                ..Mm::default()
            },
        )]),
        files: BTreeMap::from([(
            process.files,
            FilesTable {
                fds: vec![FdEntry {
                    fd: Fd(3),
                    ofd: OfdId(0x42),
                    cloexec: true,
                }],
            },
        )]),
        ofds: BTreeMap::from([(OfdId(0x42), open)]),
        contents: BTreeMap::from([(
            tracker::model::frozen::ContentId(9),
            Content {
                kind: ContentKind::Memfd {
                    name: "jit".into(),
                    seals: 1,
                },
                ..Content::default()
            },
        )]),
        processes: vec![process],
    };
    Image {
        system: Some(System::default()),
        applications: vec![application.clone(), application],
    }
}

#[test]
fn what_is_written_is_read_back() {
    let image = sample();
    assert_eq!(decode(&encode(&image)).unwrap(), image);
    assert_eq!(
        decode(&encode(&Image::default())).unwrap(),
        Image::default()
    );
}

#[test]
fn an_image_without_its_seal_does_not_exist() {
    let bytes = encode(&sample());
    for end in 0..bytes.len() {
        let error = decode(&bytes[..end]).expect_err("a truncated image must not decode");
        assert!(error.offset <= end as u64, "{error}");
    }
}

#[test]
fn records_cannot_be_reordered_or_repeated() {
    let bytes = encode(&sample());
    let mut at = vec![Header::LEN];
    while *at.last().unwrap() < bytes.len() {
        let start = *at.last().unwrap();
        let len = u64::from_le_bytes(bytes[start + 4..start + 12].try_into().unwrap());
        at.push(start + 16 + usize::try_from(len).unwrap());
    }
    assert!(at.len() > 10, "the sample has {} records", at.len());
    for pair in at.windows(3) {
        let (a, b, c) = (pair[0], pair[1], pair[2]);
        let swapped = [&bytes[..a], &bytes[b..c], &bytes[a..b], &bytes[c..]].concat();
        assert!(
            swapped == bytes || decode(&swapped).is_err(),
            "records at {a} and {b} swapped"
        );
        let repeated = [&bytes[..b], &bytes[a..b], &bytes[b..]].concat();
        assert!(decode(&repeated).is_err(), "record at {a} repeated");
        let dropped = [&bytes[..a], &bytes[b..]].concat();
        assert!(decode(&dropped).is_err(), "record at {a} dropped");
    }
}

#[test]
fn another_architecture_and_a_newer_format_are_named() {
    for (at, expected) in [(8, "architecture"), (12, "format version"), (16, "flags")] {
        let mut bytes = encode(&sample());
        bytes[at] = 0xb7;
        let crc = crc32fast::hash(&bytes[..20]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        let error = decode(&bytes).unwrap_err();
        assert!(error.reason.contains(expected), "{error}");
    }
}

proptest! {
    #[test]
    fn a_changed_bit_is_found(byte in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let mut bytes = encode(&sample());
        let at = byte.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_decode_nor_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let framed = [&Header::current().to_bytes()[..], &bytes].concat();
        prop_assert!(decode(&framed).is_err());
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn an_absurd_length_is_refused(len in any::<u64>()) {
        let mut bytes = encode(&sample());
        let at = Header::LEN + 4;
        prop_assume!(bytes[at..at + 8] != len.to_le_bytes());
        bytes[at..at + 8].copy_from_slice(&len.to_le_bytes());
        prop_assert!(decode(&bytes).is_err());
    }
}

fn pages(fill: u8, count: usize) -> Vec<u8> {
    vec![fill; count * 4096]
}

#[test]
fn a_directory_image_exists_once_committed_and_is_never_overwritten() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut store = DirectoryStore::create(&path).unwrap();
    store.write_pages(3, &pages(3, 2)).unwrap();
    assert!(matches!(store.metadata(), Err(StoreError::NotSealed(..))));
    store.commit(b"metadata", 5).unwrap();
    assert!(matches!(
        DirectoryStore::create(&path),
        Err(StoreError::Exists(_))
    ));

    let store = DirectoryStore::open(&path).unwrap();
    let mut read = pages(0, 2);
    store.read_pages(3, &mut read).unwrap();
    assert_eq!(read, pages(3, 2));
    assert_eq!(store.metadata().unwrap(), b"metadata");
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join("pages")), 0o600);
    assert_eq!(mode(&path.join("metadata")), 0o600);
}

#[test]
fn an_unsealed_directory_image_can_be_discarded() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    DirectoryStore::create(&path).unwrap().discard();
    assert!(!path.exists());
}

#[test]
fn a_range_holds_an_image_from_commit_to_erase() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("range");
    std::fs::write(&path, vec![0x5a; 64 * 4096]).unwrap();
    assert!(matches!(
        RangeStore::open(&path).unwrap().metadata(),
        Err(StoreError::NotSealed(..))
    ));

    let mut store = RangeStore::create(&path).unwrap();
    store.write_pages(1, &pages(7, 1)).unwrap();
    assert!(matches!(store.metadata(), Err(StoreError::NotSealed(..))));
    store.commit(b"metadata", 2).unwrap();

    let store = RangeStore::open(&path).unwrap();
    assert_eq!(store.metadata().unwrap(), b"metadata");
    let mut read = pages(0, 1);
    store.read_pages(1, &mut read).unwrap();
    assert_eq!(read, pages(7, 1));
    let (fd, base) = store.page_file();
    let file = std::fs::File::from(fd.try_clone_to_owned().unwrap());
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut read, base + 4096).unwrap();
    assert_eq!(read, pages(7, 1));

    store.erase().unwrap();
    assert!(matches!(store.metadata(), Err(StoreError::NotSealed(..))));
}

#[test]
fn a_range_that_is_too_small_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("range");
    std::fs::write(&path, vec![0; 4 * 4096]).unwrap();
    let mut store = RangeStore::create(&path).unwrap();
    assert!(matches!(
        store.write_pages(3, &pages(1, 1)),
        Err(StoreError::Full { .. })
    ));
    assert!(matches!(
        store.commit(&pages(1, 2), 2),
        Err(StoreError::Full { .. })
    ));
}
