//! Threads: names, credentials, sessions, directories.

use super::Audit;
use super::kernel::{self, Place};
use crate::model::event::Ids;
use crate::model::ids::{InodeId, Pid, TaskId};
use crate::model::state::Task;
use std::collections::{BTreeMap, BTreeSet};

impl Audit<'_> {
    pub(super) fn process(&mut self, pid: Pid, tasks: &[(TaskId, &Task)]) {
        let kernel = match kernel::threads(pid) {
            Ok(threads) => threads,
            Err(error) => return self.unread(pid, "threads", &error),
        };
        // Those of its own mount namespace, as far as it sees them.
        self.mounts.extend(kernel::mounts(&pid.to_string()));
        let model: BTreeMap<_, _> = tasks.iter().map(|(_, task)| (task.tid, *task)).collect();
        let tids: BTreeSet<_> = kernel.keys().chain(model.keys()).copied().collect();
        for tid in tids {
            self.compared.threads += 1;
            let name = model.get(&tid).map_or("", |task| task.comm.as_str());
            let comm = kernel.get(&tid).map_or("", String::as_str);
            self.differ(pid, format!("thread {tid}"), name, comm);
            if let (Some(task), true) = (model.get(&tid), kernel.contains_key(&tid)) {
                self.attrs(pid, task);
            }
        }
        let leader = tasks.iter().find(|(_, task)| task.tid.0 == pid.0);
        let leader = leader.and_then(|(_, task)| task.files);
        let mut seen = BTreeSet::new();
        for (_, task) in tasks {
            if let Some(files) = task.files.filter(|files| seen.insert(*files)) {
                self.reachable = leader == Some(files);
                self.table(pid, task.tid, files);
            }
            if let Some(mm) = task.mm.filter(|mm| self.mms.insert(*mm)) {
                self.mappings(pid, task.tid, mm);
            }
        }
    }

    fn attrs(&mut self, pid: Pid, task: &Task) {
        let tid = task.tid;
        let truth = match kernel::attrs(pid, tid) {
            Ok(truth) => truth,
            Err(error) => return self.unread(pid, format!("status of thread {tid}"), &error),
        };
        if let Some(parent) = task.parent {
            let object = format!("parent of thread {tid}");
            self.differ(pid, object, parent.to_string(), truth.parent.to_string());
        }
        self.compared.credentials += 1;
        let model = task.ids.as_deref().map(credentials).unwrap_or_default();
        let object = format!("credentials of thread {tid}");
        self.differ(pid, object, model, credentials(&truth.ids));
        if task.zombie {
            return;
        }
        let (cwd, root) = match (
            kernel::place(pid, tid, "cwd"),
            kernel::place(pid, tid, "root"),
        ) {
            (Ok(cwd), Ok(root)) => (cwd, root),
            (Err(error), _) | (_, Err(error)) => {
                return self.unread(pid, format!("directories of thread {tid}"), &error);
            }
        };
        self.compared.directories += 1;
        let known = task.fs.and_then(|id| self.state.fss.get(&id));
        let model = known.map(|fs| {
            let (cwd, root) = (self.known(fs.info.cwd, cwd), self.known(fs.info.root, root));
            format!("cwd {cwd} root {root} umask {:o}", fs.info.umask)
        });
        let umask = truth.umask.unwrap_or_default();
        let (cwd, root) = (self.found(cwd), self.found(root));
        let kernel = format!("cwd {cwd} root {root} umask {umask:o}");
        let object = format!("directories of thread {tid}");
        self.differ(pid, object, model.unwrap_or_default(), kernel);
    }

    /// An inode as the kernel shows it, with its device if the mount can be seen.
    pub(super) fn found(&self, place: Place) -> String {
        match self.mounts.get(&place.mount) {
            Some(dev) => InodeId {
                dev: *dev,
                ino: place.ino,
            }
            .to_string(),
            None => place.ino.to_string(),
        }
    }

    /// An inode of the model in the words of `found`.
    pub(super) fn known(&self, inode: InodeId, place: Place) -> String {
        match self.mounts.get(&place.mount) {
            Some(_) => inode.to_string(),
            None => inode.ino.to_string(),
        }
    }
}

/// Securebits are not shown.
fn credentials(ids: &Ids) -> String {
    let caps = ids.caps.map(|caps| format!("{caps:x}")).join(" ");
    let numbers = |ids: [u32; 4]| ids.map(|id| id.to_string()).join(" ");
    let (uids, gids) = (numbers(ids.uids), numbers(ids.gids));
    let (session, group) = (ids.session, ids.group);
    format!("session {session} group {group} uids {uids} gids {gids} caps {caps}")
}
