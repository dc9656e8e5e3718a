//! Images of any content, with the checksums put right: a checksum keeps damage out, not malice.
//! What decodes is encoded to something that decodes to the same.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tracker::image::{Header, decode, encode};

/// kind: u16, version: u16, length: u64, crc: u32 (docs/image-format.md).
const FRAME: usize = 16;

fuzz_target!(|input: &[u8]| {
    let mut bytes = Header::current().to_bytes().to_vec();
    let mut rest = input.get(Header::LEN..).unwrap_or_default();
    let mut records = 0_u64;
    while rest.len() >= FRAME {
        let length = u64::from_le_bytes(rest[4..12].try_into().expect("eight bytes"));
        let length = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len() - FRAME);
        let (record, more) = rest.split_at(FRAME + length);
        rest = more;
        if record[..2] == [0xff, 0xff] {
            break;
        }
        push(&mut bytes, &record[..4], &record[FRAME..]);
        records += 1;
    }
    // The seal is a CBOR array of the number of records and the checksum before it.
    let crc = crc32fast::hash(&bytes);
    let mut seal = vec![0x82, 0x1b];
    seal.extend(records.to_be_bytes());
    seal.push(0x1a);
    seal.extend(crc.to_be_bytes());
    push(&mut bytes, &[0xff, 0xff, 1, 0], &seal);

    if let Ok(image) = decode(&bytes) {
        // Compared as bytes: a float that is no number does not equal itself.
        let again = encode(&image);
        let image = decode(&again).expect("what was encoded here");
        assert_eq!(encode(&image), again);
    }
    // And as it is.
    let _ = decode(input);
});

fn push(bytes: &mut Vec<u8>, head: &[u8], payload: &[u8]) {
    let start = bytes.len();
    bytes.extend(head);
    bytes.extend((payload.len() as u64).to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&bytes[start..]);
    hasher.update(payload);
    bytes.extend(hasher.finalize().to_le_bytes());
    bytes.extend(payload);
}
