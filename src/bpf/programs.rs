//! What the kernel says of programs it has loaded: their size, and how often they ran or did not.

use libbpf_rs::{MapCore, MapFlags, MapHandle, Object, libbpf_sys};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

/// One loaded program.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProgramStats {
    /// Its name in the BPF object; the kernel keeps 15 bytes of it.
    pub name: String,
    /// Instructions the verifier walked through, on all paths; a program may take a million.
    pub verified_insns: u32,
    /// Bytes after verification and rewriting.
    pub xlated_bytes: u32,
    /// Bytes of machine code; 0 where the JIT is off.
    pub jited_bytes: u32,
    /// Runs; counted only while `kernel.bpf_stats_enabled` is set.
    pub run_cnt: u64,
    /// Nanoseconds of those runs.
    pub run_time_ns: u64,
    /// Runs that were left out because the program ran on this CPU already, and that no
    /// stand-in made: an event that was not seen, and counted nowhere else.
    pub recursion_misses: u64,
    /// Runs that its stand-in made instead.
    pub stood_in: u64,
}

/// What the name of a program ends with that has the turns of another one that runs on the CPU
/// already. It does nothing else, so its own turns that are left out are none.
const STAND_IN: &str = "_stand_in";

/// The loaded programs of a BPF object. They stay loaded, but not attached, as long as a clone
/// of this lives.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    loaded: Arc<[Loaded]>,
    /// Counts the turns of the object's one stand-in, if it has one.
    stood_in: Option<Arc<MapHandle>>,
}

#[derive(Debug)]
struct Loaded {
    name: String,
    fd: OwnedFd,
}

impl Programs {
    /// Those of an object that were loaded.
    ///
    /// # Errors
    ///
    /// This process has no descriptors left.
    pub(super) fn of(object: &Object) -> io::Result<Self> {
        let loaded = object.progs().filter_map(|program| {
            let fd = program.as_fd();
            // libbpf answers -ENOENT for one that was not to be loaded.
            (fd.as_raw_fd() >= 0).then(|| {
                Ok(Loaded {
                    name: program.name().to_string_lossy().into_owned(),
                    fd: fd.try_clone_to_owned()?,
                })
            })
        });
        let mut maps = object.maps().filter(|map| map.name() == "stood_in");
        let stood_in = maps.next().map(|map| MapHandle::try_from(&map));
        Ok(Self {
            loaded: loaded.collect::<io::Result<_>>()?,
            stood_in: stood_in
                .transpose()
                .map_err(io::Error::other)?
                .map(Arc::new),
        })
    }

    /// These, by their names in their BPF object, which has no stand-in.
    ///
    /// # Errors
    ///
    /// This process has no descriptors left.
    pub(super) fn named<'a>(
        programs: impl IntoIterator<Item = (&'static str, BorrowedFd<'a>)>,
    ) -> io::Result<Self> {
        let loaded = programs.into_iter().map(|(name, fd)| {
            Ok(Loaded {
                name: name.to_owned(),
                fd: fd.try_clone_to_owned()?,
            })
        });
        Ok(Self {
            loaded: loaded.collect::<io::Result<_>>()?,
            stood_in: None,
        })
    }

    /// What the kernel says of each.
    ///
    /// # Errors
    ///
    /// `BPF_OBJ_GET_INFO_BY_FD` failed.
    pub fn stats(&self) -> io::Result<Vec<ProgramStats>> {
        let stats = self.loaded.iter().map(Loaded::stats);
        let mut stats = stats.collect::<io::Result<Vec<_>>>()?;
        // Read last: a turn is counted as left out before it is as made.
        let stood_in = self.turns()?;
        let mut names = self.loaded.iter().map(|one| one.name.as_str());
        let replaced = names.find_map(|name| name.strip_suffix(STAND_IN));
        for one in &mut stats {
            if Some(one.name.as_str()) == replaced {
                one.stood_in = stood_in;
                one.recursion_misses = one.recursion_misses.saturating_sub(stood_in);
            } else if one.name.ends_with(STAND_IN) {
                one.recursion_misses = 0;
            }
        }
        Ok(stats)
    }

    fn turns(&self) -> io::Result<u64> {
        let Some(map) = &self.stood_in else {
            return Ok(0);
        };
        let counts = map.lookup_percpu(&0_u32.to_ne_bytes(), MapFlags::ANY);
        let counts = counts.map_err(io::Error::other)?.unwrap_or_default();
        let words = counts
            .iter()
            .filter_map(|bytes| bytes.as_slice().try_into().ok());
        Ok(words.map(u64::from_ne_bytes).sum())
    }

    /// Programs of which runs were left out and made by nobody, with how many.
    ///
    /// # Errors
    ///
    /// As [`Self::stats`].
    pub fn missed(&self) -> io::Result<BTreeMap<String, u64>> {
        let stats = self.stats()?.into_iter();
        let counts = stats.map(|one| (one.name, one.recursion_misses));
        Ok(counts.filter(|(_, missed)| *missed > 0).collect())
    }
}

impl Loaded {
    fn stats(&self) -> io::Result<ProgramStats> {
        let info = info(self.fd.as_fd())?;
        Ok(ProgramStats {
            name: self.name.clone(),
            verified_insns: info.verified_insns,
            xlated_bytes: info.xlated_prog_len,
            jited_bytes: info.jited_prog_len,
            run_cnt: info.run_cnt,
            run_time_ns: info.run_time_ns,
            recursion_misses: info.recursion_misses,
            stood_in: 0,
        })
    }
}

/// As `libbpf_rs::query::ProgramInfo`, which is to be had only for all programs of the machine
/// and copies their code to tell its length.
pub(super) fn info(fd: BorrowedFd<'_>) -> io::Result<libbpf_sys::bpf_prog_info> {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut len = u32::try_from(size_of_val(&info)).unwrap_or(u32::MAX);
    // SAFETY: the structure outlives the call and its size is told; all of its pointers and the
    // lengths beside them are zero, so the kernel writes nowhere else.
    let result =
        unsafe { libbpf_sys::bpf_prog_get_info_by_fd(fd.as_raw_fd(), &raw mut info, &raw mut len) };
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(info)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_descriptor_that_is_no_program_is_an_error() {
        let loaded = Loaded {
            name: "null".to_owned(),
            fd: std::fs::File::open("/dev/null").unwrap().into(),
        };
        assert!(loaded.stats().is_err());
        let programs = Programs {
            loaded: Arc::new([loaded]),
            stood_in: None,
        };
        assert!(programs.stats().is_err());
    }
}
