//! Copying once more, while the application runs, what it wrote since its memory was copied.

use super::Capture;
use super::error::CheckpointError;
use super::files::Slots;
use crate::image::Store;
use std::rc::Rc;
use std::time::Duration;

/// How many pages make it worth to stop the application for a moment, to see which these are: they
/// would make the frozen window about twice as long.
const WORTHWHILE: u64 = 1024;

/// How often it is stopped for that.
const ROUNDS: usize = 3;

/// How long freezing may take for that.
const BRIEF: Duration = Duration::from_millis(500);

impl Capture {
    /// Copies again what was written since [`Capture::precopy`], so that less is left for the
    /// frozen window. If that is much the application is stopped for as long as it takes to see
    /// which pages these are; where the kernel does not tell which they are nothing is copied. With
    /// `write_later`, pages that are copied in the frozen window wait in memory until
    /// [`Capture::write_rest`]: only for an application that is left running.
    ///
    /// # Errors
    /// The carrier is full, something cannot be read, or tracker was asked to stop.
    pub fn refresh(
        &mut self,
        store: &dyn Store,
        slots: &mut Slots,
        write_later: bool,
    ) -> Result<(), CheckpointError> {
        let tracking = self.memory.stats().dirty_tracking;
        if !tracking && !write_later {
            return Ok(());
        }
        let scope = self.scope();
        let iterators = Rc::clone(&self.iterators);
        let mut written = self.memory.written(&mut iterators.borrow_mut(), scope)?;
        if write_later {
            // Before the rounds, though less may be left after them: to make room takes its time.
            self.memory.reserve(written);
        }
        let rounds = if tracking { ROUNDS } else { 0 };
        for _ in 0..rounds {
            if written < WORTHWHILE {
                break;
            }
            let looked = self.look_frozen();
            let running = self.let_run();
            looked.and(running)?;
            self.memory.copy_harvested(store, slots, &self.wakeups)?;
            let before = written;
            written = self.memory.written(&mut iterators.borrow_mut(), scope)?;
            // What is written all the time does not get less.
            if written > before / 2 {
                break;
            }
        }
        self.timeline.done("refresh");
        Ok(())
    }

    /// Freezes it and notes what has to be copied; if it takes too long to freeze, nothing.
    fn look_frozen(&mut self) -> Result<(), CheckpointError> {
        if !self.freezes_within(BRIEF)? {
            return Ok(());
        }
        let scope = self.scope();
        let iterators = Rc::clone(&self.iterators);
        self.memory.harvest(&mut iterators.borrow_mut(), scope)
    }
}
