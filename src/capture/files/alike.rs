//! TCP sockets that have the same options.
//!
//! A socket has some thirty options, and a server may have thousands of sockets: to read them takes
//! longer than everything else about one. The iterators' records tell whether two sockets have the
//! same, so that those of one are read and hold for the others.

use super::CollectError;
use super::borrow::Borrowed;
use super::options::{Defaults, Kind};
use crate::bpf::events::{SockChoices, SockFlag, SockOpts, SockRec};
use crate::bpf::iter::{Detail, File};
use crate::model::frozen::SockOption;
use crate::model::map::Map;

/// What tells the options of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Likeness {
    kind: Kind,
    opts: SockOpts,
    choices: SockChoices,
}

impl Likeness {
    /// `None` where a record does not tell all.
    fn of(rec: &SockRec) -> Option<Self> {
        (rec.choices.known != 0).then(|| Self {
            kind: Kind::of(rec),
            opts: rec.opts,
            choices: rec.choices,
        })
    }
}

/// Options of sockets that were read already.
#[derive(Debug, Default)]
pub struct Alike {
    known: Map<Likeness, Vec<SockOption>>,
    defaults: Defaults,
}

impl Alike {
    /// Looks at new sockets of the kinds that are among these descriptors: later there is less
    /// time. What fails is tried again then.
    pub fn prepare(files: &[File]) -> Self {
        let mut this = Self::default();
        for file in files {
            if let Detail::Socket(rec) = &file.detail {
                this.defaults.prepare(rec);
            }
        }
        this
    }

    /// What new sockets have.
    pub fn defaults(&mut self) -> &mut Defaults {
        &mut self.defaults
    }

    /// The options of a socket, if they were read of one like it. A filter is more than options.
    pub fn options(&self, rec: &SockRec) -> Option<&Vec<SockOption>> {
        if rec.flags & SockFlag::HAS_FILTER != 0 {
            return None;
        }
        self.known.get(&Likeness::of(rec)?)
    }

    /// The options of a socket, which are read if those of none like it were.
    ///
    /// # Errors
    /// A socket call fails.
    pub fn read(
        &mut self,
        from: &Borrowed,
        rec: &SockRec,
    ) -> Result<Vec<SockOption>, CollectError> {
        let likeness = Likeness::of(rec);
        if let Some(options) = likeness.and_then(|likeness| self.known.get(&likeness)) {
            return Ok(options.clone());
        }
        let options = self.defaults.read(from, rec)?;
        if let Some(likeness) = likeness {
            self.known.insert(likeness, options.clone());
        }
        Ok(options)
    }
}
