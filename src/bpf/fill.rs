//! How full the event rings are, seen from beside their consumers.

use super::shared::SharedPage;
use serde::{Deserialize, Serialize};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// One ring at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RingFill {
    /// Bytes written and not consumed yet.
    pub bytes: u64,
    /// Bytes it has room for.
    pub size: u64,
}

/// The positions of every ring, in the order of the shards.
#[derive(Clone, Debug)]
pub struct Fills(Arc<[Positions]>);

impl Fills {
    /// Those of ring maps, each with its size.
    ///
    /// # Errors
    ///
    /// mmap(2).
    pub(super) fn of<'fd>(rings: impl Iterator<Item = (BorrowedFd<'fd>, u32)>) -> io::Result<Self> {
        let positions = rings.map(|(fd, size)| Positions::map(fd, size.into()));
        Ok(Self(positions.collect::<io::Result<_>>()?))
    }

    /// How full each ring is now.
    #[must_use]
    pub fn now(&self) -> Vec<RingFill> {
        self.0.iter().map(Positions::now).collect()
    }
}

/// The first two pages of a ring map: the consumer's position and the producer's
/// (kernel/bpf/ringbuf.c, `struct bpf_ringbuf`). libbpf maps them too, but its handle belongs
/// to the thread that consumes.
#[derive(Debug)]
struct Positions {
    consumer: SharedPage,
    producer: SharedPage,
    size: u64,
}

impl Positions {
    fn map(ring: BorrowedFd<'_>, size: u64) -> io::Result<Self> {
        Ok(Self {
            consumer: SharedPage::map(ring, 0)?,
            producer: SharedPage::map(ring, 1)?,
            size,
        })
    }

    fn now(&self) -> RingFill {
        // In this order the difference cannot be negative, but it can be too large.
        let consumed = self.consumer.long().load(Ordering::SeqCst);
        let produced = self.producer.long().load(Ordering::SeqCst);
        RingFill {
            bytes: produced.saturating_sub(consumed).min(self.size),
            size: self.size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::shared::PAGE;
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    #[test]
    fn what_is_written_and_not_consumed_fills_a_ring() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(2 * PAGE as u64).unwrap();
        let fills = Fills::of([(file.as_fd(), 8192)].into_iter()).unwrap();
        assert_eq!(
            fills.now(),
            [RingFill {
                bytes: 0,
                size: 8192
            }]
        );
        file.write_at(&100_000_u64.to_ne_bytes(), 0).unwrap();
        file.write_at(&100_064_u64.to_ne_bytes(), PAGE as u64)
            .unwrap();
        assert_eq!(fills.now()[0].bytes, 64);
        file.write_at(&900_000_u64.to_ne_bytes(), PAGE as u64)
            .unwrap();
        assert_eq!(fills.now()[0].bytes, 8192, "never more than fits");
    }
}
