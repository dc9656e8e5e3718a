//! Carriers: where metadata and page slots are kept.

use super::sums::{Written, while_writing};
use crate::model::frozen::PAGE_SIZE;
use crc32fast::hash;
use nix::errno::Errno;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Why a carrier could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The operating system refused.
    #[error("{operation} {path}: {source}; check the path, its permissions and free space")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A checkpoint never overwrites an image.
    #[error("{0} exists already; name a directory that does not exist")]
    Exists(PathBuf),
    /// Pages and metadata do not fit.
    #[error("The arena holds {capacity} bytes and {needed} are needed; reserve a larger one")]
    Full {
        /// Bytes the carrier has.
        capacity: u64,
        /// Bytes the image takes.
        needed: u64,
    },
    /// A page is not the one that was written.
    #[error(
        "Image invalid at byte {offset} of its pages, slot {slot}: its checksum is wrong; \
         make a new checkpoint"
    )]
    Page {
        /// Number of the page slot.
        slot: u64,
        /// Where it begins on the carrier.
        offset: u64,
    },
    /// No sealed image on this carrier.
    #[error("{0} holds no sealed image: {1}")]
    NotSealed(PathBuf, &'static str),
}

impl StoreError {
    /// Whether what was to be opened is not there.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A carrier. Page slots may be written in any order and again; the image
/// exists once [`Store::commit`] has returned.
pub trait Store: Send + Sync {
    /// Writes whole pages starting at `slot`, and notes their checksums.
    ///
    /// # Errors
    /// The carrier is full or refuses.
    fn write_pages(&self, slot: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let sums = while_writing(bytes, || self.write_unsummed(slot, bytes))?;
        self.written().note(slot, &sums);
        Ok(())
    }

    /// Writes whole pages starting at `slot`; their checksums must be noted in
    /// [`Store::written`].
    ///
    /// # Errors
    /// The carrier is full or refuses.
    fn write_unsummed(&self, slot: u64, bytes: &[u8]) -> Result<(), StoreError>;

    /// Checksums of the pages written through this value.
    fn written(&self) -> &Written;

    /// Reads whole pages starting at `slot`.
    ///
    /// # Errors
    /// The carrier refuses or ends before.
    fn read_pages(&self, slot: u64, bytes: &mut [u8]) -> Result<(), StoreError>;

    /// The byte offset of slot 0 on the carrier.
    fn first_slot(&self) -> u64;

    /// Seals the image: `slots` page slots are in use, `metadata` describes them.
    ///
    /// # Errors
    /// The carrier is full or refuses; the image does not exist then.
    fn commit(&mut self, metadata: &[u8], slots: u64) -> Result<(), StoreError>;

    /// The metadata of a sealed image.
    ///
    /// # Errors
    /// There is none, or the carrier refuses.
    fn metadata(&self) -> Result<Vec<u8>, StoreError>;
}

pub(super) fn io_error<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io {
        operation,
        path: path.to_owned(),
        source,
    }
}

pub(super) fn call_error<'a>(
    operation: &'static str,
    path: &'a Path,
) -> impl FnOnce(Errno) -> StoreError + 'a {
    move |errno| io_error(operation, path)(errno.into())
}

/// An image in a range of bytes that survives kexec: a pmem block device, or
/// any file or block device in tests.
///
/// Block 0 is the superblock, page slots follow, metadata stands behind the
/// last slot in use. The superblock is written last: until then, and from
/// [`RangeStore::create`] on, the range holds no image.
#[derive(Debug)]
pub struct RangeStore {
    path: PathBuf,
    file: File,
    capacity: u64,
    written: Written,
    /// `O_DIRECT`: a pmem device is memory already, the page cache would be a copy of it
    /// that takes memory and most of the time.
    direct: bool,
}

/// What `O_DIRECT` wants buffers, offsets and lengths to be multiples of, at most.
const BLOCK: usize = 4096;

/// A buffer for direct I/O, and where in it the aligned part begins.
fn bounce(len: usize) -> (Vec<u8>, usize) {
    let buffer = vec![0; len.next_multiple_of(BLOCK) + BLOCK];
    let start = buffer.as_ptr().align_offset(BLOCK);
    (buffer, start)
}

fn is_aligned(bytes: &[u8], offset: u64) -> bool {
    bytes.as_ptr().align_offset(BLOCK) == 0
        && bytes.len().is_multiple_of(BLOCK)
        && offset.is_multiple_of(BLOCK as u64)
}

const SUPERBLOCK_MAGIC: &[u8; 8] = b"TRKARENA";
const SUPERBLOCK_LEN: usize = 36;

impl RangeStore {
    /// Prepares `path` for a new image; the old one is gone afterwards.
    ///
    /// # Errors
    /// It cannot be opened or written.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        let store = Self::open_file(path)?;
        store.erase()?;
        Ok(store)
    }

    /// Opens a range that may hold an image.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_file(path)
    }

    /// Makes the image on this range not exist any more.
    ///
    /// # Errors
    /// The range cannot be written.
    pub fn erase(&self) -> Result<(), StoreError> {
        self.write_at(&[0; 4096], 0)?;
        self.sync()
    }

    /// Writes back what the page cache holds, so that [`Store::commit`] has less to do.
    ///
    /// # Errors
    /// The range cannot be written.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.sync()
    }

    fn open_file(path: &Path) -> Result<Self, StoreError> {
        use std::io::{Seek, SeekFrom};
        let direct = std::fs::symlink_metadata(path)
            .is_ok_and(|metadata| metadata.file_type().is_block_device());
        let flag = if direct { nix::libc::O_DIRECT } else { 0 };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_NOFOLLOW | flag)
            .open(path)
            .map_err(io_error("open", path))?;
        let capacity = file
            .seek(SeekFrom::End(0))
            .map_err(io_error("seek", path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            capacity,
            written: Written::default(),
            direct,
        })
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        let needed = offset + bytes.len() as u64;
        if needed > self.capacity {
            return Err(StoreError::Full {
                capacity: self.capacity,
                needed,
            });
        }
        let written = if !self.direct || is_aligned(bytes, offset) {
            self.file.write_all_at(bytes, offset)
        } else {
            // Every write begins at a block of its own; zeros may follow it.
            let (mut buffer, start) = bounce(bytes.len());
            buffer[start..start + bytes.len()].copy_from_slice(bytes);
            let end = start + bytes.len().next_multiple_of(BLOCK);
            self.file.write_all_at(&buffer[start..end], offset)
        };
        written.map_err(io_error("write", &self.path))
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> Result<(), StoreError> {
        let read = if !self.direct || is_aligned(bytes, offset) {
            self.file.read_exact_at(bytes, offset)
        } else {
            let skip = usize::try_from(offset % BLOCK as u64).unwrap_or_default();
            let len = skip + bytes.len();
            let (mut buffer, start) = bounce(len);
            let end = start + len.next_multiple_of(BLOCK);
            let read = self
                .file
                .read_exact_at(&mut buffer[start..end], offset - skip as u64);
            bytes.copy_from_slice(&buffer[start + skip..start + len]);
            read
        };
        read.map_err(io_error("read", &self.path))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.file
            .sync_data()
            .map_err(io_error("fdatasync", &self.path))
    }
}

impl Store for RangeStore {
    fn written(&self) -> &Written {
        &self.written
    }

    fn write_unsummed(&self, slot: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.write_at(bytes, (slot + 1) * PAGE_SIZE)
    }

    fn read_pages(&self, slot: u64, bytes: &mut [u8]) -> Result<(), StoreError> {
        self.read_at(bytes, (slot + 1) * PAGE_SIZE)
    }

    fn first_slot(&self) -> u64 {
        PAGE_SIZE
    }

    fn commit(&mut self, metadata: &[u8], slots: u64) -> Result<(), StoreError> {
        let offset = (slots + 1) * PAGE_SIZE;
        self.write_at(metadata, offset)?;
        self.sync()?;
        let mut block = [0_u8; 4096];
        block[..8].copy_from_slice(SUPERBLOCK_MAGIC);
        block[8..12].copy_from_slice(&super::FORMAT_VERSION.to_le_bytes());
        block[12..20].copy_from_slice(&offset.to_le_bytes());
        block[20..28].copy_from_slice(&(metadata.len() as u64).to_le_bytes());
        let crc = hash(&block[..SUPERBLOCK_LEN - 4]);
        block[SUPERBLOCK_LEN - 4..SUPERBLOCK_LEN].copy_from_slice(&crc.to_le_bytes());
        self.write_at(&block, 0)?;
        self.sync()
    }

    fn metadata(&self) -> Result<Vec<u8>, StoreError> {
        let unsealed = |why| StoreError::NotSealed(self.path.clone(), why);
        let mut block = [0_u8; SUPERBLOCK_LEN];
        self.read_at(&mut block, 0)?;
        let u64_at =
            |at: usize| u64::from_le_bytes(block[at..at + 8].try_into().unwrap_or_default());
        let u32_at =
            |at: usize| u32::from_le_bytes(block[at..at + 4].try_into().unwrap_or_default());
        if &block[..8] != SUPERBLOCK_MAGIC {
            return Err(unsealed("it has no superblock"));
        }
        if hash(&block[..SUPERBLOCK_LEN - 4]) != u32_at(SUPERBLOCK_LEN - 4) {
            return Err(unsealed("its superblock is damaged"));
        }
        let (offset, len) = (u64_at(12), u64_at(20));
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.capacity)
        {
            return Err(unsealed("its metadata reaches beyond the end"));
        }
        let len = usize::try_from(len).map_err(|_| unsealed("its metadata is too long"))?;
        let mut bytes = vec![0; len];
        self.read_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}
