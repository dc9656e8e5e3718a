//! The order in which a tree of processes is made again.
//!
//! Sessions constrain it: a process gets a session by being born into it or by leading it,
//! nothing else. So a child of an older session than its parent's must be born before the
//! parent calls setsid(2), and a process whose parent is gone but whose session leader is
//! in the tree must be born below that leader and lose its parent then.
//!
//! A descriptor table or directories can be shared only from birth on, with the parent.

use super::frozen::Process;
use super::ids::Pid;
use std::collections::{BTreeMap, BTreeSet};

/// What a process has in common with its parent from its birth on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shares {
    /// Its descriptor table (`CLONE_FILES`).
    pub files: bool,
    /// Its directories and umask (`CLONE_FS`).
    pub fs: bool,
}

/// One step; each is done by one process, in the order of the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `parent` (or the restorer) creates `child`.
    Fork {
        /// Who; `None` = the restorer.
        parent: Option<Pid>,
        /// Whom.
        child: Pid,
        /// Through a go-between that exits, so that the child's parent is gone.
        orphan: bool,
        /// What it has in common with `parent`.
        shares: Shares,
    },
    /// setsid(2), which makes a group too.
    LeadSession(Pid),
    /// setpgid(2) to itself.
    LeadGroup(Pid),
    /// setpgid(2) to a group made before.
    JoinGroup {
        /// Who.
        pid: Pid,
        /// Which.
        pgid: Pid,
    },
    /// Exits and stays a zombie.
    Die(Pid),
}

/// Why a tree cannot be made again.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The list of processes contradicts itself.
    #[error("PID {pid} names PID {parent} as its parent, which comes later or not at all")]
    NoParent {
        /// The process.
        pid: Pid,
        /// What it names.
        parent: Pid,
    },
    /// Two processes have one number.
    #[error("PID {0} occurs twice")]
    Twice(Pid),
    /// No order of births gives this process its session.
    #[error(
        "PID {pid} cannot be born into session {sid}: its parent would have to be in two sessions"
    )]
    Session {
        /// The process.
        pid: Pid,
        /// Its session.
        sid: Pid,
    },
    /// Processes share what only a parent and its child can be made to share again.
    #[error("PID {pid} shares its {what} with PID {other}, which is not its parent")]
    Sharing {
        /// The process.
        pid: Pid,
        /// The other one.
        other: Pid,
        /// What they share.
        what: &'static str,
    },
}

impl PlanError {
    /// The process that is in the way.
    #[must_use]
    pub fn pid(&self) -> Pid {
        match *self {
            Self::NoParent { pid, .. }
            | Self::Twice(pid)
            | Self::Session { pid, .. }
            | Self::Sharing { pid, .. } => pid,
        }
    }
}

/// Orders the births of `processes` (parents before children) and what each does for its
/// session and group. Sessions and groups whose leader is not in the tree are those the
/// restorer is in. Zombies without a parent in the tree have nobody to read them: left out.
///
/// # Errors
/// The tree contradicts itself.
pub fn processes(processes: &[Process]) -> Result<Vec<Step>, PlanError> {
    let tree = Tree::new(processes)?;
    tree.check_sharing()?;
    let mut steps = Vec::new();
    for root in tree.kids(None) {
        tree.bear(None, *root, &mut steps)?;
    }
    for process in &tree.alive {
        if process.pgid != process.pid && tree.groups.contains(&process.pgid) {
            steps.push(Step::JoinGroup {
                pid: process.pid,
                pgid: process.pgid,
            });
        }
    }
    // Children before their parents: nobody may be dead when a child is born to it.
    let dead = tree.alive.iter().rev().filter(|p| p.zombie.is_some());
    steps.extend(dead.map(|p| Step::Die(p.pid)));
    Ok(steps)
}

/// Whether two identities are of one object; 0 is none.
fn shared(one: u64, other: u64) -> bool {
    one != 0 && one == other
}

struct Tree<'a> {
    alive: Vec<&'a Process>,
    by_pid: BTreeMap<Pid, &'a Process>,
    /// By the process that bears them, which is not the parent of an orphan.
    kids: BTreeMap<Option<Pid>, Vec<Pid>>,
    sessions: BTreeSet<Pid>,
    groups: BTreeSet<Pid>,
}

impl<'a> Tree<'a> {
    fn new(processes: &'a [Process]) -> Result<Self, PlanError> {
        let alive: Vec<_> = processes
            .iter()
            .filter(|p| p.zombie.is_none() || p.parent.is_some())
            .collect();
        let mut by_pid = BTreeMap::new();
        for process in &alive {
            if let Some(parent) = process.parent
                && !by_pid.contains_key(&parent)
            {
                let pid = process.pid;
                return Err(PlanError::NoParent { pid, parent });
            }
            if by_pid.insert(process.pid, *process).is_some() {
                return Err(PlanError::Twice(process.pid));
            }
        }
        let leaders = |of: fn(&Process) -> Pid| -> BTreeSet<Pid> {
            let leads = alive.iter().filter(|p| of(p) == p.pid);
            leads.map(|p| p.pid).collect()
        };
        let sessions = leaders(|p| p.sid);
        let groups = leaders(|p| p.pgid);
        let mut kids: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for process in &alive {
            let foster = sessions
                .contains(&process.sid)
                .then_some(process.sid)
                .filter(|sid| *sid != process.pid);
            let bearer = process.parent.or(foster);
            kids.entry(bearer).or_default().push(process.pid);
        }
        Ok(Self {
            alive,
            by_pid,
            kids,
            sessions,
            groups,
        })
    }

    /// What a process shares with its parent.
    fn shares(&self, pid: Pid) -> Shares {
        let of = |pid: &Pid| self.by_pid.get(pid).filter(|p| p.zombie.is_none());
        let child = of(&pid);
        let parent = child.and_then(|p| p.parent).and_then(|pid| of(&pid));
        match (child, parent) {
            (Some(child), Some(parent)) => Shares {
                files: shared(child.files.0, parent.files.0),
                fs: shared(child.fs.0, parent.fs.0),
            },
            _ => Shares::default(),
        }
    }

    /// Of those who share something, all but one must share it with their parent.
    fn check_sharing(&self) -> Result<(), PlanError> {
        type Key = (&'static str, u64);
        let mut first: BTreeMap<Key, Pid> = BTreeMap::new();
        for process in self.alive.iter().filter(|p| p.zombie.is_none()) {
            let with_parent = self.shares(process.pid);
            for (what, id, born) in [
                ("descriptor table", process.files.0, with_parent.files),
                ("working directory", process.fs.0, with_parent.fs),
            ] {
                if id == 0 || born {
                    continue;
                }
                if let Some(other) = first.insert((what, id), process.pid) {
                    let pid = process.pid;
                    return Err(PlanError::Sharing { pid, other, what });
                }
            }
        }
        Ok(())
    }

    fn kids(&self, of: Option<Pid>) -> &[Pid] {
        self.kids.get(&of).map_or(&[], Vec::as_slice)
    }

    /// The session as far as the tree knows it; `None` = one from outside.
    fn session(&self, pid: Pid) -> Option<Pid> {
        let sid = self.by_pid.get(&pid)?.sid;
        self.sessions.contains(&sid).then_some(sid)
    }

    /// The session `pid` must be born into; `None` = any will do.
    fn born_into(&self, pid: Pid) -> Result<Option<Option<Pid>>, PlanError> {
        let session = self.session(pid);
        if session != Some(pid) {
            return Ok(Some(session));
        }
        let mut wanted = None;
        for kid in self.kids(Some(pid)) {
            match self.born_into(*kid)? {
                Some(into) if into != Some(pid) => {
                    if wanted.is_some_and(|other| other != into) {
                        return Err(self.session_error(*kid));
                    }
                    wanted = Some(into);
                }
                _ => {}
            }
        }
        Ok(wanted)
    }

    fn session_error(&self, pid: Pid) -> PlanError {
        let sid = self.by_pid.get(&pid).map_or(pid, |p| p.sid);
        PlanError::Session { pid, sid }
    }

    fn bear(&self, parent: Option<Pid>, pid: Pid, steps: &mut Vec<Step>) -> Result<(), PlanError> {
        let orphan = parent.is_some() && self.by_pid.get(&pid).is_some_and(|p| p.parent.is_none());
        steps.push(Step::Fork {
            parent,
            child: pid,
            orphan,
            shares: self.shares(pid),
        });
        let leads_session = self.session(pid) == Some(pid);
        let mut late = Vec::new();
        for kid in self.kids(Some(pid)) {
            let into = self.born_into(*kid)?;
            if leads_session && into.is_some_and(|into| into != Some(pid)) {
                self.bear(Some(pid), *kid, steps)?;
            } else if leads_session || into.is_none_or(|into| into == self.session(pid)) {
                late.push(*kid);
            } else {
                return Err(self.session_error(*kid));
            }
        }
        if leads_session {
            steps.push(Step::LeadSession(pid));
        } else if self.groups.contains(&pid) {
            steps.push(Step::LeadGroup(pid));
        }
        for kid in late {
            self.bear(Some(pid), kid, steps)?;
        }
        Ok(())
    }
}

/// The lowest address from `from` on where `len` bytes are free with `guard` bytes free on
/// both sides; `taken` are (start, end) ranges in any order.
#[must_use]
pub fn free_gap(taken: &[(u64, u64)], from: u64, len: u64, guard: u64) -> Option<u64> {
    let mut taken = taken.to_vec();
    taken.sort_unstable();
    let mut at = from.checked_add(guard)?;
    for (start, end) in taken {
        if at.checked_add(len)?.checked_add(guard)? <= start {
            break;
        }
        at = at.max(end.checked_add(guard)?);
    }
    (at.checked_add(len)?.checked_add(guard)? <= USER_END).then_some(at)
}

/// First address behind user space with four-level page tables.
pub const USER_END: u64 = 0x7fff_ffff_f000;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::{FilesId, FsId};
    use proptest::prelude::*;

    fn process(pid: i32, parent: Option<i32>, pgid: i32, sid: i32) -> Process {
        Process {
            pid: Pid(pid),
            parent: parent.map(Pid),
            pgid: Pid(pgid),
            sid: Pid(sid),
            ..Process::default()
        }
    }

    /// Plays the steps as the kernel would; (parent, session, group) by PID.
    fn play(steps: &[Step]) -> BTreeMap<Pid, (Option<Pid>, Pid, Pid)> {
        const OUTSIDE: Pid = Pid(0);
        let mut world = BTreeMap::new();
        let mut dead = BTreeSet::new();
        for step in steps {
            match *step {
                Step::Fork {
                    parent,
                    child,
                    orphan,
                    ..
                } => {
                    let (sid, pgid) = parent.map_or((OUTSIDE, OUTSIDE), |p| {
                        let (_, sid, pgid) = world[&p];
                        assert!(!dead.contains(&p));
                        (sid, pgid)
                    });
                    let parent = parent.filter(|_| !orphan);
                    assert!(world.insert(child, (parent, sid, pgid)).is_none());
                }
                Step::LeadSession(pid) => {
                    assert!(
                        world
                            .values()
                            .all(|(_, sid, pgid)| *sid != pid && *pgid != pid)
                    );
                    let entry = world.get_mut(&pid).unwrap();
                    (entry.1, entry.2) = (pid, pid);
                }
                Step::LeadGroup(pid) => world.get_mut(&pid).unwrap().2 = pid,
                Step::JoinGroup { pid, pgid } => {
                    let sid = world[&pid].1;
                    let group_sid = world.values().find(|(_, _, g)| *g == pgid).unwrap().1;
                    assert_eq!(sid, group_sid, "a group lies in one session");
                    world.get_mut(&pid).unwrap().2 = pgid;
                }
                Step::Die(pid) => assert!(dead.insert(pid)),
            }
        }
        world
    }

    #[test]
    fn a_child_of_an_older_session_is_born_before_setsid() {
        let tree = [
            process(10, None, 10, 10),
            process(11, Some(10), 11, 11),
            process(12, Some(11), 10, 10),
        ];
        let world = play(&processes(&tree).unwrap());
        assert_eq!(world[&Pid(12)], (Some(Pid(11)), Pid(10), Pid(10)));
        assert_eq!(world[&Pid(11)], (Some(Pid(10)), Pid(11), Pid(11)));
    }

    #[test]
    fn an_orphan_is_born_below_its_session_leader() {
        let tree = [process(10, None, 10, 10), process(12, None, 10, 10)];
        let world = play(&processes(&tree).unwrap());
        assert_eq!(world[&Pid(12)], (None, Pid(10), Pid(10)));
    }

    #[test]
    fn two_foreign_sessions_below_one_leader_are_refused() {
        let tree = [
            process(10, None, 10, 10),
            process(20, None, 20, 20),
            process(21, Some(20), 21, 20),
            process(22, Some(21), 10, 10),
        ];
        assert_eq!(
            processes(&tree),
            Err(PlanError::Session {
                pid: Pid(22),
                sid: Pid(10)
            })
        );
    }

    #[test]
    fn what_is_shared_is_shared_from_birth_on() {
        let sharing = |pid, parent, files, fs| Process {
            files: FilesId(files),
            fs: FsId(fs),
            ..process(pid, parent, 10, 10)
        };
        let mut tree = vec![
            sharing(10, None, 1, 1),
            sharing(11, Some(10), 1, 2),
            sharing(12, Some(11), 1, 1),
        ];
        let apart = PlanError::Sharing {
            pid: Pid(12),
            other: Pid(10),
            what: "working directory",
        };
        assert_eq!(processes(&tree), Err(apart));
        tree[2].fs = FsId(2);
        let steps = processes(&tree).unwrap();
        let shares: Vec<_> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Fork { shares, .. } => Some((shares.files, shares.fs)),
                _ => None,
            })
            .collect();
        assert_eq!(shares, [(false, false), (true, false), (true, true)]);
    }

    #[test]
    fn a_parent_must_come_first() {
        let tree = [process(11, Some(10), 11, 11)];
        assert!(matches!(processes(&tree), Err(PlanError::NoParent { .. })));
    }

    proptest! {
        /// A random history of forks, setsid, setpgid and exits gives a tree that is made again.
        #[test]
        fn any_history_is_replayed(history in prop::collection::vec((0_usize..8, 0_u8..6), 1..40)) {
            let mut tree = vec![process(100, None, 100, 100)];
            for (who, what) in history {
                let next = 100 + i32::try_from(tree.len()).unwrap();
                let who = who % tree.len();
                let actor = tree[who].clone();
                match what {
                    0..=2 => {
                        let born = process(next, Some(actor.pid.0), actor.pgid.0, actor.sid.0);
                        tree.push(born);
                    }
                    3 if actor.pgid != actor.pid
                        && tree.iter().all(|p| p.pgid != actor.pid) => {
                        tree[who].sid = actor.pid;
                        tree[who].pgid = actor.pid;
                    }
                    4 if actor.sid != actor.pid => tree[who].pgid = actor.pid,
                    5 if tree.iter().all(|p| p.parent != Some(actor.pid)) && who > 0 => {
                        tree[who].zombie = Some(0);
                    }
                    _ => {}
                }
            }
            let world = play(&processes(&tree).unwrap());
            for p in &tree {
                prop_assert_eq!(world[&p.pid], (p.parent, p.sid, p.pgid));
            }
        }

        #[test]
        fn a_gap_touches_nothing(
            taken in prop::collection::vec((0_u64..1000, 1_u64..50), 0..40),
            len in 1_u64..100,
            guard in 0_u64..20,
        ) {
            let taken: Vec<_> = taken.iter().map(|(start, len)| (*start, start + len)).collect();
            let at = free_gap(&taken, 0, len, guard).unwrap();
            for (start, end) in taken {
                prop_assert!(end + guard <= at || at + len + guard <= start);
            }
        }
    }
}
