//! An instance of the iterators that one process has loaded and another one uses.
//!
//! Loading keeps the verifier busy for more than a second on a slow machine, and a checkpoint waits
//! for it. A process that runs all the time loads a [`Spare`] beforehand and tells its [`Loan`] to
//! who asks, one borrower at a time. The borrower opens the objects by their ids, and from then on
//! has them to itself: the kernel keeps them while it does, whatever becomes of the lender.

use super::instance::{Instance, LoadError, Pass};
use super::programs;
use super::skeleton::iter::types::bss;
use libbpf_rs::{MapCore, MapHandle, Program, libbpf_sys};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;

/// Says which BPF object this program was built with.
const FINGERPRINT: &str = env!("TRACKER_ITERATORS");

const PAGE: usize = 4096;

/// Where to find a loaded instance: ids of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loan {
    /// Of the BPF object, with the layout of its variables: another build's is of no use.
    fingerprint: String,
    /// Of the programs over tasks, descriptors and mappings.
    programs: [u32; Pass::ALL.len()],
    /// Of the map with the variables.
    vars: u32,
    /// Of the ring.
    side: u32,
}

impl Loan {
    /// Of an instance that was loaded by this build: ids of its programs over tasks, descriptors
    /// and mappings, of the map with its variables and of its ring.
    pub(crate) fn ours(programs: [u32; Pass::ALL.len()], vars: u32, side: u32) -> Self {
        Self {
            fingerprint: FINGERPRINT.to_owned(),
            programs,
            vars,
            side,
        }
    }
}

/// A loan cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoanError {
    /// The lender was built with another BPF object.
    #[error("The lender's iterators are of another build ({theirs}, not {FINGERPRINT})")]
    Build {
        /// Its fingerprint.
        theirs: String,
    },
    /// There is no such object, or it may not be opened.
    #[error("Opening the lent {what} of id {id} failed")]
    Open {
        /// Program or map.
        what: &'static str,
        /// Its id.
        id: u32,
        /// From the kernel.
        source: libbpf_rs::Error,
    },
    /// The id is of something else.
    #[error("The lent id {id} is not of {what}, but of {found:?}")]
    Other {
        /// What it should be.
        what: &'static str,
        /// The id.
        id: u32,
        /// The name it has.
        found: String,
    },
    /// The variables cannot be mapped.
    #[error("Mapping the variables of the lent iterators failed")]
    Map(#[source] io::Error),
    /// The ring cannot be mapped.
    #[error("Mapping the ring of the lent iterators failed")]
    Ring(#[source] libbpf_rs::Error),
}

/// A loaded instance that nobody uses. It stays loaded as long as this lives, or a borrower
/// has it open.
#[derive(Debug)]
pub struct Spare {
    loan: Loan,
    /// Programs and maps; what libbpf knows of them takes megabytes and is not needed any more.
    _kept: Vec<OwnedFd>,
}

impl Spare {
    /// Loads an instance.
    ///
    /// # Errors
    ///
    /// As [`Iterators::load`](super::iter::Iterators::load).
    pub fn load() -> Result<Self, LoadError> {
        let instance = Instance::load()?;
        let (vars, side) = (instance.vars_map(), instance.side());
        let passes = Pass::ALL.map(|pass| instance.program(pass));
        let ids = || -> libbpf_rs::Result<Loan> {
            let mut programs = [0; Pass::ALL.len()];
            for (id, program) in programs.iter_mut().zip(passes) {
                *id = programs::info(program)?.id;
            }
            let (vars, side) = (vars.info()?.info.id, side.info()?.info.id);
            Ok(Loan::ours(programs, vars, side))
        };
        let loan = ids().map_err(LoadError::at("asking for ids"))?;
        let all = passes.into_iter().chain([vars.as_fd(), side.as_fd()]);
        let kept: io::Result<_> = all.map(|fd| fd.try_clone_to_owned()).collect();
        Ok(Self {
            loan,
            _kept: kept.map_err(LoadError::at("keeping descriptors"))?,
        })
    }

    /// What a borrower has to know.
    #[must_use]
    pub fn loan(&self) -> &Loan {
        &self.loan
    }

    /// A spare that is not loaded, to be told of and not to be used.
    #[cfg(test)]
    pub(crate) fn of(loan: Loan) -> Self {
        let _kept = Vec::new();
        Self { loan, _kept }
    }
}

/// The right to use an instance alone, until the lender sees the connection end.
#[derive(Debug)]
struct Lease(UnixStream);

impl Drop for Lease {
    fn drop(&mut self) {
        // A forked process may have a copy of the descriptor. Should this fail, it is gone.
        let _ = self.0.shutdown(Shutdown::Both);
    }
}

/// Somebody else's instance, in use here.
#[derive(Debug)]
pub(super) struct Lent {
    programs: [OwnedFd; Pass::ALL.len()],
    vars: Vars,
    vars_map: MapHandle,
    side: MapHandle,
    // last: it is given back when nothing here uses it any more
    _lease: Lease,
}

impl Lent {
    /// Opens what was lent over a connection, which is held as long as this lives.
    pub(super) fn open(loan: &Loan, lease: UnixStream) -> Result<Self, LoanError> {
        let lease = Lease(lease);
        super::redirect_libbpf_log();
        if loan.fingerprint != FINGERPRINT {
            return Err(LoanError::Build {
                theirs: loan.fingerprint.clone(),
            });
        }
        let [tasks, files, vmas, orphans] = loan.programs;
        let vars_map = open_map("variables", loan.vars)?;
        let mut vars = Vars::map(&vars_map).map_err(LoanError::Map)?;
        vars.reset();
        Ok(Self {
            programs: [
                open_program(Pass::Tasks, tasks)?,
                open_program(Pass::Files, files)?,
                open_program(Pass::Vmas, vmas)?,
                open_program(Pass::Orphans, orphans)?,
            ],
            vars,
            vars_map,
            side: open_map("ring", loan.side)?,
            _lease: lease,
        })
    }

    pub(super) fn program(&self, pass: Pass) -> BorrowedFd<'_> {
        let [tasks, files, vmas, orphans] = &self.programs;
        match pass {
            Pass::Tasks => tasks.as_fd(),
            Pass::Files => files.as_fd(),
            Pass::Vmas => vmas.as_fd(),
            Pass::Orphans => orphans.as_fd(),
        }
    }

    pub(super) fn vars(&mut self) -> &mut bss {
        self.vars.get()
    }

    pub(super) fn vars_map(&self) -> &MapHandle {
        &self.vars_map
    }

    pub(super) fn side(&self) -> &MapHandle {
        &self.side
    }
}

/// `BPF_PROG_GET_FD_BY_ID`.
fn open_program(pass: Pass, id: u32) -> Result<OwnedFd, LoanError> {
    let what = pass.program();
    let failed = |source| LoanError::Open { what, id, source };
    let program = Program::fd_from_id(id).map_err(failed)?;
    let info = programs::info(program.as_fd()).map_err(|source| failed(source.into()))?;
    let found = super::record::c_text(&info.name);
    match found == what {
        true => Ok(program),
        false => Err(LoanError::Other { what, id, found }),
    }
}

/// `BPF_MAP_GET_FD_BY_ID`.
fn open_map(what: &'static str, id: u32) -> Result<MapHandle, LoanError> {
    MapHandle::from_map_id(id).map_err(|source| LoanError::Open { what, id, source })
}

/// The variables of an instance, mapped here.
#[derive(Debug)]
struct Vars {
    at: NonNull<bss>,
    len: usize,
}

// SAFETY: the mapping belongs to the process; only this value has its address.
unsafe impl Send for Vars {}

impl Vars {
    fn map(map: &MapHandle) -> io::Result<Self> {
        let info = map.info().map_err(io::Error::other)?.info;
        let len = size_of::<bss>().next_multiple_of(PAGE);
        let array = info.type_ == libbpf_sys::BPF_MAP_TYPE_ARRAY && info.max_entries == 1;
        if !array || (info.value_size as usize).next_multiple_of(PAGE) != len {
            let what = format!("a map of type {} and {} bytes", info.type_, info.value_size);
            return Err(io::Error::new(io::ErrorKind::InvalidData, what));
        }
        // SAFETY: a new mapping, which replaces none.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_fd().as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let at = NonNull::new(at.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { at, len })
    }

    fn get(&mut self) -> &mut bss {
        // SAFETY: the mapping is aligned to pages, holds a whole bss and lives as long as this. It
        // consists of integers, which any bytes are. The kernel writes it only while a pass runs,
        // which this thread waits for without a reference.
        unsafe { self.at.as_mut() }
    }

    /// Has the variables be what they are after a load. The borrower before may have died in a
    /// pass; what it has left in the ring is thrown away before every pass anyway.
    fn reset(&mut self) {
        let vars = self.get();
        // SAFETY: integers, and arrays and structures of them.
        let mut fresh: bss = unsafe { std::mem::zeroed() };
        // What loading has found, and what no two passes may share: the map `seen` remembers it.
        fresh.restarts = vars.restarts;
        fresh.symbols = vars.symbols;
        fresh.possible_cpus = vars.possible_cpus;
        fresh.generation = vars.generation;
        *vars = fresh;
    }
}

impl Drop for Vars {
    fn drop(&mut self) {
        // SAFETY: made by mmap with this length; references to it have ended with the borrow.
        unsafe { libc::munmap(self.at.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_builds_iterators_are_not_used() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let loan = Loan {
            fingerprint: "0123456789abcdef".to_owned(),
            ..Loan::default()
        };
        let refused = Lent::open(&loan, ours).unwrap_err();
        assert!(matches!(refused, LoanError::Build { .. }), "{refused}");
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // No object has id 0.
        let loan = Loan::ours([0; 4], 0, 0);
        let refused = Lent::open(&loan, ours).unwrap_err();
        assert!(
            matches!(refused, LoanError::Open { id: 0, .. }),
            "{refused}"
        );
        // The lender learns of it at once.
        assert_eq!(io::Read::read(&mut theirs, &mut [0]).unwrap(), 0);
    }
}
