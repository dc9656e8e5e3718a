//! Mappings as /proc/PID/smaps shows them.

use crate::model::event::Vma;
use crate::model::ids::{InodeId, Pid, Tid};
use std::fs;
use std::io;

const PAGE_SHIFT: u32 = 12;

/// Names of `VmFlags` (fs/proc/task_mmu.c) with their bits. Not among them is what changes
/// without the mapping being changed (soft-dirty), and bits that kernels number differently.
const FLAGS: [(&str, u64); 27] = [
    ("rd", 0x1),
    ("wr", 0x2),
    ("ex", 0x4),
    ("sh", 0x8),
    ("mr", 0x10),
    ("mw", 0x20),
    ("me", 0x40),
    ("ms", 0x80),
    ("gd", 0x100),
    ("um", 0x200),
    ("pf", 0x400),
    ("uw", 0x1000),
    ("lo", 0x2000),
    ("io", 0x4000),
    ("sr", 0x8000),
    ("rr", 0x1_0000),
    ("dc", 0x2_0000),
    ("de", 0x4_0000),
    ("ac", 0x10_0000),
    ("nr", 0x20_0000),
    ("ht", 0x40_0000),
    ("sf", 0x80_0000),
    ("wf", 0x200_0000),
    ("dd", 0x400_0000),
    ("hg", 0x2000_0000),
    ("nh", 0x4000_0000),
    ("mg", 0x8000_0000),
];

/// Names of the flags that are compared.
pub fn names(flags: u64) -> Vec<&'static str> {
    let set = FLAGS.iter().filter(|(_, bit)| flags & bit != 0);
    set.map(|(name, _)| *name).collect()
}

/// As much of a mapping as is shown.
pub fn shown(vma: Vma) -> Vma {
    let mask = FLAGS.iter().fold(0, |mask, (_, bit)| mask | bit);
    Vma {
        flags: vma.flags & mask,
        // Of an anonymous mapping it is not.
        pgoff: if vma.inode.ino == 0 { 0 } else { vma.pgoff },
        ..vma
    }
}

/// The mappings of a thread's address space; none if it gave it up.
pub fn read(pid: Pid, tid: Tid) -> io::Result<Vec<Vma>> {
    let text = fs::read(format!("/proc/{pid}/task/{tid}/smaps"))?;
    Ok(parse(&String::from_utf8_lossy(&text)))
}

fn parse(text: &str) -> Vec<Vma> {
    let mut found: Vec<Vma> = Vec::new();
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(vma) = found.last_mut() {
                let bit = |name: &str| FLAGS.iter().find(|(known, _)| *known == name);
                let bits = flags.split_whitespace().filter_map(bit);
                vma.flags = bits.fold(0, |flags, (_, bit)| flags | bit);
            }
        } else if line.starts_with(|c: char| c.is_ascii_digit() || c.is_ascii_lowercase()) {
            found.extend(header(line));
        }
    }
    // [vsyscall] is shown for every process and belongs to none.
    found.retain(|vma| vma.start < 1 << 63);
    found
}

/// `55d0c0000000-55d0c0022000 r--p 00002000 fe:01 1234    /path`
fn header(line: &str) -> Option<Vma> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let offset = words.nth(1)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let dev = hex(major)? << 20 | hex(minor)?;
    Some(Vma {
        start: hex(start)?,
        end: hex(end)?,
        flags: 0,
        pgoff: hex(offset)? >> PAGE_SHIFT,
        inode: InodeId {
            dev: u32::try_from(dev).ok()?,
            ino: words.next()?.parse().ok()?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_is_read_with_its_flags() {
        let text = "7f00-8f00 r-xs 00002000 fe:01 77   /a b\nSize:   4 kB\n\
                    VmFlags: rd ex sh dd sd \n\
                    ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]\n\
                    VmFlags: ex \n";
        let inode = InodeId {
            dev: 0xfe << 20 | 1,
            ino: 77,
        };
        let vma = Vma {
            start: 0x7f00,
            end: 0x8f00,
            flags: 0x400_000d,
            pgoff: 2,
            inode,
        };
        assert_eq!(parse(text), [vma]);
        assert_eq!(names(vma.flags), ["rd", "ex", "sh", "dd"]);
    }
}
