//! Threads that stand in the vDSO.
//!
//! On another kernel the old vDSO's functions are overwritten with jumps to the new one. A
//! thread between the bytes of such a jump would crash, one deeper inside goes on in old code
//! over zeroed data, which falls back to the system call except for the coarse clocks.

use object::{Object, ObjectSymbol};
use std::ops::Range;

/// Bytes a jump to the new vDSO takes (`jmp [rip+0]` and the address).
const JUMP: u64 = 14;

/// Where a thread stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Not in the vDSO.
    Outside,
    /// In it, where it can go on on another kernel, if not by choice.
    Inside,
    /// Between bytes that may be overwritten.
    Overwritten,
}

/// The running kernel's vDSO: the same in all processes but for its address.
#[derive(Clone, Debug, Default)]
pub struct Code {
    len: u64,
    /// First bytes of functions that may be overwritten, as offsets.
    entries: Vec<Range<u64>>,
}

impl Code {
    /// Reads that of this process.
    #[must_use]
    pub fn ours() -> Self {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
        let range = maps.lines().find(|line| line.ends_with("[vdso]"));
        let range = range
            .and_then(|line| line.split_once(' '))
            .and_then(|(range, _)| range.split_once('-'));
        let hex = |text| u64::from_str_radix(text, 16).ok();
        let Some((start, end)) = range.and_then(|(a, b)| Some((hex(a)?, hex(b)?))) else {
            return Self::default();
        };
        let mut bytes = vec![0; usize::try_from(end - start).unwrap_or(0)];
        let this = crate::model::ids::Pid(std::process::id().cast_signed());
        match crate::sys::process::read_memory_exact(this, start, &mut bytes) {
            Ok(()) => Self::parse(&bytes),
            Err(_) => Self::default(),
        }
    }

    fn parse(bytes: &[u8]) -> Self {
        let entries = object::File::parse(bytes)
            .map(|elf| {
                elf.dynamic_symbols()
                    .filter(|symbol| symbol.name().is_ok_and(|n| n.starts_with("__vdso_")))
                    .map(|symbol| symbol.address()..symbol.address() + JUMP)
                    .collect()
            })
            .unwrap_or_default();
        Self {
            len: bytes.len() as u64,
            entries,
        }
    }

    /// Where an instruction pointer stands, with the vDSO at `base`.
    #[must_use]
    pub fn standing(&self, base: u64, rip: u64) -> Standing {
        let Some(offset) = rip
            .checked_sub(base)
            .filter(|at| base != 0 && *at < self.len)
        else {
            return Standing::Outside;
        };
        let torn = |entry: &Range<u64>| entry.start < offset && offset < entry.end;
        if self.entries.iter().any(torn) {
            Standing::Overwritten
        } else {
            Standing::Inside
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_has_the_clock() {
        let code = Code::ours();
        assert!(code.len >= 4096);
        assert!(code.entries.len() >= 5);
    }

    #[test]
    fn only_the_bytes_behind_the_first_are_torn() {
        let code = Code {
            len: 8192,
            entries: vec![100..114, 300..314],
        };
        let at = |offset: u64| code.standing(0x7000, 0x7000 + offset);
        assert_eq!(at(99), Standing::Inside);
        assert_eq!(at(100), Standing::Inside);
        assert_eq!(at(101), Standing::Overwritten);
        assert_eq!(at(114), Standing::Inside);
        assert_eq!(at(8192), Standing::Outside);
        assert_eq!(code.standing(0, 50), Standing::Outside);
    }
}
