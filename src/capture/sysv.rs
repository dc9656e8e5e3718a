//! System V shared memory: segments that are attached.
//!
//! The namespace is the machine's, and an object belongs to nobody: those of an application are
//! the segments it has attached.

use super::error::CheckpointError;
use super::huge;
use super::mm::map_file;
use crate::bpf::events::{VmaKind, VmaRec};
use crate::bpf::iter::Tasks;
use crate::model::frozen::{Blocker, ContentId, PAGE_SIZE};
use crate::model::ids::Pid;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind;

/// `SHM_DEST` of include/linux/shm.h: goes with the last who has it attached.
const DESTROYED: u32 = 0o1000;

/// A line of /proc/sysvipc/shm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Key; 0 = `IPC_PRIVATE`.
    pub key: i32,
    /// Id.
    pub id: i32,
    /// Permission bits and `SHM_*`.
    pub perms: u32,
    /// Bytes.
    pub size: u64,
    /// PID of its creator.
    pub creator: u32,
    /// How often it is attached.
    pub attached: u64,
    /// Owner.
    pub owner: (u32, u32),
    /// Creator's ids.
    pub creator_ids: (u32, u32),
}

impl Segment {
    /// Whether it goes with the last who has it attached.
    pub fn is_destroyed(&self) -> bool {
        self.perms & DESTROYED != 0
    }

    /// Its content's identity, apart from those of files.
    pub fn content(&self) -> ContentId {
        ContentId(1 << 62 | u64::from(self.id.cast_unsigned()))
    }
}

/// All segments of the namespace.
///
/// # Errors
/// procfs cannot be read.
pub fn segments() -> Result<BTreeMap<i32, Segment>, CheckpointError> {
    let lines = table("/proc/sysvipc/shm")?;
    let segments = lines.iter().filter_map(|line| segment(line));
    Ok(segments.map(|segment| (segment.id, segment)).collect())
}

/// The lines of a file of /proc/sysvipc as numbers.
///
/// # Errors
/// procfs cannot be read.
pub fn table(path: &str) -> Result<Vec<Vec<i64>>, CheckpointError> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text.lines().skip(1).map(numbers).collect()),
        // A kernel without System V IPC.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(CheckpointError::io("read", path)(error)),
    }
}

/// The third column, permissions, is octal.
fn numbers(line: &str) -> Vec<i64> {
    let parse = |(column, word)| i64::from_str_radix(word, if column == 2 { 8 } else { 10 });
    let words = line.split_ascii_whitespace().enumerate();
    words.map(|word| parse(word).unwrap_or(0)).collect()
}

fn segment(line: &[i64]) -> Option<Segment> {
    let [
        key,
        id,
        perms,
        size,
        cpid,
        _,
        attached,
        uid,
        gid,
        cuid,
        cgid,
        ..,
    ] = *line
    else {
        return None;
    };
    let number = |value: i64| u32::try_from(value).unwrap_or(0);
    Some(Segment {
        key: i32::try_from(key).ok()?,
        id: i32::try_from(id).ok()?,
        perms: number(perms),
        size: u64::try_from(size).ok()?,
        creator: number(cpid),
        attached: u64::try_from(attached).ok()?,
        owner: (number(uid), number(gid)),
        creator_ids: (number(cuid), number(cgid)),
    })
}

/// The segment that a mapping shows. Its file's inode number is the id (newseg()).
pub fn of<'a>(segments: &'a BTreeMap<i32, Segment>, vma: &VmaRec) -> Option<&'a Segment> {
    if !is_named_like_one(vma) {
        return None;
    }
    segments.get(&i32::try_from(vma.ino).ok()?)
}

/// Whether the file of a mapping has no name but that which the kernel gives segments (newseg()).
pub fn is_named_like_one(vma: &VmaRec) -> bool {
    matches!(vma.kind, VmaKind::SHMEM | VmaKind::HUGETLB)
        && vma.nlink == 0
        && vma.name().starts_with("SYSV")
}

/// What of segments keeps an application from being checkpointed.
pub fn blockers(segments: &BTreeMap<i32, Segment>, vmas: &[VmaRec], tasks: &Tasks) -> Vec<Blocker> {
    let inside: BTreeSet<u32> = tasks.processes.iter().map(|p| p.pid).collect();
    attachments(segments, vmas, &inside, page_of)
}

/// Bytes of a page of a mapping.
fn page_of(vma: &VmaRec) -> u64 {
    match vma.kind {
        // One that is gone by now is no obstacle.
        VmaKind::HUGETLB => huge::page_at(&map_file(vma)).unwrap_or(PAGE_SIZE).max(1),
        _ => PAGE_SIZE,
    }
}

fn attachments(
    segments: &BTreeMap<i32, Segment>,
    vmas: &[VmaRec],
    inside: &BTreeSet<u32>,
    page_of: impl Fn(&VmaRec) -> u64,
) -> Vec<Blocker> {
    let mut found = Vec::new();
    let mut counted: BTreeMap<i32, (u32, u64)> = BTreeMap::new();
    let blocker = |pid: u32, id: i32, reason: String| Blocker {
        pid: Pid(pid.cast_signed()),
        fd: None,
        object: format!("System V shared memory {id}"),
        reason,
    };
    for vma in vmas {
        let Some(segment) = of(segments, vma) else {
            continue;
        };
        counted.entry(segment.id).or_insert((vma.tgid, 0)).1 += 1;
        let whole = segment.size.next_multiple_of(page_of(vma));
        if vma.pgoff != 0 || vma.end - vma.start != whole {
            let reason = format!(
                "mapping {:x}-{:x} shows only a part of it, which is not carried yet",
                vma.start, vma.end
            );
            found.push(blocker(vma.tgid, segment.id, reason));
        }
    }
    for segment in segments.values() {
        match counted.get(&segment.id) {
            Some((pid, _)) if segment.perms & !(DESTROYED | 0o777) != 0 => {
                let reason = "its pages are locked (SHM_LOCK), which is not carried yet";
                found.push(blocker(*pid, segment.id, reason.to_owned()));
            }
            Some((pid, count)) if segment.attached > *count => found.push(blocker(
                *pid,
                segment.id,
                "it is attached outside the application as well; checkpoint both together"
                    .to_owned(),
            )),
            None if inside.contains(&segment.creator) => found.push(blocker(
                segment.creator,
                segment.id,
                "a process of the application made it and none has it attached, which is not \
                 carried yet; attach or remove it"
                    .to_owned(),
            )),
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_procfs_is_read() {
        let line = "  1234  32769  1600  8192  77  78  2  33  44  5  6  1 2 3  8192 0";
        let segment = segment(&numbers(line)).unwrap();
        assert_eq!((segment.key, segment.id, segment.size), (1234, 32769, 8192));
        assert!(segment.is_destroyed());
        assert_eq!((segment.owner, segment.creator_ids), ((33, 44), (5, 6)));
        assert_eq!((segment.creator, segment.attached), (77, 2));
    }

    #[test]
    fn every_attachment_must_be_inside_and_whole() {
        let one = Segment {
            id: 7,
            size: 5000,
            attached: 1,
            creator: 9,
            ..Segment::default()
        };
        let segments = BTreeMap::from([(7, one)]);
        let mut vma = VmaRec {
            start: 0x1000,
            end: 0x3000,
            kind: VmaKind::SHMEM,
            ino: 7,
            ..VmaRec::default()
        };
        for (to, from) in vma.name.iter_mut().zip(b"SYSV00000000") {
            *to = from.cast_signed();
        }
        let refused = |segments: &BTreeMap<i32, Segment>, vmas: &[VmaRec]| {
            let page_of = |vma: &VmaRec| match vma.kind {
                VmaKind::HUGETLB => 2 << 20,
                _ => PAGE_SIZE,
            };
            attachments(segments, vmas, &BTreeSet::from([9]), page_of).len()
        };
        assert_eq!(refused(&segments, &[vma]), 0);
        let cut = VmaRec { end: 0x2000, ..vma };
        assert_eq!(refused(&segments, &[cut]), 1);
        assert_eq!(refused(&segments, &[]), 1);
        let huge = VmaRec {
            kind: VmaKind::HUGETLB,
            ..vma
        };
        assert_eq!(refused(&segments, &[huge]), 1);
        let end = huge.start + (2 << 20);
        assert_eq!(refused(&segments, &[VmaRec { end, ..huge }]), 0);
        let outside = Segment { attached: 2, ..one };
        assert_eq!(refused(&BTreeMap::from([(7, outside)]), &[vma]), 1);
    }
}
