//! The fixed header, readable without decoding anything behind it.

use super::ImageError;
use crc32fast::hash;

/// Version of the format; independent of the program's version.
pub const FORMAT_VERSION: u32 = 1;

/// `e_machine` of x86-64 (elf.h), the only architecture there is.
pub const ARCH_X86_64: u32 = 62;

const MAGIC: &[u8; 8] = b"TRACKIMG";

/// The first [`Header::LEN`] bytes of the metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// `e_machine` value of the architecture.
    pub arch: u32,
    /// [`FORMAT_VERSION`] of the writer.
    pub version: u32,
    /// No flag is defined yet.
    pub flags: u32,
}

impl Header {
    /// Bytes a header takes.
    pub const LEN: usize = 24;

    /// The header this program writes.
    #[must_use]
    pub fn current() -> Self {
        Self {
            arch: ARCH_X86_64,
            version: FORMAT_VERSION,
            flags: 0,
        }
    }

    /// Encodes it, checksum included.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..8].copy_from_slice(MAGIC);
        for (at, value) in [(8, self.arch), (12, self.version), (16, self.flags)] {
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let crc = hash(&bytes[..20]);
        bytes[20..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads a header and checks that this program can decode what follows.
    ///
    /// # Errors
    /// Not an image, damaged, another architecture, a newer format.
    pub fn parse(bytes: &[u8]) -> Result<Self, ImageError> {
        let invalid = |reason: String| ImageError {
            record: 0,
            offset: 0,
            reason,
        };
        let Some(bytes) = bytes.get(..Self::LEN) else {
            return Err(invalid(format!(
                "{} bytes are too short for a header",
                bytes.len()
            )));
        };
        if &bytes[..8] != MAGIC {
            return Err(invalid("this is not a tracker image".into()));
        }
        let word = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        if hash(&bytes[..20]) != word(20) {
            return Err(invalid("the header's checksum is wrong".into()));
        }
        let header = Self {
            arch: word(8),
            version: word(12),
            flags: word(16),
        };
        if header.arch != ARCH_X86_64 {
            return Err(invalid(format!(
                "made on another architecture (e_machine {})",
                header.arch
            )));
        }
        if header.version != FORMAT_VERSION {
            return Err(invalid(format!(
                "format version {} is not the {FORMAT_VERSION} this program knows",
                header.version
            )));
        }
        if header.flags != 0 {
            return Err(invalid(format!("unknown flags {:#x}", header.flags)));
        }
        Ok(header)
    }
}
