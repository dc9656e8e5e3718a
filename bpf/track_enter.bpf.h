/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* How a thread comes to be tracked: born of one that is, born into a tracked cgroup, or
 * moved there. One whose table was not followed so far is introduced with all of it,
 * where nobody else can change the table meanwhile; else user space has to read it. */

#define MAX_INTRODUCED 4096

struct introduction {
	struct files_struct *files;
	struct fdtable *fdt;
};

static long introduce_fd(u64 index, void *ctx)
{
	struct introduction *to = ctx;
	struct files_struct *files = to->files;
	struct fdtable *fdt = to->fdt;
	struct fown_struct *owner;
	struct file *file = NULL;

	bpf_probe_read_kernel(&file, sizeof(file), BPF_CORE_READ(fdt, fd) + index);
	if (!file)
		return 0;
	send_install(false, files, index, file, -1, false);
	owner = file_owner(false, file);
	if (owner && (BPF_CORE_READ(owner, pid) || BPF_CORE_READ(owner, signum)))
		send_ofd(file);
	return 0;
}

static __always_inline void introduce(struct task_struct *task)
{
	struct files_struct *files = BPF_CORE_READ(task, files);
	struct fdtable *fdt = BPF_CORE_READ(files, fdt);
	u32 fds = BPF_CORE_READ(fdt, max_fds);
	struct introduction to;

	if (files && fds <= MAX_INTRODUCED) {
		to.files = files;
		to.fdt = fdt;
		send_fd(EVENT_FILES_NEW, files, 0);
		bpf_loop(fds, introduce_fd, &to, 0);
	}
	send_new_task(task, EVENT_TASK_NEW);
}

/* In copy_process, after the child joined its cgroup and before it runs; unlike
 * sched_process_fork it sees io_uring workers too. */
SEC("tp_btf/task_newtask")
int BPF_PROG(task_newtask, struct task_struct *task, unsigned long flags)
{
	if (task->flags & PF_KTHREAD || !task_tracked(task))
		return 0;
	if (!(flags & CLONE_FILES) && !current_tracked())
		introduce(task);
	else
		send_new_task(task, EVENT_TASK_NEW);
	return 0;
}

/* A new cgroup, before it can be seen. */
SEC("tp_btf/cgroup_mkdir")
int BPF_PROG(cgroup_mkdir, struct cgroup *cgrp)
{
	judge(cgrp);
	return 0;
}

/* After the move. A thread that moved itself and is alone cannot be changed by others. */
SEC("tp_btf/cgroup_attach_task")
int BPF_PROG(cgroup_attach, struct cgroup *cgrp, const char *path, struct task_struct *task)
{
	bool tracked = cgroup_tracked(cgrp);
	struct move_event *e;

	if (tracked && task == bpf_get_current_task_btf() &&
	    BPF_CORE_READ(task, signal, nr_threads) == 1)
		introduce(task);
	e = EVENT(struct move_event, EVENT_CGROUP_MOVE, task, CLASS_TASK);
	if (!e)
		return 0;
	e->cgroup = BPF_CORE_READ(cgrp, kn, id);
	e->tgid = BPF_CORE_READ(task, tgid);
	e->tracked = tracked;
	submit(e);
	return 0;
}
