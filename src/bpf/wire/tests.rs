//! Whatever bytes a ring holds, decoding takes them.

use super::{decode, encode};
use crate::bpf::events::EventKind;
use crate::model::event::Body;
use proptest::prelude::*;

/// The numbers that are a kind, and some around them.
const KINDS: std::ops::Range<u32> = 60..100;

/// Sizes of the layouts, for records that are right on the outside.
const SIZES: [usize; 13] = [16, 32, 40, 48, 80, 144, 272, 336, 560, 0, 8, 24, 600];

fn record(kind: u32, size: u32, rest: &[u8]) -> Vec<u8> {
    [&kind.to_ne_bytes(), &size.to_ne_bytes(), rest].concat()
}

/// A record with a kind, the size it says and anything inside.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    (KINDS, prop::sample::select(&SIZES[..])).prop_flat_map(|(kind, size)| {
        let rest = prop::collection::vec(any::<u8>(), size.saturating_sub(8));
        rest.prop_map(move |rest| record(kind, u32::try_from(size).unwrap(), &rest))
    })
}

proptest! {
    #[test]
    fn any_bytes_decode_or_are_malformed(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        match decode(&bytes) {
            Ok(event) => prop_assert_eq!(event.seq.to_ne_bytes().to_vec(), bytes[8..16].to_vec()),
            Err(_) => prop_assert!(bytes.len() < 16),
        }
    }

    /// A layout takes any content, and what is decoded says what the record did.
    #[test]
    fn plausible_records_mean_what_they_say(bytes in plausible()) {
        let Ok(event) = decode(&bytes) else {
            prop_assert!(bytes.len() < 16);
            return Ok(());
        };
        // A name that is no text is not kept as it was.
        let named = matches!(event.body, Body::TaskNew(_) | Body::TaskExec(_) | Body::TaskRename { .. });
        if event.body != Body::Malformed && !named {
            prop_assert_eq!(decode(&encode(&event)).unwrap(), event);
        }
    }

    /// The size in the header decides: bytes behind it are the ring's padding, and a record
    /// that is cut, or says another size than its kind has, is malformed.
    #[test]
    fn another_size_is_malformed(bytes in plausible(), grow in 1..64_usize, at in any::<prop::sample::Index>()) {
        let Ok(event) = decode(&bytes) else { return Ok(()) };
        let mut longer = bytes.clone();
        longer.resize(bytes.len() + grow, 0xa5);
        prop_assert_eq!(&decode(&longer).unwrap(), &event, "padding");
        let size = u32::try_from(longer.len()).unwrap();
        longer[4..8].copy_from_slice(&size.to_ne_bytes());
        if event.body != Body::Malformed && !SIZES.contains(&longer.len()) {
            prop_assert_eq!(decode(&longer).unwrap().body, Body::Malformed, "over-long");
        }
        let cut = &bytes[..at.index(bytes.len())];
        match decode(cut) {
            Ok(event) => prop_assert_eq!(event.body, Body::Malformed),
            Err(error) => prop_assert!(cut.len() < 16, "{error}"),
        }
    }
}

/// Every kind has a layout; without its own size it is none.
#[test]
fn every_kind_is_decoded_from_one_size_alone() {
    for kind in EventKind::TASK_NEW..=EventKind::FILES_COPIED {
        let sizes: Vec<_> = (16..1024_u32)
            .filter(|size| {
                // A class and a table that exist; everything else may be 1.
                let rest = [1; 1024];
                let mut bytes = record(kind, *size, &rest[..*size as usize - 8]);
                for word in bytes[16..].chunks_exact_mut(4) {
                    word.copy_from_slice(&1_u32.to_ne_bytes());
                }
                decode(&bytes).unwrap().body != Body::Malformed
            })
            .collect();
        assert_eq!(
            sizes.len(),
            1,
            "kind {kind} is decoded from {sizes:?} bytes"
        );
    }
}
