//! What of threads changes seldom, for `apply`.

use super::apply::Step;
use super::event::TaskAttrs;
use super::ids::{FsId, TaskId};

impl Step<'_> {
    /// Takes over what is said of a thread, unless later news of it came first.
    pub(super) fn task_attrs(&mut self, attrs: &TaskAttrs) {
        if self.task(attrs.task).is_some() {
            self.set_attrs(attrs);
        }
    }

    /// Takes it over.
    pub(super) fn set_attrs(&mut self, attrs: &TaskAttrs) {
        let id = attrs.task;
        let Some(task) = self.state.tasks.get_mut(&id) else {
            return;
        };
        let session = (attrs.ids.session, attrs.ids.group);
        task.ids = Some(Box::new(attrs.ids));
        let tgid = task.tgid;
        let new = attrs.fs.map(|(fs, _)| fs);
        let old = std::mem::replace(&mut task.fs, new);
        // All threads of a process are in its session and group.
        let threads: Vec<TaskId> = self.state.threads(tgid).collect();
        for id in threads {
            if let Some(ids) = self
                .state
                .tasks
                .get_mut(&id)
                .and_then(|task| task.ids.as_mut())
            {
                (ids.session, ids.group) = session;
            }
        }
        if old != new {
            self.leave_fs(id, old);
        }
        if let Some((fs, info)) = attrs.fs {
            let seq = self.seq;
            let fs = self.state.fss.entry(fs).or_default();
            fs.users.insert(id);
            if fs.seq <= seq {
                fs.seq = seq;
                fs.info = info;
            }
        }
    }

    pub(super) fn leave_fs(&mut self, task: TaskId, fs: Option<FsId>) {
        let Some(id) = fs else { return };
        if let Some(fs) = self.state.fss.get_mut(&id)
            && fs.users.remove(&task)
            && fs.users.is_empty()
        {
            self.state.fss.remove(&id);
        }
    }
}
