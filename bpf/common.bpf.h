/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * Helpers every BPF object of the tracker uses: which tasks are watched, and what
 * kind of thing an open file is. Include after defining nothing; it brings in
 * events.h, kernel.h and libbpf's headers.
 */
#ifndef TRACKER_COMMON_BPF_H
#define TRACKER_COMMON_BPF_H

#include "events.h"
#include "kernel.h"
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd

#define S_IFMT 0170000
#define FMODE_WRITE 2
#define S_IFSOCK 0140000
#define S_IFLNK 0120000
#define S_IFREG 0100000
#define S_IFBLK 0060000
#define S_IFDIR 0040000
#define S_IFCHR 0020000
#define S_IFIFO 0010000

/* include/uapi/linux/magic.h and the kernel's private ones */
#define ANON_INODE_FS_MAGIC 0x09041934
#define HUGETLBFS_MAGIC 0x958458f6
#define CGROUP2_SUPER_MAGIC 0x63677270
#define MQUEUE_MAGIC 0x19800202
#define NSFS_MAGIC 0x6e736673
#define PID_FS_MAGIC 0x50494446
#define PIPEFS_MAGIC 0x50495045
#define PROC_SUPER_MAGIC 0x9fa0
#define TMPFS_MAGIC 0x01021994

#define PF_KTHREAD 0x00200000
#define PF_IO_WORKER 0x00000010
#define MAX_CGROUP_DEPTH 32

/* Eight characters of a name as a number, for one-instruction comparisons. */
#define NAME8(a, b, c, d, e, f, g, h)                                                              \
	((u64)(a) | (u64)(b) << 8 | (u64)(c) << 16 | (u64)(d) << 24 | (u64)(e) << 32 |             \
	 (u64)(f) << 40 | (u64)(g) << 48 | (u64)(h) << 56)

/* Reads a member. Where the verifier knows the type of the pointer (arguments of hooks, the
 * current task, and what their members point to) that is an instruction, else it takes a helper.
 * `typed` must be constant. */
#define MEMBER(typed, pointer, member)                                                             \
	((typed) ? (pointer)->member : BPF_CORE_READ(pointer, member))
/* The same for a bit field. */
#define BITS(typed, pointer, member)                                                               \
	((typed) ? BPF_CORE_READ_BITFIELD(pointer, member)                                         \
		 : BPF_CORE_READ_BITFIELD_PROBED(pointer, member))

/* Fills the members of these names, of whatever record, with credentials of a known type. The
 * capabilities stand side by side in both, a u32[2] each before 6.3 and a u64 since:
 * inheritable, permitted, effective, bounding, ambient. */
#define FILL_CRED(rec, cred)                                                                       \
	do {                                                                                       \
		(rec)->uid = (cred)->uid.val;                                                      \
		(rec)->gid = (cred)->gid.val;                                                      \
		(rec)->euid = (cred)->euid.val;                                                    \
		(rec)->egid = (cred)->egid.val;                                                    \
		(rec)->suid = (cred)->suid.val;                                                    \
		(rec)->sgid = (cred)->sgid.val;                                                    \
		(rec)->fsuid = (cred)->fsuid.val;                                                  \
		(rec)->fsgid = (cred)->fsgid.val;                                                  \
		(rec)->securebits = (cred)->securebits;                                            \
		bpf_core_read(&(rec)->cap_inheritable, 5 * sizeof(u64), &(cred)->cap_inheritable); \
	} while (0)

/* Who is told of readiness; NULL where nobody ever was. `typed` is about the file, see MEMBER. */
static __always_inline struct fown_struct *file_owner(const bool typed, struct file *file)
{
	struct file___embedded *embedded = (void *)file;

	if (bpf_core_field_exists(embedded->f_owner.pid))
		return (void *)file + bpf_core_field_offset(struct file___embedded, f_owner);
	return MEMBER(typed, file, f_owner);
}

/* The PID a struct pid has in the initial PID namespace; 0 for none. */
static __always_inline u32 pid_nr(struct pid *pid)
{
	return pid ? (u32)BPF_CORE_READ(pid, numbers[0].nr) : 0;
}

/* The cgroup v2 id of a task's cgroup. */
static __always_inline u64 task_cgroup_id(struct task_struct *task)
{
	return BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);
}

/* Whether a cgroup is the one with this id or below it. */
static __always_inline bool cgroup_is_under(struct cgroup *cgrp, u64 id)
{
	int level = BPF_CORE_READ(cgrp, level);
	char *ancestors = (char *)cgrp + bpf_core_field_offset(struct cgroup, ancestors);

	/* from the leaf up, since the task is most often in the cgroup itself */
	for (int i = 0; i < MAX_CGROUP_DEPTH; i++) {
		struct cgroup *ancestor = NULL;

		if (level - i < 0)
			break;
		bpf_probe_read_kernel(&ancestor, sizeof(ancestor), ancestors + (level - i) * 8);
		if (BPF_CORE_READ(ancestor, kn, id) == id)
			return true;
	}
	return false;
}

static __always_inline bool task_is_under(struct task_struct *task, u64 cgroup_id)
{
	return cgroup_is_under(BPF_CORE_READ(task, cgroups, dfl_cgrp), cgroup_id);
}

/* The address as a number: the verifier knows most objects as typed pointers, with
 * which it allows no arithmetic. */
static __always_inline u64 address(const void *object)
{
	u64 number = 0;

	bpf_probe_read_kernel(&number, sizeof(number), &object);
	return number;
}

/* Whether a cgroup is one of these or below one. `typed` is about the cgroup, see MEMBER. */
static __always_inline bool is_below_root(const bool typed, struct cgroup *cgrp,
					  const volatile struct root_rec *roots, u32 count)
{
	u64 ancestors = address(cgrp) + bpf_core_field_offset(struct cgroup, ancestors);
	u32 level = MEMBER(typed, cgrp, level);
	bool below = false;

	for (u32 i = 0; i < TRK_MAX_ROOTS; i++) {
		struct cgroup *ancestor = NULL;

		if (i >= count)
			break;
		if (roots[i].level > level)
			continue;
		bpf_probe_read_kernel(&ancestor, sizeof(ancestor),
				      (void *)(ancestors + roots[i].level * 8));
		below |= BPF_CORE_READ(ancestor, kn, id) == roots[i].id;
	}
	return below;
}

/* The file kinds of the anonymous inode filesystem are told apart by the name the
 * kernel gave the dentry; nobody else can create one there. The f_op symbols would
 * do too, but only kernels built with KALLSYMS_ALL offer them. */
static __always_inline u32 anon_inode_kind(u64 name8)
{
	switch (name8) {
	case NAME8('[', 'e', 'v', 'e', 'n', 't', 'f', 'd'):
		return FILE_EVENTFD;
	case NAME8('[', 'e', 'v', 'e', 'n', 't', 'p', 'o'):
		return FILE_EPOLL;
	case NAME8('[', 't', 'i', 'm', 'e', 'r', 'f', 'd'):
		return FILE_TIMERFD;
	case NAME8('[', 's', 'i', 'g', 'n', 'a', 'l', 'f'):
		return FILE_SIGNALFD;
	case NAME8('i', 'n', 'o', 't', 'i', 'f', 'y', 0):
		return FILE_INOTIFY;
	case NAME8('[', 'f', 'a', 'n', 'o', 't', 'i', 'f'):
		return FILE_FANOTIFY;
	case NAME8('[', 'p', 'i', 'd', 'f', 'd', ']', 0):
		return FILE_PIDFD;
	case NAME8('[', 'i', 'o', '_', 'u', 'r', 'i', 'n'):
		return FILE_IO_URING;
	case NAME8('[', 'u', 's', 'e', 'r', 'f', 'a', 'u'):
		return FILE_USERFAULTFD;
	case NAME8('[', 'p', 'e', 'r', 'f', '_', 'e', 'v'):
		return FILE_PERF_EVENT;
	case NAME8('b', 'p', 'f', '-', 'm', 'a', 'p', 0):
	case NAME8('b', 'p', 'f', '-', 'p', 'r', 'o', 'g'):
	case NAME8('b', 'p', 'f', '_', 'l', 'i', 'n', 'k'):
	case NAME8('b', 'p', 'f', '_', 'i', 't', 'e', 'r'):
	case NAME8('b', 't', 'f', 0, 0, 0, 0, 0):
		return FILE_BPF;
	default:
		return FILE_OTHER;
	}
}

/* The kind of a file, from its superblock's magic, its mode, its link count and the
 * start of its dentry's name. */
static __always_inline u32 file_kind_of(u64 magic, u32 mode, u32 nlink, u64 name8)
{
	switch (magic) {
	case ANON_INODE_FS_MAGIC:
		return anon_inode_kind(name8);
	case PIPEFS_MAGIC:
		return FILE_PIPE;
	case PID_FS_MAGIC:
		return FILE_PIDFD;
	case NSFS_MAGIC:
		return FILE_NAMESPACE;
	}
	switch (mode & S_IFMT) {
	case S_IFREG:
		if (magic == MQUEUE_MAGIC)
			return FILE_MQUEUE;
		if ((magic == TMPFS_MAGIC || magic == HUGETLBFS_MAGIC) && nlink == 0 &&
		    (name8 & 0xffffffffffffULL) == NAME8('m', 'e', 'm', 'f', 'd', ':', 0, 0))
			return FILE_MEMFD;
		return FILE_REGULAR;
	case S_IFDIR:
		return FILE_DIRECTORY;
	case S_IFCHR:
		return FILE_CHAR_DEVICE;
	case S_IFBLK:
		return FILE_BLOCK_DEVICE;
	case S_IFLNK:
		return FILE_SYMLINK;
	case S_IFIFO:
		return FILE_FIFO;
	case S_IFSOCK:
		return FILE_SOCKET;
	default:
		return FILE_OTHER;
	}
}

#endif
