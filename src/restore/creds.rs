//! Credentials, which Linux keeps per thread: set by raw system calls on each.
//!
//! The order matters: ids while capabilities are full, sets that only shrink before what
//! shrinks the right to change them (capabilities(7)).

use super::RestoreError;
use super::tape::{Expect, Script, Tape};
use crate::model::frozen::Credentials;
use nix::libc;

const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
/// `SECBIT_KEEP_CAPS | SECBIT_NO_SETUID_FIXUP`: changing ids leaves capabilities alone.
const SECUREBITS_HANDS_OFF: u64 = 0x14;
const PR_CAP_AMBIENT: u64 = 47;
const PR_CAP_AMBIENT_RAISE: u64 = 2;
const PR_CAP_AMBIENT_CLEAR_ALL: u64 = 4;

/// Adds the calls that give the calling thread `creds`. It has all capabilities before.
///
/// # Errors
/// The tape has no room for the data.
pub fn restore(
    script: &mut Script,
    tape: &mut Tape,
    creds: &Credentials,
    rights: Rights,
) -> Result<(), RestoreError> {
    let Rights { last_cap, held } = rights;
    let [inheritable, permitted, effective, bounding, ambient] = creds.caps;
    let prctl = |script: &mut Script, args: &[u64]| script.zero(libc::SYS_prctl, args);
    let securebits = option(libc::PR_SET_SECUREBITS);
    prctl(script, &[securebits, SECUREBITS_HANDS_OFF]);

    let groups: Vec<u8> = creds.groups.iter().flat_map(|g| g.to_le_bytes()).collect();
    let groups = tape.data(&groups).ok_or(RestoreError::NoRoom)?;
    script.zero(libc::SYS_setgroups, &[creds.groups.len() as u64, groups]);
    let [rgid, egid, sgid, fsgid] = creds.gids.map(u64::from);
    script.zero(libc::SYS_setresgid, &[rgid, egid, sgid]);
    script.add(libc::SYS_setfsgid, &[fsgid], Expect::Ok);
    let [ruid, euid, suid, fsuid] = creds.uids.map(u64::from);
    script.zero(libc::SYS_setresuid, &[ruid, euid, suid]);
    script.add(libc::SYS_setfsuid, &[fsuid], Expect::Ok);

    let known = (2_u64 << last_cap) - 1;
    // Inheritable first: it must be a subset of the bounding set once that has shrunk.
    capset(script, tape, [held, held, inheritable & known])?;
    for cap in 0..=last_cap {
        if bounding & (1 << cap) == 0 {
            prctl(script, &[option(libc::PR_CAPBSET_DROP), cap.into()]);
        }
    }
    prctl(script, &[PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL]);
    for cap in 0..=last_cap {
        if ambient & (1 << cap) != 0 {
            prctl(script, &[PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, cap.into()]);
        }
    }
    prctl(script, &[securebits, creds.securebits.into()]);
    capset(
        script,
        tape,
        [effective, permitted, inheritable].map(|set| set & known),
    )?;
    if creds.no_new_privs {
        prctl(script, &[option(libc::PR_SET_NO_NEW_PRIVS), 1]);
    }
    Ok(())
}

/// Sets effective, permitted, inheritable of the calling thread.
fn capset(script: &mut Script, tape: &mut Tape, sets: [u64; 3]) -> Result<(), RestoreError> {
    let half =
        |shift: u32| sets.map(|set| u32::try_from((set >> shift) & 0xffff_ffff).unwrap_or(0));
    let words = [[CAPABILITY_VERSION_3, 0].as_slice(), &half(0), &half(32)].concat();
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let header = tape.data(&bytes).ok_or(RestoreError::NoRoom)?;
    script.zero(libc::SYS_capset, &[header, header + 8]);
    Ok(())
}

pub(super) fn option(value: i32) -> u64 {
    value.cast_unsigned().into()
}

/// What the restorer may do and hand on.
#[derive(Clone, Copy, Debug)]
pub struct Rights {
    /// Highest capability this kernel knows.
    pub last_cap: u32,
    /// The restorer's own permitted set.
    pub held: u64,
}

impl Rights {
    /// Reads both from procfs.
    ///
    /// # Errors
    /// procfs is not mounted.
    pub fn own() -> Result<Self, RestoreError> {
        let read = |path: &str| {
            std::fs::read_to_string(path).map_err(RestoreError::io(format!("read {path}")))
        };
        let last_cap = read("/proc/sys/kernel/cap_last_cap")?;
        let status = read("/proc/self/status")?;
        let held = status.lines().find_map(|l| l.strip_prefix("CapPrm:"));
        let held = held.and_then(|set| u64::from_str_radix(set.trim(), 16).ok());
        Ok(Self {
            last_cap: last_cap.trim_end().parse().unwrap_or(40).min(62),
            held: held.unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls(creds: &Credentials) -> (Script, Tape) {
        static NEXT: std::sync::atomic::AtomicU64 =
            std::sync::atomic::AtomicU64::new(0x2500_0000_0000);
        let at = NEXT.fetch_add(1 << 32, std::sync::atomic::Ordering::Relaxed);
        let mut tape = Tape::new(at).unwrap();
        let mut script = Script::default();
        let rights = Rights {
            last_cap: 40,
            held: (1 << 41) - 1,
        };
        restore(&mut script, &mut tape, creds, rights).unwrap();
        (script, tape)
    }

    #[test]
    fn a_full_bounding_set_drops_nothing() {
        let creds = Credentials {
            caps: [0, u64::MAX, u64::MAX, u64::MAX, 0],
            ..Credentials::default()
        };
        let (script, _tape) = calls(&creds);
        let drop = option(libc::PR_CAPBSET_DROP);
        assert!(
            script
                .calls
                .iter()
                .all(|c| c.nr != libc::SYS_prctl || c.args[0] != drop)
        );
    }

    #[test]
    fn the_final_set_is_the_last_word() {
        let creds = Credentials {
            uids: [33; 4],
            caps: [0, 1 << 35 | 1, 1, 0, 0],
            ..Credentials::default()
        };
        let (script, tape) = calls(&creds);
        let last = script
            .calls
            .iter()
            .rfind(|c| c.nr == libc::SYS_capset)
            .unwrap();
        let mut data = [0; 24];
        tape.read_data(last.args[1], &mut data);
        let words: Vec<u32> = data
            .chunks_exact(4)
            .map(|c| u32::from_le_bytes(c.try_into().unwrap()))
            .collect();
        assert_eq!(words, [1, 1, 0, 0, 8, 0]);
        let drops = script
            .calls
            .iter()
            .filter(|c| c.nr == libc::SYS_prctl && c.args[0] == option(libc::PR_CAPBSET_DROP));
        assert_eq!(drops.count(), 41);
    }
}
