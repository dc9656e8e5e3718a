/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of kernel.h, which explains it: POSIX message queues (ipc/mqueue.c, ipc/msgutil.c). */
#ifndef TRACKER_KERNEL_MQUEUE_H
#define TRACKER_KERNEL_MQUEUE_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct lockref {
	int count;
};
struct dentry___counted {
	struct lockref d_lockref;
};
struct task_struct___exec {
	struct hlist_node pid_links[4];
	u64 self_exec_id;
};
struct ucounts {
	kuid_t uid;
};
struct mq_attr {
	long mq_maxmsg;
	long mq_msgsize;
	long mq_curmsgs;
};
struct sigevent {
	union {
		void *sival_ptr;
	} sigev_value;
	int sigev_signo;
	int sigev_notify;
};
struct posix_msg_tree_node {
	struct rb_node rb_node;
	struct list_head msg_list;
	int priority;
};
struct mqueue_inode_info {
	struct inode vfs_inode;
	struct rb_root msg_tree;
	struct mq_attr attr;
	struct sigevent notify;
	struct pid *notify_owner;
	u32 notify_self_exec_id;
	struct ucounts *ucounts;
	unsigned long qsize;
};
/* the text follows, up to the end of a page, and goes on behind each segment's header */
struct msg_msgseg {
	struct msg_msgseg *next;
};
struct msg_msg {
	struct list_head m_list;
	unsigned long m_ts;
	struct msg_msgseg *next;
};

#pragma clang attribute pop

#endif
