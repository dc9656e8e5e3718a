//! What is in a tmpfs that only the application has mounted: a device directory of its own, or a
//! few files. It ends with the application, so a restore makes it again.

use crate::model::frozen::{TmpfsEntry, TmpfsNode};
use nix::libc;
use rustix::fs::llistxattr;
use serde_bytes::ByteBuf;
use std::collections::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Bytes that the files of one may have together: it is read in the frozen window, and kept in
/// memory as a part of the image.
const MOST_BYTES: u64 = 16 << 20;

/// How many names one may have.
const MOST_NAMES: usize = 10_000;

/// All that is in a tmpfs, whose root `tree` is, with nothing mounted in it.
///
/// # Errors
/// Why it is not carried.
pub fn read(tree: &OwnedFd) -> Result<Vec<TmpfsEntry>, String> {
    let mut reading = Reading {
        top: PathBuf::from(format!("/proc/self/fd/{}/", tree.as_raw_fd())),
        entries: Vec::new(),
        links: HashMap::new(),
        bytes: 0,
    };
    reading.add(Path::new(""))?;
    Ok(reading.entries)
}

struct Reading {
    top: PathBuf,
    entries: Vec<TmpfsEntry>,
    /// The first name of what has several, by inode number.
    links: HashMap<u64, ByteBuf>,
    bytes: u64,
}

impl Reading {
    fn add(&mut self, path: &Path) -> Result<(), String> {
        let at = self.top.join(path);
        let failed = |error: io::Error| format!("{} in it cannot be read: {error}", path.display());
        let found = match path.as_os_str().is_empty() {
            true => fs::metadata(&at),
            false => fs::symlink_metadata(&at),
        };
        let found = found.map_err(failed)?;
        let mut names = [0_u8; 0];
        if llistxattr(&at, &mut names).is_ok_and(|bytes| bytes > 0) {
            return Err(format!("{} in it has extended attributes", path.display()));
        }
        let name = ByteBuf::from(path.as_os_str().as_bytes());
        let node = self.node(&at, &name, &found).map_err(failed)?;
        let is_directory = node == TmpfsNode::Directory;
        if self.bytes > MOST_BYTES || self.entries.len() >= MOST_NAMES {
            return Err(format!(
                "it has more than {} MiB or {MOST_NAMES} names",
                MOST_BYTES >> 20
            ));
        }
        self.entries.push(TmpfsEntry {
            path: name,
            node,
            mode: found.mode() & 0o7777,
            uid: found.uid(),
            gid: found.gid(),
            mtime: found.mtime() * 1_000_000_000 + found.mtime_nsec(),
        });
        if is_directory {
            let names = fs::read_dir(&at).and_then(Iterator::collect::<io::Result<Vec<_>>>);
            let mut names: Vec<_> = names
                .map_err(failed)?
                .iter()
                .map(fs::DirEntry::file_name)
                .collect();
            names.sort_unstable();
            for name in names {
                self.add(&path.join(name))?;
            }
        }
        Ok(())
    }

    fn node(&mut self, at: &Path, name: &ByteBuf, found: &Metadata) -> io::Result<TmpfsNode> {
        let kind = found.mode() & libc::S_IFMT;
        if kind == libc::S_IFDIR {
            return Ok(TmpfsNode::Directory);
        }
        if found.nlink() > 1 {
            let first = self
                .links
                .entry(found.ino())
                .or_insert_with(|| name.clone());
            if first != name {
                return Ok(TmpfsNode::Link(first.clone()));
            }
        }
        Ok(match kind {
            libc::S_IFLNK => {
                TmpfsNode::Symlink(fs::read_link(at)?.into_os_string().into_vec().into())
            }
            libc::S_IFREG => {
                self.bytes += found.size();
                // What is too much is refused, and need not be read.
                let content = match self.bytes > MOST_BYTES {
                    true => Vec::new(),
                    false => fs::read(at)?,
                };
                TmpfsNode::File(content.into())
            }
            _ => TmpfsNode::Special(kind, found.rdev()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_tree_is_read_with_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir(at("b")).unwrap();
        fs::write(at("b/file"), "text").unwrap();
        fs::hard_link(at("b/file"), at("c")).unwrap();
        std::os::unix::fs::symlink("b/file", at("a")).unwrap();
        let tree = OwnedFd::from(File::open(dir.path()).unwrap());
        let entries = read(&tree).unwrap();
        let found: Vec<_> = entries
            .iter()
            .map(|one| {
                (
                    String::from_utf8_lossy(&one.path).into_owned(),
                    one.node.clone(),
                )
            })
            .collect();
        let bytes = |text: &str| ByteBuf::from(text.as_bytes());
        let wanted = [
            ("", TmpfsNode::Directory),
            ("a", TmpfsNode::Symlink(bytes("b/file"))),
            ("b", TmpfsNode::Directory),
            ("b/file", TmpfsNode::File(bytes("text"))),
            ("c", TmpfsNode::Link(bytes("b/file"))),
        ];
        assert_eq!(found, wanted.map(|(name, node)| (name.to_owned(), node)));
    }
}
