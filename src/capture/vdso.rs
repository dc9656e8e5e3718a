//! Threads that stand in the vDSO.
//!
//! On another kernel the old vDSO's functions are overwritten with jumps to the new one. A
//! thread between the bytes of such a jump would crash; one deeper inside would go on in old code
//! over zeroed data, which falls back to the system call but for the coarse clocks: those would
//! show zero. So nobody may stand there.

use object::{Object, ObjectSymbol};

/// Where a thread stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Not in the vDSO.
    Outside,
    /// In it.
    Inside,
}

/// The running kernel's vDSO: the same in all processes but for its address.
#[derive(Clone, Debug, Default)]
pub struct Code {
    len: u64,
    /// First bytes of functions, as offsets.
    entries: Vec<u64>,
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
                    .map(|symbol| symbol.address())
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
        let inside = base != 0 && (base..base + self.len).contains(&rip);
        match inside && !self.is_entry(rip - base) {
            true => Standing::Inside,
            false => Standing::Outside,
        }
    }

    /// At its first byte a function has not begun: the jump that may stand there is taken whole.
    fn is_entry(&self, offset: u64) -> bool {
        self.entries.contains(&offset)
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
    fn whoever_has_not_begun_is_outside() {
        let code = Code {
            len: 8192,
            entries: vec![100, 300],
        };
        let at = |offset: u64| code.standing(0x7000, 0x7000 + offset);
        assert_eq!(at(99), Standing::Inside);
        assert_eq!(at(100), Standing::Outside);
        assert_eq!(at(101), Standing::Inside);
        assert_eq!(at(8192), Standing::Outside);
        assert_eq!(code.standing(0, 50), Standing::Outside);
    }
}
