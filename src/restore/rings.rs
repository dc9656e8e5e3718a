//! Mappings of io_uring instances. Since 6.4 (io_uring_mmu_get_unmapped_area()) the kernel chooses
//! where they are and takes no address: all other room is taken first, so that it has no choice.

use super::RestoreError;
use super::layout::ranges;
use super::sources::Sources;
use super::supervisor::Supervisor;
use super::tape::{Expect, Script};
use crate::model::frozen::{Backing, Mm, PAGE_SIZE, Vma};
use crate::model::ids::Pid;
use crate::model::plan::USER_END;
use nix::libc;
use std::ops::Range;

type Result<T> = std::result::Result<T, RestoreError>;

/// Takes room that nothing else may have; it needs no memory.
fn take(script: &mut Script, room: &Range<u64>) {
    let flags =
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED_NOREPLACE;
    let flags = u64::from(flags.cast_unsigned());
    let args = [room.start, room.end - room.start, 0, flags, u64::MAX, 0];
    let expect = Expect::Is(room.start.cast_signed());
    script.add(libc::SYS_mmap, &args, expect);
}

/// Marks the place of a ring, of io_uring or AIO, which the kernel would give to another one
/// otherwise.
pub(super) fn hold_place(script: &mut Script, vma: &Vma) {
    take(script, &(vma.start..vma.end));
}

fn give_back(script: &mut Script, room: &Range<u64>) {
    let args = [room.start, room.end - room.start];
    script.zero(libc::SYS_munmap, &args);
}

/// The room between mappings, which are in order.
fn holes(mapped: &[Range<u64>]) -> Vec<Range<u64>> {
    // Nothing is mapped at 0.
    let mut at = PAGE_SIZE;
    let mut holes = Vec::new();
    for range in mapped {
        if range.start > at {
            holes.push(at..range.start);
        }
        at = at.max(range.end);
    }
    if at < USER_END {
        holes.push(at..USER_END);
    }
    holes
}

impl Supervisor<'_> {
    /// Maps the instances of an address space that has all of its other mappings.
    ///
    /// # Errors
    /// The kernel refuses a call, or puts one elsewhere.
    pub(super) fn map_rings(&mut self, pid: Pid, mm: &Mm, sources: &Sources) -> Result<()> {
        let is_ring = |vma: &&Vma| matches!(vma.backing, Backing::IoUring { .. });
        let mut taken = Vec::new();
        for vma in mm.vmas.iter().filter(is_ring) {
            let place = vma.start..vma.end;
            let len = vma.end - vma.start;
            let fd = sources.of_vma(vma).ok_or(RestoreError::NoRoom)?;
            let Backing::IoUring { offset, .. } = vma.backing else {
                continue;
            };
            let map = |script: &mut Script, at: u64, flags: i32, expect| {
                let flags = u64::from((libc::MAP_SHARED | flags).cast_unsigned());
                let fd = u64::from(fd.cast_unsigned());
                let args = [at, len, vma.prot.into(), flags, fd, offset];
                script.add(libc::SYS_mmap, &args, expect);
            };
            let mut script = Script::default();
            give_back(&mut script, &place);
            let fixed = libc::MAP_FIXED_NOREPLACE;
            map(&mut script, vma.start, fixed, Expect::Anything);
            let results = self.run(pid, pid.leader(), &script)?;
            let mut script = Script::default();
            if results.last() != Some(&vma.start.cast_signed()) {
                if taken.is_empty() {
                    // The place itself is to be left over.
                    take(&mut script, &place);
                    self.run(pid, pid.leader(), &script)?;
                    taken = holes(&mapped(pid)?);
                    script = Script::default();
                    for hole in &taken {
                        take(&mut script, hole);
                    }
                    give_back(&mut script, &place);
                }
                map(&mut script, 0, 0, Expect::Is(vma.start.cast_signed()));
            }
            for advice in &vma.advice {
                let advice = u64::from(advice.cast_unsigned());
                script.zero(libc::SYS_madvise, &[vma.start, len, advice]);
            }
            self.run(pid, pid.leader(), &script)?;
        }
        let mut script = Script::default();
        for hole in &taken {
            give_back(&mut script, hole);
        }
        self.run(pid, pid.leader(), &script)?;
        Ok(())
    }
}

/// What a process has mapped, in order.
fn mapped(pid: Pid) -> Result<Vec<Range<u64>>> {
    let path = format!("/proc/{pid}/maps");
    let text = std::fs::read_to_string(&path).map_err(RestoreError::io(format!("read {path}")))?;
    Ok(ranges(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_room_is_mapped_or_a_hole() {
        let mapped = [0x2000..0x3000, 0x3000..0x5000, 0x7000..USER_END - 0x1000];
        let expected = [0x1000..0x2000, 0x5000..0x7000, USER_END - 0x1000..USER_END];
        assert_eq!(holes(&mapped), expected);
        let all = 0x1000..USER_END;
        assert_eq!(holes(std::slice::from_ref(&all)), []);
    }
}
