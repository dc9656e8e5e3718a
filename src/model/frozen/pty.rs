//! Pseudo-terminals.

use crate::model::ids::Pid;
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// What the two ends of a pseudo-terminal have in common. The master has no settings of its
/// own: its line discipline passes all bytes through.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyState {
    /// N of `/dev/pts/N`.
    pub index: u32,
    /// Owner of `/dev/pts/N`.
    pub uid: u32,
    /// Group of `/dev/pts/N`.
    pub gid: u32,
    /// Permissions of `/dev/pts/N`.
    pub mode: u32,
    /// The master is closed, which hung up every slave. Nothing below counts then.
    pub hung_up: bool,
    /// The slave has been open, if it is not any more.
    pub slave_opened: bool,
    /// Settings.
    pub termios: Termios,
    /// Rows, columns, width and height in pixels.
    pub winsize: [u16; 4],
    /// `TIOCEXCL` of the master and of the slave.
    pub exclusive: [bool; 2],
    /// `TIOCSPTLCK`.
    pub locked: bool,
    /// `TIOCPKT`.
    pub packet: bool,
    /// What the slave writes is held back since the terminal's user typed `VSTOP`.
    pub stopped: bool,
    /// `TCOOFF` of the master and of the slave.
    pub output_off: [bool; 2],
    /// The session whose controlling terminal it is.
    pub session: Option<Pid>,
    /// Foreground process group.
    pub foreground: Option<Pid>,
    /// Bytes for the master to read.
    pub output: ByteBuf,
    /// Bytes for the slave to read.
    pub input: PtyInput,
    /// Column that the slave's output has reached, from 0 on.
    pub column: u32,
    /// Column in which the line that is being typed begins.
    pub canon_column: u32,
}

/// What was typed and not read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PtyInput {
    /// Bytes in the line discipline.
    pub bytes: ByteBuf,
    /// Indices of bytes that end a line, in ascending order. An end of file is a 0 here.
    pub line_ends: Vec<u32>,
    /// How many of the bytes are complete lines, in canonical mode.
    pub complete: u32,
    /// Canonical mode came on when bytes had been typed; they end without a delimiter.
    pub pushed: bool,
    /// Bytes that the line discipline has no room for yet, before it has looked at them.
    pub waiting: ByteBuf,
}

/// `struct termios2` of asm-generic/termbits.h.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Termios {
    /// `c_iflag`.
    pub iflag: u32,
    /// `c_oflag`.
    pub oflag: u32,
    /// `c_cflag`.
    pub cflag: u32,
    /// `c_lflag`.
    pub lflag: u32,
    /// `c_line`.
    pub line: u8,
    /// `c_cc`.
    pub cc: [u8; 19],
    /// `c_ispeed`, bits per second.
    pub ispeed: u32,
    /// `c_ospeed`, bits per second.
    pub ospeed: u32,
}

impl Termios {
    /// Bytes of the kernel's struct.
    pub const LEN: usize = 44;

    /// From the kernel's struct.
    #[must_use]
    pub fn decode(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at: usize| {
            let word = bytes[at..].first_chunk::<4>();
            word.map_or(0, |word| u32::from_le_bytes(*word))
        };
        let mut cc = [0; 19];
        cc.copy_from_slice(&bytes[17..36]);
        Self {
            iflag: word(0),
            oflag: word(4),
            cflag: word(8),
            lflag: word(12),
            line: bytes[16],
            cc,
            ispeed: word(36),
            ospeed: word(40),
        }
    }

    /// The kernel's struct.
    #[must_use]
    pub fn encode(&self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        for (at, word) in [
            (0, self.iflag),
            (4, self.oflag),
            (8, self.cflag),
            (12, self.lflag),
            (36, self.ispeed),
            (40, self.ospeed),
        ] {
            bytes[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[16] = self.line;
        bytes[17..36].copy_from_slice(&self.cc);
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_struct_goes_there_and_back() {
        let mut bytes = [0; Termios::LEN];
        for (number, byte) in (1..).zip(&mut bytes) {
            *byte = number;
        }
        let termios = Termios::decode(&bytes);
        assert_eq!(termios.oflag, 0x0807_0605);
        assert_eq!((termios.line, termios.cc[18]), (17, 36));
        assert_eq!(termios.encode(), bytes);
    }
}
