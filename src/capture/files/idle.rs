//! TCP sockets whose options were read while the application ran.
//!
//! A socket has some thirty options, and a server may have thousands of sockets: to read them takes
//! longer than everything else about one. A socket that is, in the frozen window, what it was before
//! they were read, to the last bit of the kernel's structure, has them still. Listeners are, and
//! connections over which nothing has gone since.

use super::CollectError;
use super::borrow::Lender;
use super::options::Defaults;
use crate::bpf::events::{SockFlag, SockRec};
use crate::bpf::iter::{Detail, File};
use crate::model::frozen::SockOption;
use crate::model::map::Map;

/// The options of sockets, by the address of the socket.
#[derive(Debug, Default)]
pub struct IdleSockets {
    known: Map<u64, Known>,
    defaults: Defaults,
}

#[derive(Debug)]
struct Known {
    ino: u64,
    fingerprint: u64,
    options: Vec<SockOption>,
}

impl IdleSockets {
    /// Reads those among the descriptors of running processes, whose fingerprints must have been
    /// taken before. What goes away or fails meanwhile is left out.
    pub fn read(files: &[File]) -> Self {
        let mut lender = Lender::default();
        let (mut known, mut defaults) = (Map::default(), Defaults::default());
        for file in files {
            let Detail::Socket(rec) = &file.detail else {
                continue;
            };
            if rec.fingerprint == 0 || known.contains_key(&rec.sock) {
                continue;
            }
            if let Ok(options) = options(&mut lender, &mut defaults, file, rec) {
                let socket = Known {
                    ino: rec.ino,
                    fingerprint: rec.fingerprint,
                    options,
                };
                known.insert(rec.sock, socket);
            }
        }
        Self { known, defaults }
    }

    /// What new sockets have.
    pub fn defaults(&mut self) -> &mut Defaults {
        &mut self.defaults
    }

    /// The options of a socket, if they are known and it has not changed since.
    pub fn options(&mut self, rec: &SockRec) -> Option<Vec<SockOption>> {
        // A filter is more than options.
        if rec.fingerprint == 0 || rec.flags & SockFlag::HAS_FILTER != 0 {
            return None;
        }
        let known = self.known.get_mut(&rec.sock)?;
        let same = (known.ino, known.fingerprint) == (rec.ino, rec.fingerprint);
        same.then(|| std::mem::take(&mut known.options))
    }
}

fn options(
    lender: &mut Lender,
    defaults: &mut Defaults,
    file: &File,
    rec: &SockRec,
) -> Result<Vec<SockOption>, CollectError> {
    let from = lender.borrow(file)?;
    defaults.read(&from, rec)
}
