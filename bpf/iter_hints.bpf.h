/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* What the kernel was told of how open files will be used, and what it has to tell of files. */

#define FMODE_RANDOM 0x1000
#define FMODE_NOREUSE 0x800000
#define MAX_MARKS 64

struct epoll_rec out_epoll;

static __always_inline u32 write_hint(struct inode *inode)
{
	struct inode___byte_hint *byte = (void *)inode;
	struct inode___enum_hint *named = (void *)inode;

	if (bpf_core_type_exists(enum rw_hint) && bpf_core_field_exists(named->i_write_hint))
		return BPF_CORE_READ(named, i_write_hint);
	if (bpf_core_field_exists(byte->i_write_hint))
		return BPF_CORE_READ(byte, i_write_hint);
	return 0;
}

/* Whether what was written to a file is lost, and nobody has been told through this one yet:
 * errseq_check() of lib/errseq.c. */
static __always_inline bool has_write_error(struct file *file)
{
	return file->f_wb_err != file->f_mapping->wb_err;
}

/* Of a regular file. Twice as much is read ahead where reading was said to be sequential. */
static __always_inline void fill_hints(struct file_rec *r, struct file *file, struct inode *inode,
				       struct super_block *sb)
{
	u32 usual = BPF_CORE_READ(sb, s_bdi, ra_pages);
	u32 ahead = file->f_ra.ra_pages;

	if (usual && ahead == usual * 2)
		r->hints |= HINT_SEQUENTIAL;
	if (r->fmode & FMODE_RANDOM)
		r->hints |= HINT_RANDOM;
	if (r->fmode & FMODE_NOREUSE)
		r->hints |= HINT_NOREUSE;
	if (has_write_error(file))
		r->hints |= HINT_WRITE_ERROR;
	r->write_hint = write_hint(inode);
}

/* The mark of F_NOTIFY that a directory has, NULL for none. */
static __always_inline struct dnotify_mark *dnotify_mark(struct inode *inode)
{
	struct fsnotify_mark_connector *connector = inode->i_fsnotify_marks;
	struct hlist_node *node;
	u64 group = 0;
	u32 i;

	if (!connector || !symbols.dnotify_group)
		return NULL;
	bpf_probe_read_kernel(&group, sizeof(group), (void *)symbols.dnotify_group);
	node = BPF_CORE_READ(connector, list.first);
	for (i = 0; i < MAX_MARKS && node; i++) {
		struct fsnotify_mark *mark =
			(void *)node - bpf_core_field_offset(struct fsnotify_mark, obj_list);

		if ((u64)BPF_CORE_READ(mark, group) == group)
			return (void *)mark;
		node = BPF_CORE_READ(node, next);
	}
	return NULL;
}

/* Whether a directory is watched by F_NOTIFY through this file. */
static __always_inline bool has_dnotify(struct inode *inode, struct file *file)
{
	struct dnotify_mark *mark = dnotify_mark(inode);
	struct dnotify_struct *watch;
	u32 i;

	if (!mark)
		return false;
	watch = BPF_CORE_READ(mark, dn);
	for (i = 0; i < MAX_MARKS && watch; i++) {
		if (BPF_CORE_READ(watch, dn_filp) == file)
			return true;
		watch = BPF_CORE_READ(watch, dn_next);
	}
	return false;
}

/* Of an inotify instance or a fanotify group. */
static __always_inline bool has_events(struct file *file)
{
	struct fsnotify_group *group = file->private_data;

	return BPF_CORE_READ(group, q_len);
}

/* include/linux/fanotify.h: no flag of fanotify_init(2) */
#define FANOTIFY_UNPRIV 0x80000000

static __always_inline u32 fanotify_hints(struct file *file)
{
	struct fsnotify_group *group = file->private_data;
	u32 hints = has_events(file) ? HINT_EVENTS : 0;
	struct list_head *asked;

	/* of a kernel that tells less nothing is carried */
	if (!bpf_core_field_exists(group->fanotify_data.flags) ||
	    !bpf_core_field_exists(group->fanotify_data.access_list))
		return hints | HINT_EVENTS;
	asked = (void *)group +
		bpf_core_field_offset(struct fsnotify_group, fanotify_data.access_list);
	if (BPF_CORE_READ(asked, next) != asked)
		hints |= HINT_EVENTS;
	if (BPF_CORE_READ(group, fanotify_data.flags) & FANOTIFY_UNPRIV)
		hints |= HINT_UNPRIVILEGED;
	return hints;
}

static __always_inline long write_epoll(struct seq_file *seq, void *ctx)
{
	struct eventpoll *epoll = ctx;
	struct epoll_rec *r = &out_epoll;

	if (!bpf_core_field_exists(epoll->busy_poll_usecs))
		return 0;
	r->hdr.kind = REC_EPOLL;
	r->hdr.size = sizeof(*r);
	r->busy_poll_usecs = BPF_CORE_READ(epoll, busy_poll_usecs);
	r->busy_poll_budget = BPF_CORE_READ(epoll, busy_poll_budget);
	r->prefer_busy_poll = BPF_CORE_READ(epoll, prefer_busy_poll);
	r->pad = 0;
	if (!r->busy_poll_usecs && !r->busy_poll_budget && !r->prefer_busy_poll)
		return 0;
	return bpf_seq_write(seq, r, sizeof(*r));
}
