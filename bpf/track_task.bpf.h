/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Threads: birth, exec, exit, reaping, names, cgroups, and which table they use. */

static __always_inline void send_task(struct task_struct *task, u32 kind, const char *comm)
{
	struct task_event *e;

	e = EVENT(struct task_event, kind, task, CLASS_TASK);
	if (!e)
		return;
	e->task = (u64)task;
	e->files = (u64)task->files;
	e->mm = (u64)task->mm;
	e->cgroup = task->cgroups->dfl_cgrp->kn->id;
	e->tid = task->pid;
	e->tgid = task->tgid;
	e->ppid = task->real_parent->tgid;
	e->pad = 0;
	__builtin_memset(e->comm, 0, sizeof(e->comm));
	bpf_probe_read_kernel_str(e->comm, sizeof(e->comm), comm ? comm : task->comm);
	submit(e);
}

static __always_inline void send_attrs(struct task_struct *task)
{
	struct fs_struct *fs = task->fs;
	const struct cred *cred;
	struct inode *cwd, *root;
	struct task_attr_event *e;

	e = EVENT(struct task_attr_event, EVENT_TASK_ATTRS, task, CLASS_TASK);
	if (!e)
		return;
	cred = task->cred;
	e->task = (u64)task;
	e->fs = (u64)fs;
	/* what is read through nothing is 0 */
	cwd = fs->pwd.dentry->d_inode;
	root = fs->root.dentry->d_inode;
	e->cwd_ino = cwd->i_ino;
	e->cwd_dev = cwd->i_sb->s_dev;
	e->root_ino = root->i_ino;
	e->root_dev = root->i_sb->s_dev;
	e->umask = fs->umask;
	e->sid = pid_nr(BPF_CORE_READ(task, signal, pids[PIDTYPE_SID]));
	e->pgid = pid_nr(BPF_CORE_READ(task, signal, pids[PIDTYPE_PGID]));
	FILL_CRED(e, cred);
	submit(e);
}

static __always_inline void send_new_task(struct task_struct *task, u32 kind)
{
	send_task(task, kind, NULL);
	send_attrs(task);
}

SEC("tp_btf/sched_process_exec")
int BPF_PROG(task_exec, struct task_struct *task)
{
	if (current_tracked())
		send_new_task(task, EVENT_TASK_EXEC);
	return 0;
}

SEC("tp_btf/task_rename")
int BPF_PROG(task_rename, struct task_struct *task, const char *comm)
{
	if (task_tracked(task))
		send_task(task, EVENT_TASK_RENAME, comm);
	return 0;
}

/* In do_exit, before the thread lets go of its descriptors. */
SEC("tp_btf/sched_process_exit")
int BPF_PROG(task_exit, struct task_struct *task)
{
	if (current_tracked())
		send_task(task, EVENT_TASK_EXIT, NULL);
	return 0;
}

/* Reaped. A leader that release_task() reaps along with its last thread is seen only
 * when it is freed, a grace period later. */
SEC("fentry/release_task")
int BPF_PROG(task_release, struct task_struct *task)
{
	if (task_tracked(task))
		send_task(task, EVENT_TASK_RELEASE, NULL);
	return 0;
}

SEC("tp_btf/sched_process_free")
int BPF_PROG(task_free, struct task_struct *task)
{
	if (task_tracked(task))
		send_task(task, EVENT_TASK_RELEASE, NULL);
	return 0;
}

static __always_inline void files_switched(void)
{
	if (current_tracked())
		send_task(bpf_get_current_task_btf(), EVENT_TASK_FILES, NULL);
}

/* exec */
SEC("fexit/unshare_files")
int BPF_PROG(unshare_files)
{
	files_switched();
	return 0;
}

SEC("fexit/ksys_unshare")
int BPF_PROG(ksys_unshare, unsigned long flags)
{
	if (flags & CLONE_FILES)
		files_switched();
	/* a mount namespace of its own comes with directories of its own */
	if (flags & (CLONE_FS | CLONE_NEWNS) && current_tracked())
		send_attrs(bpf_get_current_task_btf());
	return 0;
}
