//! The sockets of tracked processes that were made outside the tracked cgroups: see `adopted` in
//! `bpf/track_socket.bpf.h`.

use super::track::{MapError, number};
use crate::model::ids::SockId;
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapMut};
use std::sync::atomic::{AtomicU64, Ordering};

/// The set, which the hooks use and add to meanwhile.
#[derive(Debug)]
pub struct Adopted<'a> {
    map: &'a MapMut<'static>,
    /// Never less than there are in the map.
    count: Option<&'a AtomicU64>,
}

impl<'a> Adopted<'a> {
    /// The map and the number of its entries, which the kernel changes, too.
    pub(super) fn new(map: &'a MapMut<'static>, count: Option<&'a mut u64>) -> Self {
        // SAFETY: the number is aligned, lives in mapped memory as long as it is borrowed, and is
        // accessed atomically by everybody.
        let count = count.map(|count| unsafe { AtomicU64::from_ptr(count) });
        Self { map, count }
    }

    /// How many there are, or were a moment ago.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.map_or(0, |count| count.load(Ordering::SeqCst))
    }

    /// All of them, each with the number that it was added with last.
    #[must_use]
    pub fn all(&self) -> Vec<(SockId, u64)> {
        let seq = |key: &[u8]| self.map.lookup(key, MapFlags::ANY).ok().flatten();
        let keys = self.map.keys();
        // One that is gone by now was taken out by nobody but us.
        keys.filter_map(|key| Some((SockId(number(&key)), number(&seq(&key)?))))
            .collect()
    }

    /// Has the hooks say whatever happens to a socket from now on; `seq` is the number of the
    /// last event. Says whether they did not so far.
    ///
    /// # Errors
    ///
    /// The map is full.
    pub fn add(&self, sock: SockId, seq: u64) -> Result<bool, MapError> {
        // Counted first, since nobody looks while the number is 0.
        self.change_count(1);
        let (key, value) = (sock.0.to_ne_bytes(), seq.to_ne_bytes());
        let added = self.map.update(&key, &value, MapFlags::NO_EXIST);
        if added.is_err() {
            self.change_count(-1);
        }
        match added {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(source) => Err(MapError {
                map: "adopted",
                source,
            }),
        }
    }

    /// Takes a socket out, and says what number it was added with last; `None` if it was not
    /// there.
    #[must_use]
    pub fn remove(&self, sock: SockId) -> Option<u64> {
        let key = sock.0.to_ne_bytes();
        let value = self.map.lookup_and_delete(&key).ok().flatten()?;
        self.change_count(-1);
        Some(number(&value))
    }

    fn change_count(&self, change: i64) {
        if let Some(count) = self.count {
            count.fetch_add(change.cast_unsigned(), Ordering::SeqCst);
        }
    }
}
