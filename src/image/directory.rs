//! An image in a directory of a filesystem.

use super::store::{Store, StoreError, call_error, io_error};
use super::stripes::Stripes;
use super::sums::Written;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, geteuid, unlinkat};
use std::fs::{DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;

/// An image in a directory: `metadata`, `pages`, `pages.1` and so on. Mode 0700/0600, since it
/// holds the application's memory; no symbolic link is followed in writing it.
#[derive(Debug)]
pub struct DirectoryStore {
    path: PathBuf,
    /// What is written is written here, whatever becomes of the name.
    directory: OwnedFd,
    pages: Stripes,
    written: Written,
}

impl DirectoryStore {
    const METADATA: &str = "metadata";
    const PART: &str = "metadata.part";

    /// Makes a new image directory.
    ///
    /// # Errors
    /// It exists already, or cannot be made.
    pub fn create(path: &Path) -> Result<Self, StoreError> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                return Err(StoreError::Exists(path.to_owned()));
            }
            result => result.map_err(io_error("mkdir", path))?,
        }
        let directory = Self::open_directory(path, OFlag::O_NOFOLLOW)?;
        Self::check_owner(path, &directory)?;
        let files = Stripes::for_cpus(available_parallelism().map_or(1, usize::from));
        let files = (0..files).map(|n| Self::new_file(path, &directory, &Self::pages(n)));
        let pages = Stripes::new(files.collect::<Result<_, _>>()?);
        Ok(Self {
            path: path.to_owned(),
            directory,
            pages,
            written: Written::default(),
        })
    }

    /// Opens an existing image.
    ///
    /// # Errors
    /// It is not there or cannot be read.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let directory = Self::open_directory(path, OFlag::empty())?;
        let mut files = vec![Self::old_file(path, &directory, &Self::pages(0))?];
        // As many as there are: where one is missing, pages have other checksums.
        for number in 1..Stripes::MOST {
            match Self::old_file(path, &directory, &Self::pages(number)) {
                Err(error) if error.is_not_found() => break,
                file => files.push(file?),
            }
        }
        Ok(Self {
            path: path.to_owned(),
            directory,
            pages: Stripes::new(files),
            written: Written::default(),
        })
    }

    /// Removes an image that was never sealed.
    pub fn discard(self) {
        let names = [Self::METADATA, Self::PART].map(str::to_owned);
        for name in names.into_iter().chain((0..Stripes::MOST).map(Self::pages)) {
            let _ = unlinkat(&self.directory, name.as_str(), UnlinkatFlags::NoRemoveDir);
        }
        let _ = std::fs::remove_dir(&self.path);
    }

    /// Name of a file of pages.
    fn pages(number: usize) -> String {
        match number {
            0 => "pages".to_owned(),
            _ => format!("pages.{number}"),
        }
    }

    fn open_directory(path: &Path, flags: OFlag) -> Result<OwnedFd, StoreError> {
        let flags = flags | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        open(path, flags, Mode::empty()).map_err(call_error("open", path))
    }

    /// Between mkdir and open another directory may have got the name.
    fn check_owner(path: &Path, directory: &OwnedFd) -> Result<(), StoreError> {
        let stat = fstat(directory).map_err(call_error("stat", path))?;
        let open_to_others = stat.st_mode & 0o077 != 0;
        if stat.st_uid != geteuid().as_raw() || open_to_others {
            return Err(call_error("mkdir", path)(Errno::EPERM));
        }
        Ok(())
    }

    fn new_file(path: &Path, directory: &OwnedFd, name: &str) -> Result<File, StoreError> {
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let fd = openat(directory, name, flags | OFlag::O_CLOEXEC, mode);
        let fd = fd.map_err(call_error("create", &path.join(name)))?;
        Ok(fd.into())
    }

    fn old_file(path: &Path, directory: &OwnedFd, name: &str) -> Result<File, StoreError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(directory, name, flags, Mode::empty());
        let fd = fd.map_err(call_error("open", &path.join(name)))?;
        Ok(fd.into())
    }
}

impl Store for DirectoryStore {
    fn written(&self) -> &Written {
        &self.written
    }

    fn write_unsummed(&self, slot: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.pages
            .write(slot, bytes)
            .map_err(io_error("write", &self.path))
    }

    fn read_pages(&self, slot: u64, bytes: &mut [u8]) -> Result<(), StoreError> {
        self.pages
            .read(slot, bytes)
            .map_err(io_error("read", &self.path))
    }

    fn first_slot(&self) -> u64 {
        0
    }

    fn commit(&mut self, metadata: &[u8], slots: u64) -> Result<(), StoreError> {
        self.pages
            .set_slots(slots)
            .map_err(io_error("truncate", &self.path))?;
        let (directory, part) = (&self.directory, self.path.join(Self::PART));
        let mut file = Self::new_file(&self.path, directory, Self::PART)?;
        file.write_all(metadata).map_err(io_error("write", &part))?;
        renameat(directory, Self::PART, directory, Self::METADATA)
            .map_err(call_error("rename", &part))
    }

    fn metadata(&self) -> Result<Vec<u8>, StoreError> {
        let mut file = match Self::old_file(&self.path, &self.directory, Self::METADATA) {
            Err(error) if error.is_not_found() => {
                let path = self.path.clone();
                return Err(StoreError::NotSealed(path, "it has no metadata"));
            }
            file => file?,
        };
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(io_error("read", &self.path.join(Self::METADATA)))?;
        Ok(bytes)
    }
}
