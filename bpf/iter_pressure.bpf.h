/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Triggers of pressure stall information, which a file of procfs or of a cgroup may have. */

struct pressure_rec out_pressure;

static __always_inline bool is_pressure_name(u64 name8)
{
	return name8 == NAME8('m', 'e', 'm', 'o', 'r', 'y', '.', 'p') ||
	       name8 == NAME8('i', 'o', '.', 'p', 'r', 'e', 's', 's') ||
	       name8 == NAME8('c', 'p', 'u', '.', 'p', 'r', 'e', 's') ||
	       name8 == NAME8('i', 'r', 'q', '.', 'p', 'r', 'e', 's');
}

static __always_inline struct psi_trigger *pressure_trigger(struct file_rec *r, struct file *file)
{
	struct seq_file *seq = file->private_data;
	struct kernfs_open_file *open;
	struct cgroup_file_ctx *ctx;
	const unsigned char *parent;
	u64 name8 = 0;

	if (!(r->fmode & FMODE_WRITE))
		return NULL;
	if (r->magic == CGROUP2_SUPER_MAGIC) {
		__builtin_memcpy(&name8, r->name, sizeof(name8));
		if (!is_pressure_name(name8))
			return NULL;
		open = BPF_CORE_READ(seq, private);
		ctx = BPF_CORE_READ(open, priv);
		return BPF_CORE_READ(ctx, psi.trigger);
	}
	if (r->magic != PROC_SUPER_MAGIC)
		return NULL;
	parent = BPF_CORE_READ(file, f_path.dentry, d_parent, d_name.name);
	bpf_probe_read_kernel(&name8, sizeof(name8), parent);
	if (name8 != NAME8('p', 'r', 'e', 's', 's', 'u', 'r', 'e'))
		return NULL;
	return BPF_CORE_READ(seq, private);
}

static __always_inline long write_pressure(struct seq_file *seq, struct file_rec *file_rec,
					   struct file *file)
{
	struct pressure_rec *r = &out_pressure;
	struct psi_trigger *trigger = pressure_trigger(file_rec, file);

	if (!trigger)
		return 0;
	r->hdr.kind = REC_PRESSURE;
	r->hdr.size = sizeof(*r);
	r->threshold_ns = BPF_CORE_READ(trigger, threshold);
	r->window_ns = BPF_CORE_READ(trigger, win.size);
	r->state = BPF_CORE_READ(trigger, state);
	r->pad = 0;
	return bpf_seq_write(seq, r, sizeof(*r));
}
