//! Asks /proc for the names of files, in a thread of its own.
//!
//! A path is nothing a hook could tell at a bearable price, and most files are closed before
//! anybody would want to know theirs.

use crate::model::names::Unnamed;
use crossbeam_channel::{Receiver, Sender, bounded};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::thread::{self, JoinHandle};

/// Those that were asked for and found.
pub(super) type Named = Vec<(Unnamed, Vec<u8>)>;

/// Starts the thread; it ends when the sender is dropped.
pub(super) fn start() -> std::io::Result<(Sender<Vec<Unnamed>>, Receiver<Named>, JoinHandle<()>)> {
    let (questions, inbox) = bounded::<Vec<Unnamed>>(1);
    let (outbox, answers) = bounded(1);
    let thread = thread::Builder::new().name("names".into()).spawn(move || {
        for wanted in inbox {
            let found = wanted
                .into_iter()
                .filter_map(|asked| Some((asked, name(&asked)?)));
            if outbox.send(found.collect()).is_err() {
                return;
            }
        }
    })?;
    Ok((questions, answers, thread))
}

/// What /proc shows; `None` if the descriptor is gone or something else by now.
fn name(asked: &Unnamed) -> Option<Vec<u8>> {
    let base = format!("/proc/{}", asked.tid);
    let link = fs::read_link(format!("{base}/fd/{}", asked.fd)).ok()?;
    let info = fs::read_to_string(format!("{base}/fdinfo/{}", asked.fd)).ok()?;
    let ino = info.lines().find_map(|line| line.strip_prefix("ino:"))?;
    (ino.trim().parse() == Ok(asked.inode.ino)).then(|| link.into_os_string().into_vec())
}
