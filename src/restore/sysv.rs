//! System V shared memory: made with the old ids before any process attaches it.

use super::RestoreError;
use super::files::content;
use crate::image::Pages;
use crate::model::frozen::{Application, Content, ContentKind, Segment};
use crate::sys::sysv::{Attached, create_segment, remove_segment, set_owner};
use nix::errno::Errno;
use nix::unistd::{Gid, Uid, setegid, seteuid};
use std::fs;

fn all(app: &Application) -> impl Iterator<Item = (&Content, &Segment)> {
    app.contents
        .values()
        .filter_map(|content| match &content.kind {
            ContentKind::SysvShm(segment) => Some((content, segment)),
            _ => None,
        })
}

fn refused(id: i32, call: &str) -> impl FnOnce(Errno) -> RestoreError + use<> {
    RestoreError::system(format!("{call} of System V shared memory {id}"))
}

/// Makes every segment and fills it; the ids of new ones are added to `created`. One that the
/// checkpoint left behind on this kernel is used as it is, but for its bytes.
///
/// # Errors
/// An id or key is in use, or the kernel refuses a step.
pub fn create_all(
    app: &Application,
    image: Pages<'_>,
    created: &mut Vec<i32>,
) -> Result<(), RestoreError> {
    for (content, segment) in all(app) {
        let left = is_left(content, segment)?;
        if !left {
            create(content, segment)?;
            created.push(segment.id);
            set_owner(segment.id, content.uid, content.gid, content.mode)
                .map_err(refused(segment.id, "shmctl(IPC_SET)"))?;
        }
        fill(content, segment.id, left, image)?;
    }
    Ok(())
}

/// What there is under an id.
pub enum Left {
    /// No object.
    Nothing,
    /// One of the same key and size; the columns of its line.
    Same(Vec<String>),
    /// Another one.
    Other,
}

/// Looks for an object in a file of /proc/sysvipc; its fourth column is the size.
///
/// # Errors
/// procfs cannot be read.
pub fn left(path: &str, id: i32, key: i32, size: u64) -> Result<Left, RestoreError> {
    let text = fs::read_to_string(path).map_err(RestoreError::io(format!("read {path}")))?;
    for line in text.lines().skip(1) {
        let words: Vec<String> = line.split_ascii_whitespace().map(str::to_owned).collect();
        let [its_key, its_id, _, its_size, ..] = &words[..] else {
            continue;
        };
        if its_id.parse() == Ok(id) {
            let same = its_key.parse() == Ok(key) && its_size.parse() == Ok(size);
            return Ok(if same { Left::Same(words) } else { Left::Other });
        }
    }
    Ok(Left::Nothing)
}

/// Whether the segment itself is still there.
fn is_left(content: &Content, segment: &Segment) -> Result<bool, RestoreError> {
    match left("/proc/sysvipc/shm", segment.id, segment.key, content.size)? {
        Left::Nothing => Ok(false),
        Left::Same(words) if words.get(6).is_some_and(|n| n == "0") && !segment.destroyed => {
            Ok(true)
        }
        _ => Err(refused(segment.id, "shmget")(Errno::EEXIST)),
    }
}

/// Makes an object that has this id, by the file of /proc/sys/kernel that chooses the `next` one.
///
/// # Errors
/// `refused` tells: of `make`, or `EEXIST` where the id is in use.
pub fn make_with_id(
    next: &str,
    id: i32,
    creator: (u32, u32),
    make: impl FnOnce() -> Result<i32, Errno>,
    remove: impl FnOnce(i32) -> Result<(), Errno>,
    refused: impl FnOnce(Errno) -> RestoreError,
) -> Result<(), RestoreError> {
    let path = format!("/proc/sys/kernel/{next}");
    fs::write(&path, id.to_string()).map_err(RestoreError::io(format!("write {path}")))?;
    match as_creator(creator, make) {
        Ok(made) if made == id => Ok(()),
        Ok(other) => {
            let _ = remove(other);
            Err(refused(Errno::EEXIST))
        }
        Err(errno) => Err(refused(errno)),
    }
}

/// Runs `make` with the effective ids of who made the object, which cannot be set later.
fn as_creator(
    (uid, gid): (u32, u32),
    make: impl FnOnce() -> Result<i32, Errno>,
) -> Result<i32, Errno> {
    setegid(Gid::from_raw(gid))?;
    seteuid(Uid::from_raw(uid))?;
    let made = make();
    seteuid(Uid::from_raw(0))?;
    setegid(Gid::from_raw(0))?;
    made
}

fn create(content: &Content, segment: &Segment) -> Result<(), RestoreError> {
    let size = usize::try_from(content.size).unwrap_or(usize::MAX);
    let mode = i32::try_from(content.mode & 0o777).unwrap_or(0);
    make_with_id(
        "shm_next_id",
        segment.id,
        (segment.creator_uid, segment.creator_gid),
        || create_segment(segment.key, size, mode, content.huge_page),
        remove_segment,
        refused(segment.id, "shmget"),
    )
}

fn fill(content: &Content, id: i32, left: bool, image: Pages<'_>) -> Result<(), RestoreError> {
    let size = usize::try_from(content.size).unwrap_or(usize::MAX);
    let mut memory = Attached::new(id, size).map_err(refused(id, "shmat"))?;
    if left {
        memory.clear();
    }
    content::read(content, image, |at, bytes| {
        memory.write(usize::try_from(at).unwrap_or(usize::MAX), bytes);
        Ok(())
    })
}

/// Marks those that were marked, now that all who had them attached have them again.
///
/// # Errors
/// The kernel refuses.
pub fn mark_destroyed(app: &Application) -> Result<(), RestoreError> {
    for (_, segment) in all(app).filter(|(_, segment)| segment.destroyed) {
        remove_segment(segment.id).map_err(refused(segment.id, "shmctl(IPC_RMID)"))?;
    }
    Ok(())
}

/// Takes back what was made, after a failure.
pub fn remove(created: &[i32]) {
    for id in created {
        let _ = remove_segment(*id);
    }
}
