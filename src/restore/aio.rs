//! AIO contexts: made by the process itself, and their rings moved to where they were, which is
//! the id that user space knows them by (aio_ring_mremap()).
//!
//! The kernel keeps to itself which slot the next completion goes to; in a new ring that is the
//! first. Reads of nothing are made until it is the one it was, and those that stand for what was
//! not read are overwritten with it.

use super::RestoreError;
use super::signals::words_to;
use super::supervisor::Supervisor;
use super::tape::{Expect, Script};
use crate::model::frozen::{AioRing, Backing, Mm};
use crate::model::ids::Pid;
use crate::sys::process::{read_memory_exact, write_memory};
use crate::sys::task::affinity;
use nix::libc;

/// Requests made by one call.
const CHUNK: u32 = 1024;

type Result<T> = std::result::Result<T, RestoreError>;

/// The bytes of an inherited ring's mapping, which is memory and nothing else.
pub(super) fn inherited(ring: &AioRing) -> Vec<(u64, Vec<u8>)> {
    const MAGIC: u32 = 0xa10a_10a1;
    const COMPAT_FEATURES: u32 = 1;
    const HEADER_LENGTH: u32 = 32;
    let words = [
        0,
        ring.nr,
        ring.head,
        ring.tail(),
        MAGIC,
        COMPAT_FEATURES,
        0,
        HEADER_LENGTH,
    ];
    let mut pieces = events(ring);
    let header = words.iter().flat_map(|word| word.to_ne_bytes());
    pieces.push((0, header.collect()));
    pieces
}

/// Events that were not read, each with its offset in the ring.
fn events(ring: &AioRing) -> Vec<(u64, Vec<u8>)> {
    let events = ring.events.chunks_exact(AioRing::EVENT);
    let placed = ring.slots().zip(events);
    placed
        .map(|(slot, event)| (AioRing::offset(slot), event.to_vec()))
        .collect()
}

/// An io_setup(2) argument that makes a ring of so many bytes whatever the number of CPUs, if
/// any does (ioctx_alloc(), aio_setup_ring()): it is doubled, and two are added.
fn requests_for(bytes: u64) -> u32 {
    let slots = AioRing::slots_in(bytes);
    u32::try_from(slots.saturating_sub(2) / 2).unwrap_or(u32::MAX)
}

impl Supervisor<'_> {
    /// Makes the contexts of an address space that has all of its mappings. `file` is an open
    /// descriptor that can be read from.
    ///
    /// # Errors
    /// The kernel refuses a call, or its rings have other sizes.
    pub(super) fn make_contexts(&mut self, pid: Pid, mm: &Mm, file: i32) -> Result<()> {
        // Calls that are still to be made point to what is on the tape.
        let mark = self.tape(pid)?.mark();
        for vma in &mm.vmas {
            let Backing::AioRing(ring) = &vma.backing else {
                continue;
            };
            if let Some(requests) = ring.max_reqs {
                let len = vma.end - vma.start;
                let id = self.set_up(pid, ring, requests, len)?;
                let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).cast_unsigned();
                let args = [id, len, len, flags.into(), vma.start];
                let mut script = Script::default();
                let expect = Expect::Is(vma.start.cast_signed());
                script.add(libc::SYS_mremap, &args, expect);
                self.run(pid, pid.leader(), &script)?;
                self.wind(pid, vma.start, ring, file)?;
                for (offset, event) in events(ring) {
                    write_memory(pid, vma.start + offset, &event)?;
                }
                self.tape(pid)?.rewind(mark);
            }
        }
        Ok(())
    }

    /// A new context with a ring like this one; its id. How large a ring is made depends on how
    /// many CPUs the kernel reckons with.
    fn set_up(&mut self, pid: Pid, ring: &AioRing, requests: u32, len: u64) -> Result<u64> {
        for requests in [requests, requests_for(len)] {
            let tape = self.tape(pid)?;
            let addr = words_to(tape, &[0])?;
            let mut script = Script::default();
            script.zero(libc::SYS_io_setup, &[requests.into(), addr]);
            self.run(pid, pid.leader(), &script)?;
            let mut id = [0; 8];
            self.tape(pid)?.read_data(addr, &mut id);
            let id = u64::from_ne_bytes(id);
            let mut nr = [0; 4];
            read_memory_exact(pid, id + 4, &mut nr)?;
            if u32::from_ne_bytes(nr) == ring.nr {
                return Ok(id);
            }
            let mut script = Script::default();
            script.zero(libc::SYS_io_destroy, &[id]);
            self.run(pid, pid.leader(), &script)?;
        }
        Err(RestoreError::Unsupported {
            pid,
            what: format!("AIO context with a ring of {} events", ring.nr),
        })
    }

    /// Brings a new ring to where it was: what was read comes and goes, what was not comes and
    /// stays.
    fn wind(&mut self, pid: Pid, id: u64, ring: &AioRing, file: i32) -> Result<()> {
        let unread = ring.unread();
        if ring.head == 0 && unread == 0 {
            return Ok(());
        }
        let cpu = affinity(pid.leader())?;
        let tape = self.tape(pid)?;
        let room = || RestoreError::NoRoom;
        let buffer = tape.data(&[0; AioRing::EVENT]).ok_or_else(room)?;
        let request = words_to(tape, &read_of_nothing(file, buffer))?;
        let requests = words_to(tape, &vec![request; CHUNK as usize])?;
        let results = tape.data(&vec![0; CHUNK as usize * AioRing::EVENT]);
        let results = results.ok_or_else(room)?;
        let mask = tape.data(&only_first(&cpu)).ok_or_else(room)?;
        let mut script = Script::default();
        // The kernel keeps some of the free slots for the CPU that gave them back: on another
        // one there may be too few. Threads get their own CPUs later.
        let args = [0, cpu.len().next_multiple_of(8) as u64, mask];
        script.add(libc::SYS_sched_setaffinity, &args, Expect::Ok);
        let none = words_to(tape, &[0, 0])?;
        // Free slots are handed out by batches, of which a CPU may get none that is whole
        // (__get_reqs_available()): all at once are not to be had.
        let most = CHUNK.min(ring.nr / 4).max(1);
        for count in chunks(ring.head, most) {
            let all = Expect::Is(count.into());
            script.add(libc::SYS_io_submit, &[id, count.into(), requests], all);
            // What is missing is not waited for: the call would never return.
            let args = [id, count.into(), count.into(), results, none];
            script.add(libc::SYS_io_getevents, &args, all);
        }
        for count in chunks(unread, most) {
            let args = [id, count.into(), requests];
            script.add(libc::SYS_io_submit, &args, Expect::Is(count.into()));
        }
        self.run(pid, pid.leader(), &script)?;
        Ok(())
    }
}

/// `struct iocb`: `IOCB_CMD_PREAD` of no bytes, which ends at once.
fn read_of_nothing(file: i32, buffer: u64) -> [u64; 8] {
    const IOCB_CMD_PREAD: u64 = 0;
    let file = u64::from(file.cast_unsigned());
    [0, 0, IOCB_CMD_PREAD | file << 32, buffer, 0, 0, 0, 0]
}

/// Of a mask of CPUs the lowest one, in whole words.
fn only_first(cpus: &[u8]) -> Vec<u8> {
    let mut mask = vec![0; cpus.len().next_multiple_of(8)];
    if let Some(at) = cpus.iter().position(|byte| *byte != 0) {
        mask[at] = 1 << cpus[at].trailing_zeros();
    }
    mask
}

fn chunks(count: u32, most: u32) -> impl Iterator<Item = u32> {
    let starts = (0..count).step_by(most as usize);
    starts.map(move |at| most.min(count - at))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_bytes::ByteBuf;

    #[test]
    fn events_go_round_the_ring() {
        let ring = AioRing {
            max_reqs: None,
            nr: 127,
            head: 125,
            events: ByteBuf::from([[1; 32], [2; 32], [3; 32]].concat()),
        };
        let offsets: Vec<_> = events(&ring).iter().map(|(at, e)| (*at, e[0])).collect();
        assert_eq!(offsets, [(126 * 32, 1), (127 * 32, 2), (32, 3)]);
        assert_eq!((ring.unread(), ring.tail()), (3, 1));
        let header = inherited(&ring).pop().unwrap();
        assert_eq!((header.0, header.1.len()), (0, AioRing::HEADER));
    }

    #[test]
    fn a_ring_of_any_size_can_be_asked_for() {
        for pages in 1..100_u64 {
            let requests = u64::from(requests_for(pages * 4096));
            let made = (32 + 32 * (2 * requests + 2)).div_ceil(4096);
            assert_eq!(made, pages);
        }
    }

    #[test]
    fn requests_are_made_in_chunks() {
        assert_eq!(chunks(0, 7).count(), 0);
        assert_eq!(chunks(2049, 1024).collect::<Vec<_>>(), [1024, 1024, 1]);
        assert_eq!(only_first(&[0, 0b1100]), [0, 0b100, 0, 0, 0, 0, 0, 0]);
    }
}
