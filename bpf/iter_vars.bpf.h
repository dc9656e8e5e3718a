/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* State shared by the iterator programs and set by user space before each pass. */

u64 scope_cgroup; /* only tasks under this cgroup; 0 reports all but kernel threads */
u32 scope_pid;    /* only this process; 0 reports all */
u32 want;         /* enum iter_want */
u64 generation;   /* number of the pass, never 0 */
u64 side_lost;    /* records that did not fit the side ring */

/* What is tracked, for who wants to know which sockets are foreign to it. */
struct root_rec roots[TRK_MAX_ROOTS];
u32 root_count;

/* Addresses of the kernel's variables, 0 where they are not to be found. */
struct {
	u64 per_cpu_offset;       /* where each CPU's area of per-CPU variables begins */
	u64 vmemmap_base;         /* where the descriptors of pages begin */
	u64 page_offset_base;     /* where memory itself does */
	u64 landlock_initialized; /* whether Landlock is in use (bool) */
	u64 landlock_blob_sizes;  /* where its part of credentials is */
	u64 ptracer_relations;    /* who may trace whom by Yama's leave (struct list_head) */
	u64 dnotify_group;        /* all watches of F_NOTIFY (struct fsnotify_group *) */
} symbols;

u32 possible_cpus; /* set by user space */

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 8 << 20);
} side SEC(".maps");

/* Objects whose side records this pass already wrote: one epoll instance is often
 * reached through several descriptors. Beyond its size, objects are reported again. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, u64);
	__type(value, u64);
} seen SEC(".maps");

/* The verdict on the task seen last: a pass visits each task's objects in a row. */
u64 verdict_task;
u32 verdict;

/* The same of the cgroup of the socket seen last: whether it is foreign. */
u64 foreign_cgroup;
u32 foreign;

static __always_inline bool first_visit(u64 object)
{
	u64 now = generation;
	u64 *then = bpf_map_lookup_elem(&seen, &object);

	if (then && *then == now)
		return false;
	bpf_map_update_elem(&seen, &object, &now, BPF_ANY);
	return true;
}

static __always_inline bool in_scope(struct task_struct *task)
{
	if ((u64)task == verdict_task)
		return verdict;
	verdict_task = (u64)task;
	verdict = 0;
	if (task->flags & PF_KTHREAD)
		return false;
	if (scope_pid && task->tgid != scope_pid)
		return false;
	if (scope_cgroup && !task_is_under(task, scope_cgroup))
		return false;
	verdict = 1;
	return true;
}

static __always_inline bool cpus_are_known(void)
{
	return symbols.per_cpu_offset && possible_cpus;
}

/* Where a CPU's area of per-CPU variables begins; to be asked for only if they are known. */
static __always_inline u64 cpu_area(u64 cpu)
{
	u64 base = 0;

	bpf_probe_read_kernel(&base, sizeof(base), (void *)(symbols.per_cpu_offset + cpu * 8));
	return base;
}

/* Returns whether the walk may go on: after a loss the pass is void anyway, and a walk over
 * objects that change under it could go round in circles. */
static __always_inline bool side_write(void *rec, u64 size)
{
	if (!bpf_ringbuf_output(&side, rec, size, BPF_RB_NO_WAKEUP))
		return true;
	side_lost++;
	return false;
}
