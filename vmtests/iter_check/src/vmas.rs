//! Mappings, against `/proc/self/maps`.

use std::fs;
use std::ptr;

use anyhow::{Context, Result, ensure};
use tracker::bpf::events::{VmaKind, VmaRec};
use tracker::bpf::iter::{Iterators, Scope};

/// Length of the mappings made here.
const LEN: usize = 4 * 4096;

fn map(protection: i32, flags: i32) -> Result<u64> {
    // SAFETY: a new mapping at an address the kernel chooses.
    let at = unsafe { libc::mmap(ptr::null_mut(), LEN, protection, flags, -1, 0) };
    ensure!(
        at != libc::MAP_FAILED,
        "mmap: {}",
        std::io::Error::last_os_error()
    );
    Ok(at as u64)
}

/// The line of `/proc/PID/maps` up to the inode.
fn line(vma: &VmaRec) -> String {
    let bit = |mask: u64, letter: char| if vma.flags & mask != 0 { letter } else { '-' };
    let (major, minor) = (vma.dev >> 20, vma.dev & 0xf_ffff);
    // VM_READ, VM_WRITE, VM_EXEC, VM_MAYSHARE of linux/mm.h
    let share = if vma.flags & 0x80 != 0 { 's' } else { 'p' };
    let offset = if vma.file != 0 { vma.pgoff * 4096 } else { 0 };
    format!(
        "{:08x}-{:08x} {}{}{}{share} {offset:08x} {major:02x}:{minor:02x} {}",
        vma.start,
        vma.end,
        bit(1, 'r'),
        bit(2, 'w'),
        bit(4, 'x'),
        vma.ino
    )
}

pub fn mappings(iterators: &mut Iterators) -> Result<()> {
    let me = Scope::Process(std::process::id());
    let shared = map(
        libc::PROT_READ | libc::PROT_WRITE,
        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
    )?;
    let none = map(libc::PROT_NONE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)?;
    // SAFETY: names our own mapping; kernels without CONFIG_ANON_VMA_NAME refuse.
    let named = unsafe { libc::prctl(0x5356_4d41, 0, none, LEN, c"iter-check".as_ptr()) } == 0;

    // the heap may move between the two looks, so look until nothing did
    for _ in 0..20 {
        let before = iterators.vmas(me)?;
        let text = fs::read_to_string("/proc/self/maps")?;
        let after = iterators.vmas(me)?;
        let bounds = |vmas: &[VmaRec]| vmas.iter().map(|v| (v.start, v.end)).collect::<Vec<_>>();
        if bounds(&before) != bounds(&after) {
            continue;
        }
        let lines: Vec<&str> = text
            .lines()
            .filter(|l| !l.ends_with("[vsyscall]"))
            .collect();
        ensure!(
            lines.len() == before.len(),
            "{} lines, {} records",
            lines.len(),
            before.len()
        );
        for (vma, text) in before.iter().zip(&lines) {
            // /proc prints no offset for special mappings, and major:minor zero
            let ours = line(vma);
            ensure!(text.starts_with(&ours), "{text} is not {ours}");
            if vma.kind == VmaKind::SPECIAL {
                ensure!(text.ends_with(&vma.name()), "{text} is not {}", vma.name());
            }
        }
        let at = |start: u64| before.iter().find(|v| v.start <= start && start < v.end);
        let vma = at(shared).context("shared mapping")?;
        ensure!(vma.kind == VmaKind::SHMEM && vma.nlink == 0, "{vma:?}");
        let vma = at(none).context("private mapping")?;
        ensure!(vma.kind == VmaKind::ANON && vma.has_anon == 0, "{vma:?}");
        ensure!(!named || vma.name() == "iter-check", "{}", vma.name());
        ensure!(before.iter().any(|v| v.name() == "[vdso]"), "vdso");
        for start in [shared, none] {
            // SAFETY: unmaps what was mapped above.
            unsafe { libc::munmap(start as *mut libc::c_void, LEN) };
        }
        return Ok(());
    }
    anyhow::bail!("the mappings never stood still")
}
