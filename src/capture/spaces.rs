//! Private memory of address spaces that stand still: which pages an image needs is found, and
//! what there is room for is read. That takes about as long as to read all else, so that a thread
//! of its own does it beside that, where there is one.

use super::copier::{Copied, Copier};
use super::error::CheckpointError;
use super::files::Slots;
use super::pages::{Piece, plan, select};
use super::tracked::Tracked;
use crate::bpf::events::VmaRec;
use crate::model::frozen::PageRun;
use crate::model::ids::Pid;
use crate::sys::heap;
use crate::sys::memory::Pagemap;
use crate::sys::precedence::Precedence;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};

/// One address space.
#[derive(Debug)]
pub struct Space {
    /// A process that has it.
    pub pid: Pid,
    /// Its mappings, in address order.
    pub vmas: Arc<Vec<VmaRec>>,
    /// As for [`select`].
    pub tracked: Option<Arc<Tracked>>,
    /// What the image has of it already, in address order.
    pub have: Arc<Vec<PageRun>>,
}

/// Address spaces to be read, by what and into what.
#[derive(Debug)]
pub struct Work {
    /// One after the other.
    pub spaces: Vec<Space>,
    /// With the room there is.
    pub copier: Copier,
    /// For pages that were never copied.
    pub slots: Slots,
}

/// What was read of an address space.
#[derive(Debug)]
pub struct Read {
    /// What the image needs of it.
    pub pieces: Vec<Piece>,
    /// What was read.
    pub copied: Copied,
    /// What there was no room for, or has to be read in another way.
    pub rest: Vec<Piece>,
}

/// Work that was done.
#[derive(Debug)]
pub struct Done {
    /// Of each space.
    pub read: Vec<Read>,
    /// Given back.
    pub copier: Copier,
    /// Given back.
    pub slots: Slots,
}

/// Does the work; `zero_frame` is as for [`select`].
///
/// # Errors
/// A pagemap cannot be read.
pub fn read(work: Work, zero_frame: Option<u64>) -> Result<Done, CheckpointError> {
    let Work {
        spaces,
        mut copier,
        mut slots,
    } = work;
    let read = spaces.iter().map(|space| {
        let mut pagemap = Pagemap::open(space.pid)?;
        let tracked = space.tracked.as_deref();
        let needs = select(&mut pagemap, &space.vmas, tracked, zero_frame)?;
        let pieces = plan(&needs, &space.have, |pages| slots.take(pages));
        let (copied, rest) = copier.read(space.pid, &pieces);
        Ok(Read {
            pieces,
            copied,
            rest,
        })
    });
    let read = read.collect::<Result<_, CheckpointError>>()?;
    Ok(Done {
        read,
        copier,
        slots,
    })
}

/// A thread that does such work when it is asked to.
#[derive(Debug)]
pub struct Beside {
    work: Sender<Work>,
    done: Receiver<Result<Done, CheckpointError>>,
    /// It has begun something that was not waited for.
    busy: bool,
}

impl Beside {
    /// Starts it, with memory for what it will find. It ends when this is dropped, after what it
    /// is at.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(zero_frame: Option<u64>) -> io::Result<Self> {
        const ROOM: usize = 1 << 20;
        let (work, asked) = channel();
        let (answer, done) = channel();
        let thread = move || {
            heap::warm(ROOM);
            while let Ok(work) = asked.recv() {
                let _precedence = Precedence::take();
                // Nobody there: the checkpoint has failed.
                let _ = answer.send(read(work, zero_frame));
            }
        };
        let name = "memory".to_owned();
        std::thread::Builder::new().name(name).spawn(thread)?;
        Ok(Self {
            work,
            done,
            busy: false,
        })
    }

    /// Has it begin.
    pub fn begin(&mut self, work: Work) {
        // Should the thread have died, nobody answers either.
        let _ = self.work.send(work);
        self.busy = true;
    }

    /// Whether it has begun something that was not waited for.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy
    }

    /// Waits for what was done.
    ///
    /// # Errors
    /// As [`read`]; or the thread has died.
    pub fn done(&mut self) -> Result<Done, CheckpointError> {
        self.busy = false;
        let died = |_| CheckpointError::Unstable("The thread that reads memory died".into());
        self.done.recv().map_err(died)?
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::events::VmaKind;
    use crate::capture::mm::vm;
    use crate::capture::pending::Pending;
    use crate::sys::memory::zero_frame;

    const PAGE: u64 = 4096;

    /// Two pages of our own that were written to, with room for so many.
    fn work(start: u64, room: u64) -> Work {
        let vma = VmaRec {
            start,
            end: start + 2 * PAGE,
            kind: VmaKind::ANON,
            has_anon: 1,
            flags: vm::READ,
            ..VmaRec::default()
        };
        let mut copier = Copier::new();
        copier.pending = Pending::with_room(room);
        Work {
            spaces: vec![Space {
                pid: Pid(std::process::id().cast_signed()),
                vmas: Arc::new(vec![vma]),
                tracked: None,
                have: Arc::default(),
            }],
            copier,
            slots: Slots::from(7),
        }
    }

    #[test]
    fn a_thread_reads_what_there_is_room_for() {
        let memory = vec![1_u8; 4 * 4096];
        let start = (memory.as_ptr() as u64).next_multiple_of(PAGE);
        let run = PageRun {
            addr: start,
            pages: 2,
            slot: 7,
        };
        let mut beside = Beside::start(zero_frame()).unwrap();
        for (room, copied, rest) in [(0, 0, 1), (1, 0, 1), (2, 2, 0)] {
            beside.begin(work(start, room));
            let done = beside.done().unwrap();
            let read = &done.read[0];
            assert_eq!(read.pieces.len(), 1);
            assert_eq!(read.pieces[0].run, run);
            assert_eq!((read.copied.pages, read.rest.len()), (copied, rest));
            assert_eq!(done.slots.used(), 9);
        }
        let mut unknown = work(start, 2);
        unknown.spaces[0].pid = Pid(0);
        beside.begin(unknown);
        assert!(beside.done().is_err());
        drop(memory);
    }
}
