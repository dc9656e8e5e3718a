//! One instance of the iterators in the kernel: its programs, its variables, its ring.
//!
//! Variables and ring are an instance's own, and hold the state of the pass that runs: an instance
//! has one user at a time.

use super::lent::Lent;
use super::pass::{self, Target};
use super::programs::Programs;
use super::skeleton::iter::types::bss;
use super::skeleton::iter::{IterSkel, IterSkelBuilder};
use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapCore, ProgramInput};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

/// Why the iterators could not be loaded.
#[derive(Debug, thiserror::Error)]
#[error(
    "Loading the BPF iterators failed at {step}; they need Linux 6.1 or newer with BTF, and CAP_BPF with CAP_PERFMON or root"
)]
pub struct LoadError {
    step: &'static str,
    source: libbpf_rs::Error,
}

impl LoadError {
    pub(super) fn at<E: Into<libbpf_rs::Error>>(step: &'static str) -> impl Fn(E) -> Self {
        move |source| Self {
            step,
            source: source.into(),
        }
    }
}

/// The programs that a pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    Tasks,
    Files,
    Vmas,
    Orphans,
}

impl Pass {
    pub(super) const ALL: [Self; 4] = [Self::Tasks, Self::Files, Self::Vmas, Self::Orphans];

    /// Its name in the BPF object, and the kernel's.
    pub(super) fn program(self) -> &'static str {
        match self {
            Self::Tasks => "iter_tasks",
            Self::Files => "iter_files",
            Self::Vmas => "iter_vmas",
            Self::Orphans => "iter_orphans",
        }
    }
}

/// An instance, whoever loaded it.
pub(super) enum Instance {
    Own(Box<IterSkel<'static>>),
    Lent(Lent),
}

impl Instance {
    /// Loads the programs into the kernel, and has it attach each once.
    pub(super) fn load() -> Result<Self, LoadError> {
        super::redirect_libbpf_log();
        // The skeleton borrows this storage. A few words stay behind per load, of which there are
        // one or two in the life of a process; what it points at is freed with the skeleton.
        let storage = Box::leak(Box::new(MaybeUninit::uninit()));
        let open = IterSkelBuilder::default()
            .open(storage)
            .map_err(LoadError::at("open"))?;
        let mut skel = open.load().map_err(LoadError::at("load"))?;
        let found = skel.progs.find_symbols.test_run(ProgramInput::default());
        found.map_err(LoadError::at("looking for symbols"))?;
        let cpus = libbpf_rs::num_possible_cpus().map_err(LoadError::at("counting the CPUs"))?;
        if let Some(vars) = skel.maps.bss_data.as_deref_mut() {
            vars.possible_cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
        }
        let this = Self::Own(Box::new(skel));
        // a kernel may accept a program and refuse to attach it: better learnt now
        for pass in Pass::ALL {
            let target = match pass {
                Pass::Orphans => Target::System,
                _ => Target::Process(std::process::id()),
            };
            pass::link(this.program(pass), target).map_err(LoadError::at("attach"))?;
        }
        Ok(this)
    }

    pub(super) fn program(&self, pass: Pass) -> BorrowedFd<'_> {
        match self {
            Self::Own(skel) => match pass {
                Pass::Tasks => skel.progs.iter_tasks.as_fd(),
                Pass::Files => skel.progs.iter_files.as_fd(),
                Pass::Vmas => skel.progs.iter_vmas.as_fd(),
                Pass::Orphans => skel.progs.iter_orphans.as_fd(),
            },
            Self::Lent(lent) => lent.program(pass),
        }
    }

    /// Every loaded program; of what is lent, those that a pass runs.
    pub(super) fn programs(&self) -> io::Result<Programs> {
        match self {
            Self::Own(skel) => Programs::of(skel.object()),
            Self::Lent(_) => {
                Programs::named(Pass::ALL.map(|pass| (pass.program(), self.program(pass))))
            }
        }
    }

    /// The variables of the programs.
    pub(super) fn vars(&mut self) -> Option<&mut bss> {
        match self {
            Self::Own(skel) => skel.maps.bss_data.as_deref_mut(),
            Self::Lent(lent) => Some(lent.vars()),
        }
    }

    /// The ring of records that do not fit the pass's own file.
    pub(super) fn side(&self) -> &dyn MapCore {
        match self {
            Self::Own(skel) => &skel.maps.side,
            Self::Lent(lent) => lent.side(),
        }
    }

    /// The map that the variables lie in.
    pub(super) fn vars_map(&self) -> &dyn MapCore {
        match self {
            Self::Own(skel) => &skel.maps.bss,
            Self::Lent(lent) => lent.vars_map(),
        }
    }
}
