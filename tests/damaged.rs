//! Damaged images: whatever is wrong with one, it is refused, and the error names the record and
//! where it begins. `tracker` ends with 5.

mod sample;

use proptest::prelude::*;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use tracker::image::{
    DirectoryStore, Header, Image, ImageError, Pages, StoreError, decode, encode,
};
use tracker::model::frozen::{AioRing, Backing, FileKind, IoUring, PageRun};

/// kind: u16, version: u16, length: u64, crc: u32 (docs/image-format.md).
const FRAME: usize = 16;

/// The sample, and where each of its records lies.
fn metadata() -> (Vec<u8>, Vec<Range<usize>>) {
    let dir = tempfile::tempdir().unwrap();
    let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
    let bytes = encode(&sample::everything(&store));
    let records = records(&bytes);
    let kinds: std::collections::BTreeSet<_> = records.iter().map(|r| kind(&bytes, r)).collect();
    assert_eq!(kinds, (1..=9).chain([0xffff]).collect(), "every kind");
    (bytes, records)
}

fn records(bytes: &[u8]) -> Vec<Range<usize>> {
    let mut records = Vec::new();
    let mut at = Header::LEN;
    while at < bytes.len() {
        let len = u64::from_le_bytes(bytes[at + 4..at + 12].try_into().unwrap());
        let end = at + FRAME + usize::try_from(len).unwrap();
        records.push(at..end);
        at = end;
    }
    records
}

fn kind(bytes: &[u8], record: &Range<usize>) -> u16 {
    u16::from_le_bytes(bytes[record.start..record.start + 2].try_into().unwrap())
}

/// Puts a record's own checksum right.
fn sum(record: &mut [u8]) {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..12]);
    hasher.update(&record[FRAME..]);
    record[12..FRAME].copy_from_slice(&hasher.finalize().to_le_bytes());
}

/// A record with another payload and the right length and checksum.
fn with_payload(record: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut new = [&record[..FRAME], payload].concat();
    new[4..12].copy_from_slice(&(payload.len() as u64).to_le_bytes());
    sum(&mut new);
    new
}

/// Records behind a header, with a seal that is right: what checksums do not find.
fn sealed<'a>(records: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
    let mut bytes = Header::current().to_bytes().to_vec();
    let mut count = 0_u64;
    for record in records {
        bytes.extend(record);
        count += 1;
    }
    // An array of two: the number of records and the checksum of all before it.
    let crc = crc32fast::hash(&bytes);
    let mut seal = vec![0x82, 0x1b];
    seal.extend(count.to_be_bytes());
    seal.push(0x1a);
    seal.extend(crc.to_be_bytes());
    let mut frame = [0; FRAME];
    frame[..4].copy_from_slice(&[0xff, 0xff, 1, 0]);
    bytes.extend(with_payload(&frame, &seal));
    bytes
}

/// All records but the seal.
fn unsealed<'a>(bytes: &'a [u8], records: &[Range<usize>]) -> Vec<&'a [u8]> {
    let all = records.iter().map(|record| &bytes[record.clone()]);
    all.take(records.len() - 1).collect()
}

/// The error is about record `number`, which begins at `offset`.
#[track_caller]
fn refused(bytes: &[u8], number: usize, offset: usize) -> ImageError {
    let error = decode(bytes).expect_err("a damaged image must not decode");
    let named = (error.record, error.offset);
    assert_eq!(named, (number as u64, offset as u64), "{error}");
    error
}

#[test]
fn the_sample_itself_is_right() {
    let (bytes, records) = metadata();
    let again = sealed(unsealed(&bytes, &records));
    assert_eq!(decode(&again).unwrap(), decode(&bytes).unwrap());
}

#[test]
fn a_truncated_record_is_named() {
    let (bytes, records) = metadata();
    for end in 0..Header::LEN {
        refused(&bytes[..end], 0, 0);
    }
    for (index, record) in records.iter().enumerate() {
        for end in record.clone() {
            refused(&bytes[..end], index + 1, record.start);
        }
    }
}

#[test]
fn a_flipped_bit_is_found_where_it_is() {
    let (mut bytes, records) = metadata();
    let record_at = |at: usize| records.iter().position(|record| record.contains(&at));
    for at in 0..bytes.len() {
        let bit = 1 << (at % 8);
        bytes[at] ^= bit;
        match record_at(at) {
            Some(index) => refused(&bytes, index + 1, records[index].start),
            None => refused(&bytes, 0, 0),
        };
        bytes[at] ^= bit;
    }
}

#[test]
fn reordered_repeated_and_missing_records_are_found() {
    let (bytes, records) = metadata();
    let list = unsealed(&bytes, &records);
    let start = |index: usize| records[index].start;
    for index in 0..list.len() {
        // The seal as it was: it is what does not fit, if nothing before it does.
        let mut dropped = bytes.clone();
        dropped.drain(records[index].clone());
        assert!(decode(&dropped).is_err(), "record {} missing", index + 1);
        // A seal that fits.
        let mut repeated = list.clone();
        repeated.insert(index, list[index]);
        let error = refused(&sealed(repeated), index + 2, records[index].end);
        assert!(
            error.reason.contains("second")
                || error.reason.contains("order")
                || error.reason.contains("after"),
            "{error}"
        );
        if index + 1 == list.len() {
            continue;
        }
        let mut swapped = list.clone();
        swapped.swap(index, index + 1);
        let kinds = [index, index + 1].map(|index| kind(&bytes, &records[index]));
        match decode(&sealed(swapped)) {
            // Threads but the first are in no order.
            Ok(_) => assert_eq!(kinds, [4, 4], "records {} and the next", index + 1),
            Err(error) => {
                assert!(error.offset >= start(index) as u64, "{error}");
            }
        }
    }
}

#[test]
fn an_absurd_length_is_refused_where_it_is() {
    let (bytes, records) = metadata();
    for (index, record) in records.iter().enumerate() {
        let length = (record.len() - FRAME) as u64;
        for absurd in [
            0,
            length - 1,
            length + 1,
            1 << 40,
            i64::MAX as u64,
            u64::MAX,
        ] {
            let mut bytes = bytes.clone();
            bytes[record.start + 4..record.start + 12].copy_from_slice(&absurd.to_le_bytes());
            refused(&bytes, index + 1, record.start);
            // With a checksum that fits, where there are so many bytes.
            let end = usize::try_from(absurd)
                .ok()
                .and_then(|len| len.checked_add(record.start + FRAME));
            if let Some(part) = end.and_then(|end| bytes.get_mut(record.start..end)) {
                sum(part);
                refused(&bytes, index + 1, record.start);
            }
        }
    }
}

#[test]
fn an_image_without_its_seal_does_not_exist() {
    let (bytes, records) = metadata();
    let seal = records.last().unwrap();
    let error = refused(&bytes[..seal.start], records.len(), seal.start);
    assert!(error.reason.contains("ends within"), "{error}");
    let more = [&bytes[..], b"x"].concat();
    refused(&more, records.len(), seal.start);
}

#[test]
fn an_unknown_kind_or_version_is_refused() {
    let (bytes, records) = metadata();
    for (index, record) in records.iter().enumerate() {
        for (at, value, expected) in [(0, 0x7777_u16, "kind"), (2, 7, "version 7")] {
            let mut bytes = bytes.clone();
            let place = record.start + at;
            bytes[place..place + 2].copy_from_slice(&value.to_le_bytes());
            sum(&mut bytes[record.clone()]);
            let error = refused(&bytes, index + 1, record.start);
            assert!(error.reason.contains(expected), "{error}");
        }
    }
}

/// A ring that its mapping has no room for would be written past it.
#[test]
fn an_aio_ring_fits_its_mapping() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
    let image = sample::everything(&store);
    let spoil: [fn(&mut AioRing); 4] = [
        |ring| ring.nr = 4096,
        |ring| ring.head = ring.nr,
        |ring| ring.events.push(0),
        |ring| ring.events.resize(ring.nr as usize * AioRing::EVENT, 0),
    ];
    for spoil in spoil {
        let mut image = image.clone();
        let mms = image.applications[0].mms.values_mut();
        let mut backings = mms.flat_map(|mm| &mut mm.vmas).map(|vma| &mut vma.backing);
        let ring = backings.find_map(|backing| match backing {
            Backing::AioRing(ring) => Some(ring),
            _ => None,
        });
        spoil(ring.unwrap());
        let error = decode(&encode(&image)).unwrap_err();
        assert!(error.reason.contains("AIO ring"), "{error}");
    }
}

/// One that is shorter or longer than it says would be written past its end, or not to it.
#[test]
fn an_io_uring_instance_is_as_long_as_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
    let image = sample::everything(&store);
    let spoil: [fn(&mut IoUring); 4] = [
        |ring| ring.ring.push(0),
        |ring| ring.sqes.clear(),
        |ring| ring.cq_entries = u32::MAX,
        |ring| ring.sq_array = u32::MAX,
    ];
    for spoil in spoil {
        let mut image = image.clone();
        let mut files = image.applications[0].ofds.values_mut();
        let ring = files.find_map(|file| match &mut file.kind {
            FileKind::IoUring(ring) => Some(ring),
            _ => None,
        });
        spoil(ring.unwrap());
        let error = decode(&encode(&image)).unwrap_err();
        assert!(error.reason.contains("io_uring"), "{error}");
    }
}

/// What would put one page in another's place.
#[test]
fn page_extents_lie_within_the_image_and_apart() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
    let image = sample::everything(&store);
    let check = |of_content: bool, runs: &[(u64, u64, u64)], expected: &str| {
        let mut image = image.clone();
        let runs = runs
            .iter()
            .map(|&(addr, pages, slot)| PageRun { addr, pages, slot });
        let app = &mut image.applications[0];
        let (place, wanted) = if of_content {
            let content = app
                .contents
                .values_mut()
                .find(|content| !content.pages.is_empty());
            (&mut content.unwrap().pages, 8)
        } else {
            (&mut app.mms.values_mut().next().unwrap().pages, 5)
        };
        *place = runs.collect();
        let bytes = encode(&image);
        let error = decode(&bytes).expect_err(expected);
        assert!(error.reason.contains(expected), "{error}, not {expected}");
        let record = &records(&bytes)[usize::try_from(error.record).unwrap() - 1];
        assert_eq!(error.offset, record.start as u64);
        assert_eq!(kind(&bytes, record), wanted, "{error}");
    };
    let page = 4096;
    for (run, expected) in [
        ((0x10_0000, 2, 2), "beyond the 3 page slots"),
        ((0x10_0000, 1, u64::MAX), "beyond the 3 page slots"),
        ((0x10_0000, 0, 1), "no range"),
        ((0x10_0000, u64::MAX, 1), "no range"),
        ((0x10_0001, 1, 1), "no range"),
        ((u64::MAX - 4095, 1, 1), "no range"),
        ((0x10_0000 - page, 2, 1), "outside of its mappings"),
        ((0x10_1000, 2, 1), "outside of its mappings"),
        ((0x80_0000, 1, 1), "outside of its mappings"),
    ] {
        check(false, &[run], expected);
    }
    let (first, second) = (0x10_0000, 0x10_1000);
    check(false, &[(first, 1, 1), (second, 1, 1)], "share page slot 1");
    check(false, &[(first, 2, 0), (second, 1, 2)], "overlap");
    check(false, &[(second, 1, 1), (first, 1, 2)], "overlap");
    // 5,000 bytes are two pages.
    check(true, &[(2 * page, 1, 0)], "beyond its end");
    check(true, &[(0, 1, 1)], "share page slot 1");
    check(true, &[(0, 4, 0)], "beyond the 3 page slots");
}

#[test]
fn a_damaged_page_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let store = DirectoryStore::create(&path).unwrap();
    let image = sample::everything(&store);
    let verify = || -> Result<(), StoreError> {
        let mut all = image.applications.iter();
        all.try_for_each(|app| Pages::new(&store, &image.slots).verify(app))
    };
    verify().unwrap();
    let pages = fs::read(path.join("pages")).unwrap();
    for at in (0..pages.len()).step_by(509) {
        let mut bytes = pages.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(path.join("pages"), &bytes).unwrap();
        match verify() {
            Err(StoreError::Page { slot, offset }) => {
                assert_eq!(slot, (at / 4096) as u64);
                assert_eq!(offset, slot * 4096);
            }
            other => panic!("byte {at}: {other:?}"),
        }
    }
    fs::write(path.join("pages"), &pages[..2 * 4096]).unwrap();
    assert!(matches!(verify(), Err(StoreError::Io { .. })));
}

/// The exit code and what was said on stderr.
fn tracker(arguments: &[&str], image: &Path) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tracker"));
    let output = command.args(arguments).arg(image).output().unwrap();
    assert!(output.stdout.is_empty() || output.status.success());
    (
        output.status.code(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn tracker_says_image_invalid_for_all_of_it() {
    let (bytes, records) = metadata();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, metadata: Option<&[u8]>, pages: &[u8]| {
        let path = dir.path().join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("pages"), pages).unwrap();
        if let Some(metadata) = metadata {
            fs::write(path.join("metadata"), metadata).unwrap();
        }
        path
    };
    let right = write("right", Some(&bytes), &sample::pages());
    assert_eq!(tracker(&["inspect"], &right).0, Some(0));
    assert_eq!(tracker(&["inspect", "--json"], &right).0, Some(0));

    let check = |path: &Path, restored: bool, named: &str| {
        for arguments in [
            &["inspect"][..],
            &["inspect", "--json"],
            &["restore", "--detach", "--image"],
        ] {
            if arguments[0] == "restore" && !restored {
                continue;
            }
            let (code, said) = tracker(arguments, path);
            assert_eq!(code, Some(5), "{arguments:?} {}: {said}", path.display());
            assert!(said.contains(named), "{said}");
        }
    };
    let mut seen = Vec::new();
    for (index, record) in records.iter().enumerate() {
        let kind = kind(&bytes, record);
        if seen.contains(&kind) {
            continue;
        }
        seen.push(kind);
        let named = format!("at byte {}, record {}:", record.start, index + 1);
        let mut flipped = bytes.clone();
        flipped[record.end - 1] ^= 0x10;
        check(
            &write(&format!("flip.{kind}"), Some(&flipped), &[]),
            true,
            &named,
        );
        let cut = &bytes[..record.end - 1];
        check(&write(&format!("cut.{kind}"), Some(cut), &[]), true, &named);
    }
    let mut newer = bytes.clone();
    newer[12] = 2;
    let crc = crc32fast::hash(&newer[..20]);
    newer[20..24].copy_from_slice(&crc.to_le_bytes());
    check(&write("newer", Some(&newer), &[]), true, "format version 2");
    check(&write("unsealed", None, &[]), true, "no sealed image");
    // A restore needs privileges before it reads the first page: vmtests do that.
    let mut pages = sample::pages();
    pages[5000] ^= 1;
    check(
        &write("page", Some(&bytes), &pages),
        false,
        "at byte 4096 of its pages, slot 1",
    );
    check(
        &write("short", Some(&bytes), &pages[..4096]),
        false,
        "read ",
    );
}

proptest! {
    /// Past the checksums: what the payload of a record says is not believed either.
    #[test]
    fn any_payload_decodes_to_what_can_be_encoded_or_is_refused(
        which in any::<prop::sample::Index>(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let (bytes, records) = metadata();
        let mut list = unsealed(&bytes, &records);
        let which = which.index(list.len());
        let mut payload = list[which][FRAME..].to_vec();
        for (at, value) in flips {
            let at = at.index(payload.len());
            payload[at] = value;
        }
        if let Some(cut) = cut {
            payload.truncate(cut.index(payload.len()));
        }
        let record = with_payload(list[which], &payload);
        list[which] = &record;
        match decode(&sealed(list)) {
            Ok(image) => {
                let again = encode(&image);
                prop_assert_eq!(encode(&decode(&again).expect("encoded here")), again);
            }
            Err(error) => {
                prop_assert!(error.record > which as u64, "{}", error);
                prop_assert!(error.offset >= records[which].start as u64, "{}", error);
            }
        }
    }
}

#[test]
fn two_applications_of_one_name_are_refused() {
    let image = Image {
        applications: vec![Default::default(), Default::default()],
        ..Image::default()
    };
    let error = decode(&encode(&image)).unwrap_err();
    assert!(error.reason.contains("second application"), "{error}");
}
