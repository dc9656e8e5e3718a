//! The files that page slots of an image directory lie in: several, since the kernel lets one CPU
//! at a time write to a file.

use super::pages::PART;
use crate::model::frozen::PAGE_SIZE;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Slots that follow one another in a file, before the next file has its turn: as many as are
/// written at once.
const STRIPE: u64 = PART;

/// All of them, in turn.
#[derive(Debug)]
pub struct Stripes(Vec<File>);

/// A piece of what is read or written: of which file, from which byte on, how many bytes.
#[derive(Debug, PartialEq, Eq)]
struct Piece {
    file: usize,
    offset: u64,
    bytes: usize,
}

impl Stripes {
    /// More files than this make nothing faster.
    pub const MOST: usize = 8;

    /// How many files are written by so many CPUs: with twice as many, two of them seldom meet
    /// at one.
    #[must_use]
    pub fn for_cpus(cpus: usize) -> usize {
        if cpus > 1 {
            (2 * cpus).min(Self::MOST)
        } else {
            1
        }
    }

    /// Those files, in their order; not none.
    #[must_use]
    pub const fn new(files: Vec<File>) -> Self {
        Self(files)
    }

    /// Writes whole pages from `slot` on.
    pub fn write(&self, slot: u64, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for piece in pieces(self.0.len(), slot, bytes.len()) {
            let (own, others) = rest.split_at(piece.bytes);
            self.0[piece.file].write_all_at(own, piece.offset)?;
            rest = others;
        }
        Ok(())
    }

    /// Reads whole pages from `slot` on.
    pub fn read(&self, slot: u64, bytes: &mut [u8]) -> io::Result<()> {
        let len = bytes.len();
        let mut rest = bytes;
        for piece in pieces(self.0.len(), slot, len) {
            let (own, others) = rest.split_at_mut(piece.bytes);
            self.0[piece.file].read_exact_at(own, piece.offset)?;
            rest = others;
        }
        Ok(())
    }

    /// Gives each file the length that so many slots take.
    pub fn set_slots(&self, slots: u64) -> io::Result<()> {
        let round = STRIPE * self.0.len() as u64;
        for (file, number) in self.0.iter().zip(0..) {
            let last = (slots % round).saturating_sub(number * STRIPE).min(STRIPE);
            file.set_len((slots / round * STRIPE + last) * PAGE_SIZE)?;
        }
        Ok(())
    }
}

/// Where so many bytes from `slot` on lie in so many files.
fn pieces(files: usize, slot: u64, bytes: usize) -> impl Iterator<Item = Piece> {
    let files = files as u64;
    let mut at = slot * PAGE_SIZE;
    let end = at + bytes as u64;
    let stripe = STRIPE * PAGE_SIZE;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let (number, inside) = (at / stripe, at % stripe);
        let len = (stripe - inside).min(end - at);
        at += len;
        Some(Piece {
            file: usize::try_from(number % files).unwrap_or(0),
            offset: number / files * stripe + inside,
            bytes: usize::try_from(len).unwrap_or(0),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 4096;

    #[test]
    fn one_file_has_all_slots_in_their_order() {
        let mut at = 100 * PAGE_SIZE;
        for piece in pieces(1, 100, 300 * BYTES) {
            assert_eq!((piece.file, piece.offset), (0, at));
            at += piece.bytes as u64;
        }
        assert_eq!(at, 400 * PAGE_SIZE);
    }

    #[test]
    fn files_take_turns() {
        let stripe = usize::try_from(STRIPE).unwrap();
        let piece = |file, slots: u64, pages| Piece {
            file,
            offset: slots * PAGE_SIZE,
            bytes: pages * BYTES,
        };
        let found: Vec<_> = pieces(2, STRIPE - 1, (stripe + 3) * BYTES).collect();
        let expected = [
            piece(0, STRIPE - 1, 1),
            piece(1, 0, stripe),
            piece(0, STRIPE, 2),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_was_written_is_read_however_many_files_there_are() {
        let slots = 5 * STRIPE + 7;
        let pages: Vec<u8> = (0..slots)
            .flat_map(|slot| [slot.to_le_bytes()[0]; BYTES])
            .collect();
        for files in 1..4 {
            let made = (0..files).map(|_| tempfile::tempfile().unwrap());
            let stripes = Stripes::new(made.collect());
            let (first, second) = pages.split_at(3 * BYTES);
            stripes.write(3, second).unwrap();
            stripes.write(0, first).unwrap();
            let lengths = || stripes.0.iter().map(|file| file.metadata().unwrap().len());
            let before: Vec<_> = lengths().collect();
            stripes.set_slots(slots).unwrap();
            assert_eq!(lengths().collect::<Vec<_>>(), before);
            let mut read = vec![0; 200 * BYTES];
            stripes.read(50, &mut read).unwrap();
            assert_eq!(read, pages[50 * BYTES..250 * BYTES]);
            stripes.set_slots(STRIPE + 1).unwrap();
            assert_eq!(lengths().sum::<u64>(), (STRIPE + 1) * PAGE_SIZE);
            assert!(stripes.read(STRIPE + 1, &mut read[..BYTES]).is_err());
        }
    }
}
