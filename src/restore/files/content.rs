//! Memfds, shared anonymous memory and deleted files: bytes that come from the image.

use super::error::{FilesError, call, io_call};
use super::regular;
use crate::image::{Pages, StoreError, bytes, parts};
use crate::model::frozen::{Content, ContentKind, PAGE_SIZE};
use crate::sys::huge::size_flag;
use crate::sys::mapped::MappedFile;
use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, SealFlag, fallocate, fcntl, open};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Uid, fchown, ftruncate};
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Makes the object and fills it; seals are set last.
///
/// # Errors
/// The kernel refuses a step, or the image cannot be read.
pub fn make(content: &Content, image: Pages<'_>) -> Result<OwnedFd, FilesError> {
    let object = name(content);
    let memfd = |name: &str, flags: MFdFlags| {
        let flags = flags | MFdFlags::MFD_CLOEXEC | huge_pages(content);
        memfd_create(name, flags).map_err(call(&object, "memfd_create"))
    };
    let fd = match &content.kind {
        ContentKind::SharedAnonymous => memfd("shared anonymous", MFdFlags::empty())?,
        ContentKind::Memfd { name, .. } => memfd(name, MFdFlags::MFD_ALLOW_SEALING)?,
        ContentKind::SysvShm(_) => return Err(FilesError::Missing(object)),
        ContentKind::Deleted { .. } if content.huge_page > 0 => {
            return Err(FilesError::Missing(object));
        }
        ContentKind::Deleted { at } => {
            let path = regular::here(at);
            // Its directory may be gone as well.
            let above = path.ancestors().skip(1).find(|dir| dir.is_dir());
            let dir = above.unwrap_or(Path::new("/"));
            let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
            open(dir, flags, Mode::from_bits_truncate(0o600))
                .map_err(call(&object, "open(O_TMPFILE)"))?
        }
    };
    fchown(
        fd.as_fd(),
        Some(Uid::from_raw(content.uid)),
        Some(Gid::from_raw(content.gid)),
    )
    .map_err(call(&object, "fchown"))?;
    fchmod(fd.as_fd(), Mode::from_bits_truncate(content.mode & 0o7777))
        .map_err(call(&object, "fchmod"))?;
    let size = i64::try_from(content.size).unwrap_or(i64::MAX);
    ftruncate(fd.as_fd(), size).map_err(call(&object, "ftruncate"))?;
    let file = File::from(fd);
    fill(&object, &file, content, image)?;
    if let ContentKind::Memfd { seals, .. } = &content.kind {
        let seals = SealFlag::from_bits_retain(seals.cast_signed());
        fcntl(file.as_fd(), FcntlArg::F_ADD_SEALS(seals))
            .map_err(call(&object, "fcntl(F_ADD_SEALS)"))?;
    }
    Ok(file.into())
}

/// What memfd_create(2) is told of the pages of a content.
fn huge_pages(content: &Content) -> MFdFlags {
    if content.huge_page == 0 {
        return MFdFlags::empty();
    }
    MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(size_flag(content.huge_page))
}

fn name(content: &Content) -> String {
    match &content.kind {
        ContentKind::SharedAnonymous => "shared anonymous memory".to_owned(),
        ContentKind::Memfd { name, .. } => format!("memfd {name}"),
        ContentKind::SysvShm(segment) => format!("System V shared memory {}", segment.id),
        ContentKind::Deleted { at } => {
            format!("deleted file {}", String::from_utf8_lossy(&at.path))
        }
    }
}

fn fill(object: &str, file: &File, content: &Content, image: Pages<'_>) -> Result<(), FilesError> {
    if content.huge_page > 0 && !content.pages.is_empty() {
        // write(2) is not for files on hugetlbfs.
        let mut mapped = allocate_huge(object, file, content)?;
        return read(content, image, |at, bytes| {
            mapped.write(usize::try_from(at).unwrap_or(usize::MAX), bytes);
            Ok(())
        });
    }
    read(content, image, |at, bytes| {
        file.write_all_at(bytes, at)
            .map_err(io_call(object, "pwrite"))
    })
}

/// Reads the bytes of a content, which `put` gets with the offset of each piece.
///
/// # Errors
/// The image cannot be read, or `put` fails.
pub fn read<E: From<StoreError>>(
    content: &Content,
    image: Pages<'_>,
    mut put: impl FnMut(u64, &[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut buffer = Vec::new();
    for part in content.pages.iter().flat_map(parts) {
        let len = bytes(part.pages);
        buffer.resize(len, 0);
        image.read(part.slot, &mut buffer)?;
        // The last page may reach beyond the end of a file of odd length.
        let end = content.size.saturating_sub(part.addr);
        let end = usize::try_from(end).unwrap_or(usize::MAX);
        put(part.addr, &buffer[..len.min(end)])?;
    }
    Ok(())
}

/// Has the kernel set aside the huge pages that have bytes, so that they can be written to.
fn allocate_huge(object: &str, file: &File, content: &Content) -> Result<MappedFile, FilesError> {
    for run in &content.pages {
        let (from, len) = (run.addr.cast_signed(), run.pages * PAGE_SIZE);
        let mode = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(file, mode, from, len.cast_signed()).map_err(call(object, "fallocate"))?;
    }
    let size = usize::try_from(content.size).unwrap_or(usize::MAX);
    MappedFile::new(file.as_fd(), size).map_err(call(object, "mmap"))
}

/// One more description of an object.
///
/// # Errors
/// The kernel refuses.
pub fn reopen(fd: &OwnedFd, flags: u32, pos: u64) -> Result<OwnedFd, FilesError> {
    let object = "memfd or deleted file";
    let path = PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let once = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_TRUNC | OFlag::O_TMPFILE;
    let flags = OFlag::from_bits_retain(flags.cast_signed()).difference(once) | OFlag::O_CLOEXEC;
    let new = open(&path, flags, Mode::empty()).map_err(call(object, "open"))?;
    let pos = i64::try_from(pos).unwrap_or(i64::MAX);
    nix::unistd::lseek(new.as_fd(), pos, nix::unistd::Whence::SeekSet)
        .map_err(call(object, "lseek"))?;
    Ok(new)
}
