//! Asks /proc for the names of files, in a thread of its own.
//!
//! A path is nothing a hook could tell at a bearable price, and most files are closed before
//! anybody would want to know theirs.

use crate::model::ids::Pid;
use crate::model::names::{Names, Unnamed};
use crate::sys::inode::Watches;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::thread::{self, JoinHandle};

/// Those that were asked for and found.
pub(super) type Named = Vec<Names>;

/// Where to ask, where the answers come, and the thread.
type Namer = (Sender<Vec<Unnamed>>, Receiver<Named>, JoinHandle<()>);

/// Starts the thread; it ends when the sender is dropped.
pub(super) fn start() -> std::io::Result<Namer> {
    let (questions, inbox) = bounded::<Vec<Unnamed>>(1);
    let (outbox, answers) = bounded(1);
    let thread = thread::Builder::new().name("names".into()).spawn(move || {
        for wanted in inbox {
            let found = wanted.into_iter().filter_map(names);
            if outbox.send(found.collect()).is_err() {
                return;
            }
        }
    })?;
    Ok((questions, answers, thread))
}

/// What /proc shows; `None` if the descriptor is gone or something else by now.
fn names(asked: Unnamed) -> Option<Names> {
    let base = format!("/proc/{}", asked.tid);
    let link = fs::read_link(format!("{base}/fd/{}", asked.fd)).ok()?;
    let info = fs::read_to_string(format!("{base}/fdinfo/{}", asked.fd)).ok()?;
    let ino = info.lines().find_map(|line| line.strip_prefix("ino:"))?;
    let mut watches = Watches::parse(Pid(asked.tid.0), &info);
    let inodes: Vec<_> = watches.inodes().collect();
    let found = inodes
        .into_iter()
        .filter_map(|(wd, inode)| Some((wd, inode, watches.watched(wd).ok()?.path)));
    let paths = found.collect();
    (ino.trim().parse() == Ok(asked.inode.ino)).then(|| Names {
        asked,
        name: link.into_os_string().into_vec(),
        paths,
    })
}
