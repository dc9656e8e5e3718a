//! Where things lie while address spaces are replaced: tapes, and the running kernel's vDSO.

use super::RestoreError;
use super::tape::Tape;
use crate::model::frozen::{Application, Backing, Mm};
use crate::model::ids::Pid;
use crate::model::plan::{USER_END, free_gap};
use crate::sys::process::read_memory_exact;
use std::ops::Range;

/// Low enough to stay clear of libraries and stacks, high enough for any heap.
const SEARCH_FROM: u64 = 0x1000_0000_0000;
/// The kernel keeps 256 pages free below a stack that grows (`stack_guard_gap`).
const GUARD: u64 = 256 * 4096;

/// Addresses that the restorer and all processes of an application agree on.
#[derive(Debug)]
pub struct Layout {
    /// First tape; one for each process, one after the other.
    pub tapes: u64,
    /// Where the running kernel's vDSO group is put aside.
    pub vdso_aside: u64,
    /// The group as the restorer (and every child of it) has it, in address order.
    pub vdso: Vec<Range<u64>>,
    /// Bytes of the running kernel's `[vdso]`, the last of the group.
    pub vdso_code: Vec<u8>,
}

/// What becomes of the vDSO in one address space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VdsoMove {
    /// The kernel is the one the application ran on: the group goes back to this address.
    Back(u64),
    /// Another kernel: the group stays aside, the old code jumps to it.
    Forward,
}

impl Layout {
    /// Finds room for `processes` tapes that is free in the restorer and in every address space.
    ///
    /// # Errors
    /// There is none, or the restorer's own mappings cannot be read.
    pub fn find(app: &Application, processes: usize) -> Result<Self, RestoreError> {
        let maps = std::fs::read_to_string("/proc/self/maps")
            .map_err(RestoreError::io("read /proc/self/maps"))?;
        let mut taken = Vec::new();
        let mut vdso = Vec::new();
        let mut code = 0..0;
        for (range, name) in maps.lines().filter_map(parse_line) {
            taken.push((range.start, range.end));
            if name == "[vdso]" {
                code = range.clone();
            }
            // [vvar] and, on newer kernels, [vvar_vclock].
            if name == "[vdso]" || name.starts_with("[vvar") {
                vdso.push(range);
            }
        }
        let vmas = app.mms.values().flat_map(|mm| &mm.vmas);
        taken.extend(vmas.map(|vma| (vma.start, vma.end)));
        let group = vdso.last().map_or(0, |r| r.end) - vdso.first().map_or(0, |r| r.start);
        let tapes_len = (processes * Tape::LEN) as u64;
        let tapes =
            free_gap(&taken, SEARCH_FROM, tapes_len + group, GUARD).ok_or(RestoreError::NoRoom)?;
        let len = usize::try_from(code.end - code.start).unwrap_or(0);
        let mut vdso_code = vec![0; len];
        if len > 0 {
            let this = Pid(std::process::id().cast_signed());
            read_memory_exact(this, code.start, &mut vdso_code)?;
        }
        Ok(Self {
            tapes,
            vdso_aside: tapes + tapes_len,
            vdso,
            vdso_code,
        })
    }

    /// Everything in user space but `tape` and the vDSO group.
    #[must_use]
    pub fn all_but(&self, tape: Range<u64>) -> Vec<Range<u64>> {
        let mut keep = self.vdso.clone();
        keep.push(tape);
        keep.sort_unstable_by_key(|range| range.start);
        let mut holes = Vec::new();
        let mut at = 0;
        for range in keep {
            if range.start > at {
                holes.push(at..range.start);
            }
            at = range.end;
        }
        // The kernel may have put the vDSO at the very end.
        if at < USER_END {
            holes.push(at..USER_END);
        }
        holes
    }

    /// Address of the running kernel's `[vdso]` once its group was put aside.
    #[must_use]
    pub fn vdso_code_aside(&self) -> u64 {
        let first = self.vdso.first().map_or(0, |r| r.start);
        let last = self.vdso.last().map_or(0, |r| r.start);
        self.vdso_aside + (last - first)
    }

    /// Decides for one address space.
    #[must_use]
    pub fn vdso_move(&self, mm: &Mm) -> VdsoMove {
        let saved: Vec<_> = mm
            .vmas
            .iter()
            .filter(|vma| matches!(vma.backing, Backing::Vdso | Backing::Vvar))
            .map(|vma| vma.start..vma.end)
            .collect();
        let same_code = mm.vdso.as_ref().is_some_and(|v| v.code == self.vdso_code);
        match (saved.first(), self.vdso.first()) {
            (Some(old), Some(new)) if same_code && same_shape(&saved, &self.vdso) => {
                debug_assert_eq!(old.end - old.start, new.end - new.start);
                VdsoMove::Back(old.start)
            }
            _ => VdsoMove::Forward,
        }
    }
}

fn same_shape(a: &[Range<u64>], b: &[Range<u64>]) -> bool {
    let shape = |ranges: &[Range<u64>]| -> Vec<(u64, u64)> {
        let base = ranges.first().map_or(0, |r| r.start);
        let relative = ranges.iter().map(|r| (r.start - base, r.end - base));
        relative.collect()
    };
    shape(a) == shape(b)
}

/// The ranges that a file of /proc/PID/maps tells, in order.
pub(super) fn ranges(maps: &str) -> Vec<Range<u64>> {
    let lines = maps.lines().filter_map(parse_line);
    lines.map(|(range, _)| range).collect()
}

fn parse_line(line: &str) -> Option<(Range<u64>, &str)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let start = u64::from_str_radix(start, 16).ok()?;
    let end = u64::from_str_radix(end, 16).ok()?;
    // [vsyscall] lies in the kernel's half.
    (end <= USER_END + 4096).then_some((start..end, fields.nth(4).unwrap_or("")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_holes_are_the_complement() {
        let layout = Layout {
            tapes: 0x5000,
            vdso_aside: 0x7000,
            vdso: vec![0x1000..0x2000, 0x2000..0x3000],
            vdso_code: Vec::new(),
        };
        assert_eq!(
            layout.all_but(0x5000..0x6000),
            [0..0x1000, 0x3000..0x5000, 0x6000..USER_END]
        );
        assert_eq!(layout.vdso_code_aside(), 0x8000);
    }

    #[test]
    fn nothing_lies_behind_a_vdso_at_the_end() {
        let layout = Layout {
            tapes: 0x5000,
            vdso_aside: 0x7000,
            vdso: vec![
                USER_END - 0x3000..USER_END - 0x1000,
                USER_END - 0x1000..USER_END,
            ],
            vdso_code: Vec::new(),
        };
        assert_eq!(
            layout.all_but(0x5000..0x6000),
            [0..0x5000, 0x6000..USER_END - 0x3000]
        );
    }

    #[test]
    fn the_own_vdso_is_found() {
        let layout = Layout::find(&Application::default(), 3).unwrap();
        assert!(layout.vdso_code.starts_with(b"\x7fELF"));
        assert!(layout.vdso.len() >= 2);
        assert_eq!(layout.vdso_aside, layout.tapes + 3 * Tape::LEN as u64);
    }

    #[test]
    fn lines_are_parsed() {
        let line = "7fff1000-7fff3000 r-xp 00000000 00:00 0                          [vdso]";
        assert_eq!(parse_line(line), Some((0x7fff_1000..0x7fff_3000, "[vdso]")));
        let line = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0   [vsyscall]";
        assert_eq!(parse_line(line), None);
    }
}
