/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * io_uring instances, and what tasks have asked of them. A request counts as in flight from its
 * submission until it has completed and is given back; it may be counted a moment longer.
 */

/* log2 of the buckets of an io_hash_table, which follow from the length of the ring. */
#define MAX_URING_HASH_BITS 16

struct uring_rec out_uring;

struct {
	u64 counters; /* of a percpu_counter, an offset into each CPU's area */
	s64 sum;
} uring_sum;

static long uring_cpu_step(u64 index, void *unused)
{
	s32 part = 0;

	bpf_probe_read_kernel(&part, sizeof(part), (void *)(cpu_area(index) + uring_sum.counters));
	uring_sum.sum += part;
	return 0;
}

/* A task takes references for many requests at once and keeps those it has not used. */
static __always_inline s32 uring_in_flight(struct io_uring_task *tctx)
{
	if (!cpus_are_known())
		return -1;
	uring_sum.counters = (u64)BPF_CORE_READ(tctx, inflight.counters);
	uring_sum.sum = BPF_CORE_READ(tctx, inflight.count);
	bpf_loop(possible_cpus, uring_cpu_step, NULL, 0);
	return uring_sum.sum - BPF_CORE_READ(tctx, cached_refs);
}

static __always_inline u32 uring_registered(struct io_uring_task *tctx)
{
	struct file *rings[IO_RINGFD_REG_MAX] = {};
	u32 registered = 0;

	BPF_CORE_READ_INTO(&rings, tctx, registered_rings);
	for (int i = 0; i < IO_RINGFD_REG_MAX; i++)
		registered += rings[i] != NULL;
	return registered;
}

static __always_inline void fill_uring_task(struct thread_rec *r, struct task_struct *task)
{
	struct io_worker *worker = task->worker_private;
	struct io_uring_task *tctx;

	r->uring_in_flight = 0;
	r->uring_registered = 0;
	if (!bpf_core_field_exists(task->io_uring))
		return;
	if (task->flags & PF_IO_WORKER && BPF_CORE_READ(worker, cur_work))
		r->flags |= THREAD_WORKING;
	tctx = BPF_CORE_READ(task, io_uring);
	if (!tctx)
		return;
	r->uring_in_flight = uring_in_flight(tctx);
	r->uring_registered = uring_registered(tctx);
}

struct {
	u64 buckets;
	bool used;
} uring_table;

static long uring_bucket_step(u64 index, void *unused)
{
	struct io_hash_bucket *bucket =
		(void *)uring_table.buckets + index * bpf_core_type_size(struct io_hash_bucket);

	uring_table.used = BPF_CORE_READ(bucket, list.first) != NULL;
	return uring_table.used;
}

static __always_inline bool uring_has_waiting(struct io_hash_table *table)
{
	u32 bits = BPF_CORE_READ(table, hash_bits);

	uring_table.buckets = (u64)BPF_CORE_READ(table, hbs);
	uring_table.used = false;
	if (uring_table.buckets && bits <= MAX_URING_HASH_BITS)
		bpf_loop(1 << bits, uring_bucket_step, NULL, 0);
	return uring_table.used;
}

static __always_inline u32 uring_waits(struct io_ring_ctx *ring)
{
	u64 timeouts = (u64)ring + bpf_core_field_offset(ring->timeout_list);
	bool waits = (u64)BPF_CORE_READ(ring, timeout_list.next) != timeouts;

	waits |= uring_has_waiting((void *)ring + bpf_core_field_offset(ring->cancel_table));
	if (bpf_core_field_exists(ring->cancel_table_locked))
		waits |= uring_has_waiting((void *)ring +
					   bpf_core_field_offset(ring->cancel_table_locked));
	if (bpf_core_field_exists(ring->futex_list))
		waits |= BPF_CORE_READ(ring, futex_list.first) != NULL;
	if (bpf_core_field_exists(ring->waitid_list))
		waits |= BPF_CORE_READ(ring, waitid_list.first) != NULL;
	if (bpf_core_field_exists(ring->cancelable_uring_cmd))
		waits |= BPF_CORE_READ(ring, cancelable_uring_cmd.first) != NULL;
	return waits ? URING_WAITS : 0;
}

static __always_inline u32 uring_state(struct io_ring_ctx *ring)
{
	struct io_ring_ctx___tables *newer = (void *)ring;
	u64 overflow = (u64)ring + bpf_core_field_offset(ring->cq_overflow_list);
	u32 state = uring_waits(ring);

	if (BPF_CORE_READ(ring, io_ev_fd))
		state |= URING_EVENTFD;
	if (BPF_CORE_READ(ring, io_bl_xa.xa_head))
		state |= URING_BUFFERS;
	if (bpf_core_field_exists(ring->io_bl) && BPF_CORE_READ(ring, io_bl))
		state |= URING_BUFFERS;
	if (BPF_CORE_READ(ring, personalities.xa_head))
		state |= URING_PERSONALITIES;
	if (BPF_CORE_READ_BITFIELD_PROBED(ring, restricted))
		state |= URING_RESTRICTED;
	if (BPF_CORE_READ_BITFIELD_PROBED(ring, iowq_limits_set))
		state |= URING_WORKERS;
	if ((u64)BPF_CORE_READ(ring, cq_overflow_list.next) != overflow)
		state |= URING_OVERFLOWN;
	if (bpf_core_field_exists(ring->napi_enabled) && BPF_CORE_READ(ring, napi_enabled))
		state |= URING_NAPI;
	if (bpf_core_field_exists(newer->napi_track_mode) && BPF_CORE_READ(newer, napi_track_mode))
		state |= URING_NAPI;
	return state;
}

static __always_inline long write_uring(struct seq_file *seq, void *ctx)
{
	struct io_ring_ctx *ring = ctx;
	struct io_ring_ctx___tables *newer = ctx;
	struct uring_rec *r = &out_uring;

	r->hdr.kind = REC_URING;
	r->hdr.size = sizeof(*r);
	r->flags = BPF_CORE_READ(ring, flags);
	r->sq_entries = BPF_CORE_READ(ring, sq_entries);
	r->cq_entries = BPF_CORE_READ(ring, cq_entries);
	r->sq_head = BPF_CORE_READ(ring, cached_sq_head);
	r->cq_tail = BPF_CORE_READ(ring, cached_cq_tail);
	if (bpf_core_field_exists(ring->nr_user_files)) {
		r->files = BPF_CORE_READ(ring, nr_user_files);
		r->buffers = BPF_CORE_READ(ring, nr_user_bufs);
	} else {
		r->files = BPF_CORE_READ(newer, file_table.data.nr);
		r->buffers = BPF_CORE_READ(newer, buf_table.nr);
	}
	r->state = uring_state(ring);
	return bpf_seq_write(seq, r, sizeof(*r));
}
