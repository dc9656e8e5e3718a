/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * How events leave the kernel, and which tasks cause them.
 *
 * Rings are sharded by the address of the object an event is about. One counter
 * numbers all events, and an event takes its number only after its room in a ring
 * is reserved: a number always belongs to a record that user space will see, so
 * user space can put the shards back into one order and knows when it has all up to
 * a number. State is read after the number is taken: what a later event changed
 * meanwhile is then said twice, never missed. An event whose hook is inside the
 * kernel's own lock, or before publication, is thereby in the order of the changes.
 */
#ifndef TRACKER_TRACK_RING_BPF_H
#define TRACKER_TRACK_RING_BPF_H

/* Set by user space before loading: the verifier leaves out what does not follow from it. */
const volatile u32 shard_mask;
const volatile struct root_rec roots[TRK_MAX_ROOTS];
const volatile u32 root_count;

/* Set by user space once all programs are attached: nothing is tracked before. */
u32 tracking;

/*
 * Whether cgroups are tracked: the address, and one more than that for those that are, each at a
 * place that follows from it. A look costs less than walking up. An answer is right for as long
 * as the cgroup lives, since neither the roots change nor what a cgroup is below; one that is
 * made where another was is judged before anything can be in it.
 */
#define VERDICTS 1024
u64 verdicts[VERDICTS];

u64 last_seq;       /* number of the last event */
u64 stale_overflow; /* losses whose object could not be noted: everything is stale */

struct ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} ring0 SEC(".maps"), ring1 SEC(".maps"), ring2 SEC(".maps"), ring3 SEC(".maps"),
	ring4 SEC(".maps"), ring5 SEC(".maps"), ring6 SEC(".maps"), ring7 SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, TRK_MAX_SHARDS);
	__type(key, u32);
	__array(values, struct ring);
} rings SEC(".maps") = {
	.values = {&ring0, &ring1, &ring2, &ring3, &ring4, &ring5, &ring6, &ring7},
};

/* Whether the reader of the rings waits to be woken. Alone in its map, which user space maps. */
u32 asleep SEC(".bss.asleep");

/* Events that found no room, by class. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CLASS_COUNT);
	__type(key, u32);
	__type(value, u64);
} lost SEC(".maps");

/* Objects about which something was lost, until user space takes note. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, u32);
} stale SEC(".maps");

/* Objects that are known to have changed: no need to say so again until they are read. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 65536);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, u32);
} dirty SEC(".maps");

/* What a call that is reported when it returns found when it began. */
struct call {
	u64 epoll;
	u64 target;
};
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, u64);
	__type(value, struct call);
} calls SEC(".maps");

/* The lower half of an address, without a helper: a move of 32 bits makes a number of any
 * pointer. */
static __always_inline u32 address32(const void *object)
{
	u32 number;

	asm("%0 = %1" : "=w"(number) : "w"((u32)(u64)object));
	return number;
}

/* A cgroup takes two to four KiB, and the allocator puts it at a multiple of that: from bit 11 on
 * addresses differ. Put so that it takes two instructions. */
static __always_inline u64 *verdict_of(struct cgroup *cgrp)
{
	return (void *)verdicts + (address32(cgrp) >> 8 & (sizeof(verdicts) - sizeof(*verdicts)));
}

/* The answer found out: seldom, so that programs only call this. */
static __noinline bool judge(struct cgroup *cgrp)
{
	bool tracked;

	if (!tracking)
		return false;
	tracked = is_below_root(false, cgrp, roots, root_count);
	*verdict_of(cgrp) = address(cgrp) + tracked;
	return tracked;
}

/* Without roots, which only `cargo xtask overhead` asks for, the verifier makes programs of this
 * that return at once: what the hooks themselves cost. */
static __always_inline bool cgroup_tracked(struct cgroup *cgrp)
{
	u64 verdict;

	if (!root_count)
		return false;
	verdict = *verdict_of(cgrp);
	if (verdict == (u64)cgrp)
		return false;
	if (verdict == (u64)cgrp + 1)
		return true;
	return judge(cgrp);
}

static __always_inline bool current_tracked(void)
{
	return cgroup_tracked(bpf_get_current_task_btf()->cgroups->dfl_cgrp);
}

static __always_inline bool task_tracked(struct task_struct *task)
{
	return cgroup_tracked(task->cgroups->dfl_cgrp);
}

/*
 * What a program does for the few that are tracked, with the arguments of its hook: APART
 * BPF_PROG(name, ...) defines a function that the program calls with `ctx`. In the program itself
 * all would pay for it, since registers are saved and room on the stack is made at its entry,
 * before it asks whether the caller is tracked.
 */
#define APART static __noinline void

static __noinline void note_loss(u64 object, u32 class)
{
	u64 *count = bpf_map_lookup_elem(&lost, &class);

	if (bpf_map_update_elem(&stale, &object, &class, BPF_ANY))
		__sync_fetch_and_add(&stale_overflow, 1);
	if (count)
		(*count)++;
}

static __always_inline void *reserve(const void *object, u32 class, u64 size)
{
	/* slab objects differ in the middle bits: Fibonacci hashing spreads them */
	u32 shard = (address32(object) * 0x9e3779b1U) >> 28 & shard_mask;
	void *ring = bpf_map_lookup_elem(&rings, &shard);
	void *rec = NULL;

	if (ring)
		rec = bpf_ringbuf_reserve(ring, size, 0);
	if (!rec)
		note_loss(address(object), class);
	return rec;
}

static __always_inline void number(struct event_hdr *ev, u32 kind, u32 size)
{
	ev->hdr.kind = kind;
	ev->hdr.size = size;
	ev->seq = __sync_fetch_and_add(&last_seq, 1) + 1;
}

/* Hands an event over. To wake the reader costs as much as all the rest, so it is done only
 * when it waits for that: while there is something to read it looks by itself now and then.
 * It falls asleep only if no room is reserved after it said so, and room was reserved before
 * the event was numbered, which is a full barrier: so this sees it, or it sees the room. */
static __always_inline void submit(void *event)
{
	volatile u32 *waits = &asleep;
	u64 flags = BPF_RB_NO_WAKEUP;

	if (*waits) {
		*waits = 0;
		flags = BPF_RB_FORCE_WAKEUP;
	}
	bpf_ringbuf_submit(event, flags);
}

/* Room for an event of this type, numbered; NULL if there is none. It must be submitted. */
#define EVENT(type, kind, object, class)                                                           \
	({                                                                                         \
		type *_e = reserve((void *)(object), class, sizeof(type));                         \
		if (_e)                                                                            \
			number(&_e->ev, kind, sizeof(type));                                       \
		_e;                                                                                \
	})

static __always_inline void say_stale(u64 object, u32 class)
{
	struct object_event *e = EVENT(struct object_event, EVENT_STALE, object, class);

	if (!e)
		return;
	e->object = object;
	e->class = class;
	e->pad = 0;
	submit(e);
}

/* Says once that an object changed, until user space clears the mark to read it. */
static __always_inline void mark_dirty(u64 object, u32 class)
{
	if (bpf_map_lookup_elem(&dirty, &object))
		return;
	bpf_map_update_elem(&dirty, &object, &class, BPF_ANY);
	say_stale(object, class);
}

static __always_inline struct call *begin_call(void)
{
	u64 id = bpf_get_current_pid_tgid();
	struct call call = {};

	bpf_map_update_elem(&calls, &id, &call, BPF_ANY);
	return bpf_map_lookup_elem(&calls, &id);
}

extern void *bpf_rdonly_cast(const void *object, u32 btf_id) __ksym __weak;

/* Eight bytes of the kernel's memory. Since 6.2 that is an instruction: any structure that begins
 * with a number will do. */
static __always_inline u64 word_at(const void *where)
{
	u64 word = 0;

	if (bpf_ksym_exists(bpf_rdonly_cast)) {
		u32 type = bpf_core_type_id_kernel(struct timespec64);
		struct timespec64 *number = bpf_rdonly_cast(where, type);

		return number->tv_sec;
	}
	bpf_probe_read_kernel(&word, sizeof(word), where);
	return word;
}

/* What a descriptor of a table refers to, NULL for nothing. */
static __always_inline struct file *file_at(struct files_struct *files, u32 fd)
{
	struct fdtable *fdt = files->fdt;

	return fd < fdt->max_fds ? (struct file *)word_at(fdt->fd + fd) : NULL;
}

static __always_inline u32 bit_at(unsigned long *bitmap, u32 fd)
{
	return word_at(bitmap + fd / 64) >> (fd % 64) & 1;
}

/* Whether another thread may change the table right now. */
static __always_inline bool table_shared(struct files_struct *files)
{
	return files->count.counter > 1;
}

/* Whether a table is of the first size, whose bits lie in itself: without bpf_rdonly_cast only
 * those can be read by an instruction. */
static __always_inline bool is_small(struct files_struct *files, struct fdtable *fdt)
{
	return !bpf_ksym_exists(bpf_rdonly_cast) && fdt == &files->fdtab;
}

/* Whether a descriptor refers to something, while the table is locked. The number that an open()
 * under way has reserved does not, which only another thread can see. */
static __always_inline bool is_open(struct files_struct *files, u32 fd)
{
	if (is_small(files, files->fdt) && !table_shared(files))
		return fd < 64 && files->open_fds_init[0] >> fd & 1;
	return file_at(files, fd);
}

static __always_inline u32 cloexec_at(const bool typed, struct files_struct *files, u32 fd)
{
	struct fdtable *fdt = MEMBER(typed, files, fdt);

	if (typed && is_small(files, fdt))
		return files->close_on_exec_init[0] >> (fd & 63) & 1;
	return bit_at(MEMBER(typed, fdt, close_on_exec), fd);
}

static __always_inline struct files_struct *current_files(void)
{
	return bpf_get_current_task_btf()->files;
}

#endif
