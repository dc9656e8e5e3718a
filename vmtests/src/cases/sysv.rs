//! System V shared memory and semaphores.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::unistd::getpid;

use super::child::Child;
use super::probe::{blocked_thread, check_pattern, fill, join, permissions_at, sys};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("sysv_shm", shared),
    Entry::carried("sysv_shm_key", keyed),
    Entry::refused("refused_sysv_shm_part", "only a part of it", part),
    Entry::refused(
        "refused_sysv_shm_detached",
        "none has it attached",
        detached,
    ),
    Entry::carried("sysv_sem", semaphores),
    Entry::carried("sysv_sem_waits", semaphore_waits),
    Entry::carried("sysv_sem_undo", undo),
    Entry::refused(
        "refused_sysv_sem_undo_shared",
        "shares them with another process",
        undo_shared,
    ),
];

const LEN: usize = 5 * 4096 + 100;

/// An attached segment; detached on drop.
struct Attached(*mut libc::c_void);

impl Attached {
    fn new(id: i32, flags: i32) -> Result<Attached> {
        // SAFETY: a new mapping at an address of the kernel's choice.
        let memory = unsafe { libc::shmat(id, std::ptr::null(), flags) };
        ensure!(memory.addr() != usize::MAX, "shmat: {}", Errno::last());
        Ok(Attached(memory))
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: all segments of these cases have this length; writers keep to their turns.
        unsafe { std::slice::from_raw_parts(self.0.cast(), LEN) }
    }

    /// Writes one byte, which others see.
    fn put(&self, at: usize, byte: u8) {
        assert!(at < LEN);
        // SAFETY: inside of it.
        unsafe { self.0.cast::<u8>().add(at).write_volatile(byte) };
    }

    fn detach(self) -> Result<()> {
        let memory = self.0;
        std::mem::forget(self);
        // SAFETY: attached, and no slice of it is left.
        sys("shmdt", unsafe { libc::shmdt(memory) }.into()).map(|_| ())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        // SAFETY: as in detach.
        unsafe { libc::shmdt(self.0) };
    }
}

fn segment(key: i32, mode: i32) -> Result<i32> {
    // SAFETY: takes integers.
    let id = unsafe { libc::shmget(key, LEN, libc::IPC_CREAT | mode) };
    Ok(i32::try_from(sys("shmget", id.into())?)?)
}

fn state(id: i32) -> Result<libc::shmid_ds, Errno> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut state: libc::shmid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one shmid_ds.
    Errno::result(unsafe { libc::shmctl(id, libc::IPC_STAT, &raw mut state) })?;
    Ok(state)
}

fn remove(id: i32) -> Result<()> {
    // SAFETY: nothing is read or written.
    let removed = unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    sys("IPC_RMID", removed.into()).map(|_| ())
}

/// Marked to be destroyed, shared with a child, attached twice, once for reading only.
fn shared(case: &Case) -> Result<()> {
    let id = segment(libc::IPC_PRIVATE, 0o640)?;
    let memory = Attached::new(id, 0)?;
    let read_only = Attached::new(id, libc::SHM_RDONLY)?;
    // SAFETY: as in put, all of it; nobody else writes yet.
    fill(11, unsafe {
        std::slice::from_raw_parts_mut(memory.0.cast(), LEN)
    });
    // A hole in the middle.
    for at in 4096..3 * 4096 {
        memory.put(at, 0);
    }
    let seen = memory.0.addr();
    let child = Child::start(case.dir(), "child", move |turn| {
        turn.wait();
        // SAFETY: attached by the parent at this address, inherited.
        let word = std::ptr::with_exposed_provenance_mut::<u8>(seen);
        // SAFETY: as above.
        unsafe {
            ensure!(
                word.read_volatile() == 77,
                "The parent's byte does not show"
            );
            word.add(1).write_volatile(88);
        }
        Ok(())
    })?;
    let _ = memory.0.expose_provenance();
    child.waits()?;
    remove(id)?;
    let before = state(id)?;

    case.ready()?;

    let after = state(id)?;
    ensure!(after.shm_nattch == 4, "Attached {} times", after.shm_nattch);
    let owners = |s: &libc::shmid_ds| {
        let p = &s.shm_perm;
        (p.uid, p.gid, p.cuid, p.cgid, p.mode, s.shm_segsz)
    };
    ensure!(
        owners(&before) == owners(&after),
        "Owners or mode: {:?} and {:?}",
        owners(&before),
        owners(&after)
    );
    let mut expected = vec![0; LEN];
    fill(11, &mut expected);
    expected[4096..3 * 4096].fill(0);
    ensure!(memory.bytes() == expected, "The bytes are others");
    ensure!(
        permissions_at(read_only.0.addr())?.as_deref() == Some("r--s"),
        "Not read-only any more"
    );
    memory.put(0, 77);
    ensure!(read_only.bytes()[0] == 77, "Not one segment");
    child.finish()?;
    ensure!(memory.bytes()[1] == 88, "The child's byte does not show");
    ensure!(state(id)?.shm_nattch == 2, "The child's attachments stay");
    read_only.detach()?;
    memory.detach()?;
    ensure!(
        state(id).is_err_and(|e| e == Errno::EINVAL || e == Errno::EIDRM),
        "It was not destroyed"
    );
    Ok(())
}

/// Found by its key, made by another user; others keep their ids.
fn keyed(case: &Case) -> Result<()> {
    const KEY: i32 = 0x7472_616b;
    let first = segment(libc::IPC_PRIVATE, 0o600)?;
    // SAFETY: takes integers; the saved id stays 0.
    sys("seteuid", unsafe { libc::seteuid(33) }.into())?;
    let id = segment(KEY, 0o660)?;
    // SAFETY: as above.
    sys("seteuid", unsafe { libc::seteuid(0) }.into())?;
    let (memory, other) = (Attached::new(id, 0)?, Attached::new(first, 0)?);
    other.put(3, 4);
    // SAFETY: all of it; nobody else writes.
    fill(12, unsafe {
        std::slice::from_raw_parts_mut(memory.0.cast(), LEN)
    });
    case.ready()?;
    check_pattern("The segment", 12, memory.bytes())?;
    ensure!(segment(KEY, 0)? == id, "The key leads to another one");
    let state = state(id)?;
    ensure!(
        (
            state.shm_perm.cuid,
            state.shm_perm.uid,
            state.shm_perm.mode & 0o777
        ) == (33, 33, 0o660),
        "Its creator, owner or mode"
    );
    ensure!(other.bytes()[3] == 4, "The other one");
    let again = Attached::new(id, 0)?;
    again.put(9, 1);
    ensure!(memory.bytes()[9] == 1, "Attached again, it is another one");
    remove(id)?;
    remove(first)?;
    memory.detach()?;
    again.detach()?;
    other.detach()?;
    let left = fs::read_to_string("/proc/sysvipc/shm")?;
    let ids = left
        .lines()
        .filter_map(|l| l.split_ascii_whitespace().nth(1));
    ensure!(
        ids.clone()
            .all(|left| left.parse() != Ok(id) && left.parse() != Ok(first)),
        "One is left"
    );
    Ok(())
}

/// Half of it unmapped.
fn part(case: &Case) -> Result<()> {
    let id = segment(libc::IPC_PRIVATE, 0o600)?;
    let memory = Attached::new(id, 0)?;
    remove(id)?;
    memory.put(0, 5);
    // SAFETY: the second half of the segment, which nothing refers to.
    let gone = unsafe { libc::munmap(memory.0.byte_add(3 * 4096), 3 * 4096) };
    sys("munmap", gone.into())?;
    case.ready()?;
    // SAFETY: still mapped.
    ensure!(unsafe { memory.0.cast::<u8>().read() } == 5, "Lost");
    memory.detach()
}

/// Made and not attached.
fn detached(case: &Case) -> Result<()> {
    let id = segment(libc::IPC_PRIVATE, 0o600)?;
    case.ready()?;
    let creator = state(id).context("It is gone")?.shm_cpid;
    ensure!(creator == getpid().as_raw(), "Made by {creator}");
    remove(id)
}

fn semaphore_set(key: i32, count: i32, mode: i32) -> Result<i32> {
    // SAFETY: takes integers.
    let id = unsafe { libc::semget(key, count, libc::IPC_CREAT | mode) };
    Ok(i32::try_from(sys("semget", id.into())?)?)
}

fn operate(id: i32, number: u16, operation: i16, flags: i32) -> Result<(), Errno> {
    let one = libc::sembuf {
        sem_num: number,
        sem_op: operation,
        sem_flg: i16::try_from(flags).unwrap_or(0),
    };
    // SAFETY: reads one sembuf.
    Errno::result(unsafe { libc::syscall(libc::SYS_semop, id, &raw const one, 1) }).map(drop)
}

/// `GETVAL`, `GETPID` and the like.
fn ask(id: i32, number: i32, what: i32) -> Result<i32> {
    // SAFETY: takes integers.
    let answer = unsafe { libc::semctl(id, number, what) };
    Ok(i32::try_from(sys("semctl", answer.into())?)?)
}

/// Values, who changed them last, owners; a set that is found by its key.
fn semaphores(case: &Case) -> Result<()> {
    const KEY: i32 = 0x7472_616c;
    let first = semaphore_set(libc::IPC_PRIVATE, 1, 0o600)?;
    operate(first, 0, 7, 0)?;
    // SAFETY: takes integers; the saved id stays 0.
    sys("seteuid", unsafe { libc::seteuid(33) }.into())?;
    let id = semaphore_set(KEY, 4, 0o660)?;
    // SAFETY: as above.
    sys("seteuid", unsafe { libc::seteuid(0) }.into())?;
    operate(id, 0, 3, 0)?;
    operate(id, 1, 1, 0)?;
    operate(id, 1, -1, 0)?;
    let child = Child::start(case.dir(), "child", move |turn| {
        operate(id, 2, 9, 0)?;
        turn.wait();
        operate(id, 2, -9, libc::IPC_NOWAIT)?;
        Ok(())
    })?;
    child.waits()?;

    case.ready()?;

    ensure!(
        semaphore_set(KEY, 4, 0)? == id,
        "The key leads to another one"
    );
    let me = getpid().as_raw();
    let mut found = Vec::new();
    for number in 0..4 {
        let last = ask(id, number, libc::GETPID)?;
        found.push((ask(id, number, libc::GETVAL)?, last));
    }
    let wanted = [(3, me), (0, me), (9, child.pid.as_raw()), (0, 0)];
    ensure!(
        found == wanted,
        "Values and users {found:?}, not {wanted:?}"
    );
    ensure!(ask(first, 0, libc::GETVAL)? == 7, "The other set's value");
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut state: libc::semid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one semid_ds.
    let got = unsafe { libc::semctl(id, 0, libc::IPC_STAT, &raw mut state) };
    sys("IPC_STAT", got.into())?;
    ensure!(
        (
            state.sem_perm.cuid,
            state.sem_perm.mode & 0o777,
            state.sem_nsems
        ) == (33, 0o660, 4),
        "Its creator, mode or size"
    );
    child.finish()?;
    ensure!(
        operate(id, 2, -1, libc::IPC_NOWAIT) == Err(Errno::EAGAIN),
        "The child has not taken all"
    );
    ask(id, 0, libc::IPC_RMID)?;
    ask(first, 0, libc::IPC_RMID)?;
    Ok(())
}

/// A thread and a child asleep in semop(2), one for a value and one for zero.
fn semaphore_waits(case: &Case) -> Result<()> {
    let id = semaphore_set(libc::IPC_PRIVATE, 2, 0o600)?;
    operate(id, 1, 2, 0)?;
    let child = Child::start(case.dir(), "child", move |_| {
        operate(id, 0, -5, 0)?;
        Ok(())
    })?;
    child.sleeps_in(libc::SYS_semop)?;
    let for_zero = blocked_thread(libc::SYS_semop, move || Ok(operate(id, 1, 0, 0)?))?;
    case.ready()?;
    operate(id, 0, 4, 0)?;
    ensure!(ask(id, 0, libc::GETVAL)? == 4, "Taken too early");
    operate(id, 0, 1, 0)?;
    child.join()?;
    ensure!(ask(id, 0, libc::GETVAL)? == 0, "Something is left");
    ensure!(!for_zero.is_finished(), "It did not wait for zero");
    operate(id, 1, -2, 0)?;
    join("semop", for_zero)?;
    ask(id, 0, libc::IPC_RMID)?;
    Ok(())
}

/// Operations that are to be undone when the processes end that did them; of one semaphore by two,
/// and of one that has its largest value.
fn undo(case: &Case) -> Result<()> {
    let id = semaphore_set(libc::IPC_PRIVATE, 4, 0o600)?;
    operate(id, 0, 5, 0)?;
    operate(id, 3, i16::MAX, 0)?;
    let holder = Child::start(case.dir(), "holder", move |turn| {
        operate(id, 0, -2, libc::SEM_UNDO)?;
        operate(id, 1, 3, libc::SEM_UNDO)?;
        operate(id, 3, -7, libc::SEM_UNDO)?;
        operate(id, 3, 7, 0)?;
        turn.wait();
        operate(id, 0, -1, libc::SEM_UNDO)?;
        operate(id, 3, -7, 0)?;
        Ok(())
    })?;
    holder.waits()?;
    let other = Child::start(case.dir(), "other", move |turn| {
        operate(id, 0, -1, libc::SEM_UNDO)?;
        turn.wait();
        Ok(())
    })?;
    other.waits()?;
    operate(id, 2, 1, 0)?;

    case.ready()?;

    let is = |when: &str, wanted: [i32; 4]| -> Result<()> {
        let values = (0..4).map(|number| ask(id, number, libc::GETVAL));
        let values = values.collect::<Result<Vec<_>>>()?;
        ensure!(values == wanted, "{when}: {values:?}, not {wanted:?}");
        Ok(())
    };
    is("Restored", [2, 3, 1, 32_767])?;
    let users = (0..4).map(|number| ask(id, number, libc::GETPID));
    let users = users.collect::<Result<Vec<_>>>()?;
    let (me, holds) = (getpid().as_raw(), holder.pid.as_raw());
    let wanted = [other.pid.as_raw(), holds, me, holds];
    ensure!(users == wanted, "Used by {users:?}, not {wanted:?}");
    holder.finish()?;
    is("One has ended", [4, 0, 1, 32_767])?;
    other.finish()?;
    is("Both have ended", [5, 0, 1, 32_767])?;
    ask(id, 0, libc::IPC_RMID)?;
    Ok(())
}

/// What is undone when the last of two processes ends.
fn undo_shared(case: &Case) -> Result<()> {
    let id = semaphore_set(libc::IPC_PRIVATE, 1, 0o600)?;
    let child = Child::sharing(libc::CLONE_SYSVSEM, case.dir(), "child", |turn| {
        turn.wait();
        Ok(())
    })?;
    child.waits()?;
    operate(id, 0, 2, libc::SEM_UNDO)?;
    case.ready()?;
    let value = ask(id, 0, libc::GETVAL)?;
    ask(id, 0, libc::IPC_RMID)?;
    ensure!(value == 2, "The value is {value}");
    child.finish()
}
