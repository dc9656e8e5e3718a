/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* iter/task_file: descriptors, and what the kernel objects behind them hold. */

#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define MAX_PIPE_SLOTS (1 << 20)
#define MAX_EPOLL_STEPS (1 << 22)
#define MAX_WATCHES (1 << 20)
#define MAX_LOCKS (1 << 16)

struct file_rec out_file;
struct eventfd_rec out_eventfd;
struct pipe_rec out_pipe;
struct timerfd_rec out_timerfd;
struct signalfd_rec out_signalfd;
struct pidfd_rec out_pidfd;
struct sock_rec out_sock;
struct epoll_item_rec out_item;
struct watch_rec out_watch;
struct lock_rec out_lock;

static __always_inline void fill_owner(struct file_rec *r, struct file *file)
{
	struct file___embedded *embedded = (void *)file;
	struct fown_struct *owner;

	r->owner_pid = 0;
	r->owner_type = 0;
	r->owner_sig = 0;
	r->owner_uid = 0;
	r->owner_euid = 0;
	if (bpf_core_field_exists(embedded->f_owner.pid))
		owner = (void *)file + bpf_core_field_offset(struct file___embedded, f_owner);
	else
		owner = file->f_owner;
	if (!owner)
		return;
	r->owner_pid = pid_nr(BPF_CORE_READ(owner, pid));
	r->owner_type = BPF_CORE_READ(owner, pid_type);
	r->owner_sig = BPF_CORE_READ(owner, signum);
	r->owner_uid = BPF_CORE_READ(owner, uid.val);
	r->owner_euid = BPF_CORE_READ(owner, euid.val);
}

static __always_inline u64 file_refs(struct file *file)
{
	struct file___ref *ref = (void *)file;

	/* the iterator holds one itself; a file_ref_t counts from zero for one */
	if (bpf_core_field_exists(ref->f_ref))
		return ref->f_ref.refcnt.counter;
	return file->f_count.counter - 1;
}

static __always_inline u32 fd_is_cloexec(struct task_struct *task, u32 fd)
{
	/* as a number: the verifier allows no index it does not know on a pointer */
	u64 bitmap = (u64)task->files->fdt->close_on_exec;
	unsigned long word = 0;

	bpf_probe_read_kernel(&word, sizeof(word), (void *)(bitmap + fd / 64 * 8));
	return word >> (fd % 64) & 1;
}

static __always_inline bool inode_has_locks(struct inode *inode)
{
	struct file_lock_context *flc = inode->i_flctx;
	u64 head;

	if (!flc)
		return false;
	head = (u64)flc + bpf_core_field_offset(struct file_lock_context, flc_flock);
	if ((u64)BPF_CORE_READ(flc, flc_flock.next) != head)
		return true;
	head = (u64)flc + bpf_core_field_offset(struct file_lock_context, flc_posix);
	if ((u64)BPF_CORE_READ(flc, flc_posix.next) != head)
		return true;
	head = (u64)flc + bpf_core_field_offset(struct file_lock_context, flc_lease);
	return (u64)BPF_CORE_READ(flc, flc_lease.next) != head;
}

static __always_inline void fill_file(struct file_rec *r, struct task_struct *task,
				      struct file *file, u32 fd)
{
	struct inode *inode = file->f_inode;
	struct dentry *dentry = file->f_path.dentry;
	struct super_block *sb = inode->i_sb;
	struct mount *mnt = (void *)file->f_path.mnt - bpf_core_field_offset(struct mount, mnt);
	u64 name8 = 0;

	r->hdr.kind = REC_FILE;
	r->hdr.size = sizeof(*r);
	r->files = (u64)task->files;
	r->file = (u64)file;
	r->inode = (u64)inode;
	r->private_data = (u64)file->private_data;
	r->tgid = task->tgid;
	r->tid = task->pid;
	r->fd = fd;
	r->cloexec = fd_is_cloexec(task, fd);
	r->flags = file->f_flags;
	r->fmode = file->f_mode;
	r->mode = inode->i_mode;
	r->pos = file->f_pos;
	r->size = inode->i_size;
	r->ino = inode->i_ino;
	r->refs = file_refs(file);
	r->magic = sb->s_magic;
	r->dev = sb->s_dev;
	r->rdev = inode->i_rdev;
	r->nlink = inode->i_nlink;
	r->mnt_id = BPF_CORE_READ(mnt, mnt_id);
	fill_owner(r, file);
	r->has_locks = inode_has_locks(inode);
	__builtin_memset(r->name, 0, sizeof(r->name));
	bpf_probe_read_kernel_str(r->name, sizeof(r->name), dentry->d_name.name);
	__builtin_memcpy(&name8, r->name, sizeof(name8));
	r->kind = file_kind_of(r->magic, r->mode, r->nlink, name8);
}

static __always_inline long write_eventfd(struct seq_file *seq, void *ctx)
{
	struct eventfd_ctx *eventfd = ctx;
	struct eventfd_rec *r = &out_eventfd;

	r->hdr.kind = REC_EVENTFD;
	r->hdr.size = sizeof(*r);
	r->count = BPF_CORE_READ(eventfd, count);
	r->flags = BPF_CORE_READ(eventfd, flags);
	return bpf_seq_write(seq, r, sizeof(*r));
}

struct {
	u64 bufs;
	u64 bytes;
	u32 tail;
	u32 mask;
} pipe_walk;

static long pipe_step(u64 index, void *ctx)
{
	u64 slot = (pipe_walk.tail + index) & pipe_walk.mask;
	struct pipe_buffer *buf =
		(void *)pipe_walk.bufs + slot * bpf_core_type_size(struct pipe_buffer);

	pipe_walk.bytes += BPF_CORE_READ(buf, len);
	return 0;
}

static __always_inline long write_pipe(struct seq_file *seq, struct pipe_inode_info *pipe)
{
	struct pipe_rec *r = &out_pipe;
	u32 head;

	if (!pipe)
		return 0;
	head = BPF_CORE_READ(pipe, head);
	pipe_walk.tail = BPF_CORE_READ(pipe, tail);
	pipe_walk.bufs = (u64)BPF_CORE_READ(pipe, bufs);
	pipe_walk.bytes = 0;
	r->hdr.kind = REC_PIPE;
	r->hdr.size = sizeof(*r);
	r->pipe = (u64)pipe;
	r->slots = BPF_CORE_READ(pipe, ring_size);
	r->used = head - pipe_walk.tail;
	r->readers = BPF_CORE_READ(pipe, readers);
	r->writers = BPF_CORE_READ(pipe, writers);
	pipe_walk.mask = r->slots - 1;
	if (r->used && r->used <= MAX_PIPE_SLOTS)
		bpf_loop(r->used, pipe_step, NULL, 0);
	r->bytes = pipe_walk.bytes;
	return bpf_seq_write(seq, r, sizeof(*r));
}

static __always_inline long write_timerfd(struct seq_file *seq, void *ctx)
{
	struct timerfd_ctx *timerfd = ctx;
	struct timerfd_rec *r = &out_timerfd;

	r->hdr.kind = REC_TIMERFD;
	r->hdr.size = sizeof(*r);
	r->clock = BPF_CORE_READ(timerfd, clockid);
	r->settime_flags = BPF_CORE_READ(timerfd, settime_flags);
	r->interval_ns = BPF_CORE_READ(timerfd, tintv);
	r->expired = BPF_CORE_READ(timerfd, expired);
	r->ticks = BPF_CORE_READ(timerfd, ticks);
	r->expires_ns = 0;
	if (r->clock == CLOCK_REALTIME_ALARM || r->clock == CLOCK_BOOTTIME_ALARM) {
		r->base_clock = r->clock == CLOCK_REALTIME_ALARM ? CLOCK_REALTIME : CLOCK_BOOTTIME;
		if (BPF_CORE_READ(timerfd, t.alarm.state) & ALARMTIMER_STATE_ENQUEUED)
			r->expires_ns = BPF_CORE_READ(timerfd, t.alarm.node.expires);
	} else {
		r->base_clock = BPF_CORE_READ(timerfd, t.tmr.base, clockid);
		if (BPF_CORE_READ(timerfd, t.tmr.state) & HRTIMER_STATE_ENQUEUED)
			r->expires_ns = BPF_CORE_READ(timerfd, t.tmr.node.expires);
	}
	return bpf_seq_write(seq, r, sizeof(*r));
}

static __always_inline long write_signalfd(struct seq_file *seq, void *ctx)
{
	struct signalfd_ctx *signalfd = ctx;
	struct signalfd_rec *r = &out_signalfd;

	r->hdr.kind = REC_SIGNALFD;
	r->hdr.size = sizeof(*r);
	/* the kernel keeps the complement */
	r->mask = ~BPF_CORE_READ(signalfd, sigmask.sig[0]);
	return bpf_seq_write(seq, r, sizeof(*r));
}

static __always_inline long write_pidfd(struct seq_file *seq, struct file *file)
{
	struct pidfd_rec *r = &out_pidfd;
	struct pid *pid = file->private_data;

	/* since 6.9 a pidfd has an inode of its own, which holds the struct pid */
	if (file->f_inode->i_sb->s_magic == PID_FS_MAGIC)
		pid = file->f_inode->i_private;
	r->hdr.kind = REC_PIDFD;
	r->hdr.size = sizeof(*r);
	r->pid = pid_nr(pid);
	return bpf_seq_write(seq, r, sizeof(*r));
}

static __always_inline void fill_unix(struct sock_rec *r, struct sock *sk)
{
	struct unix_sock *unix = (void *)sk;
	struct unix_address *addr = BPF_CORE_READ(unix, addr);
	struct sock *peer = BPF_CORE_READ(unix, peer);
	struct file *peer_file;

	r->peer = (u64)peer;
	if (peer) {
		/* a connection still in an accept queue has no socket or file yet */
		peer_file = BPF_CORE_READ(peer, sk_socket, file);
		if (peer_file)
			r->peer_ino = BPF_CORE_READ(peer_file, f_inode, i_ino);
	}
	r->inflight = BPF_CORE_READ(unix, scm_stat.nr_fds.counter);
	if (addr) {
		int len = BPF_CORE_READ(addr, len) - (int)sizeof(u16);
		char *path = (char *)addr + bpf_core_field_offset(struct unix_address, name) +
			     sizeof(u16);

		if (len > 0 && len <= TRK_SUN_PATH_LEN) {
			r->path_len = len;
			bpf_probe_read_kernel(r->path, sizeof(r->path), path);
		}
	}
}

static __always_inline void fill_inet(struct sock_rec *r, struct sock *sk)
{
	u16 dport = sk->__sk_common.skc_dport;

	r->local_port = sk->__sk_common.skc_num;
	r->remote_port = dport >> 8 | dport << 8;
	if (r->family == AF_INET) {
		bpf_core_read(&r->local_addr, 4, &sk->__sk_common.skc_rcv_saddr);
		bpf_core_read(&r->remote_addr, 4, &sk->__sk_common.skc_daddr);
	} else if (bpf_core_field_exists(sk->__sk_common.skc_v6_daddr)) {
		bpf_core_read(&r->local_addr, 16, &sk->__sk_common.skc_v6_rcv_saddr);
		bpf_core_read(&r->remote_addr, 16, &sk->__sk_common.skc_v6_daddr);
	}
}

static __always_inline long write_socket(struct seq_file *seq, struct file *file)
{
	struct socket *socket = bpf_sock_from_file(file);
	struct sock_rec *r = &out_sock;
	struct sock *sk;

	if (!socket)
		return 0;
	sk = socket->sk;
	if (!sk)
		return 0;
	__builtin_memset(r, 0, sizeof(*r));
	r->hdr.kind = REC_SOCKET;
	r->hdr.size = sizeof(*r);
	r->sock = (u64)sk;
	r->ino = file->f_inode->i_ino;
	r->cookie = sk->__sk_common.skc_cookie.counter;
	r->family = sk->__sk_common.skc_family;
	r->type = sk->sk_type;
	r->protocol = sk->sk_protocol;
	r->state = sk->__sk_common.skc_state;
	r->shutdown = sk->sk_shutdown;
	if (BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_reuse))
		r->flags |= SOCK_REUSEADDR;
	if (BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_reuseport))
		r->flags |= SOCK_REUSEPORT;
	if (BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_ipv6only))
		r->flags |= SOCK_V6ONLY;
	if (sk->sk_filter)
		r->flags |= SOCK_HAS_FILTER;
	r->bound_ifindex = sk->__sk_common.skc_bound_dev_if;
	r->mark = sk->sk_mark;
	r->priority = sk->sk_priority;
	r->rcvbuf = sk->sk_rcvbuf;
	r->sndbuf = sk->sk_sndbuf;
	r->ack_backlog = sk->sk_ack_backlog;
	r->max_ack_backlog = sk->sk_max_ack_backlog;
	r->rcv_qlen = sk->sk_receive_queue.qlen;
	r->rmem = sk->sk_backlog.rmem_alloc.counter;
	r->wmem = sk->sk_wmem_queued;
	r->err = sk->sk_err;
	r->net_ns = sk->__sk_common.skc_net.net->ns.inum;
	if (bpf_core_field_exists(sk->sk_cgrp_data))
		r->cgroup_id = sk->sk_cgrp_data.cgroup->kn->id;
	if (r->family == AF_UNIX)
		fill_unix(r, sk);
	else if (r->family == AF_INET || r->family == AF_INET6)
		fill_inet(r, sk);
	return bpf_seq_write(seq, r, sizeof(*r));
}

/* In-order walk of an epoll instance's tree, one edge per step: 6.12 finds a loop
 * inside a bpf_loop callback too complex. prev tells where the walk came from. */
struct {
	u64 node;
	u64 prev;
	u64 file;
} epoll_walk;

static __always_inline void emit_epoll_item(struct rb_node *node)
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
	side_write(r, sizeof(*r));
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
		emit_epoll_item(node);
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
	side_write(r, sizeof(*r));
	return 0;
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
	/* a lease has a struct of its own since 6.9, without a range */
	if (lock_walk.class != LOCK_LEASE) {
		r->start = BPF_CORE_READ(lock, fl_start);
		r->end = BPF_CORE_READ(lock, fl_end);
	}
	side_write(r, sizeof(*r));
	return 0;
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

SEC("iter/task_file")
int iter_files(struct bpf_iter__task_file *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct task_struct *task = ctx->task;
	struct file *file = ctx->file;
	struct file_rec *r = &out_file;
	long failed = 0;

	if (!task || !file || !in_scope(task))
		return 0;
	fill_file(r, task, file, ctx->fd);
	if (bpf_seq_write(seq, r, sizeof(*r)))
		return 0;
	switch (r->kind) {
	case FILE_EVENTFD:
		failed = write_eventfd(seq, file->private_data);
		break;
	case FILE_PIPE:
	case FILE_FIFO:
		failed = write_pipe(seq, file->f_inode->i_pipe);
		break;
	case FILE_TIMERFD:
		failed = write_timerfd(seq, file->private_data);
		break;
	case FILE_SIGNALFD:
		failed = write_signalfd(seq, file->private_data);
		break;
	case FILE_PIDFD:
		failed = write_pidfd(seq, file);
		break;
	case FILE_SOCKET:
		failed = write_socket(seq, file);
		break;
	}
	/* side records last: a seq_write that did not fit has this object visited again */
	if (failed)
		return 0;
	if (r->kind == FILE_EPOLL && (want & WANT_EPOLL) && first_visit((u64)file))
		emit_epoll(file);
	if (r->kind == FILE_INOTIFY && (want & WANT_WATCHES) && first_visit((u64)file))
		emit_watches(file);
	if (r->has_locks && (want & WANT_LOCKS) && first_visit((u64)file->f_inode))
		emit_locks(file->f_inode);
	return 0;
}
