//! What could not be written back: a filesystem on a device that has no room.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::mman::{MapFlags, MsFlags as Sync, ProtFlags, mmap, msync, munmap};
use nix::unistd::sync;

use super::probe::pattern;
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::refused("refused_write_error", "have it call fsync(2)", written),
    Entry::refused("refused_write_error_mapped", "shared file mapping", mapped),
];

/// Bytes of a file, more than its device can hold.
const SIZE: usize = 8 << 20;

/// An ext2 on a loop device whose file cannot grow.
struct Full {
    tmpfs: PathBuf,
    point: PathBuf,
}

impl Full {
    fn mounted(case: &Case) -> Result<Full> {
        let full = Full {
            tmpfs: case.path("tmpfs"),
            point: case.path("full"),
        };
        fs::create_dir(&full.tmpfs)?;
        fs::create_dir(&full.point)?;
        let none = None::<&str>;
        mount(
            none,
            &full.tmpfs,
            Some("tmpfs"),
            MsFlags::empty(),
            Some("size=2m"),
        )
        .context("Mount a tmpfs")?;
        let disk = full.tmpfs.join("disk");
        File::create(&disk)?.set_len(64 << 20)?;
        let script =
            "modprobe loop && mke2fs -q -F -t ext2 -N 16 \"$1\" && mount -o loop \"$1\" \"$2\"";
        let output = Command::new("sh")
            .args(["-c", script, "sh"])
            .args([&disk, &full.point])
            .output()?;
        ensure!(
            output.status.success(),
            "Make a filesystem: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(full)
    }

    /// A file whose pages are only in memory so far.
    fn file(&self) -> Result<File> {
        let path = self.point.join("file");
        fs::write(&path, pattern(7, SIZE))?;
        Ok(File::options().read(true).write(true).open(path)?)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        for point in [&self.point, &self.tmpfs] {
            // Nobody else uses them.
            let _ = umount2(point, MntFlags::MNT_DETACH);
        }
    }
}

/// Written by the application and lost by the kernel: fsync(2) has yet to say so.
fn written(case: &Case) -> Result<()> {
    let full = Full::mounted(case)?;
    let file = full.file()?;
    // Unlike fsync(2) it tells nobody.
    sync();
    case.ready()?;
    let told = file.sync_all();
    ensure!(told.is_err(), "Nothing was lost");
    ensure!(file.sync_all().is_ok(), "It is told again");
    // The page cache still has it.
    let mut byte = [0];
    file.read_exact_at(&mut byte, 5)?;
    ensure!(byte[0] == pattern(7, SIZE)[5], "Another byte");
    Ok(())
}

/// The same of memory, without a descriptor.
fn mapped(case: &Case) -> Result<()> {
    let full = Full::mounted(case)?;
    let file = full.file()?;
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping where nothing is.
    let memory = unsafe {
        mmap(
            None,
            SIZE.try_into()?,
            protection,
            MapFlags::MAP_SHARED,
            &file,
            0,
        )
    }?;
    drop(file);
    sync();
    case.ready()?;
    // SAFETY: the mapping above, of which nobody else knows.
    let told = unsafe { msync(memory, SIZE, Sync::MS_SYNC) };
    ensure!(told.is_err(), "Nothing was lost");
    // SAFETY: as above.
    unsafe { munmap(memory, SIZE) }?;
    Ok(())
}
