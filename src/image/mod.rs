//! Images: how a checkpoint lies on its carrier (docs/image-format.md).
//!
//! Two streams. *Metadata* is a header and framed, checksummed CBOR records,
//! closed by a commit record: without it the image does not exist. *Pages* are
//! 4 KiB slots that the records point into; one record has the checksum of each.

mod decode;
mod directory;
mod encode;
mod extents;
mod header;
mod pages;
mod record;
mod store;
mod stripes;
mod sums;

pub use decode::{decode, decode_one};
pub use directory::DirectoryStore;
pub use encode::encode;
pub use header::{FORMAT_VERSION, Header};
pub use pages::{Buffer, PART, Pages, bytes, each, each_with, parts, threads};
pub use record::RecordKind;
pub use store::{RangeStore, Store, StoreError};
pub use sums::{SlotSums, Written, page_sum, short_sum, sums};

use crate::model::frozen::{Application, System};

/// The decoded metadata of one image.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Image {
    /// State of the machine; only images made for a kexec have it.
    pub system: Option<System>,
    /// Checksums of the page slots.
    pub slots: SlotSums,
    /// Applications, each restored independently of the others.
    pub applications: Vec<Application>,
}

/// Why metadata is not a valid image. `offset` counts bytes from its start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("Image invalid at byte {offset}, record {record}: {reason}; make a new checkpoint")]
pub struct ImageError {
    /// Number of the record, 0 = the header.
    pub record: u64,
    /// Byte offset of that record.
    pub offset: u64,
    /// What is wrong.
    pub reason: String,
}
