//! Leases on files (fcntl(2), `F_SETLEASE`).

use crate::bpf::events::{LockClass, LockRec, VmaRec};
use crate::bpf::iter::{File, Files};
use crate::model::frozen::{Blocker, Lease};
use crate::model::ids::{Fd, Pid};
use crate::model::map::Set;

// `FL_*` of include/linux/filelock.h.
const FL_DELEG: u32 = 4;
const FL_DOWNGRADE_PENDING: u32 = 256;
const FL_UNLOCK_PENDING: u32 = 512;
const FL_LAYOUT: u32 = 2048;
const F_WRLCK: u32 = 1;

/// Where files that anybody has locks on are open: process, descriptor, description.
#[derive(Debug, Default)]
pub struct Places(Set<(u32, i32, u64)>);

impl Places {
    /// Goes through a pass.
    pub fn of(found: &Files) -> Self {
        let locked = found.files.iter().filter(|file| file.rec.has_locks != 0);
        let place = |file: &File| (file.rec.tgid, file.rec.fd.cast_signed(), file.rec.file);
        Self(locked.map(place).collect())
    }
}

/// Why a file is not carried for a lease taken through it; `None` when it is. The signal that
/// tells of its end names the descriptor it was taken through, and goes to who took it unless
/// something else was asked for.
pub fn refusal(lease: &LockRec, places: &Places) -> Option<String> {
    if lease.flags & (FL_DELEG | FL_LAYOUT) != 0 {
        return Some("its delegation is not carried; release it before the update".into());
    }
    if lease.flags & (FL_DOWNGRADE_PENDING | FL_UNLOCK_PENDING) != 0 {
        return Some(
            "its lease is being broken, and somebody waits for it to be released; try again \
             when the application has done so"
                .into(),
        );
    }
    let place = (lease.pid, lease.fd, lease.file);
    (!places.0.contains(&place)).then(|| {
        format!(
            "its lease was taken by PID {} through descriptor {}, and is not to be had there \
             any more; release it before the update",
            lease.pid, lease.fd
        )
    })
}

/// The lease among these locks that was taken through this description.
pub fn of(locks: &[&LockRec], file: &File) -> Option<Lease> {
    let own = |lock: &&&LockRec| lock.class == LockClass::LEASE && lock.file == file.rec.file;
    let lease = locks.iter().find(own)?;
    Some(Lease {
        exclusive: lease.type_ == F_WRLCK,
        pid: Pid(lease.pid.cast_signed()),
        fd: Fd(lease.fd),
    })
}

/// Files that are leased for writing and mapped: mapped again they are open twice, and then
/// nobody can have such a lease (check_conflicting_open()).
pub(in crate::capture) fn mapped(found: &Files, vmas: &[VmaRec]) -> Vec<Blocker> {
    let leases = found
        .locks
        .iter()
        .filter(|lock| lock.class == LockClass::LEASE && lock.type_ == F_WRLCK);
    let blocker = |lease: &LockRec| {
        let held = found
            .files
            .iter()
            .find(|file| file.rec.file == lease.file)?;
        let is_same = |vma: &&VmaRec| (vma.dev, vma.ino) == (lease.dev, lease.ino);
        let vma = vmas.iter().filter(|vma| vma.file != 0).find(is_same)?;
        Some(Blocker {
            pid: Pid(vma.tgid.cast_signed()),
            fd: Some(Fd(held.rec.fd.cast_signed())),
            object: format!("file {}", held.rec.name()),
            reason: "it has a lease for writing and is mapped, and both together are not \
                     carried; release one of them before the update"
                .into(),
        })
    };
    leases.filter_map(blocker).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_carried_where_it_was_taken() {
        let lease = LockRec {
            class: LockClass::LEASE,
            file: 77,
            pid: 5,
            fd: 3,
            ..LockRec::default()
        };
        let places = |place| Places(Set::from_iter([place]));
        let told = |lease: &LockRec, place| refusal(lease, &places(place)).unwrap_or_default();
        assert_eq!(told(&lease, (5, 3, 77)), "");
        for elsewhere in [(6, 3, 77), (5, 4, 77), (5, 3, 78)] {
            assert!(told(&lease, elsewhere).contains("PID 5 through descriptor 3"));
        }
        let breaking = LockRec {
            flags: FL_UNLOCK_PENDING,
            ..lease
        };
        assert!(told(&breaking, (5, 3, 77)).contains("being broken"));
        let delegation = LockRec {
            flags: FL_DELEG,
            ..lease
        };
        assert!(told(&delegation, (5, 3, 77)).contains("delegation"));
    }
}
