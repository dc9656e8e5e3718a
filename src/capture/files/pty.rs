//! Pseudo-terminals: settings and what is queued, as the iterators found them. Nothing is
//! borrowed: reading from a terminal would take out what is there.

use crate::bpf::events::{TRK_TTY_BUF, TtyDataRec, TtyFlag as Flag, TtyPart, TtyRec, TtySide};
use crate::bpf::iter::{Detail, Files, Tasks};
use crate::model::frozen::{Blocker, PtyInput, PtyState, Termios};
use crate::model::ids::{Fd, Pid};
use crate::model::map::Set;
use nix::libc;
use serde_bytes::ByteBuf;
use std::collections::BTreeMap;

/// Open file descriptions of a pseudo-terminal that the application has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ends {
    masters: i32,
    slaves: i32,
}

impl Ends {
    /// Counts one.
    pub fn add(&mut self, master: bool) {
        match master {
            true => self.masters += 1,
            false => self.slaves += 1,
        }
    }

    /// Whether somebody else has an end too.
    pub fn outside(self, tty: &TtyRec) -> Option<String> {
        // pty_common_install(): the open master counts as one slave.
        let slaves = tty.slave.count - tty.master.count.min(1);
        if tty.master.count > self.masters {
            return Some(
                "it is the terminal of somebody outside the application, who holds the master; \
                 start the application without it, or checkpoint both together"
                    .into(),
            );
        }
        (slaves > self.slaves).then(|| {
            "it is also open outside the application; close it there, or checkpoint both together"
                .into()
        })
    }
}

/// Its name in messages.
pub fn object(tty: &TtyRec) -> String {
    let end = if tty.is_master != 0 {
        "master"
    } else {
        "slave"
    };
    format!("pseudo-terminal /dev/pts/{} ({end})", tty.index)
}

fn has(side: &TtySide, flag: u32) -> bool {
    side.flags & flag != 0
}

fn slave_opened(tty: &TtyRec) -> bool {
    // pty_close() of the last slave marks the master.
    tty.slave.count > 1 || has(&tty.master, Flag::OTHER_CLOSED)
}

fn unread(side: &TtySide) -> bool {
    side.read_head != side.read_tail || side.flip > 0
}

/// Why a pseudo-terminal is not carried, wherever its ends are; `pids` are the processes of
/// the application.
pub fn refusal(tty: &TtyRec, pids: &Set<u32>) -> Option<String> {
    /// More would not have been found; see `MAX_FLIP_BUFFERS` in iter_tty.bpf.h.
    const MOST_FLIP_BUFFERS: u32 = 128;
    let (master, slave) = (&tty.master, &tty.slave);
    let both = [master, slave];
    if tty.hung_up != 0 {
        // tty_vhangup() by somebody else than the last master.
        return (tty.is_master != 0 || master.count > 0).then(|| {
            "it was hung up while its master is open, which is not carried yet; close it".into()
        });
    }
    if both.iter().any(|side| has(side, Flag::BUSY)) {
        return Some(ON_THEIR_WAY.into());
    }
    if both.iter().any(|side| side.discipline != 0) {
        return Some("line disciplines other than N_TTY are not carried yet; set it back".into());
    }
    if both
        .iter()
        .any(|side| has(side, Flag::FLAGGED) || side.flip_buffers >= MOST_FLIP_BUFFERS)
    {
        return Some("what is queued in it cannot be read; read it before the update".into());
    }
    if has(slave, Flag::LNEXT | Flag::ERASING) {
        return Some("a control sequence is half typed; finish it before the update".into());
    }
    if has(slave, Flag::ECHO_PENDING) {
        return Some("echoes wait for output that is stopped; let it go on (Ctrl-Q)".into());
    }
    if has(master, Flag::PACKET) && slave.pktstatus != 0 {
        return Some("its master has not read a packet mode status; try again".into());
    }
    if slave.locked != 0 {
        return Some("TIOCSLCKTRMIOS is not carried yet; unlock its settings".into());
    }
    if !slave_opened(tty) && (unread(slave) || unread(master)) {
        return Some(
            "it was written to before its slave was opened, which is not carried yet".into(),
        );
    }
    let by_user = |side| has(side, Flag::STOPPED) && !has(side, Flag::TCO_STOPPED);
    let termios = Termios::decode(&slave.termios);
    let can_type_stop = termios.iflag & libc::IXON != 0 && termios.cc[libc::VSTOP] != 0;
    if by_user(master) || by_user(slave) && !can_type_stop {
        return Some("its output is stopped in a way that is not carried; let it go on".into());
    }
    (slave.session != 0 && !pids.contains(&slave.session)).then(|| {
        format!(
            "it is the controlling terminal of session {}, whose leader is outside the \
             application; start the application in a session of its own",
            slave.session
        )
    })
}

/// Whether there are any.
#[must_use]
pub fn has_terminals(found: &Files) -> bool {
    let is_terminal = |detail: &Detail| matches!(detail, Detail::Tty(_));
    found.files.iter().any(|file| is_terminal(&file.detail))
}

/// Terminals in which bytes have moved between two passes over frozen processes: a worker that
/// has been woken and has not begun yet shows nowhere.
#[must_use]
pub fn unsettled(before: &Files, after: &Files) -> Vec<Blocker> {
    let positions = |side: &TtySide| {
        let of = [side.read_head, side.canon_head, side.read_tail];
        (of, side.flags, side.flip)
    };
    let moved = before.files.iter().zip(&after.files).filter(|pair| {
        let (Detail::Tty(before), Detail::Tty(after)) = (&pair.0.detail, &pair.1.detail) else {
            return false;
        };
        positions(&before.master) != positions(&after.master)
            || positions(&before.slave) != positions(&after.slave)
    });
    moved
        .map(|(file, _)| Blocker {
            pid: Pid(file.rec.tgid.cast_signed()),
            fd: Some(Fd(file.rec.fd.cast_signed())),
            object: format!("pseudo-terminal ({})", file.rec.name()),
            reason: ON_THEIR_WAY.to_owned(),
        })
        .collect()
}

const ON_THEIR_WAY: &str = "bytes are on their way through it; try again";

/// Controlling terminals that would be lost or appear: those of sessions whose leader is in
/// the application, as far as they are not among its open files.
#[must_use]
pub fn controlling(tasks: &Tasks, found: &Files) -> Vec<Blocker> {
    let inside: BTreeMap<u64, u32> = found
        .files
        .iter()
        .filter_map(|file| match &file.detail {
            Detail::Tty(tty) if tty.hung_up == 0 => Some((tty.slave.tty, tty.slave.session)),
            _ => None,
        })
        .collect();
    let sessions: Set<u32> = inside.values().copied().filter(|sid| *sid != 0).collect();
    let leaders: Set<u32> = tasks.processes.iter().map(|p| p.pid).collect();
    let blocker = |pid: u32, reason: &str| Blocker {
        pid: Pid(pid.cast_signed()),
        fd: None,
        object: "controlling terminal".to_owned(),
        reason: reason.to_owned(),
    };
    let zombies: Set<u32> = tasks
        .threads
        .iter()
        .filter(|thread| thread.tid == thread.tgid && thread.is_zombie())
        .map(|thread| thread.tgid)
        .collect();
    let living = tasks.processes.iter().filter(|p| !zombies.contains(&p.pid));
    living
        .filter_map(|process| {
            if process.tty != 0 && leaders.contains(&process.sid) {
                return (!inside.contains_key(&process.tty)).then(|| {
                    blocker(
                        process.pid,
                        "no process of the application has it open; open it, or give it up",
                    )
                });
            }
            (process.tty == 0 && sessions.contains(&process.sid)).then(|| {
                blocker(
                    process.pid,
                    "it gave up the terminal that its session has, which is not carried yet",
                )
            })
        })
        .collect()
}

/// A terminal as the image carries it, from its record and the bytes of both sides; `Err`
/// tells why not.
pub fn state(
    tty: &TtyRec,
    master: &[&TtyDataRec],
    slave: &[&TtyDataRec],
) -> Result<PtyState, String> {
    let base = PtyState {
        index: tty.index,
        uid: tty.uid,
        gid: tty.gid,
        mode: tty.mode & 0o7777,
        hung_up: tty.hung_up != 0,
        ..PtyState::default()
    };
    if base.hung_up {
        return Ok(base);
    }
    let (output, rest) = (ring(&tty.master, master)?, flip(&tty.master, master)?);
    let input = ring(&tty.slave, slave)?;
    let pid = |number: u32| (number != 0).then_some(Pid(number.cast_signed()));
    let sides = [&tty.master, &tty.slave];
    let side = &tty.slave;
    Ok(PtyState {
        slave_opened: slave_opened(tty),
        termios: Termios::decode(&side.termios),
        winsize: [side.rows, side.columns, side.xpixel, side.ypixel],
        exclusive: sides.map(|side| has(side, Flag::EXCLUSIVE)),
        locked: has(&tty.master, Flag::LOCKED),
        packet: has(&tty.master, Flag::PACKET),
        stopped: has(side, Flag::STOPPED) && !has(side, Flag::TCO_STOPPED),
        output_off: sides.map(|side| has(side, Flag::TCO_STOPPED)),
        session: pid(side.session),
        foreground: pid(side.pgrp),
        output: ByteBuf::from([output, rest].concat()),
        input: PtyInput {
            line_ends: line_ends(side, slave, input.len()),
            complete: u32::try_from(side.canon_head.wrapping_sub(side.read_tail)).unwrap_or(0),
            pushed: has(side, Flag::PUSH),
            bytes: ByteBuf::from(input),
            waiting: ByteBuf::from(flip(side, slave)?),
        },
        column: side.column,
        canon_column: side.canon_column,
        ..base
    })
}

fn part<'a>(data: &[&'a TtyDataRec], part: u32) -> impl Iterator<Item = u8> + use<'a> {
    let of: Vec<&TtyDataRec> = data
        .iter()
        .copied()
        .filter(|rec| rec.part == part)
        .collect();
    of.into_iter().flat_map(|rec| {
        let len = (rec.len as usize).min(rec.data.len());
        rec.data[..len].iter().copied()
    })
}

fn incomplete() -> String {
    "what is queued in it could not be read whole; try again".into()
}

/// Bytes of the line discipline's ring that were not read.
fn ring(side: &TtySide, data: &[&TtyDataRec]) -> Result<Vec<u8>, String> {
    let size = u64::from(TRK_TTY_BUF);
    let len = side.read_head.wrapping_sub(side.read_tail);
    if len == 0 {
        return Ok(Vec::new());
    }
    let all: Vec<u8> = part(data, TtyPart::READ_BUF).collect();
    if len > size || all.len() as u64 != size {
        return Err(incomplete());
    }
    let start = usize::try_from(side.read_tail % size).unwrap_or(0);
    let ring = all.iter().cycle().skip(start);
    Ok(ring
        .take(usize::try_from(len).unwrap_or(0))
        .copied()
        .collect())
}

fn line_ends(side: &TtySide, data: &[&TtyDataRec], len: usize) -> Vec<u32> {
    let flags: Vec<u8> = part(data, TtyPart::READ_FLAGS).collect();
    let ends = |n: &u32| {
        let place = side.read_tail.wrapping_add(u64::from(*n)) % u64::from(TRK_TTY_BUF);
        let byte = flags.get((place / 8) as usize).copied().unwrap_or(0);
        byte >> (place % 8) & 1 != 0
    };
    let len = u32::try_from(len).unwrap_or(0);
    (0..len).filter(ends).collect()
}

fn flip(side: &TtySide, data: &[&TtyDataRec]) -> Result<Vec<u8>, String> {
    let all: Vec<u8> = part(data, TtyPart::FLIP).collect();
    if all.len() != side.flip as usize {
        return Err(incomplete());
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(part: u32, bytes: &[u8]) -> TtyDataRec {
        let mut rec = TtyDataRec {
            part,
            len: u32::try_from(bytes.len()).unwrap(),
            ..TtyDataRec::default()
        };
        rec.data[..bytes.len()].copy_from_slice(bytes);
        rec
    }

    /// A ring of which `text` wraps around the end, with its newlines flagged.
    fn wrapped(text: &[u8]) -> (TtySide, Vec<TtyDataRec>) {
        let size = TRK_TTY_BUF as usize;
        let (mut all, mut flags) = (vec![0; size], vec![0; size / 8]);
        let tail = 3 * size - 3;
        for (n, byte) in text.iter().enumerate() {
            let place = (tail + n) % size;
            all[place] = *byte;
            flags[place / 8] |= u8::from(*byte == b'\n') << (place % 8);
        }
        let mut data: Vec<_> = all
            .chunks(1024)
            .map(|bytes| chunk(TtyPart::READ_BUF, bytes))
            .collect();
        data.push(chunk(TtyPart::READ_FLAGS, &flags));
        let side = TtySide {
            read_tail: tail as u64,
            read_head: (tail + text.len()) as u64,
            ..TtySide::default()
        };
        (side, data)
    }

    #[test]
    fn a_ring_is_read_around_its_end() {
        let (side, data) = wrapped(b"one\ntwo\nthr");
        let data: Vec<&TtyDataRec> = data.iter().collect();
        assert_eq!(ring(&side, &data).unwrap(), b"one\ntwo\nthr");
        assert_eq!(line_ends(&side, &data, 11), [3, 7]);
        assert!(ring(&side, &data[1..]).is_err());
    }

    #[test]
    fn ends_elsewhere_are_seen() {
        let mut tty = TtyRec::default();
        (tty.master.count, tty.slave.count) = (1, 3);
        let mut ends = Ends::default();
        ends.add(false);
        assert!(ends.outside(&tty).is_some_and(|why| why.contains("master")));
        ends.add(true);
        assert!(ends.outside(&tty).is_some_and(|why| why.contains("also")));
        ends.add(false);
        assert_eq!(ends.outside(&tty), None);
    }
}
