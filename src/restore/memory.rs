//! An address space put back: the calls that unmap what the restorer left, map what the
//! application had, and protect it when it is filled.

use super::RestoreError;
use super::aio;
use super::layout::{Layout, VdsoMove};
use super::rings;
use super::sources::Sources;
use super::tape::{Expect, Script, Tape};
use super::vdso;
use crate::model::frozen::{Backing, MemoryPolicy, Mm, PAGE_SIZE, PageRun, Process, Rseq, Vma};
use crate::sys::huge::size_flag;
use nix::libc;
use std::ops::Range;

/// Of include/uapi/linux/mman.h, since 6.11; a type like `MAP_PRIVATE`.
const MAP_DROPPABLE: i32 = 8;

/// Of include/uapi/linux/prctl.h, since 6.4.
const PR_SET_MEMORY_MERGE: u64 = 67;

/// The calls for one process, in three scripts, and bytes written in between from outside.
#[derive(Debug, Default)]
pub struct MemoryPlan {
    /// Unmaps and maps.
    pub build: Script,
    /// (address, bytes) to write when the pages of the image are there.
    pub pokes: Vec<(u64, Vec<u8>)>,
    /// Protects, locks, sets the bounds.
    pub seal: Script,
}

/// One process's address space, about to be replaced.
#[derive(Debug)]
pub struct Rebuild<'a> {
    /// Whose.
    pub process: &'a Process,
    /// Its address space.
    pub mm: &'a Mm,
    /// Addresses agreed on.
    pub layout: &'a Layout,
    /// Its page runs in address order.
    pub pages: &'a [PageRun],
    /// Its descriptors.
    pub sources: &'a Sources,
    /// rseq registration left by the restorer's C library.
    pub stale_rseq: Option<Rseq>,
}

impl Rebuild<'_> {
    /// Builds the scripts; data they point to goes to `tape`.
    ///
    /// # Errors
    /// The vDSOs do not match, or an object is not in the image.
    pub fn plan(&self, tape: &mut Tape) -> Result<MemoryPlan, RestoreError> {
        let mut plan = MemoryPlan::default();
        self.clear(&mut plan.build, tape.addr());
        if self.process.thp_disable {
            // Its memory must not be filled by huge pages either.
            let option = u64::from(libc::PR_SET_THP_DISABLE.cast_unsigned());
            plan.build.zero(libc::SYS_prctl, &[option, 1]);
        }
        if self.mm.merge_any {
            plan.build
                .zero(libc::SYS_prctl, &[PR_SET_MEMORY_MERGE, 1, 0, 0, 0]);
        }
        let vdso_move = self.layout.vdso_move(self.mm);
        self.move_vdso(&mut plan.build, vdso_move);
        for vma in &self.mm.vmas {
            let is_vdso = matches!(vma.backing, Backing::Vdso | Backing::Vvar);
            if !is_vdso || vdso_move == VdsoMove::Forward {
                self.map(&mut plan.build, vma)?;
            }
            if let Some(policy) = &vma.policy {
                bind(&mut plan.build, tape, vma, policy)?;
            }
        }
        if vdso_move == VdsoMove::Forward
            && let Some(old) = &self.mm.vdso
        {
            let target = self.layout.vdso_code_aside();
            let code = vdso::forward(&old.code, &self.layout.vdso_code, target);
            let code = code.map_err(|source| RestoreError::Vdso {
                pid: self.process.pid,
                source,
            })?;
            plan.pokes.push((old.addr, code));
        }
        for vma in &self.mm.vmas {
            if let Backing::AioRing(ring) = &vma.backing
                && ring.max_reqs.is_none()
            {
                let pieces = aio::inherited(ring).into_iter();
                plan.pokes
                    .extend(pieces.map(|(offset, bytes)| (vma.start + offset, bytes)));
            }
        }
        self.allocate_keys(&mut plan.seal);
        self.protect(&mut plan.seal, vdso_move);
        self.register(&mut plan.seal);
        self.bounds(&mut plan.seal, tape)?;
        if self.mm.mdwe != 0 {
            // Nothing becomes executable from here on.
            let option = u64::from(libc::PR_SET_MDWE.cast_unsigned());
            plan.seal
                .zero(libc::SYS_prctl, &[option, self.mm.mdwe.into(), 0, 0, 0]);
        }
        Ok(plan)
    }

    /// Nothing of the restorer may stay: its C library's per-thread registrations first, since
    /// the kernel writes to them when the thread returns to user mode.
    fn clear(&self, script: &mut Script, tape: u64) {
        if let Some(rseq) = self.stale_rseq {
            const UNREGISTER: u64 = 1;
            let args = [rseq.addr, rseq.len.into(), UNREGISTER, rseq.sig.into()];
            script.zero(libc::SYS_rseq, &args);
        }
        script.zero(libc::SYS_set_robust_list, &[0, ROBUST_LIST_HEAD_LEN]);
        script.add(libc::SYS_set_tid_address, &[0], Expect::Ok);
        for hole in self.layout.all_but(tape..tape + Tape::LEN as u64) {
            script.zero(libc::SYS_munmap, &[hole.start, hole.end - hole.start]);
        }
    }

    /// Two moves, since the kernel refuses one onto an overlapping range.
    fn move_vdso(&self, script: &mut Script, vdso_move: VdsoMove) {
        let base = self.layout.vdso.first().map_or(0, |r| r.start);
        let mut remap = |range: &Range<u64>, from: u64, to: u64| {
            let len = range.end - range.start;
            let (old, new) = (range.start - base + from, range.start - base + to);
            let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED).cast_unsigned();
            let args = [old, len, len, flags.into(), new];
            script.add(libc::SYS_mremap, &args, Expect::Is(new.cast_signed()));
        };
        for range in &self.layout.vdso {
            remap(range, base, self.layout.vdso_aside);
        }
        if let VdsoMove::Back(to) = vdso_move {
            for range in &self.layout.vdso {
                remap(range, self.layout.vdso_aside, to);
            }
        }
    }

    fn map(&self, script: &mut Script, vma: &Vma) -> Result<(), RestoreError> {
        if let Backing::SysvShm {
            segment, readonly, ..
        } = vma.backing
        {
            let flags = if readonly { libc::SHM_RDONLY } else { 0 };
            let args = [segment, flags].map(|arg| u64::from(arg.cast_unsigned()));
            let args = [args[0], vma.start, args[1]];
            let expect = Expect::Is(vma.start.cast_signed());
            script.add(libc::SYS_shmat, &args, expect);
            self.advise(script, vma);
            return Ok(());
        }
        let inherited = match &vma.backing {
            Backing::AioRing(ring) if ring.max_reqs.is_some() => {
                rings::hold_place(script, vma);
                return Ok(());
            }
            Backing::IoUring { .. } => {
                rings::hold_place(script, vma);
                return Ok(());
            }
            Backing::AioRing(_) => true,
            _ => false,
        };
        let mut flags = libc::MAP_FIXED_NOREPLACE;
        flags |= if vma.shared && !inherited {
            libc::MAP_SHARED
        } else if vma.droppable {
            MAP_DROPPABLE
        } else {
            libc::MAP_PRIVATE
        };
        if vma.growsdown {
            flags |= libc::MAP_GROWSDOWN;
        }
        if vma.noreserve {
            flags |= libc::MAP_NORESERVE;
        }
        let (fd, offset) = match vma.backing {
            Backing::Anonymous
            | Backing::SysvShm { .. }
            | Backing::AioRing(_)
            | Backing::IoUring { .. }
            | Backing::Vdso
            | Backing::Vvar => {
                flags |= libc::MAP_ANONYMOUS;
                (u64::MAX, 0)
            }
            Backing::AnonymousHuge { page } => {
                flags |= libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size_flag(page).cast_signed();
                (u64::MAX, 0)
            }
            Backing::File { offset, .. } | Backing::Content { offset, .. } => {
                let fd = self.sources.of_vma(vma).ok_or_else(|| self.missing(vma))?;
                (u64::from(fd.cast_unsigned()), offset)
            }
        };
        let len = vma.end - vma.start;
        let prot = self.first_prot(vma).into();
        let flags = u64::from(flags.cast_unsigned());
        let args = [vma.start, len, prot, flags, fd, offset];
        let expect = Expect::Is(vma.start.cast_signed());
        script.add(libc::SYS_mmap, &args, expect);
        self.advise(script, vma);
        Ok(())
    }

    fn advise(&self, script: &mut Script, vma: &Vma) {
        for advice in &vma.advice {
            let advice = u64::from(advice.cast_unsigned());
            let len = vma.end - vma.start;
            script.zero(libc::SYS_madvise, &[vma.start, len, advice]);
        }
    }

    fn missing(&self, vma: &Vma) -> RestoreError {
        RestoreError::Unsupported {
            pid: self.process.pid,
            what: format!("mapping {:x}-{:x}", vma.start, vma.end),
        }
    }

    /// Protection while it is filled.
    fn first_prot(&self, vma: &Vma) -> u32 {
        let write = libc::PROT_WRITE.cast_unsigned();
        match vma.backing {
            // As shmat(2) maps it.
            Backing::SysvShm { readonly, .. } => {
                libc::PROT_READ.cast_unsigned() | if readonly { 0 } else { write }
            }
            Backing::Vdso | Backing::AioRing(_) => write | libc::PROT_READ.cast_unsigned(),
            _ if !vma.shared && has_pages(vma, self.pages) => vma.prot | write,
            _ => vma.prot,
        }
    }

    /// Protection keys: the lowest free one is given out each time. What the thread may do with
    /// them comes with its registers.
    fn allocate_keys(&self, script: &mut Script) {
        let highest = self.mm.pkeys.checked_ilog2().unwrap_or(0);
        for key in 1..=highest {
            script.add(libc::SYS_pkey_alloc, &[0, 0], Expect::Is(key.into()));
        }
        for key in (1..highest).filter(|key| self.mm.pkeys & 1 << key == 0) {
            script.zero(libc::SYS_pkey_free, &[key.into()]);
        }
    }

    fn protect(&self, script: &mut Script, vdso_move: VdsoMove) {
        for vma in &self.mm.vmas {
            let is_vdso = matches!(vma.backing, Backing::Vdso | Backing::Vvar);
            if is_vdso && vdso_move != VdsoMove::Forward {
                continue;
            }
            let len = vma.end - vma.start;
            if vma.pkey != 0 {
                let args = [vma.start, len, vma.prot.into(), vma.pkey.into()];
                script.zero(libc::SYS_pkey_mprotect, &args);
            } else if self.first_prot(vma) != vma.prot {
                script.zero(libc::SYS_mprotect, &[vma.start, len, vma.prot.into()]);
            }
            if vma.locked && vma.on_fault {
                const MLOCK_ONFAULT: u64 = 1;
                script.zero(libc::SYS_mlock2, &[vma.start, len, MLOCK_ONFAULT]);
            } else if vma.locked {
                script.zero(libc::SYS_mlock, &[vma.start, len]);
            }
        }
        const VM_LOCKED: u64 = 0x2000;
        const VM_LOCKONFAULT: u64 = 0x8_0000;
        if self.mm.def_flags & VM_LOCKED != 0 {
            let on_fault = self.mm.def_flags & VM_LOCKONFAULT != 0;
            let flags = libc::MCL_FUTURE | if on_fault { libc::MCL_ONFAULT } else { 0 };
            script.zero(libc::SYS_mlockall, &[flags.cast_unsigned().into()]);
        }
    }

    /// While there is one thread, which the kernel need not tell other CPUs of.
    fn register(&self, script: &mut Script) {
        let bits = (0..u32::BITS).map(|bit| 1 << bit);
        for command in bits.filter(|bit| self.mm.membarrier & bit != 0) {
            script.zero(libc::SYS_membarrier, &[command.into(), 0, 0]);
        }
    }

    /// prctl(2) `PR_SET_MM_MAP`; the program file can be set only now that nothing of the
    /// restorer's is mapped. Then the descriptors are not needed any more.
    fn bounds(&self, script: &mut Script, tape: &mut Tape) -> Result<(), RestoreError> {
        let exe = self.sources.exe().ok_or(RestoreError::NoRoom)?;
        let auxv = tape.data(&self.mm.auxv).ok_or(RestoreError::NoRoom)?;
        let b = &self.mm.bounds;
        let words = [
            b.start_code,
            b.end_code,
            b.start_data,
            b.end_data,
            b.start_brk,
            b.brk,
            b.start_stack,
            b.arg_start,
            b.arg_end,
            b.env_start,
            b.env_end,
            auxv,
        ];
        let mut map: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let auxv_len = u32::try_from(self.mm.auxv.len()).unwrap_or(u32::MAX);
        map.extend(auxv_len.to_le_bytes());
        map.extend(exe.to_le_bytes());
        let addr = tape.data(&map).ok_or(RestoreError::NoRoom)?;
        let option = u64::from(libc::PR_SET_MM.cast_unsigned());
        let sub = u64::from(libc::PR_SET_MM_MAP.cast_unsigned());
        script.zero(libc::SYS_prctl, &[option, sub, addr, map.len() as u64]);
        let (first, last) = self.sources.range();
        for fd in first..=last {
            script.zero(libc::SYS_close, &[u64::from(fd.cast_unsigned())]);
        }
        Ok(())
    }
}

/// mbind(2), before there are pages.
fn bind(
    script: &mut Script,
    tape: &mut Tape,
    vma: &Vma,
    policy: &MemoryPolicy,
) -> Result<(), RestoreError> {
    const SET_MEMPOLICY_HOME_NODE: i64 = 450;
    let len = vma.end - vma.start;
    let (nodes, bits) = nodes(tape, policy)?;
    let args = [vma.start, len, policy.mode.into(), nodes, bits, 0];
    script.zero(libc::SYS_mbind, &args);
    if let Some(home) = policy.home {
        script.zero(SET_MEMPOLICY_HOME_NODE, &[vma.start, len, home.into(), 0]);
    }
    Ok(())
}

/// Where the mask of a policy's nodes is, and how many bits it has, as the calls count them: one
/// more than there are.
pub(super) fn nodes(tape: &mut Tape, policy: &MemoryPolicy) -> Result<(u64, u64), RestoreError> {
    if policy.nodes == 0 {
        return Ok((0, 0));
    }
    let mask = tape.data(&policy.nodes.to_le_bytes());
    let bits = u64::from(u64::BITS) + 1;
    Ok((mask.ok_or(RestoreError::NoRoom)?, bits))
}

/// `sizeof(struct robust_list_head)`, the only length set_robust_list(2) takes.
pub const ROBUST_LIST_HEAD_LEN: u64 = 24;

fn has_pages(vma: &Vma, pages: &[PageRun]) -> bool {
    // Runs are in address order; the first that ends behind the start decides.
    let first = pages.partition_point(|run| run.addr + run.pages * PAGE_SIZE <= vma.start);
    pages.get(first).is_some_and(|run| run.addr < vma.end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64) -> Vma {
        Vma {
            start,
            end,
            prot: 1,
            advice: vec![libc::MADV_DONTFORK],
            ..Vma::default()
        }
    }

    fn run(addr: u64, pages: u64, slot: u64) -> PageRun {
        PageRun { addr, pages, slot }
    }

    #[test]
    fn a_mapping_knows_whether_it_has_pages() {
        let pages = [run(0x1000, 1, 0), run(0x8000, 2, 1)];
        assert!(has_pages(&vma(0x1000, 0x2000), &pages));
        assert!(!has_pages(&vma(0x2000, 0x8000), &pages));
        assert!(has_pages(&vma(0x9000, 0xa000), &pages));
        assert!(!has_pages(&vma(0xa000, 0xb000), &pages));
    }

    #[test]
    fn a_read_only_mapping_is_writable_while_it_is_filled() {
        let process = Process::default();
        let mm = Mm {
            vmas: vec![vma(0x10000, 0x20000)],
            pages: vec![run(0x11000, 2, 7)],
            ..Mm::default()
        };
        let layout = Layout {
            tapes: 0,
            vdso_aside: 0,
            vdso: Vec::new(),
            vdso_code: Vec::new(),
        };
        let app = crate::model::frozen::Application::default();
        let sources = Sources::of(&app, &process);
        let mut tape = Tape::new(0x2400_0000_0000).unwrap();
        let rebuild = Rebuild {
            process: &process,
            mm: &mm,
            pages: &mm.pages,
            layout: &layout,
            sources: &sources,
            stale_rseq: None,
        };
        let plan = rebuild.plan(&mut tape).unwrap();
        let of = |script: &Script, nr| -> Vec<[u64; 6]> {
            let calls = script.calls.iter().filter(|c| c.nr == nr);
            calls.map(|c| c.args).collect()
        };
        assert_eq!(
            of(&plan.build, libc::SYS_mmap)[0][..3],
            [0x10000, 0x10000, 3]
        );
        assert_eq!(of(&plan.build, libc::SYS_madvise)[0][2], 10);
        assert_eq!(
            of(&plan.seal, libc::SYS_mprotect)[0][..3],
            [0x10000, 0x10000, 1]
        );
    }
}
