//! Frames: {kind, version, length, checksum} and a CBOR payload.

use super::ImageError;
use cbor4ii::core::dec::Read;
use cbor4ii::core::utils::SliceReader;
use cbor4ii::serde::{Deserializer, to_vec};
use crc32fast::Hasher;
use serde::{Serialize, de::DeserializeOwned};

/// What a record describes; one kind per kernel object kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum RecordKind {
    /// [`crate::model::frozen::System`]
    System = 1,
    /// [`crate::model::frozen::ApplicationHeader`]; the records up to the next one belong to it.
    Application = 2,
    /// [`crate::model::frozen::Process`] without its threads
    Process = 3,
    /// [`crate::model::frozen::Thread`] of the process before it
    Thread = 4,
    /// (`MmId`, [`crate::model::frozen::Mm`])
    Mm = 5,
    /// (`FilesId`, [`crate::model::frozen::FilesTable`])
    Files = 6,
    /// (`OfdId`, [`crate::model::frozen::OpenFile`])
    OpenFile = 7,
    /// (`ContentId`, [`crate::model::frozen::Content`])
    Content = 8,
    /// [`super::SlotSums`] of all pages, before the first application
    Slots = 9,
    /// Seals the image: record count and checksum of everything before it.
    Commit = 0xffff,
}

impl RecordKind {
    /// Version of this kind's payload that is written.
    #[must_use]
    pub fn version(self) -> u16 {
        match self {
            // Version 1 had CRC-32s.
            Self::Slots => 2,
            _ => 1,
        }
    }

    fn from_u16(value: u16) -> Option<Self> {
        use RecordKind::{
            Application, Commit, Content, Files, Mm, OpenFile, Process, Slots, System, Thread,
        };
        [
            System,
            Application,
            Process,
            Thread,
            Mm,
            Files,
            OpenFile,
            Content,
            Slots,
            Commit,
        ]
        .into_iter()
        .find(|kind| *kind as u16 == value)
    }
}

/// kind: u16, version: u16, length: u64, crc: u32; all little-endian.
pub(super) const FRAME_LEN: usize = 16;

/// One frame of a decoded stream.
pub(super) struct Frame<'a> {
    pub kind: RecordKind,
    pub payload: &'a [u8],
    /// Number in the stream, the first record is 1.
    pub number: u64,
    /// Where the frame begins.
    pub offset: usize,
}

fn checksum(head: &[u8], payload: &[u8]) -> u32 {
    let mut hasher = Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    hasher.finalize()
}

/// Appends one record.
pub(super) fn push<T: Serialize>(out: &mut Vec<u8>, kind: RecordKind, value: &T) {
    let start = out.len();
    out.extend_from_slice(&(kind as u16).to_le_bytes());
    out.extend_from_slice(&kind.version().to_le_bytes());
    out.extend_from_slice(&[0; FRAME_LEN - 4]);
    // Only memory can run out, and no frozen type has a map whose length serde cannot tell.
    *out = to_vec(std::mem::take(out), value).expect("CBOR of a plain value into memory");
    let len = (out.len() - start - FRAME_LEN) as u64;
    out[start + 4..start + 12].copy_from_slice(&len.to_le_bytes());
    let crc = checksum(&out[start..start + 12], &out[start + FRAME_LEN..]);
    out[start + 12..start + FRAME_LEN].copy_from_slice(&crc.to_le_bytes());
}

/// Reads the frame at `offset`.
pub(super) fn frame(bytes: &[u8], offset: usize, number: u64) -> Result<Frame<'_>, ImageError> {
    let invalid = |reason: String| ImageError {
        record: number,
        offset: offset as u64,
        reason,
    };
    let rest = &bytes[offset..];
    let Some(head) = rest.get(..FRAME_LEN) else {
        return Err(invalid("it ends within a record's frame".into()));
    };
    let kind = u16::from_le_bytes([head[0], head[1]]);
    let version = u16::from_le_bytes([head[2], head[3]]);
    let len = u64::from_le_bytes(head[4..12].try_into().unwrap_or_default());
    let crc = u32::from_le_bytes(head[12..16].try_into().unwrap_or_default());
    let payload = usize::try_from(len)
        .ok()
        .and_then(|len| len.checked_add(FRAME_LEN))
        .and_then(|end| rest.get(FRAME_LEN..end))
        .ok_or_else(|| invalid(format!("its length of {len} bytes reaches beyond the end")))?;
    if checksum(&head[..12], payload) != crc {
        return Err(invalid("its checksum is wrong".into()));
    }
    let kind =
        RecordKind::from_u16(kind).ok_or_else(|| invalid(format!("unknown record kind {kind}")))?;
    if version != kind.version() {
        return Err(invalid(format!("{kind:?} version {version} is not known")));
    }
    Ok(Frame {
        kind,
        payload,
        number,
        offset,
    })
}

impl Frame<'_> {
    /// Decodes the payload, all of it.
    pub(super) fn value<T: DeserializeOwned>(&self) -> Result<T, ImageError> {
        let mut decoder = Deserializer::new(SliceReader::new(self.payload));
        let value = T::deserialize(&mut decoder)
            .map_err(|e| self.invalid(format!("{:?} cannot be decoded: {e}", self.kind)))?;
        let mut reader = decoder.into_inner();
        let rest = match reader.fill(usize::MAX) {
            Ok(rest) => rest.as_ref().len(),
            Err(never) => match never {},
        };
        if rest == 0 {
            Ok(value)
        } else {
            Err(self.invalid(format!("{rest} bytes follow the {:?}", self.kind)))
        }
    }

    /// An error about this record.
    pub(super) fn invalid(&self, reason: String) -> ImageError {
        ImageError {
            record: self.number,
            offset: self.offset as u64,
            reason,
        }
    }

    /// Offset of the byte behind this record.
    pub(super) fn end(&self) -> usize {
        self.offset + FRAME_LEN + self.payload.len()
    }
}
