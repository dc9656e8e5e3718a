//! AIO contexts: io_setup(2), and the rings of completions that their users have mapped.

use super::error::CheckpointError;
use super::mm::vm;
use crate::bpf::events::{AioRec, VmaKind, VmaRec};
use crate::bpf::iter::Tasks;
use crate::model::frozen::{AioRing, Blocker};
use crate::model::ids::Pid;
use crate::sys::process::ProcMem;
use serde_bytes::ByteBuf;

/// `AIO_RING_MAGIC` of fs/aio.c.
const MAGIC: u32 = 0xa10a_10a1;

/// What cannot be carried: a request that is in flight ends in this kernel or never.
pub fn blockers(tasks: &Tasks) -> Vec<Blocker> {
    let busy = tasks.aio.iter().filter(|context| context.in_flight != 0);
    busy.map(|context| {
        let object = format!("AIO context {:x} with requests in flight", context.id);
        let reason = "they end in the kernel they were made in; try again when they have";
        blocker(context.tgid, object, reason)
    })
    .collect()
}

/// Contexts whose ring is not where the kernel takes it to be.
pub fn unmapped(tasks: &Tasks, vmas: &[VmaRec]) -> Vec<Blocker> {
    let gone = tasks
        .aio
        .iter()
        .filter(|context| !vmas.iter().any(|vma| is_of(vma, context)));
    gone.map(|context| {
        let object = format!("AIO context {:x} without its ring", context.id);
        let reason = "the process has unmapped or cut it; io_destroy(2) ends such a context";
        blocker(context.tgid, object, reason)
    })
    .collect()
}

fn blocker(pid: u32, object: String, reason: &str) -> Blocker {
    Blocker {
        pid: Pid(pid.cast_signed()),
        fd: None,
        object,
        reason: reason.to_owned(),
    }
}

/// Whether a mapping is the ring of a context, of this process or of one it is a child of: no
/// other file on a filesystem without a device cannot grow (aio_ring_mmap()).
pub fn is_ring(vma: &VmaRec) -> bool {
    let nowhere = vma.dev >> 20 == 0;
    vma.kind == VmaKind::FILE && nowhere && vma.flags & vm::DONTEXPAND != 0 && vma.name() == "[aio]"
}

fn is_of(vma: &VmaRec, context: &AioRec) -> bool {
    let whole = vma.start == context.id && vma.end - vma.start == context.ring_bytes;
    is_ring(vma) && vma.mm == context.mm && vma.pgoff == 0 && whole
}

/// Reads a ring that a frozen process has mapped.
///
/// # Errors
/// The process wrote to its header what the kernel would not, or it cannot be read.
pub fn ring(vma: &VmaRec, contexts: &[AioRec]) -> Result<AioRing, CheckpointError> {
    let mem = ProcMem::open(Pid(vma.tgid.cast_signed()))?;
    let mut bytes = [0; AioRing::HEADER];
    mem.read(vma.start, &mut bytes)?;
    let header = Header::of(&bytes);
    let context = contexts.iter().find(|context| is_of(vma, context));
    let slots = AioRing::slots_in(vma.end - vma.start);
    let slots = u32::try_from(slots).unwrap_or(0);
    let is_sound = match context {
        Some(context) => header.nr == context.nr_events && header.tail == context.tail,
        None => header.nr <= slots && header.tail < header.nr,
    };
    if !is_sound || header.magic != MAGIC || header.head >= header.nr {
        let object = format!("AIO ring {:x}-{:x}", vma.start, vma.end);
        let reason = "what its header says is not what the kernel wrote there; end its user";
        return Err(CheckpointError::Blocked(vec![blocker(
            vma.tgid, object, reason,
        )]));
    }
    let mut ring = AioRing {
        max_reqs: context.map(|context| context.max_reqs),
        nr: header.nr,
        head: header.head,
        events: ByteBuf::new(),
    };
    let unread = (header.tail + header.nr - header.head) % header.nr;
    let mut event = [0; AioRing::EVENT];
    for slot in ring.slots().take(unread as usize).collect::<Vec<_>>() {
        mem.read(vma.start + AioRing::offset(slot), &mut event)?;
        ring.events.extend(event);
    }
    Ok(ring)
}

/// `struct aio_ring` of fs/aio.c.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Header {
    nr: u32,
    head: u32,
    tail: u32,
    magic: u32,
}

impl Header {
    fn of(bytes: &[u8; AioRing::HEADER]) -> Self {
        let word = |index: usize| {
            let bytes = bytes[4 * index..].first_chunk();
            bytes.map_or(0, |word| u32::from_ne_bytes(*word))
        };
        Self {
            nr: word(1),
            head: word(2),
            tail: word(3),
            magic: word(4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(context: AioRec, expected: &[&str]) {
        let vma = VmaRec {
            start: 0x7000,
            end: 0x9000,
            kind: VmaKind::FILE,
            flags: vm::DONTEXPAND,
            name: {
                let mut name = VmaRec::default().name;
                for (to, from) in name.iter_mut().zip(*b"[aio]") {
                    *to = from.cast_signed();
                }
                name
            },
            ..VmaRec::default()
        };
        let tasks = Tasks {
            aio: vec![context],
            ..Tasks::default()
        };
        let mut found = blockers(&tasks);
        found.extend(unmapped(&tasks, &[vma]));
        let objects: Vec<&str> = found.iter().map(|b| b.object.as_str()).collect();
        assert_eq!(objects, expected);
    }

    #[test]
    fn requests_and_rings_are_looked_at() {
        let idle = AioRec {
            id: 0x7000,
            ring_bytes: 0x2000,
            ..AioRec::default()
        };
        check(idle, &[]);
        let busy = AioRec {
            in_flight: 3,
            ..idle
        };
        check(busy, &["AIO context 7000 with requests in flight"]);
        let cut = AioRec {
            ring_bytes: 0x3000,
            ..idle
        };
        check(cut, &["AIO context 7000 without its ring"]);
    }

    #[test]
    fn a_header_is_read() {
        let mut bytes = [0; AioRing::HEADER];
        for (index, byte) in bytes.iter_mut().step_by(4).enumerate() {
            *byte = u8::try_from(index).unwrap();
        }
        let header = Header {
            nr: 1,
            head: 2,
            tail: 3,
            magic: 4,
        };
        assert_eq!(Header::of(&bytes), header);
    }
}
