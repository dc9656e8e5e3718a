//! Bytes that exist only in memory: shared anonymous memory, memfds, deleted files.

use super::error::CheckpointError;
use super::files::Slots;
use super::huge;
use super::mm::path_ref;
use super::sysv::Segment;
use crate::image::Store;
use crate::model::frozen::{self, Content, ContentId, ContentKind, PAGE_SIZE, PageRun};
use crate::model::ids::InodeId;
use nix::fcntl::{FcntlArg, fcntl};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Contents seen so far, each with a descriptor to read it through.
#[derive(Debug, Default)]
pub struct Contents {
    found: BTreeMap<ContentId, (File, Content)>,
    /// Inode numbers alone name nothing: every filesystem has its own.
    numbers: HashMap<InodeId, ContentId>,
}

/// What the kernel puts behind the name of a file that has none any more.
const DELETED: &str = " (deleted)";

impl Contents {
    /// The content of this inode, if it was noted.
    #[must_use]
    pub fn known(&self, inode: InodeId) -> Option<ContentId> {
        self.numbers.get(&inode).copied()
    }

    /// Notes the content behind `link` (a link of `/proc/PID/map_files`), which leads to `path`.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn add_mapped(
        &mut self,
        inode: InodeId,
        link: &Path,
        path: &Path,
    ) -> Result<ContentId, CheckpointError> {
        if let Some(id) = self.known(inode) {
            return Ok(id);
        }
        let file = File::open(link).map_err(CheckpointError::io("open", link))?;
        let name = path.as_os_str().as_bytes();
        let name = name.strip_suffix(DELETED.as_bytes()).unwrap_or(name);
        let kind = if name == b"/dev/zero" || huge::is_shared_anonymous(name) {
            ContentKind::SharedAnonymous
        } else if let Some(name) = name.strip_prefix(b"/memfd:") {
            ContentKind::Memfd {
                name: String::from_utf8_lossy(name).into_owned(),
                seals: 0,
            }
        } else {
            let stat = file.metadata().map_err(CheckpointError::io("stat", link))?;
            let path = PathBuf::from(std::ffi::OsStr::from_bytes(name));
            ContentKind::Deleted {
                at: path_ref(&path, &stat),
            }
        };
        self.add(inode, file, kind)
            .map_err(CheckpointError::io("stat", link))
    }

    /// Notes the content of this inode, which `file` is a description of; the seals of a memfd
    /// are read from it.
    ///
    /// # Errors
    /// fstat(2), fstatfs(2) or fcntl(2) fails.
    pub fn add(
        &mut self,
        inode: InodeId,
        file: File,
        mut kind: ContentKind,
    ) -> io::Result<ContentId> {
        if let Some(id) = self.known(inode) {
            return Ok(id);
        }
        let stat = file.metadata()?;
        if let ContentKind::Memfd { seals, .. } = &mut kind {
            *seals = fcntl(&file, FcntlArg::F_GET_SEALS)?.cast_unsigned();
        }
        let content = Content {
            kind,
            size: stat.size(),
            mode: stat.mode() & 0o7777,
            uid: stat.uid(),
            gid: stat.gid(),
            huge_page: huge::page_of(&file)?,
            pages: Vec::new(),
        };
        let id = ContentId(self.numbers.len() as u64);
        self.numbers.insert(inode, id);
        self.found.insert(id, (file, content));
        Ok(id)
    }

    /// Notes the bytes of a System V segment, mapped as `link` of `/proc/PID/map_files`.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn add_segment(
        &mut self,
        segment: &Segment,
        link: &Path,
    ) -> Result<ContentId, CheckpointError> {
        let id = segment.content();
        if self.found.contains_key(&id) {
            return Ok(id);
        }
        let file = File::open(link).map_err(CheckpointError::io("open", link))?;
        let huge_page = huge::page_of(&file).map_err(CheckpointError::io("fstatfs", link))?;
        let content = Content {
            kind: ContentKind::SysvShm(frozen::Segment {
                id: segment.id,
                key: segment.key,
                destroyed: segment.is_destroyed(),
                creator_uid: segment.creator_ids.0,
                creator_gid: segment.creator_ids.1,
            }),
            size: segment.size,
            mode: segment.perms & 0o777,
            uid: segment.owner.0,
            gid: segment.owner.1,
            huge_page,
            pages: Vec::new(),
        };
        self.found.insert(id, (file, content));
        Ok(id)
    }

    /// Copies all of them to the image.
    ///
    /// # Errors
    /// One cannot be read, or the carrier is full.
    pub fn copy(
        self,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<BTreeMap<ContentId, Content>, CheckpointError> {
        let mut copied = BTreeMap::new();
        for (id, (file, mut content)) in self.found {
            content.pages = copy_pages(&file, content.size, store, slots)?;
            copied.insert(id, content);
        }
        Ok(copied)
    }
}

/// Copies the pages of a file that are not all zeroes.
///
/// # Errors
/// It cannot be read, or the carrier is full.
pub fn copy_pages(
    file: &File,
    size: u64,
    store: &dyn Store,
    slots: &mut Slots,
) -> Result<Vec<PageRun>, CheckpointError> {
    const CHUNK: u64 = 4 << 20;
    let page = usize::try_from(PAGE_SIZE).unwrap_or(4096);
    let failed = || CheckpointError::io("read", "shared memory or a deleted file");
    let mut runs = Vec::new();
    let mut buffer = Vec::new();
    let mut at = 0;
    while let Some((data, hole)) = next_data(file, at, size) {
        let (mut at_data, end) = (data / PAGE_SIZE * PAGE_SIZE, hole);
        while at_data < end {
            let len = CHUNK.min(end.next_multiple_of(PAGE_SIZE) - at_data);
            buffer.clear();
            buffer.resize(usize::try_from(len).unwrap_or(0), 0);
            let inside = usize::try_from(len.min(size - at_data)).unwrap_or(0);
            file.read_exact_at(&mut buffer[..inside], at_data)
                .map_err(failed())?;
            let pages: Vec<&[u8]> = buffer.chunks_exact(page).collect();
            let mut first = 0;
            while first < pages.len() {
                let zero = is_zero(pages[first]);
                let count = pages[first..]
                    .iter()
                    .take_while(|bytes| is_zero(bytes) == zero)
                    .count();
                if !zero {
                    let slot = slots.take(count as u64);
                    store.write_pages(slot, &buffer[first * page..(first + count) * page])?;
                    runs.push(PageRun {
                        addr: at_data + first as u64 * PAGE_SIZE,
                        pages: count as u64,
                        slot,
                    });
                }
                first += count;
            }
            at_data += len;
        }
        at = end.next_multiple_of(PAGE_SIZE);
    }
    Ok(super::pages::joined(runs))
}

/// Next range with data at or behind `at`; a filesystem without holes has one.
fn next_data(file: &File, at: u64, size: u64) -> Option<(u64, u64)> {
    use nix::unistd::{Whence, lseek};
    if at >= size {
        return None;
    }
    let seek = |from: u64, whence| lseek(file, from.cast_signed(), whence);
    match seek(at, Whence::SeekData) {
        Ok(data) => {
            let data = data.cast_unsigned();
            let hole = seek(data, Whence::SeekHole).map_or(size, i64::cast_unsigned);
            Some((data, hole.min(size)))
        }
        Err(nix::errno::Errno::ENXIO) => None,
        Err(_) => Some((at, size)),
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|b| *b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::DirectoryStore;
    use std::io::Write;

    #[test]
    fn only_pages_with_bytes_are_copied() {
        let dir = tempfile::tempdir().unwrap();
        let store = DirectoryStore::create(&dir.path().join("image")).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&[0; 4096]).unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let mut slots = Slots::default();
        let runs = copy_pages(&file, 9096, &store, &mut slots).unwrap();
        let run = PageRun {
            addr: 4096,
            pages: 2,
            slot: 0,
        };
        assert_eq!(runs, [run]);
        let mut back = [1; 8192];
        store.read_pages(0, &mut back).unwrap();
        assert!(back[..5000].iter().all(|b| *b == 7));
        assert!(is_zero(&back[5000..]));
    }
}
