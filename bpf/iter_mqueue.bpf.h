/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * POSIX message queues. Nothing but the kernel's own memory shows the messages without taking
 * them out. There may be more of them than fit the side ring: see iter_window.bpf.h.
 */

#define MAX_MQUEUE_STEPS (1 << 23)          /* what bpf_loop() allows */
#define MQUEUE_CHUNK (TRK_MQUEUE_CHUNK - 1) /* bytes, also as a mask */
#define KERNEL_PAGE 4096                    /* a message and its segments take one each */

struct mqueue_rec out_mqueue;
struct mqueue_data_rec out_mqueue_data;

/* In-order walk of a queue's tree from the highest priority to the lowest, one edge or one
 * record per step; see epoll_walk. */
struct {
	u64 inode;
	u64 node;
	u64 prev;
	u64 list; /* head of the node's messages, 0 on the way between nodes */
	u64 msg;  /* the one whose turn is next, or the head again */
	u64 from; /* bytes of it that come next */
	u64 seg;  /* segment behind them */
	u32 left; /* in this segment */
	u32 priority;
	u32 size;
	u32 offset;
} mq_walk;

static __always_inline struct mqueue_inode_info *mqueue_info(struct inode *inode)
{
	return (void *)(address(inode) -
			bpf_core_field_offset(struct mqueue_inode_info, vfs_inode));
}

static __always_inline bool is_mqueue(struct file *file)
{
	struct inode *inode = file->f_inode;

	return inode->i_sb->s_magic == MQUEUE_MAGIC && (inode->i_mode & S_IFMT) == S_IFREG;
}

static __always_inline void fill_notify(struct mqueue_rec *r, struct mqueue_inode_info *info)
{
	struct pid *owner = BPF_CORE_READ(info, notify_owner);
	struct task_struct___exec *task;
	u64 links;

	r->flags = 0;
	r->notify_pid = 0;
	r->notify = 0;
	r->notify_sig = 0;
	r->notify_value = 0;
	if (!owner)
		return;
	r->flags = MQF_NOTIFY;
	r->notify_pid = pid_nr(owner);
	r->notify = BPF_CORE_READ(info, notify.sigev_notify);
	r->notify_sig = BPF_CORE_READ(info, notify.sigev_signo);
	r->notify_value = (u64)BPF_CORE_READ(info, notify.sigev_value.sival_ptr);
	links = (u64)BPF_CORE_READ(owner, tasks[PIDTYPE_TGID].first);
	if (!links) {
		r->flags |= MQF_ENDED;
		return;
	}
	links -= bpf_core_field_offset(struct task_struct___exec, pid_links) +
		 PIDTYPE_TGID * bpf_core_type_size(struct hlist_node);
	task = (void *)links;
	if (BPF_CORE_READ(task, self_exec_id) != BPF_CORE_READ(info, notify_self_exec_id))
		r->flags |= MQF_EXECED;
}

static __always_inline long write_mqueue(struct seq_file *seq, struct file *file)
{
	struct mqueue_inode_info *info;
	struct dentry___counted *dentry = (void *)file->f_path.dentry;
	struct mqueue_rec *r = &out_mqueue;

	if (!bpf_core_type_exists(struct mqueue_inode_info))
		return 0;
	info = mqueue_info(file->f_inode);
	r->hdr.kind = REC_MQUEUE;
	r->hdr.size = sizeof(*r);
	r->inode = (u64)file->f_inode;
	r->qsize = BPF_CORE_READ(info, qsize);
	r->maxmsg = BPF_CORE_READ(info, attr.mq_maxmsg);
	r->msgsize = BPF_CORE_READ(info, attr.mq_msgsize);
	r->curmsgs = BPF_CORE_READ(info, attr.mq_curmsgs);
	/* each holds the dentry, and so does the name: see mqueue_create_attr() */
	r->open = BPF_CORE_READ(dentry, d_lockref.count) - (file->f_inode->i_nlink ? 1 : 0);
	r->uid = BPF_CORE_READ(file, f_inode, i_uid.val);
	r->gid = BPF_CORE_READ(file, f_inode, i_gid.val);
	r->account = BPF_CORE_READ(info, ucounts, uid.val);
	fill_notify(r, info);
	__builtin_memset(r->name, 0, sizeof(r->name));
	bpf_probe_read_kernel_str(r->name, sizeof(r->name), file->f_path.dentry->d_name.name);
	return bpf_seq_write(seq, r, sizeof(*r));
}

/* Begins with the message whose turn it is. */
static __always_inline void mqueue_begin(void)
{
	struct msg_msg *msg = (void *)mq_walk.msg - bpf_core_field_offset(struct msg_msg, m_list);
	u64 room = KERNEL_PAGE - bpf_core_type_size(struct msg_msg);

	mq_walk.from = (u64)msg + bpf_core_type_size(struct msg_msg);
	mq_walk.seg = (u64)BPF_CORE_READ(msg, next);
	mq_walk.size = BPF_CORE_READ(msg, m_ts);
	mq_walk.left = mq_walk.size < room ? mq_walk.size : room;
	mq_walk.offset = 0;
}

/* Writes the next bytes of a message, if they are in the window, and goes on behind them. */
static __always_inline bool mqueue_chunk(void)
{
	struct mqueue_data_rec *r = &out_mqueue_data;
	u64 room = KERNEL_PAGE - bpf_core_type_size(struct msg_msgseg);
	u64 len = mq_walk.left, rest;
	struct list_head *this;

	if (len > MQUEUE_CHUNK)
		len = MQUEUE_CHUNK;
	if (in_window()) {
		/* Linux 6.1 forgets the bound of a word that it spills. */
		barrier_var(len);
		len &= MQUEUE_CHUNK;
		r->hdr.kind = REC_MQUEUE_DATA;
		r->hdr.size = sizeof(*r);
		r->inode = mq_walk.inode;
		r->priority = mq_walk.priority;
		r->size = mq_walk.size;
		r->offset = mq_walk.offset;
		r->len = len;
		bpf_probe_read_kernel(r->data, len, (void *)mq_walk.from);
		if (!side_write(r, sizeof(*r)))
			return false;
	}
	mq_walk.offset += len;
	mq_walk.left -= len;
	mq_walk.from += len;
	if (mq_walk.left)
		return true;
	rest = mq_walk.size - mq_walk.offset;
	if (rest && mq_walk.seg) {
		struct msg_msgseg *seg = (void *)mq_walk.seg;

		mq_walk.from = mq_walk.seg + bpf_core_type_size(struct msg_msgseg);
		mq_walk.left = rest < room ? rest : room;
		mq_walk.seg = (u64)BPF_CORE_READ(seg, next);
		return true;
	}
	mq_walk.from = 0;
	this = (void *)mq_walk.msg;
	mq_walk.msg = (u64)BPF_CORE_READ(this, next);
	return true;
}

static long mqueue_step(u64 index, void *ctx)
{
	struct rb_node *node = (void *)mq_walk.node;
	struct posix_msg_tree_node *leaf;
	u64 prev = mq_walk.prev;
	u64 parent, left, right;

	if (mq_walk.list) {
		if (!mq_walk.from && mq_walk.msg != mq_walk.list)
			mqueue_begin();
		if (mq_walk.from)
			return !mqueue_chunk();
	}
	if (!node)
		return 1;
	parent = BPF_CORE_READ(node, __rb_parent_color) & ~3ULL;
	left = (u64)BPF_CORE_READ(node, rb_left);
	right = (u64)BPF_CORE_READ(node, rb_right);
	if (!mq_walk.list) {
		if (prev == parent && right) {
			mq_walk.prev = (u64)node;
			mq_walk.node = right;
			return 0;
		}
		if (prev == parent || prev == right) {
			/* its messages, before what is of lower priority */
			leaf = (void *)node -
			       bpf_core_field_offset(struct posix_msg_tree_node, rb_node);
			mq_walk.list = (u64)leaf +
				       bpf_core_field_offset(struct posix_msg_tree_node, msg_list);
			mq_walk.msg = (u64)BPF_CORE_READ(leaf, msg_list.next);
			mq_walk.priority = BPF_CORE_READ(leaf, priority);
			mq_walk.from = 0;
			return 0;
		}
		left = 0; /* comes from there */
	}
	mq_walk.list = 0;
	mq_walk.prev = (u64)node;
	mq_walk.node = left ? left : parent;
	return 0;
}

static __always_inline void emit_mqueue(struct file *file)
{
	struct mqueue_inode_info *info;
	u64 messages, steps;

	if (!bpf_core_type_exists(struct mqueue_inode_info) || !first_visit((u64)file->f_inode))
		return;
	info = mqueue_info(file->f_inode);
	mq_walk.inode = (u64)file->f_inode;
	mq_walk.node = (u64)BPF_CORE_READ(info, msg_tree.rb_node);
	mq_walk.prev = 0;
	mq_walk.list = 0;
	mq_walk.from = 0;
	/* Each message takes one record, one more for the rest of each segment and each chunk,
	 * and a node of at most four steps. */
	messages = BPF_CORE_READ(info, attr.mq_curmsgs);
	steps = 8 * (messages + 1) + BPF_CORE_READ(info, qsize) / (MQUEUE_CHUNK / 2);
	if (steps > MAX_MQUEUE_STEPS)
		steps = MAX_MQUEUE_STEPS;
	bpf_loop(steps, mqueue_step, NULL, 0);
}
