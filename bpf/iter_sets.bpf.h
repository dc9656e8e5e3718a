/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Kernel objects that hold any number of others: epoll instances, inotify instances, the
 * locks of an inode. Their members go to the side ring. */

#define MAX_EPOLL_STEPS (1 << 22)
#define MAX_WATCHES (1 << 20)
#define MAX_LOCKS (1 << 16)

struct epoll_item_rec out_item;
struct watch_rec out_watch;
struct lock_rec out_lock;

/* In-order walk of an epoll instance's tree, one edge per step: 6.12 finds a loop
 * inside a bpf_loop callback too complex. prev tells where the walk came from. */
struct {
	u64 node;
	u64 prev;
	u64 file;
} epoll_walk;

static __always_inline bool emit_epoll_item(struct rb_node *node)
{
	struct epitem *item = (void *)node - bpf_core_field_offset(struct epitem, rbn);
	struct epoll_item_rec *r = &out_item;
	u64 link = (u64)item + bpf_core_field_offset(struct epitem, rdllink);

	r->hdr.kind = REC_EPOLL_ITEM;
	r->hdr.size = sizeof(*r);
	r->epoll = epoll_walk.file;
	r->target = (u64)BPF_CORE_READ(item, ffd.file);
	r->fd = BPF_CORE_READ(item, ffd.fd);
	r->events = BPF_CORE_READ(item, event.events);
	r->data = BPF_CORE_READ(item, event.data);
	/* a list node that points at itself is on no list */
	r->ready = (u64)BPF_CORE_READ(item, rdllink.next) != link;
	return side_write(r, sizeof(*r));
}

static long epoll_step(u64 index, void *ctx)
{
	struct rb_node *node = (void *)epoll_walk.node;
	u64 prev = epoll_walk.prev;
	u64 parent, left, right;

	if (!node)
		return 1;
	parent = BPF_CORE_READ(node, __rb_parent_color) & ~3ULL;
	left = (u64)BPF_CORE_READ(node, rb_left);
	right = (u64)BPF_CORE_READ(node, rb_right);
	epoll_walk.prev = (u64)node;
	if (prev == parent && left) {
		epoll_walk.node = left;
		return 0;
	}
	if (prev == parent || prev == left) {
		if (!emit_epoll_item(node))
			return 1;
		if (right) {
			epoll_walk.node = right;
			return 0;
		}
	}
	epoll_walk.node = parent;
	return 0;
}

static __always_inline void emit_epoll(struct file *file)
{
	struct eventpoll *ep = file->private_data;

	epoll_walk.node = (u64)BPF_CORE_READ(ep, rbr.rb_root.rb_node);
	epoll_walk.prev = 0;
	epoll_walk.file = (u64)file;
	bpf_loop(MAX_EPOLL_STEPS, epoll_step, NULL, 0);
}

struct {
	u64 node;
	u64 end;
	u64 file;
} watch_walk;

static long watch_step(u64 index, void *ctx)
{
	struct list_head *node = (void *)watch_walk.node;
	struct watch_rec *r = &out_watch;
	struct inotify_inode_mark *mark;
	struct inode *inode;
	u64 connector, obj, back = 0;

	if (!node || watch_walk.node == watch_walk.end)
		return 1;
	mark = (void *)node - bpf_core_field_offset(struct fsnotify_mark, g_list);
	watch_walk.node = (u64)BPF_CORE_READ(node, next);
	connector = (u64)BPF_CORE_READ(mark, fsn_mark.connector);
	if (!connector)
		return 0;
	obj = (u64)BPF_CORE_READ((struct fsnotify_mark_connector *)connector, obj);
	/* obj is the inode since 6.10; before, it was the inode's pointer back to the
	 * connector, which is how the two are told apart */
	bpf_probe_read_kernel(&back, sizeof(back), (void *)obj);
	if (back == connector)
		obj -= bpf_core_field_offset(struct inode, i_fsnotify_marks);
	inode = (void *)obj;
	r->hdr.kind = REC_WATCH;
	r->hdr.size = sizeof(*r);
	r->group = watch_walk.file;
	r->ino = BPF_CORE_READ(inode, i_ino);
	r->dev = BPF_CORE_READ(inode, i_sb, s_dev);
	r->wd = BPF_CORE_READ(mark, wd);
	r->mask = BPF_CORE_READ(mark, fsn_mark.mask);
	return !side_write(r, sizeof(*r));
}

static __always_inline void emit_watches(struct file *file)
{
	struct fsnotify_group *group = file->private_data;

	watch_walk.file = (u64)file;
	watch_walk.node = (u64)BPF_CORE_READ(group, marks_list.next);
	watch_walk.end = (u64)group + bpf_core_field_offset(struct fsnotify_group, marks_list);
	bpf_loop(MAX_WATCHES, watch_step, NULL, 0);
}

struct {
	u64 node;
	u64 end;
	u64 inode;
	u32 class;
	u32 pad;
} lock_walk;

static long lock_step(u64 index, void *ctx)
{
	struct list_head *node = (void *)lock_walk.node;
	struct lock_rec *r = &out_lock;
	struct inode *inode = (void *)lock_walk.inode;
	struct file_lock_core *core;
	struct file_lock *lock;

	if (!node || lock_walk.node == lock_walk.end)
		return 1;
	lock_walk.node = (u64)BPF_CORE_READ(node, next);
	r->hdr.kind = REC_LOCK;
	r->hdr.size = sizeof(*r);
	r->inode = lock_walk.inode;
	r->ino = BPF_CORE_READ(inode, i_ino);
	r->dev = BPF_CORE_READ(inode, i_sb, s_dev);
	r->class = lock_walk.class;
	if (bpf_core_type_exists(struct file_lock_core)) {
		/* the common part is the first member of a file_lock */
		core = (void *)node - bpf_core_field_offset(struct file_lock_core, flc_list);
		r->file = (u64)BPF_CORE_READ(core, flc_file);
		r->owner = (u64)BPF_CORE_READ(core, flc_owner);
		r->flags = BPF_CORE_READ(core, flc_flags);
		r->type = BPF_CORE_READ(core, flc_type);
		r->pid = BPF_CORE_READ(core, flc_pid);
		lock = (void *)core;
	} else {
		lock = (void *)node - bpf_core_field_offset(struct file_lock, fl_list);
		r->file = (u64)BPF_CORE_READ(lock, fl_file);
		r->owner = (u64)BPF_CORE_READ(lock, fl_owner);
		r->flags = BPF_CORE_READ(lock, fl_flags);
		r->type = BPF_CORE_READ(lock, fl_type);
		r->pid = BPF_CORE_READ(lock, fl_pid);
	}
	r->start = 0;
	r->end = 0;
	r->fd = -1;
	/* a lease has a struct of its own since 6.9, without a range */
	if (lock_walk.class != LOCK_LEASE) {
		r->start = BPF_CORE_READ(lock, fl_start);
		r->end = BPF_CORE_READ(lock, fl_end);
	} else {
		struct file_lease *lease = (void *)lock;
		struct fasync_struct *fasync = bpf_core_type_exists(struct file_lease)
						       ? BPF_CORE_READ(lease, fl_fasync)
						       : BPF_CORE_READ(lock, fl_fasync);

		if (fasync)
			r->fd = BPF_CORE_READ(fasync, fa_fd);
	}
	return !side_write(r, sizeof(*r));
}

static __always_inline void emit_lock_list(struct file_lock_context *flc, u32 offset, u32 class)
{
	struct list_head *head = (void *)flc + offset;

	lock_walk.node = (u64)BPF_CORE_READ(head, next);
	lock_walk.end = (u64)head;
	lock_walk.class = class;
	bpf_loop(MAX_LOCKS, lock_step, NULL, 0);
}

static __always_inline void emit_locks(struct inode *inode)
{
	struct file_lock_context *flc = inode->i_flctx;

	lock_walk.inode = (u64)inode;
	emit_lock_list(flc, bpf_core_field_offset(struct file_lock_context, flc_flock), LOCK_FLOCK);
	emit_lock_list(flc, bpf_core_field_offset(struct file_lock_context, flc_posix), LOCK_POSIX);
	emit_lock_list(flc, bpf_core_field_offset(struct file_lock_context, flc_lease), LOCK_LEASE);
}
