//! How much memory the decoder takes is bounded by the size of what it reads, whatever the bytes
//! claim. Alone in its file: all that this program allocates is counted.

mod sample;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;
use tracker::image::{DirectoryStore, Header, decode, encode};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Bytes allocated, all together, for each byte read: a list grows by doubling, and the smallest
/// of its elements takes one byte in an image and some twenty in memory.
const FACTOR: usize = 128;

/// What a length that is claimed makes the decoder set aside at most, for all lists within lists.
const CLAIMED: usize = 8 << 20;

const FRAME: usize = 16;

#[track_caller]
fn check(bytes: &[u8], what: &str) {
    let region = Region::new(ALLOCATOR);
    let result = decode(bytes);
    let change = region.change();
    let total = change.bytes_allocated + usize::try_from(change.bytes_reallocated).unwrap_or(0);
    let limit = FACTOR * bytes.len() + CLAIMED;
    assert!(total <= limit, "{what}: {total} bytes for {}", bytes.len());
    drop(result);
}

/// An image of one record, sealed.
fn image(records: &[(u16, &[u8])]) -> Vec<u8> {
    let mut bytes = Header::current().to_bytes().to_vec();
    let push = |bytes: &mut Vec<u8>, kind: u16, payload: &[u8]| {
        let start = bytes.len();
        bytes.extend(kind.to_le_bytes());
        bytes.extend([1, 0]);
        bytes.extend((payload.len() as u64).to_le_bytes());
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&bytes[start..]);
        hasher.update(payload);
        bytes.extend(hasher.finalize().to_le_bytes());
        bytes.extend(payload);
    };
    for (kind, payload) in records {
        push(&mut bytes, *kind, payload);
    }
    let mut seal = vec![0x82, 0x1b];
    seal.extend((records.len() as u64).to_be_bytes());
    seal.push(0x1a);
    seal.extend(crc32fast::hash(&bytes).to_be_bytes());
    push(&mut bytes, 0xffff, &seal);
    bytes
}

#[test]
fn memory_is_bounded_by_the_input() {
    let dir = tempfile::tempdir().unwrap();
    let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
    let sample = encode(&sample::everything(&store));
    check(&sample, "the sample");

    // A length field that claims everything.
    for at in Header::LEN..sample.len() - FRAME {
        if at % 7 == 0 {
            let mut bytes = sample.clone();
            bytes[at..at + 8].fill(0xff);
            check(&bytes, "a length field");
        }
    }
    let no_slots: (u16, &[u8]) = (9, &[0x40]);
    let payload = |kind| {
        let record = record_of(&sample, kind);
        &sample[record.start + FRAME..record.end]
    };
    let (application, process) = ((2, payload(2)), (3, payload(3)));
    // Each kind's own payload with every byte in turn made the head of a list, a map, a text and
    // a string of bytes that claim to be endless.
    for kind in 1..=9 {
        let payload = payload(kind);
        for at in 0..payload.len().min(600) {
            for head in [0x5b, 0x7b, 0x9b, 0xbb, 0x9f] {
                let mut bytes = payload[..at].to_vec();
                bytes.push(head);
                bytes.extend([0x00, 0x00, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
                bytes.extend(&payload[at..]);
                let records: &[(u16, &[u8])] = match kind {
                    1 | 9 => &[(kind, &bytes)],
                    2 => &[no_slots, (kind, &bytes)],
                    4 => &[no_slots, application, process, (kind, &bytes)],
                    _ => &[no_slots, application, (kind, &bytes)],
                };
                check(&image(records), "a claimed length");
            }
        }
    }
    // The smallest elements: names, pages, sums.
    let many = 200_000_u32;
    let mut sums = vec![0x5a];
    sums.extend(many.to_be_bytes());
    sums.resize(sums.len() + many as usize, 0);
    check(&image(&[(9, &sums)]), "many sums");
    let mut nested = vec![0x9f; 100_000];
    nested.extend(vec![0xff; 100_000]);
    for kind in 1..=9 {
        check(&image(&[(kind, &nested)]), "lists in lists");
    }
    let mut command = vec![0xa1, 0x67];
    command.extend(b"command");
    command.push(0x9a);
    command.extend(many.to_be_bytes());
    command.resize(command.len() + many as usize, 0x60);
    check(&image(&[no_slots, (2, &command)]), "many words");
}

fn record_of(bytes: &[u8], kind: u16) -> std::ops::Range<usize> {
    let mut at = Header::LEN;
    loop {
        let len = u64::from_le_bytes(bytes[at + 4..at + 12].try_into().unwrap());
        let end = at + FRAME + usize::try_from(len).unwrap();
        if bytes[at..at + 2] == kind.to_le_bytes() {
            return at..end;
        }
        at = end;
    }
}
