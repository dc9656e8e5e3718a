//! Bytes that exist only in memory: shared anonymous memory, memfds, deleted files.

use super::error::CheckpointError;
use super::files::Slots;
use super::huge;
use super::mm::path_ref;
use super::shared::{Shared, Source};
use super::sysv::Segment;
use crate::image::Store;
use crate::model::frozen::{self, Content, ContentId, ContentKind, PathRef, Through};
use crate::model::ids::InodeId;
use nix::fcntl::{FcntlArg, fcntl};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
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
        through: Through,
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
                at: PathRef {
                    through,
                    ..path_ref(&path, &stat)
                },
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
        shared: &mut Shared,
        store: &dyn Store,
        slots: &mut Slots,
    ) -> Result<BTreeMap<ContentId, Content>, CheckpointError> {
        let mut copied = BTreeMap::new();
        for (id, (file, mut content)) in self.found {
            let source = Source {
                file: &file,
                size: content.size,
                moving: false,
            };
            content.pages = shared.copy(source, store, slots)?;
            copied.insert(id, content);
        }
        Ok(copied)
    }
}
