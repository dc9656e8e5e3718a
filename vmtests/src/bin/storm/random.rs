//! Random numbers that a seed repeats.

use std::os::raw::c_int;

/// Numbers that are played with; below are the standard streams.
const FIRST: u64 = 3;
const NUMBERS: u64 = 90;
/// The last of them.
pub const LAST: c_int = 92;

pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// Below a small limit.
    pub fn small(&mut self, limit: u8) -> c_int {
        c_int::try_from(self.below(u64::from(limit))).expect("small")
    }

    pub fn fd(&mut self) -> c_int {
        c_int::try_from(FIRST + self.below(NUMBERS)).expect("small")
    }

    pub fn coin(&mut self) -> bool {
        self.below(2) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        let n = usize::try_from(self.below(from.len() as u64)).expect("an index");
        from[n]
    }

    /// A seed for somebody else.
    pub fn fork(&mut self) -> Random {
        Random(self.next())
    }
}
