/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* iter/task_file: descriptors, and what the kernel objects behind them hold. */

#define MAX_PIPE_SLOTS (1 << 20)

struct file_rec out_file;
struct eventfd_rec out_eventfd;
struct pipe_rec out_pipe;
struct timerfd_rec out_timerfd;
struct signalfd_rec out_signalfd;
struct pidfd_rec out_pidfd;

/* As F_GETOWN_EX says it: nobody once all that had the id have ended. */
static __always_inline u32 owner_nr(struct fown_struct *owner)
{
	u64 pid = (u64)BPF_CORE_READ(owner, pid), first = 0;
	u32 type = BPF_CORE_READ(owner, pid_type);

	if (pid)
		bpf_probe_read_kernel(&first, sizeof(first),
				      (void *)(pid + bpf_core_field_offset(struct pid, tasks) +
					       (type & 3) * sizeof(first)));
	return first ? pid_nr((struct pid *)pid) : 0;
}

static __always_inline void fill_owner(struct file_rec *r, struct file *file)
{
	struct fown_struct *owner = file_owner(true, file);

	r->owner_pid = 0;
	r->owner_type = 0;
	r->owner_sig = 0;
	r->owner_uid = 0;
	r->owner_euid = 0;
	if (!owner)
		return;
	r->owner_pid = owner_nr(owner);
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
	r->hints = 0;
	r->write_hint = 0;
	if ((r->mode & S_IFMT) == S_IFREG)
		fill_hints(r, file, inode, sb);
	else if ((r->mode & S_IFMT) == S_IFDIR && has_dnotify(inode, file))
		r->hints = HINT_NOTIFY;
	__builtin_memset(r->name, 0, sizeof(r->name));
	bpf_probe_read_kernel_str(r->name, sizeof(r->name), dentry->d_name.name);
	__builtin_memcpy(&name8, r->name, sizeof(name8));
	r->kind = file_kind_of(r->magic, r->mode, r->nlink, name8);
	if (r->kind == FILE_INOTIFY && has_events(file))
		r->hints |= HINT_EVENTS;
	if (r->kind == FILE_FANOTIFY)
		r->hints |= fanotify_hints(file);
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
	if (r->clock == CLOCK_REALTIME_ALARM || r->clock == CLOCK_BOOTTIME_ALARM) {
		r->base_clock = r->clock == CLOCK_REALTIME_ALARM ? CLOCK_REALTIME : CLOCK_BOOTTIME;
		r->expires_ns = alarm_expires(&timerfd->t.alarm);
	} else {
		r->base_clock = BPF_CORE_READ(timerfd, t.tmr.base, clockid);
		r->expires_ns = hrtimer_expires(&timerfd->t.tmr);
	}
	/* one that is not armed may have fired since */
	if (!r->expires_ns) {
		r->expired = BPF_CORE_READ(timerfd, expired);
		r->ticks = BPF_CORE_READ(timerfd, ticks);
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
	/* a struct pid keeps its number when nobody has it any more */
	r->pid = BPF_CORE_READ(pid, tasks[PIDTYPE_TGID].first) ? pid_nr(pid) : 0;
	return bpf_seq_write(seq, r, sizeof(*r));
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
	if (want & WANT_MQUEUE_DATA) {
		if (is_mqueue(file))
			emit_mqueue(file);
		return 0;
	}
	if (want & WANT_WAITING) {
		emit_waiting(file);
		return 0;
	}
	if (want & WANT_CONNECTIONS) {
		write_connection(seq, file);
		return 0;
	}
	fill_file(r, task, file, ctx->fd);
	if (bpf_seq_write(seq, r, sizeof(*r)))
		return 0;
	switch (r->kind) {
	case FILE_EPOLL:
		failed = write_epoll(seq, file->private_data);
		break;
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
	case FILE_REGULAR:
		if (bpf_core_type_exists(struct psi_trigger))
			failed = write_pressure(seq, r, file);
		break;
	case FILE_IO_URING:
		if (bpf_core_type_exists(struct io_ring_ctx))
			failed = write_uring(seq, file->private_data);
		break;
	case FILE_SOCKET:
		failed = write_socket(seq, file);
		break;
	case FILE_MQUEUE:
		failed = write_mqueue(seq, file);
		break;
	case FILE_CHAR_DEVICE:
		if (r->rdev == PTMX_DEV || r->rdev >> 20 == PTS_MAJOR)
			failed = write_tty(seq, file, r->rdev == PTMX_DEV);
		break;
	}
	/* side records last: a seq_write that did not fit has this object visited again */
	if (failed)
		return 0;
	if (r->kind == FILE_EPOLL && (want & WANT_EPOLL) && first_visit((u64)file))
		emit_epoll(file);
	if (r->kind == FILE_INOTIFY && (want & WANT_WATCHES) && first_visit((u64)file))
		emit_watches(file);
	if (r->kind == FILE_CHAR_DEVICE && (want & WANT_TTY_DATA))
		emit_tty(r->rdev, file);
	if (r->has_locks && (want & WANT_LOCKS) && first_visit((u64)file->f_inode))
		emit_locks(file->f_inode);
	return 0;
}
