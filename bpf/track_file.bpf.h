/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Descriptor tables. Where the order of two changes matters, the hook is before
 * publication (fd_install), inside files->file_lock (close, dup2), or on a table that
 * nobody else can reach yet (dup_fd, do_close_on_exec). */

#define O_CLOEXEC 02000000
#define CLOSE_RANGE_UNSHARE 2
#define CLOSE_RANGE_CLOEXEC 4
#define MAX_ERRNO 4095
#define IS_ERR_OR_NULL(ptr) (!(ptr) || (u64)(ptr) >= (u64)-MAX_ERRNO)

static __always_inline struct sock *sock_of(struct file *file)
{
	struct socket *socket = BPF_CORE_READ(file, private_data);

	return BPF_CORE_READ(socket, sk);
}

/* Reports what descriptor fd refers to from now on; cloexec < 0 says: as the table has it. */
static __always_inline void send_install(struct files_struct *files, u32 fd, struct file *file,
					 int cloexec)
{
	struct inode *inode = BPF_CORE_READ(file, f_inode);
	u64 name8 = 0, magic = BPF_CORE_READ(inode, i_sb, s_magic);
	struct install_event *e;

	e = EVENT(struct install_event, EVENT_FD_INSTALL, files, CLASS_FILES);
	if (!e)
		return;
	bpf_probe_read_kernel(&name8, sizeof(name8),
			      BPF_CORE_READ(file, f_path.dentry, d_name.name));
	/* bytes behind the end of a short name */
	for (int i = 0; i < 64; i += 8) {
		if (!(name8 >> i & 0xff)) {
			name8 &= (1ULL << i) - 1;
			break;
		}
	}
	e->files = (u64)files;
	e->file = (u64)file;
	e->ino = BPF_CORE_READ(inode, i_ino);
	e->dev = BPF_CORE_READ(inode, i_sb, s_dev);
	e->fd = fd;
	e->mode = BPF_CORE_READ(inode, i_mode);
	e->flags = BPF_CORE_READ(file, f_flags);
	e->kind = file_kind_of(magic, e->mode, BPF_CORE_READ(inode, i_nlink), name8);
	e->cloexec = cloexec < 0 ? cloexec_at(files, fd) : cloexec;
	e->sock = 0;
	e->empty_epoll = 0;
	e->pad = 0;
	if (e->kind == FILE_SOCKET) {
		e->sock = (u64)sock_of(file);
	} else if (e->kind == FILE_EPOLL) {
		struct eventpoll *ep = BPF_CORE_READ(file, private_data);

		e->empty_epoll = !BPF_CORE_READ(ep, rbr.rb_root.rb_node);
	}
	bpf_ringbuf_submit(e, 0);
}

static __always_inline void send_fd(u32 kind, struct files_struct *files, u32 fd, u32 last,
				    u64 since)
{
	struct fd_event *e = EVENT(struct fd_event, kind, files, CLASS_FILES);

	if (!e)
		return;
	e->files = (u64)files;
	e->since = since;
	e->fd = fd;
	e->last = last;
	e->cloexec = kind == EVENT_FD_CLOEXEC ? cloexec_at(files, fd) : 0;
	e->pad = 0;
	bpf_ringbuf_submit(e, 0);
}

SEC("fentry/fd_install")
int BPF_PROG(fd_install, unsigned int fd, struct file *file)
{
	struct files_struct *files;

	if (!current_tracked())
		return 0;
	files = current_files();
	send_install(files, fd, file, -1);
	if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) == S_IFSOCK)
		send_socket(sock_of(file), BPF_CORE_READ(file, f_inode, i_ino));
	return 0;
}

static __always_inline int closed(struct files_struct *files, u32 fd, struct file *file)
{
	if (!IS_ERR_OR_NULL(file) && current_tracked())
		send_fd(EVENT_FD_CLOSE, files, fd, fd, 0);
	return 0;
}

/* up to 6.4 */
SEC("fexit/pick_file")
int BPF_PROG(pick_file, struct files_struct *files, unsigned int fd, struct file *file)
{
	return closed(files, fd, file);
}

SEC("fexit/file_close_fd_locked")
int BPF_PROG(file_close_fd_locked, struct files_struct *files, unsigned int fd, struct file *file)
{
	return closed(files, fd, file);
}

SEC("fentry/do_dup2")
int BPF_PROG(do_dup2, struct files_struct *files, struct file *file, unsigned int fd,
	     unsigned int flags)
{
	if (current_tracked()) {
		send_install(files, fd, file, !!(flags & O_CLOEXEC));
		if ((BPF_CORE_READ(file, f_inode, i_mode) & S_IFMT) == S_IFSOCK)
			send_socket(sock_of(file), BPF_CORE_READ(file, f_inode, i_ino));
	}
	return 0;
}

/* -EBUSY: the number was reserved by an open() under way. Else, the flag is said once
 * more: one set at the same time from another thread may have been read too early. */
SEC("fexit/do_dup2")
int BPF_PROG(do_dup2_exit, struct files_struct *files, struct file *file, unsigned int fd,
	     unsigned int flags, int ret)
{
	if (!current_tracked())
		return 0;
	if (ret < 0)
		say_stale((u64)files, CLASS_FILES);
	else
		send_fd(EVENT_FD_CLOEXEC, files, fd, fd, 0);
	return 0;
}

SEC("fexit/set_close_on_exec")
int BPF_PROG(set_close_on_exec, unsigned int fd)
{
	if (current_tracked())
		send_fd(EVENT_FD_CLOEXEC, current_files(), fd, fd, 0);
	return 0;
}

SEC("fentry/do_close_on_exec")
int BPF_PROG(do_close_on_exec, struct files_struct *files)
{
	if (current_tracked())
		send_fd(EVENT_EXEC_CLOSE, files, 0, 0, 0);
	return 0;
}

SEC("fentry/__close_range")
int BPF_PROG(close_range, unsigned int fd, unsigned int last, unsigned int flags)
{
	struct call *call;

	if (!(flags & CLOSE_RANGE_CLOEXEC) || !current_tracked())
		return 0;
	call = begin_call();
	if (call)
		call->since = last_seq;
	return 0;
}

SEC("fexit/__close_range")
int BPF_PROG(close_range_exit, unsigned int fd, unsigned int last, unsigned int flags, int ret)
{
	u64 id = bpf_get_current_pid_tgid();
	struct call *call;

	if (!flags || ret || !current_tracked())
		return 0;
	if (flags & CLOSE_RANGE_UNSHARE)
		files_switched();
	if (flags & CLOSE_RANGE_CLOEXEC) {
		call = bpf_map_lookup_elem(&calls, &id);
		send_fd(EVENT_RANGE_CLOEXEC, current_files(), fd, last, call ? call->since : 0);
		bpf_map_delete_elem(&calls, &id);
	}
	return 0;
}

struct word_walk {
	struct files_struct *files;
	struct fdtable *fdt;
};

/* bpf_loop callback: reports 64 descriptors of a table nobody else can reach yet. */
static long send_word(u64 index, void *ctx)
{
	struct word_walk *walk = ctx;
	struct files_struct *files = walk->files;
	struct fdtable *fdt = walk->fdt;
	unsigned long open = 0, cloexec = 0;
	struct word_event *e;
	u32 word = index;

	bpf_probe_read_kernel(&open, sizeof(open), BPF_CORE_READ(fdt, open_fds) + word);
	if (!open)
		return 0;
	e = EVENT(struct word_event, EVENT_FILES_WORD, files, CLASS_FILES);
	if (!e)
		return 0;
	bpf_probe_read_kernel(&cloexec, sizeof(cloexec), BPF_CORE_READ(fdt, close_on_exec) + word);
	e->files = (u64)files;
	e->open = open;
	e->cloexec = cloexec;
	e->base = word * TRK_WORD_FDS;
	e->pad = 0;
	bpf_probe_read_kernel(e->file, sizeof(e->file),
			      BPF_CORE_READ(fdt, fd) + word * TRK_WORD_FDS);
	bpf_ringbuf_submit(e, 0);
	return 0;
}

/* Its arguments differ among stable versions, its result does not. */
SEC("fexit/dup_fd")
int BPF_PROG(dup_fd)
{
	struct files_struct *files;
	struct word_walk walk;
	struct fdtable *fdt;
	u64 ret = 0;

	if (!current_tracked() || bpf_get_func_ret(ctx, &ret) || IS_ERR_OR_NULL(ret))
		return 0;
	files = (struct files_struct *)ret;
	fdt = BPF_CORE_READ(files, fdt);
	walk.files = files;
	walk.fdt = fdt;
	send_fd(EVENT_FILES_NEW, files, 0, 0, 0);
	bpf_loop((BPF_CORE_READ(fdt, max_fds) + 63) / 64, send_word, &walk, 0);
	return 0;
}
