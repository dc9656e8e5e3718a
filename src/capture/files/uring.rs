//! io_uring instances: what the kernel keeps to itself comes from the iterator, what it shares with
//! user space is read where we map it ourselves.

use super::CollectError;
use super::borrow::{Borrowed, place};
use crate::bpf::events::{FileKind, UringRec, UringState};
use crate::bpf::iter::Files;
use crate::model::frozen::{Blocker, IoUring};
use crate::sys::uring::{MappedRing, Params, make, setup};

/// What it is called.
pub const OBJECT: &str = "io_uring";

/// How many requests an instance may have taken. A new one is brought to the same position by
/// making as many that do nothing, a tenth of a microsecond each on a fast machine.
const MOST_TAKEN: u32 = 1 << 26;

/// `IORING_SETUP_*` that change nothing but when and where work is done, or how long entries are.
const CARRIED: u32 = setup::CQSIZE
    | setup::CLAMP
    | setup::ATTACH_WQ
    | setup::SUBMIT_ALL
    | setup::COOP_TASKRUN
    | setup::TASKRUN_FLAG
    | IoUring::SQE128
    | IoUring::CQE32
    | IoUring::NO_SQARRAY;

/// Why an instance is not carried; `None` when it is.
pub fn refusal(rec: &UringRec) -> Option<String> {
    let has = |bit| rec.state & bit != 0;
    let other = rec.flags & !CARRIED;
    let what = if other != 0 {
        format!(
            "it was set up with flags {other:#x} (a polling thread, a single issuer or the like)"
        )
    } else if rec.files != 0 {
        "it has registered files".into()
    } else if rec.buffers != 0 || has(UringState::BUFFERS) {
        "it has registered buffers".into()
    } else if has(UringState::EVENTFD) {
        "it has a registered eventfd".into()
    } else if has(UringState::PERSONALITIES) {
        "it has registered personalities".into()
    } else if has(UringState::RESTRICTED) {
        "it has restrictions".into()
    } else if has(UringState::WORKERS) || has(UringState::NAPI) {
        "the number of its workers or busy polling was set".into()
    } else if has(UringState::WAITS) {
        "requests in it wait for events or time-outs".into()
    } else if has(UringState::OVERFLOWN) {
        return Some("it has more completions than it has room for; try again".into());
    } else if rec.sq_head > MOST_TAKEN || rec.cq_tail > MOST_TAKEN {
        format!(
            "it has taken more than {MOST_TAKEN} requests, as many as would have to be made to \
             bring a new one to the same position"
        )
    } else {
        return None;
    };
    Some(format!(
        "{what}, which is not carried yet; close it before the update, or have the application \
         do without io_uring"
    ))
}

/// All instances, as what cannot be carried for this reason.
#[must_use]
pub fn refused(found: &Files, reason: &str) -> Vec<Blocker> {
    let rings = found.files.iter();
    let rings = rings.filter(|file| file.rec.kind == FileKind::IO_URING);
    rings
        .map(|file| {
            let (pid, fd) = place(file);
            Blocker {
                pid,
                fd: Some(fd),
                object: OBJECT.into(),
                reason: reason.to_owned(),
            }
        })
        .collect()
}

/// Reads an instance of a frozen application.
///
/// # Errors
/// It cannot be mapped, or what user space sees is not what the kernel keeps.
pub fn read(from: &Borrowed, rec: &UringRec) -> Result<IoUring, CollectError> {
    let flags = rec.flags & !(setup::CLAMP | setup::ATTACH_WQ);
    // Where its parts are only the one who made it was told. This kernel puts those of another
    // one like it in the same place.
    let (_alike, params) =
        make(rec.sq_entries, rec.cq_entries, flags).map_err(from.failed("io_uring_setup"))?;
    let mut ring = IoUring {
        flags: flags | setup::CQSIZE,
        sq_entries: rec.sq_entries,
        cq_entries: rec.cq_entries,
        sq_head: rec.sq_head,
        cq_tail: rec.cq_tail,
        sq_array: params.sq_off.array,
        cqes: params.cq_off.cqes,
        ..IoUring::default()
    };
    let mapped = MappedRing::new(&from.fd, ring.lengths()).map_err(from.failed("mmap"))?;
    if !is_sound(&mapped, &params, rec) {
        let (pid, fd) = (from.pid, Some(from.number));
        return Err(CollectError::Blocked(Blocker {
            pid,
            fd,
            object: OBJECT.into(),
            reason: "its rings do not show what the kernel wrote there; end its user".into(),
        }));
    }
    ring.ring = mapped.ring.read().into();
    ring.sqes = mapped.sqes.read().into();
    Ok(ring)
}

/// Whether the words that are the kernel's to write are as it wrote them.
fn is_sound(mapped: &MappedRing, params: &Params, rec: &UringRec) -> bool {
    let load = |offset| mapped.ring.load(offset);
    let (sq, cq) = (&params.sq_off, &params.cq_off);
    [
        (load(sq.head), rec.sq_head),
        (load(cq.tail), rec.cq_tail),
        (load(sq.ring_entries), rec.sq_entries),
        (load(cq.ring_entries), rec.cq_entries),
        (load(sq.ring_mask), rec.sq_entries.wrapping_sub(1)),
        (load(cq.ring_mask), rec.cq_entries.wrapping_sub(1)),
    ]
    .iter()
    .all(|(found, expected)| found == expected)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_registered_is_refused() {
        let told = |rec: UringRec| refusal(&rec).unwrap_or_default();
        let plain = UringRec {
            flags: setup::CQSIZE | setup::COOP_TASKRUN,
            sq_head: 7,
            cq_tail: 7,
            ..UringRec::default()
        };
        assert_eq!(told(plain), "");
        let polled = UringRec { flags: 2, ..plain };
        assert!(told(polled).contains("flags 0x2"));
        for (state, expected) in [
            (UringState::EVENTFD, "eventfd"),
            (UringState::WAITS, "time-outs"),
            (UringState::OVERFLOWN, "try again"),
            (UringState::RESTRICTED, "restrictions"),
        ] {
            assert!(told(UringRec { state, ..plain }).contains(expected));
        }
        let worn = UringRec {
            cq_tail: MOST_TAKEN + 1,
            ..plain
        };
        assert!(told(worn).contains("67108864 requests"));
    }
}
