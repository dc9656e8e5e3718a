/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Descriptor tables. Where the order of two changes matters, the hook is before
 * publication (fd_install), inside files->file_lock (close, dup2), or on a table that
 * nobody else can reach yet (dup_fd, do_close_on_exec). */

#define O_CLOEXEC 02000000
#define F_SETFL 4
#define F_SETSIG 10
#define FIONBIO 0x5421
#define FIOASYNC 0x5452
#define CLOSE_RANGE_UNSHARE 2
#define CLOSE_RANGE_CLOEXEC 4
#define MAX_ERRNO 4095
#define IS_ERR_OR_NULL(ptr) (!(ptr) || (u64)(ptr) >= (u64)-MAX_ERRNO)

/* The first eight characters of a file's name, padded with zeroes. */
static __always_inline u64 anon_name8(struct file *file)
{
	u64 name8 = 0;

	bpf_probe_read_kernel(&name8, sizeof(name8),
			      BPF_CORE_READ(file, f_path.dentry, d_name.name));
	/* bytes behind the end of a short name */
	for (int i = 0; i < 64; i += 8) {
		if (!(name8 >> i & 0xff)) {
			name8 &= (1ULL << i) - 1;
			break;
		}
	}
	return name8;
}

/* Fills all but the header, after the number was taken. */
static __always_inline void fill_install(const bool typed, struct install_event *e,
					 struct files_struct *files, u32 fd, struct file *file,
					 struct inode *inode, struct super_block *sb, u32 mode,
					 int cloexec)
{
	e->files = (u64)files;
	e->file = (u64)file;
	e->ino = MEMBER(typed, inode, i_ino);
	e->object = 0;
	e->dev = MEMBER(typed, sb, s_dev);
	e->fd = fd;
	e->cloexec = cloexec < 0 ? cloexec_at(typed, files, fd) : cloexec;
	e->mode = mode;
	e->flags = MEMBER(typed, file, f_flags);
	e->empty = 0;
	e->pad = 0;
}

static __always_inline void send_install_socket(const bool typed, struct files_struct *files,
						u32 fd, struct file *file, struct inode *inode,
						u32 mode, struct sock *sk, int cloexec, bool fresh)
{
	struct install_socket_event *e;

	e = reserve(files, CLASS_FILES, sizeof(*e));
	if (!e)
		return;
	number(&e->install.ev, EVENT_FD_INSTALL_SOCKET, sizeof(*e));
	if (!made_inside(typed, sk))
		adopt(sk, e->install.ev.seq);
	fill_install(typed, &e->install, files, fd, file, inode, MEMBER(typed, inode, i_sb), mode,
		     cloexec);
	e->install.empty = fresh;
	e->install.kind = FILE_SOCKET;
	e->install.object = (u64)sk;
	fill_socket(typed, &e->socket, sk, e->install.ino);
	submit(e);
}

/* Whether nothing refers to a file but who installs it now: it was just made. Whatever
 * installs another one has taken a reference for the descriptor by then. */
static __always_inline bool just_made(struct file *file)
{
	struct file___ref *ref = (void *)file;

	if (bpf_core_field_exists(ref->f_ref))
		return !ref->f_ref.refcnt.counter;
	return file->f_count.counter == 1;
}

/* Reports what descriptor fd refers to from now on; cloexec < 0 says: as the table has it.
 * `typed` is about the table and the file. */
static __always_inline void send_install(const bool typed, struct files_struct *files, u32 fd,
					 struct file *file, int cloexec, bool fresh)
{
	struct inode *inode = MEMBER(typed, file, f_inode);
	u32 mode = MEMBER(typed, inode, i_mode);
	struct super_block *sb;
	struct install_event *e;
	u64 magic, name8 = 0;
	u32 nlink = 1;

	if ((mode & S_IFMT) == S_IFSOCK) {
		struct sock *sk = typed ? typed_sock_of(file) : sock_of_file(file);

		if (sk) {
			send_install_socket(typed, files, fd, file, inode, mode, sk, cloexec,
					    fresh);
			return;
		}
	}
	e = EVENT(struct install_event, EVENT_FD_INSTALL, files, CLASS_FILES);
	if (!e)
		return;
	sb = MEMBER(typed, inode, i_sb);
	fill_install(typed, e, files, fd, file, inode, sb, mode, cloexec);
	magic = MEMBER(typed, sb, s_magic);
	/* few kinds are told by more than this */
	if (magic == TMPFS_MAGIC || magic == HUGETLBFS_MAGIC)
		nlink = MEMBER(typed, inode, i_nlink);
	if (magic == ANON_INODE_FS_MAGIC || !nlink)
		name8 = anon_name8(file);
	e->kind = file_kind_of(magic, mode, nlink, name8);
	e->empty = fresh;
	if (e->kind == FILE_EPOLL) {
		struct eventpoll *ep = BPF_CORE_READ(file, private_data);

		e->empty = !BPF_CORE_READ(ep, rbr.rb_root.rb_node);
	} else if (e->kind == FILE_INOTIFY) {
		struct fsnotify_group *group = BPF_CORE_READ(file, private_data);
		u64 marks = (u64)group + bpf_core_field_offset(struct fsnotify_group, marks_list);

		e->object = (u64)group;
		/* an empty list points at itself */
		e->empty = (u64)BPF_CORE_READ(group, marks_list.next) == marks;
	}
	submit(e);
}

static __always_inline void send_fd(u32 kind, struct files_struct *files, u32 fd)
{
	struct fd_event *e = EVENT(struct fd_event, kind, files, CLASS_FILES);

	if (!e)
		return;
	e->files = (u64)files;
	e->fd = fd;
	e->cloexec = kind == EVENT_FD_CLOEXEC ? cloexec_at(false, files, fd) : 0;
	e->pad = 0;
	submit(e);
}

/* Status flags and who is told of readiness. */
static __always_inline void send_ofd(struct file *file)
{
	struct fown_struct *owner;
	struct ofd_event *e;

	e = EVENT(struct ofd_event, EVENT_OFD, file, CLASS_FILES);
	if (!e)
		return;
	owner = file_owner(false, file);
	e->file = (u64)file;
	e->flags = BPF_CORE_READ(file, f_flags);
	e->owner_pid = owner ? pid_nr(BPF_CORE_READ(owner, pid)) : 0;
	e->owner_type = owner ? BPF_CORE_READ(owner, pid_type) : 0;
	e->owner_sig = owner ? BPF_CORE_READ(owner, signum) : 0;
	submit(e);
}

/* Says who is told of readiness, if anybody ever was: an installation has no room for that. The
 * type of the file must be known. */
static __always_inline void send_owner(struct file *file)
{
	struct file___embedded *embedded = (void *)file;
	bool owned;

	if (bpf_core_field_exists(embedded->f_owner.pid))
		owned = embedded->f_owner.pid || embedded->f_owner.signum;
	else
		owned = file->f_owner;
	if (owned)
		send_ofd(file);
}

APART BPF_PROG(installs, unsigned int fd, struct file *file)
{
	bool fresh = just_made(file);

	send_install(true, current_files(), fd, file, -1, fresh);
	/* nobody could ask yet for being told */
	if (!fresh)
		send_owner(file);
}

SEC("fentry/fd_install")
int BPF_PROG(fd_install)
{
	if (current_tracked())
		installs(ctx);
	return 0;
}

/* Under files->file_lock: what is there now is what is taken out. */
APART BPF_PROG(closes, struct files_struct *files, unsigned int fd)
{
	if (is_open(files, fd))
		send_fd(EVENT_FD_CLOSE, files, fd);
}

/* up to 6.4 */
SEC("fentry/pick_file")
int BPF_PROG(pick_file)
{
	if (current_tracked())
		closes(ctx);
	return 0;
}

SEC("fentry/file_close_fd_locked")
int BPF_PROG(file_close_fd_locked)
{
	if (current_tracked())
		closes(ctx);
	return 0;
}

/* Under files->file_lock, so what decides between success and -EBUSY can be seen: a
 * number that an open() under way has reserved and not filled yet is left alone. */
APART BPF_PROG(replaces, struct files_struct *files, struct file *file, unsigned int fd,
	       unsigned int flags)
{
	if (file_at(files, fd) || !bit_at(files->fdt->open_fds, fd)) {
		send_install(true, files, fd, file, !!(flags & O_CLOEXEC), false);
		send_owner(file);
	}
}

SEC("fentry/do_dup2")
int BPF_PROG(do_dup2)
{
	if (current_tracked())
		replaces(ctx);
	return 0;
}

/* The flag is said once more: one set at the same time from another thread may have been
 * read too early. */
APART BPF_PROG(replaced, struct files_struct *files, struct file *file, unsigned int fd,
	       unsigned int flags, int ret)
{
	if (ret >= 0)
		send_fd(EVENT_FD_CLOEXEC, files, fd);
}

SEC("fexit/do_dup2")
int BPF_PROG(do_dup2_exit, struct files_struct *files)
{
	if (table_shared(files) && current_tracked())
		replaced(ctx);
	return 0;
}

SEC("fexit/set_close_on_exec")
int BPF_PROG(set_close_on_exec, unsigned int fd)
{
	if (current_tracked())
		send_fd(EVENT_FD_CLOEXEC, current_files(), fd);
	return 0;
}

SEC("fentry/do_close_on_exec")
int BPF_PROG(do_close_on_exec, struct files_struct *files)
{
	if (current_tracked())
		send_fd(EVENT_EXEC_CLOSE, files, 0);
	return 0;
}

struct flag_walk {
	struct files_struct *files;
	u32 first;
	u32 pad;
};

/* bpf_loop callback: says FD_CLOEXEC of 64 descriptors. */
static long send_flags(u64 index, void *ctx)
{
	struct flag_walk *walk = ctx;
	struct files_struct *files = walk->files;
	u32 base = (walk->first / 64 + (u32)index) * 64;
	struct fd_event *e;
	u64 word = 0;

	if (base >= BPF_CORE_READ(files, fdt, max_fds))
		return 1;
	e = EVENT(struct fd_event, EVENT_CLOEXEC_WORD, files, CLASS_FILES);
	if (!e)
		return 0;
	bpf_probe_read_kernel(&word, sizeof(word),
			      BPF_CORE_READ(files, fdt, close_on_exec) + base / 64);
	e->files = (u64)files;
	e->cloexec = word;
	e->fd = base;
	e->pad = 0;
	submit(e);
	return 0;
}

SEC("fexit/__close_range")
int BPF_PROG(close_range_exit, unsigned int fd, unsigned int last, unsigned int flags, int ret)
{
	struct flag_walk walk;

	if (!flags || ret || !current_tracked())
		return 0;
	if (flags & CLOSE_RANGE_UNSHARE)
		files_switched();
	if (flags & CLOSE_RANGE_CLOEXEC && last >= fd) {
		walk.files = current_files();
		walk.first = fd;
		walk.pad = 0;
		bpf_loop(last / 64 - fd / 64 + 1, send_flags, &walk, 0);
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
	submit(e);
	return 0;
}

static __always_inline void send_copy(u32 kind)
{
	struct task_struct *task = bpf_get_current_task_btf();
	struct object_event *e = EVENT(struct object_event, kind, task, CLASS_FILES);

	if (!e)
		return;
	e->object = (u64)task;
	e->class = CLASS_TASK;
	e->pad = 0;
	submit(e);
}

/* What other threads close from now on may be in the copy, of which word comes only when it
 * is complete: this may take long, and nothing else tells what these files are. */
SEC("fentry/dup_fd")
int BPF_PROG(dup_fd_enter, struct files_struct *files)
{
	if (table_shared(files) && current_tracked())
		send_copy(EVENT_FILES_COPY);
	return 0;
}

/* Its other arguments differ among stable versions, its result does not. */
SEC("fexit/dup_fd")
int BPF_PROG(dup_fd, struct files_struct *from)
{
	struct files_struct *files;
	struct word_walk walk;
	struct fdtable *fdt;
	u64 ret = 0;

	if (!current_tracked())
		return 0;
	if (!bpf_get_func_ret(ctx, &ret) && !IS_ERR_OR_NULL(ret)) {
		files = (struct files_struct *)ret;
		fdt = BPF_CORE_READ(files, fdt);
		walk.files = files;
		walk.fdt = fdt;
		send_fd(EVENT_FILES_NEW, files, 0);
		bpf_loop((BPF_CORE_READ(fdt, max_fds) + 63) / 64, send_word, &walk, 0);
	}
	/* if the others have ended meanwhile, user space waits in vain for some time */
	if (table_shared(from))
		send_copy(EVENT_FILES_COPIED);
	return 0;
}

/* A fork that fails after it copied the table drops the copy. */
SEC("fentry/exit_files")
int BPF_PROG(exit_files, struct task_struct *task)
{
	struct files_struct *files;

	if (task == bpf_get_current_task_btf() || !current_tracked())
		return 0;
	files = BPF_CORE_READ(task, files);
	if (files)
		send_fd(EVENT_FILES_GONE, files, 0);
	return 0;
}

SEC("fexit/do_fcntl")
int BPF_PROG(fcntl, int fd, unsigned int cmd, unsigned long arg, struct file *file)
{
	if ((cmd == F_SETFL || cmd == F_SETSIG) && current_tracked())
		send_ofd(file);
	return 0;
}

SEC("fexit/do_vfs_ioctl")
int BPF_PROG(vfs_ioctl, struct file *file, unsigned int fd, unsigned int cmd)
{
	if ((cmd == FIONBIO || cmd == FIOASYNC) && current_tracked())
		send_ofd(file);
	return 0;
}

/* fcntl(2) and ioctl(2) alike */
SEC("fexit/__f_setown")
int BPF_PROG(f_setown, struct file *file)
{
	if (current_tracked())
		send_ofd(file);
	return 0;
}
