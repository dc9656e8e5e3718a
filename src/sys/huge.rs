//! The kernel's pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst).

use nix::libc;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The size of pages as mmap(2), memfd_create(2) and shmget(2) are told it beside their own flag
/// for huge ones: its logarithm in the upper bits.
#[must_use]
pub fn size_flag(page: u64) -> u32 {
    page.max(1).ilog2() << libc::MAP_HUGE_SHIFT
}

/// Where the kernel shows them.
pub const DIR: &str = "/sys/kernel/mm/hugepages";

/// The pool of one size of page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    dir: PathBuf,
}

impl Pool {
    /// The pool of pages of so many bytes.
    #[must_use]
    pub fn of(root: &Path, page: u64) -> Self {
        Self {
            dir: root.join(format!("hugepages-{}kB", page >> 10)),
        }
    }

    /// All pools and the bytes of their pages; none where the kernel has no huge pages.
    #[must_use]
    pub fn all(root: &Path) -> Vec<(u64, Self)> {
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        let pool = |entry: fs::DirEntry| {
            let name = entry.file_name().into_string().ok()?;
            let size = name.strip_prefix("hugepages-")?.strip_suffix("kB")?;
            let page = size.parse::<u64>().ok()?.checked_mul(1024)?;
            Some((page, Self { dir: entry.path() }))
        };
        let mut pools: Vec<_> = entries.filter_map(pool).collect();
        pools.sort_unstable_by_key(|(page, _)| *page);
        pools
    }

    fn number(&self, file: &str) -> io::Result<u64> {
        let text = fs::read_to_string(self.dir.join(file))?;
        text.trim().parse().map_err(io::Error::other)
    }

    /// How many pages it keeps.
    ///
    /// # Errors
    /// The kernel has no pages of this size.
    pub fn size(&self) -> io::Result<u64> {
        self.number("nr_hugepages")
    }

    /// Asks for that many; the kernel takes as many as it finds memory for.
    ///
    /// # Errors
    /// The kernel has no pages of this size, or this process may not.
    pub fn resize(&self, pages: u64) -> io::Result<()> {
        fs::write(self.dir.join("nr_hugepages"), pages.to_string())
    }

    /// How many nobody has or has reserved, with those that it may take over its size.
    ///
    /// # Errors
    /// The kernel has no pages of this size.
    pub fn free(&self) -> io::Result<u64> {
        let left =
            |all, used| Ok::<_, io::Error>(self.number(all)?.saturating_sub(self.number(used)?));
        let free = left("free_hugepages", "resv_hugepages")?;
        Ok(free + left("nr_overcommit_hugepages", "surplus_hugepages")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_pages_is_told() {
        assert_eq!(size_flag(2 << 20).cast_signed(), libc::MAP_HUGE_2MB);
        assert_eq!(size_flag(1 << 30).cast_signed(), libc::MAP_HUGE_1GB);
    }

    #[test]
    fn a_pool_is_read_and_resized() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("hugepages-2048kB");
        fs::create_dir(&dir).unwrap();
        for (file, value) in [
            ("nr_hugepages", "10"),
            ("free_hugepages", "7"),
            ("resv_hugepages", "3"),
            ("nr_overcommit_hugepages", "5"),
            ("surplus_hugepages", "1"),
        ] {
            fs::write(dir.join(file), format!("{value}\n")).unwrap();
        }
        let pools = Pool::all(root.path());
        let [(page, pool)] = &pools[..] else {
            panic!("{pools:?}");
        };
        assert_eq!((*page, pool), (2 << 20, &Pool::of(root.path(), 2 << 20)));
        assert_eq!((pool.size().unwrap(), pool.free().unwrap()), (10, 8));
        pool.resize(12).unwrap();
        assert_eq!(pool.size().unwrap(), 12);
        assert!(Pool::of(root.path(), 1 << 30).size().is_err());
    }
}
