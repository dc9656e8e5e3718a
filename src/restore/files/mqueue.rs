//! POSIX message queues: one queue for all descriptions that were of one, with its messages.

use super::error::{FilesError, call, missing_part};
use crate::model::frozen::{Application, FileKind, MqueueState, OpenFile};
use crate::model::ids::OfdId;
use crate::sys::mqueue::{self, Room};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::{Mode, fchmod, fstat};
use nix::unistd::{Gid, Uid, Whence, fchown, lseek, setresuid};
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::thread::sleep;
use std::time::Duration;

/// What open(2) sets on its own and mq_open(3) does not; the C library's constant is 0.
const O_LARGEFILE: u32 = 0o100_000;

/// A queue and the descriptions of it.
#[derive(Debug, Default)]
struct Queue<'a> {
    state: Option<&'a MqueueState>,
    descriptions: Vec<(OfdId, &'a OpenFile)>,
}

/// Makes every queue of the application and fills it; the names of new ones are added to
/// `created`. One that the checkpoint left behind on this kernel is used as it is, but for its
/// messages.
///
/// # Errors
/// A name is another queue's, the kernel refuses a step, or the image lacks a queue's state.
pub fn open_all(
    app: &Application,
    created: &mut Vec<CString>,
) -> Result<BTreeMap<OfdId, OwnedFd>, FilesError> {
    let mut opened = BTreeMap::new();
    let mut all = Vec::new();
    for queue in queues(app).into_values() {
        let state = queue.state;
        let state = state.ok_or_else(|| missing_part("POSIX message queue", "state"))?;
        all.push((state, queue.descriptions));
    }
    // Those without a name first: their old ones are free then, if ever.
    all.sort_by_key(|(state, _)| !state.unlinked);
    for (state, descriptions) in all {
        make(state, &descriptions, created, &mut opened)?;
    }
    Ok(opened)
}

fn queues(app: &Application) -> BTreeMap<u64, Queue<'_>> {
    let mut queues: BTreeMap<u64, Queue<'_>> = BTreeMap::new();
    for (&ofd, file) in &app.ofds {
        if let FileKind::Mqueue { id, state } = &file.kind {
            let queue = queues.entry(*id).or_default();
            queue.state = queue.state.or(state.as_deref());
            queue.descriptions.push((ofd, file));
        }
    }
    queues
}

/// The name as mq_open(3) takes it.
fn name_of(state: &MqueueState) -> Result<CString, FilesError> {
    let name = [b"/", &state.name[..]].concat();
    CString::new(name).map_err(|_| FilesError::Unsupported(object(state)))
}

fn object(state: &MqueueState) -> String {
    let name = String::from_utf8_lossy(&state.name);
    format!("POSIX message queue /{name}")
}

fn room(state: &MqueueState) -> Room {
    Room {
        maxmsg: state.maxmsg,
        msgsize: state.msgsize,
    }
}

fn make(
    state: &MqueueState,
    descriptions: &[(OfdId, &OpenFile)],
    created: &mut Vec<CString>,
    opened: &mut BTreeMap<OfdId, OwnedFd>,
) -> Result<(), FilesError> {
    let failed = |what| call(object(state), what);
    let mut name = name_of(state)?;
    let mut is_new = true;
    let queue = match create(&name, state) {
        Err(Errno::EEXIST) if state.unlinked => {
            let (unused, queue) = create_unnamed(state).map_err(failed("mq_open"))?;
            name = unused;
            queue
        }
        Err(Errno::EEXIST) => {
            is_new = false;
            left(state, &name)?
        }
        made => made.map_err(failed("mq_open"))?,
    };
    if is_new {
        created.push(name.clone());
    }
    for (ofd, file) in descriptions {
        let fd = description(&name, &queue, file).map_err(failed("mq_open"))?;
        if file.pos > 0 {
            let pos = i64::try_from(file.pos).unwrap_or(i64::MAX);
            lseek(fd.as_fd(), pos, Whence::SeekSet).map_err(failed("lseek"))?;
        }
        opened.insert(*ofd, fd);
    }
    if state.unlinked {
        mqueue::unlink(&name).map_err(failed("mq_unlink"))?;
        created.pop();
    }
    for message in &state.messages {
        mqueue::send(queue.as_fd(), &message.text, message.priority).map_err(failed("mq_send"))?;
    }
    if is_new {
        // Last: until here it is closed to others.
        let (uid, gid) = (Uid::from_raw(state.uid), Gid::from_raw(state.gid));
        fchown(queue.as_fd(), Some(uid), Some(gid)).map_err(failed("fchown"))?;
        let mode = Mode::from_bits_truncate(state.mode);
        fchmod(queue.as_fd(), mode).map_err(failed("fchmod"))?;
    }
    Ok(())
}

/// Makes a queue at the expense of the user who made the old one.
fn create(name: &CString, state: &MqueueState) -> Result<OwnedFd, Errno> {
    let own = Uid::current();
    // Only the real user: the rights stay.
    let unchanged = Uid::from_raw(u32::MAX);
    setresuid(Uid::from_raw(state.account), unchanged, unchanged)?;
    let made = mqueue::create(name, room(state));
    setresuid(own, unchanged, unchanged)?;
    made
}

/// Makes a queue whose old name is another queue's by now.
fn create_unnamed(state: &MqueueState) -> Result<(CString, OwnedFd), Errno> {
    let own = std::process::id();
    let mut number = 0_u32;
    loop {
        let name = CString::new(format!("/tracker-{own}-{number}")).map_err(|_| Errno::EINVAL)?;
        match create(&name, state) {
            Err(Errno::EEXIST) => number += 1,
            made => return Ok((name, made?)),
        }
    }
}

/// Opens the queue that the checkpoint left behind, and empties it.
fn left(state: &MqueueState, name: &CString) -> Result<OwnedFd, FilesError> {
    /// What was in flight when its holder was killed is closed a moment later.
    const PATIENCE: [Duration; 20] = [Duration::from_millis(50); 20];
    let failed = |what| call(object(state), what);
    let other = |reason: &str| FilesError::Queue {
        name: name.to_string_lossy().into_owned(),
        reason: reason.to_owned(),
    };
    let flags = libc::O_RDWR | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let queue = mqueue::open(name, flags).map_err(failed("mq_open"))?;
    let found = fstat(queue.as_fd()).map_err(failed("fstat"))?;
    let found_room = mqueue::room(queue.as_fd()).map_err(failed("mq_getattr"))?;
    if (found.st_uid, found.st_gid, found.st_mode & 0o7777) != (state.uid, state.gid, state.mode)
        || found_room != room(state)
    {
        return Err(other(
            "there is another one, with another owner, mode or room",
        ));
    }
    let is_used = || mqueue::is_open_elsewhere(queue.as_fd()).map_err(failed("fcntl(F_SETLEASE)"));
    let mut waits = PATIENCE.iter();
    while is_used()? {
        match waits.next() {
            Some(wait) => sleep(*wait),
            None => return Err(other("there is one that somebody has open")),
        }
    }
    let most = usize::try_from(state.msgsize).unwrap_or(0);
    loop {
        match mqueue::discard(queue.as_fd(), most) {
            Ok(()) => {}
            Err(Errno::EAGAIN) => return Ok(queue),
            Err(errno) => return Err(failed("mq_receive")(errno)),
        }
    }
}

/// How a description is opened again: by its number where mq_open(3) cannot give its flags.
fn is_reopened(flags: u32) -> bool {
    let path = OFlag::O_PATH.bits().cast_unsigned();
    flags & (path | O_LARGEFILE) != 0
}

fn description(name: &CString, queue: &OwnedFd, file: &OpenFile) -> Result<OwnedFd, Errno> {
    let flags = file.flags.cast_signed();
    if !is_reopened(file.flags) {
        return mqueue::open(name, flags);
    }
    let path = PathBuf::from(format!("/proc/self/fd/{}", queue.as_raw_fd()));
    let mut flags = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC;
    // The link of procfs is one.
    flags.remove(OFlag::O_NOFOLLOW);
    open(&path, flags, Mode::empty())
}

/// Takes back what was made, after a failure.
pub fn remove(created: &[CString]) {
    for name in created {
        let _ = mqueue::unlink(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::frozen::FileHints;

    fn description(id: u64, state: Option<MqueueState>) -> OpenFile {
        OpenFile {
            flags: 2,
            pos: 0,
            owner: None,
            locks: Vec::new(),
            lease: None,
            hints: FileHints::default(),
            kind: FileKind::Mqueue {
                id,
                state: state.map(Box::new),
            },
        }
    }

    #[test]
    fn descriptions_of_one_queue_find_its_state() {
        let state = |name: &[u8]| {
            Some(MqueueState {
                name: name.to_vec().into(),
                ..MqueueState::default()
            })
        };
        let mut app = Application::default();
        let files = [
            description(7, None),
            description(8, state(b"b")),
            description(7, state(b"a")),
        ];
        app.ofds = (1..).map(OfdId).zip(files).collect();
        let found = queues(&app);
        let name = |id: u64| &found[&id].state.unwrap().name[..];
        assert_eq!((name(7), name(8)), (&b"a"[..], &b"b"[..]));
        let ofds: Vec<_> = found[&7]
            .descriptions
            .iter()
            .map(|(ofd, _)| ofd.0)
            .collect();
        assert_eq!(ofds, [1, 3]);
        assert_eq!(name_of(found[&7].state.unwrap()).unwrap(), c"/a".to_owned());

        let lacking = [description(9, None)];
        app.ofds = (1..).map(OfdId).zip(lacking).collect();
        let error = open_all(&app, &mut Vec::new()).unwrap_err();
        assert!(error.to_string().contains("state of the POSIX"), "{error}");
    }

    #[test]
    fn flags_that_only_open_gives_are_given_by_it() {
        let flags = |flag: OFlag| flag.bits().cast_unsigned();
        assert!(!is_reopened(flags(OFlag::O_RDWR | OFlag::O_NONBLOCK)));
        assert!(!is_reopened(flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC)));
        assert!(is_reopened(O_LARGEFILE | 2));
        assert!(is_reopened(flags(OFlag::O_PATH)));
    }
}
