//! io_uring instances: two rings of positions that count on for ever, and what lies between them.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

/// An io_uring instance without requests in flight.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoUring {
    /// `IORING_SETUP_*`.
    pub flags: u32,
    /// Slots for requests, a power of two.
    pub sq_entries: u32,
    /// Slots for completions, a power of two.
    pub cq_entries: u32,
    /// How many requests the kernel has taken, modulo 2^32: its next slot is the remainder.
    pub sq_head: u32,
    /// How many completions it has put in, modulo 2^32.
    pub cq_tail: u32,
    /// Where the kernel that made it put the array of request numbers, bytes from the start of
    /// `ring`.
    pub sq_array: u32,
    /// Where it put the completions.
    pub cqes: u32,
    /// Both rings as user space has them mapped at `IORING_OFF_SQ_RING`.
    pub ring: ByteBuf,
    /// The requests, as mapped at `IORING_OFF_SQES`.
    pub sqes: ByteBuf,
}

impl IoUring {
    /// `IORING_SETUP_SQE128`.
    pub const SQE128: u32 = 1 << 10;
    /// `IORING_SETUP_CQE32`.
    pub const CQE32: u32 = 1 << 11;
    /// `IORING_SETUP_NO_SQARRAY`.
    pub const NO_SQARRAY: u32 = 1 << 16;

    /// Bytes of one request.
    #[must_use]
    pub fn sqe_bytes(flags: u32) -> usize {
        if flags & Self::SQE128 != 0 { 128 } else { 64 }
    }

    /// Bytes of one completion.
    #[must_use]
    pub fn cqe_bytes(flags: u32) -> usize {
        if flags & Self::CQE32 != 0 { 32 } else { 16 }
    }

    /// Bytes that `ring` has for such positions of its parts, of `sqes` the same.
    #[must_use]
    pub fn lengths(&self) -> (usize, usize) {
        let (sq, cq) = (self.sq_entries as usize, self.cq_entries as usize);
        let array = match self.flags & Self::NO_SQARRAY {
            0 => self.sq_array as usize + 4 * sq,
            _ => 0,
        };
        let cqes = self.cqes as usize + Self::cqe_bytes(self.flags) * cq;
        (array.max(cqes), Self::sqe_bytes(self.flags) * sq)
    }

    /// Whether there is as much of it as it says.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        (self.ring.len(), self.sqes.len()) == self.lengths()
    }

    /// How to bring a new instance to its positions: requests without a completion, requests with
    /// one, completions without a request, in this order. A request whose success is silent
    /// (`IOSQE_CQE_SKIP_SUCCESS`) or a completion that is one of several of its request
    /// accounts for the difference.
    #[must_use]
    pub fn winding(&self) -> (u32, u32, u32) {
        let more = self.cq_tail.wrapping_sub(self.sq_head).cast_signed();
        let (silent, extra) = match more {
            0.. => (0, more.unsigned_abs()),
            _ => (more.unsigned_abs(), 0),
        };
        (silent, self.sq_head.wrapping_sub(silent), extra)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(sq_head: u32, cq_tail: u32) -> IoUring {
        IoUring {
            sq_entries: 8,
            cq_entries: 16,
            sq_head,
            cq_tail,
            cqes: 64,
            sq_array: 64 + 16 * 16,
            ..IoUring::default()
        }
    }

    #[test]
    fn positions_are_reached() {
        for (sq_head, cq_tail, expected) in [
            (0, 0, (0, 0, 0)),
            (7, 7, (0, 7, 0)),
            (7, 9, (0, 7, 2)),
            (9, 7, (2, 7, 0)),
            (3, u32::MAX, (4, u32::MAX, 0)),
            (u32::MAX, 1, (0, u32::MAX, 2)),
        ] {
            let winding = ring(sq_head, cq_tail).winding();
            assert_eq!(winding, expected, "{sq_head} {cq_tail}");
            let (silent, both, extra) = winding;
            assert_eq!(silent.wrapping_add(both), sq_head);
            assert_eq!(both.wrapping_add(extra), cq_tail);
        }
    }

    #[test]
    fn its_length_is_that_of_its_parts() {
        let mut ring = ring(0, 0);
        assert_eq!(ring.lengths(), (64 + 256 + 32, 512));
        ring.flags = IoUring::SQE128 | IoUring::CQE32 | IoUring::NO_SQARRAY;
        assert_eq!(ring.lengths(), (64 + 512, 1024));
        assert!(!ring.is_whole());
        ring.ring = vec![0; 576].into();
        ring.sqes = vec![0; 1024].into();
        assert!(ring.is_whole());
    }
}
