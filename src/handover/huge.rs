//! Pools of huge pages, which applications that have any are restored from. A machine may set
//! them up as late as its init.

use crate::model::frozen::HugePool;
use crate::sys::huge::Pool;
use std::path::Path;

/// The pools that have pages.
#[must_use]
pub fn collect(root: &Path) -> Vec<HugePool> {
    let pools = Pool::all(root).into_iter();
    let pools = pools.filter_map(|(page, pool)| {
        let pages = pool.size().ok()?;
        Some(HugePool { page, pages })
    });
    pools.filter(|pool| pool.pages > 0).collect()
}

/// Makes every pool as large as it was, if it is smaller; returns what went wrong.
#[must_use]
pub fn apply(root: &Path, pools: &[HugePool]) -> Vec<String> {
    let mut failures = Vec::new();
    for HugePool { page, pages } in pools {
        let (pool, kib) = (Pool::of(root, *page), page >> 10);
        let enlarged = match pool.size() {
            Ok(there) if there >= *pages => continue,
            Ok(_) => pool.resize(*pages).and_then(|()| pool.size()),
            Err(error) => Err(error),
        };
        match enlarged {
            Ok(there) if there >= *pages => {}
            Ok(there) => failures.push(format!(
                "The kernel has {there} huge pages of {kib} KiB, and had {pages}"
            )),
            Err(error) => failures.push(format!("Huge pages of {kib} KiB: {error}")),
        }
    }
    failures
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn pools_only_grow() {
        let (old, new) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let set = |root: &Path, kib: u64, pages: u64| {
            let dir = root.join(format!("hugepages-{kib}kB"));
            fs::create_dir_all(&dir).unwrap();
            fs::write(dir.join("nr_hugepages"), format!("{pages}\n")).unwrap();
        };
        for (kib, before, after) in [(2048, 8, 3), (1 << 20, 2, 4), (64, 0, 0)] {
            set(old.path(), kib, before);
            set(new.path(), kib, after);
        }
        let pools = collect(old.path());
        assert_eq!(pools.iter().map(|p| p.pages).collect::<Vec<_>>(), [8, 2]);
        assert_eq!(apply(new.path(), &pools), [""; 0]);
        let now = collect(new.path());
        assert_eq!(now.iter().map(|p| p.pages).collect::<Vec<_>>(), [8, 4]);
        let gone = HugePool {
            page: 16 << 30,
            pages: 1,
        };
        assert_eq!(apply(new.path(), &[gone]).len(), 1);
    }
}
