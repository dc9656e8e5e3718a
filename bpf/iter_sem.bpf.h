/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* System V semaphore operations that the kernel undoes when a process ends (SEM_UNDO). */

#define MAX_SEM_UNDOS (1 << 12)

struct sem_undo_rec out_sem_undo;

struct {
	u64 node;
	u64 end;
} undo_walk;

static __always_inline struct sem_undo_list *undo_list(struct task_struct *task)
{
	if (!bpf_core_field_exists(task->sysvsem))
		return NULL;
	return BPF_CORE_READ(task, sysvsem.undo_list);
}

/* Whether a thread has some that its leader has not. A list that is its own next is empty. */
static __always_inline bool has_own_undo(struct task_struct *task)
{
	struct sem_undo_list *list = undo_list(task);
	struct task_struct *leader = BPF_CORE_READ(task, group_leader);
	u64 head;

	if (!list || (leader && undo_list(leader) == list))
		return false;
	head = (u64)list + bpf_core_field_offset(struct sem_undo_list, list_proc);
	return (u64)BPF_CORE_READ(list, list_proc.next) != head;
}

static long undo_step(u64 index, void *unused)
{
	struct sem_undo_rec *r = &out_sem_undo;
	struct list_head *node = (void *)undo_walk.node;
	struct sem_undo *undo;
	u64 adjust;

	if (!node || undo_walk.node == undo_walk.end)
		return 1;
	undo = (void *)node - bpf_core_field_offset(struct sem_undo, list_proc);
	/* behind the structure, in either case */
	if (bpf_core_field_exists(struct sem_undo___array, semadj))
		adjust = (u64)undo + bpf_core_field_offset(struct sem_undo___array, semadj);
	else
		adjust = (u64)BPF_CORE_READ(undo, semadj);
	r->semid = BPF_CORE_READ(undo, semid);
	/* how many semaphores the set has user space knows; whatever is behind them does not count
	 */
	r->failed = bpf_probe_read_kernel(r->adjust, sizeof(r->adjust), (void *)adjust) != 0;
	undo_walk.node = (u64)BPF_CORE_READ(node, next);
	return !side_write(r, sizeof(*r));
}

static __always_inline void emit_undos(struct task_struct *task)
{
	struct sem_undo_list *list = undo_list(task);

	if (!list)
		return;
	undo_walk.end = (u64)list + bpf_core_field_offset(struct sem_undo_list, list_proc);
	undo_walk.node = (u64)BPF_CORE_READ(list, list_proc.next);
	out_sem_undo.hdr.kind = REC_SEM_UNDO;
	out_sem_undo.hdr.size = sizeof(out_sem_undo);
	out_sem_undo.list = (u64)list;
	out_sem_undo.tgid = task->tgid;
	out_sem_undo.pad = 0;
	bpf_loop(MAX_SEM_UNDOS, undo_step, NULL, 0);
}
