//! Mappings.

use super::Audit;
use super::kernel::maps;
use crate::model::event::Vma;
use crate::model::ids::{MmId, Pid, Tid};
use std::collections::{BTreeMap, BTreeSet};

impl Audit<'_> {
    /// Compares one address space, which this thread uses.
    pub(super) fn mappings(&mut self, pid: Pid, tid: Tid, id: MmId) {
        let Some(mm) = self.state.mms.get(&id) else {
            return;
        };
        let kernel = match maps::read(pid, tid) {
            Ok(kernel) => kernel,
            Err(error) => return self.unread(pid, "mappings", &error),
        };
        if kernel.is_empty() {
            return; // it gave its address space up just now
        }
        self.compared.address_spaces += 1;
        let Some(vmas) = &mm.vmas else {
            return self.differ(pid, "mappings", "", format!("{}", kernel.len()));
        };
        let by_start = |vmas: &[Vma]| -> BTreeMap<u64, Vma> {
            vmas.iter()
                .map(|vma| (vma.start, maps::shown(*vma)))
                .collect()
        };
        let (model, kernel) = (by_start(vmas), by_start(&kernel));
        let starts: BTreeSet<u64> = model.keys().chain(kernel.keys()).copied().collect();
        for start in starts {
            self.compared.mappings += 1;
            let (known, found) = (model.get(&start), kernel.get(&start));
            if known != found {
                let text = |vma: Option<&Vma>| vma.map(describe).unwrap_or_default();
                self.differ(pid, format!("mapping {start:x}"), text(known), text(found));
            }
        }
    }
}

fn describe(vma: &Vma) -> String {
    let flags = maps::names(vma.flags).join(" ");
    let mut text = format!("to {:x} {flags}", vma.end);
    if vma.inode.ino != 0 {
        text += &format!(" page {:x} of {}", vma.pgoff, vma.inode);
    }
    text
}
