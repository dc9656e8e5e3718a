/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * AIO contexts of an address space. How many requests are in flight the kernel keeps nowhere: it
 * counts the free slots of a ring, some of them apart for each CPU, and completions whose slots it
 * has not given back yet (get_reqs_available(), refill_reqs_available()).
 */

/* fs.aio-max-nr allows for so many by default. */
#define MAX_AIO_CONTEXTS (1 << 16)

struct aio_rec out_aio;

struct {
	u64 table;
	u64 cpu; /* of the context at hand, an offset into each CPU's area */
	u32 free;
	u32 pad;
} aio_walk;

static long aio_cpu_step(u64 index, void *unused)
{
	struct kioctx_cpu *cpu = (void *)(cpu_area(index) + aio_walk.cpu);

	aio_walk.free += BPF_CORE_READ(cpu, reqs_available);
	return 0;
}

/* A completion moves the tail first and gives back slots later: where the tail stands still, what
 * is free may be counted too low, but not too high. */
static __always_inline u32 aio_in_flight(struct kioctx *context)
{
	u32 tail = BPF_CORE_READ(context, tail);

	if (!cpus_are_known())
		return ~0;
	aio_walk.cpu = (u64)BPF_CORE_READ(context, cpu);
	aio_walk.free = BPF_CORE_READ(context, completed_events);
	aio_walk.free += BPF_CORE_READ(context, reqs_available.counter);
	bpf_loop(possible_cpus, aio_cpu_step, NULL, 0);
	if (BPF_CORE_READ(context, tail) != tail)
		return ~0;
	return BPF_CORE_READ(context, nr_events) - 1 - aio_walk.free;
}

static long aio_step(u64 index, void *unused)
{
	struct kioctx_table *table = (void *)aio_walk.table;
	struct aio_rec *r = &out_aio;
	struct kioctx *context = NULL;

	if (index >= BPF_CORE_READ(table, nr))
		return 1;
	bpf_probe_read_kernel(&context, sizeof(context),
			      (void *)(aio_walk.table +
				       bpf_core_field_offset(struct kioctx_table, table) +
				       index * 8));
	if (!context)
		return 0;
	r->id = BPF_CORE_READ(context, user_id);
	r->ring_bytes = BPF_CORE_READ(context, mmap_size);
	r->max_reqs = BPF_CORE_READ(context, max_reqs);
	r->nr_events = BPF_CORE_READ(context, nr_events);
	r->tail = BPF_CORE_READ(context, tail);
	r->in_flight = aio_in_flight(context);
	return !side_write(r, sizeof(*r));
}

static __always_inline void emit_aio(struct task_struct *task, struct mm_struct *mm)
{
	if (!bpf_core_field_exists(mm->ioctx_table))
		return;
	aio_walk.table = (u64)mm->ioctx_table;
	if (!aio_walk.table)
		return;
	out_aio.hdr.kind = REC_AIO;
	out_aio.hdr.size = sizeof(out_aio);
	out_aio.mm = (u64)mm;
	out_aio.tgid = task->tgid;
	out_aio.pad = 0;
	bpf_loop(MAX_AIO_CONTEXTS, aio_step, NULL, 0);
}
