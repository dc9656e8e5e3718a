//! System V message queues.

use anyhow::{Result, ensure};
use nix::errno::Errno;
use nix::unistd::getpid;

use super::child::Child;
use super::probe::{blocked_thread, check_pattern, join, pattern, sys};
use super::refused::{cgroup_root, leave_cgroup};
use crate::guest::case::{Case, Entry};

/// The cases of this file.
pub const CASES: &[Entry] = &[
    Entry::carried("sysv_msg", messages),
    Entry::carried("sysv_msg_full", full),
    Entry::carried("sysv_msg_waits", waits),
    Entry::refused(
        "refused_sysv_msg_outside",
        "which is outside the application, uses it as well",
        outside,
    ),
];

fn queue(key: i32, mode: i32) -> Result<i32> {
    // SAFETY: takes integers.
    let id = unsafe { libc::msgget(key, libc::IPC_CREAT | mode) };
    Ok(i32::try_from(sys("msgget", id.into())?)?)
}

fn send(id: i32, mtype: i64, text: &[u8], flags: i32) -> Result<(), Errno> {
    let message = [&mtype.to_ne_bytes(), text].concat();
    // SAFETY: reads the type and the text behind it.
    let sent = unsafe { libc::msgsnd(id, message.as_ptr().cast(), text.len(), flags) };
    Errno::result(sent).map(drop)
}

/// A message of this type (0 = any) and its own type.
fn receive(id: i32, mtype: i64, flags: i32) -> Result<(i64, Vec<u8>), Errno> {
    const LEN: usize = 8192;
    let mut message = vec![0; 8 + LEN];
    // SAFETY: writes the type and as many bytes behind it.
    let len = unsafe { libc::msgrcv(id, message.as_mut_ptr().cast(), LEN, mtype, flags) };
    let len = usize::try_from(Errno::result(len)?).unwrap_or(0);
    let (head, text) = message.split_at(8);
    let head = head.try_into().map_or(0, i64::from_ne_bytes);
    Ok((head, text[..len].to_vec()))
}

fn state(id: i32) -> Result<libc::msqid_ds> {
    // SAFETY: plain data for which zero is valid; the kernel fills it.
    let mut state: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: writes one msqid_ds.
    let got = unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut state) };
    sys("IPC_STAT", got.into())?;
    Ok(state)
}

fn set_limit(id: i32, qbytes: u64) -> Result<()> {
    let mut state = state(id)?;
    state.msg_qbytes = qbytes;
    // SAFETY: reads one msqid_ds.
    let set = unsafe { libc::msgctl(id, libc::IPC_SET, &raw mut state) };
    sys("IPC_SET", set.into()).map(|_| ())
}

fn remove(id: i32) -> Result<()> {
    // SAFETY: nothing is read or written.
    let removed = unsafe { libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    sys("IPC_RMID", removed.into()).map(|_| ())
}

/// All but the times.
fn properties(id: i32) -> Result<impl PartialEq + std::fmt::Debug> {
    let state = state(id)?;
    let perm = &state.msg_perm;
    Ok((
        (
            perm.__key, perm.uid, perm.gid, perm.cuid, perm.cgid, perm.mode,
        ),
        (state.msg_qbytes, state.__msg_cbytes, state.msg_qnum),
        (state.msg_lspid, state.msg_lrpid),
    ))
}

/// Two queues with messages of all sizes, one of them found by its key, made by another user and
/// with a limit below what is in it; a child that waits for a type that is not there yet.
fn messages(case: &Case) -> Result<()> {
    const KEY: i32 = 0x7472_616d;
    let first = queue(libc::IPC_PRIVATE, 0o600)?;
    // SAFETY: takes integers; the saved id stays 0.
    sys("seteuid", unsafe { libc::seteuid(33) }.into())?;
    let id = queue(KEY, 0o660)?;
    // SAFETY: as above.
    sys("seteuid", unsafe { libc::seteuid(0) }.into())?;
    let sizes = [
        (3, 17),
        (1, 0),
        (i64::MAX, 8192),
        (3, 4047),
        (2, 4049),
        (3, 1),
    ];
    for (seed, (mtype, len)) in (20..).zip(sizes) {
        if len == 17 {
            send(id, 5, b"for the child", 0)?;
        }
        send(id, mtype, &pattern(seed, len), 0)?;
    }
    set_limit(id, 5000)?;
    let child = Child::start(case.dir(), "child", move |_| {
        ensure!(
            receive(id, 5, 0)?.1 == b"for the child",
            "Not for the child"
        );
        send(first, 8, b"before", 0)?;
        let (mtype, text) = receive(first, -7, 0)?;
        ensure!(
            (mtype, &text[..]) == (7, b"after"),
            "Received {mtype} {text:?}"
        );
        send(first, 9, b"seen", 0)?;
        Ok(())
    })?;
    child.sleeps_in(libc::SYS_msgrcv)?;
    let before = (properties(first)?, properties(id)?);

    case.ready()?;

    let after = (properties(first)?, properties(id)?);
    // Nobody had received from the first one: its last sender stands for a receiver.
    ensure!(before.1 == after.1, "{:?}, not {:?}", after.1, before.1);
    let found = state(first)?;
    ensure!(
        (found.msg_lspid, found.msg_qnum) == (child.pid.as_raw(), 1),
        "{:?}, not {:?}",
        after.0,
        before.0
    );
    let found = state(id)?;
    ensure!(
        (found.msg_lspid, found.msg_lrpid) == (getpid().as_raw(), child.pid.as_raw()),
        "Last users {:?}",
        (found.msg_lspid, found.msg_lrpid)
    );
    ensure!(queue(KEY, 0)? == id, "The key leads to another one");
    ensure!(
        send(id, 4, b"", libc::IPC_NOWAIT) == Err(Errno::EAGAIN),
        "Its limit is gone"
    );
    // The second of type 3 before the others.
    let (mtype, text) = receive(id, 3, libc::IPC_NOWAIT)?;
    ensure!(mtype == 3, "Type {mtype}");
    check_pattern("The first of type 3", 20, &text)?;
    for (seed, (wanted, len)) in (20..).zip(sizes).skip(1) {
        let (mtype, text) = receive(id, 0, libc::IPC_NOWAIT)?;
        ensure!(
            (mtype, text.len()) == (wanted, len),
            "Type {mtype} with {} bytes, not {wanted} with {len}",
            text.len()
        );
        check_pattern("A message", seed, &text)?;
    }
    ensure!(
        receive(id, 0, libc::IPC_NOWAIT) == Err(Errno::ENOMSG),
        "More than was sent"
    );
    send(first, 7, b"after", 0)?;
    child.join()?;
    ensure!(receive(first, 0, libc::IPC_NOWAIT)? == (8, b"before".to_vec()));
    ensure!(receive(first, 0, libc::IPC_NOWAIT)? == (9, b"seen".to_vec()));
    remove(first)?;
    remove(id)
}

/// A sender that waits for room.
fn full(case: &Case) -> Result<()> {
    let id = queue(libc::IPC_PRIVATE, 0o600)?;
    set_limit(id, 32)?;
    send(id, 1, &[1; 20], 0)?;
    send(id, 2, &[2; 10], 0)?;
    let child = Child::start(case.dir(), "child", move |_| {
        send(id, 3, &[3; 15], 0)?;
        Ok(())
    })?;
    child.sleeps_in(libc::SYS_msgsnd)?;
    case.ready()?;
    let found = state(id)?;
    ensure!(
        (found.msg_qbytes, found.__msg_cbytes, found.msg_qnum) == (32, 30, 2),
        "Of {} bytes {} in {} messages",
        found.msg_qbytes,
        found.__msg_cbytes,
        found.msg_qnum
    );
    ensure!(
        send(id, 4, &[4; 3], libc::IPC_NOWAIT) == Err(Errno::EAGAIN),
        "There is room"
    );
    ensure!(
        receive(id, 1, libc::IPC_NOWAIT)? == (1, vec![1; 20]),
        "First"
    );
    child.join()?;
    ensure!(
        receive(id, 0, libc::IPC_NOWAIT)? == (2, vec![2; 10]),
        "Second"
    );
    ensure!(
        receive(id, 0, libc::IPC_NOWAIT)? == (3, vec![3; 15]),
        "Third"
    );
    remove(id)
}

/// Queues that nobody has used yet: it is the wait that tells whose they are.
fn waits(case: &Case) -> Result<()> {
    let id = queue(libc::IPC_PRIVATE, 0o600)?;
    let other = queue(libc::IPC_PRIVATE, 0o600)?;
    let child = Child::start(case.dir(), "child", move |_| {
        let (mtype, text) = receive(id, 0, 0)?;
        ensure!(
            (mtype, &text[..]) == (6, b"go"),
            "Received {mtype} {text:?}"
        );
        Ok(())
    })?;
    child.sleeps_in(libc::SYS_msgrcv)?;
    let thread = blocked_thread(libc::SYS_msgrcv, move || Ok(receive(other, 2, 0)?))?;
    case.ready()?;
    for unused in [id, other] {
        let found = state(unused)?;
        let users = (found.msg_lspid, found.msg_lrpid, found.msg_qnum);
        ensure!(users == (0, 0, 0), "Somebody used it: {users:?}");
    }
    send(id, 6, b"go", 0)?;
    child.join()?;
    send(other, 1, b"not this", 0)?;
    send(other, 2, b"this", 0)?;
    let received = join("msgrcv", thread)?;
    ensure!(received == (2, b"this".to_vec()), "Received {received:?}");
    remove(id)?;
    remove(other)
}

/// The last receiver is a process outside the cgroup.
fn outside(case: &Case) -> Result<()> {
    let root = cgroup_root()?;
    let id = queue(libc::IPC_PRIVATE, 0o600)?;
    let outside = Child::start(case.dir(), "outside", move |turn| {
        leave_cgroup(&root)?;
        receive(id, 1, 0)?;
        turn.wait();
        receive(id, 1, 0)?;
        Ok(())
    })?;
    send(id, 3, b"kept", 0)?;
    send(id, 1, b"first", 0)?;
    outside.waits()?;
    case.ready()?;
    let kept = receive(id, 3, libc::IPC_NOWAIT)?;
    send(id, 1, b"last", 0)?;
    outside.finish()?;
    remove(id)?;
    ensure!(kept == (3, b"kept".to_vec()), "Received {kept:?}");
    Ok(())
}
