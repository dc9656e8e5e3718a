/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * The kernel types and fields the BPF programs use, and no others. Layouts here
 * are placeholders: preserve_access_index makes libbpf relocate every access to
 * the running kernel's own layout, found in its BTF. A field that exists only on
 * some kernels is guarded with bpf_core_field_exists() where it is used; a type
 * that changed has a second declaration with a ___suffix, which CO-RE ignores.
 */
#ifndef TRACKER_KERNEL_H
#define TRACKER_KERNEL_H

#include <linux/types.h>
#include <linux/bpf.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;
typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

typedef struct {
	int counter;
} atomic_t;
typedef struct {
	s64 counter;
} atomic64_t;
typedef struct {
	long counter;
} atomic_long_t;
typedef struct {
	u32 val;
} kuid_t;
typedef struct {
	u32 val;
} kgid_t;
typedef struct {
	u64 val;
} kernel_cap_t;
typedef struct {
	unsigned long sig[1];
} sigset_t;

struct list_head {
	struct list_head *next;
};
struct hlist_node {
	struct hlist_node *next;
};
struct hlist_head {
	struct hlist_node *first;
};
struct rb_node {
	unsigned long __rb_parent_color;
	struct rb_node *rb_right;
	struct rb_node *rb_left;
};
struct rb_root {
	struct rb_node *rb_node;
};
struct rb_root_cached {
	struct rb_root rb_root;
};

/* Time */
struct timerqueue_node {
	s64 expires;
};
struct hrtimer_clock_base {
	s32 clockid;
};
struct hrtimer {
	struct timerqueue_node node;
	struct hrtimer_clock_base *base;
	u8 state;
};
struct alarm {
	struct timerqueue_node node;
	int type;
	int state;
};
struct cpu_timer {
	struct timerqueue_node node;
	void *head;
};
struct cpu_itimer {
	u64 expires;
	u64 incr;
};

/* Processes */
enum pid_type {
	PIDTYPE_PID,
	PIDTYPE_TGID,
	PIDTYPE_PGID,
	PIDTYPE_SID,
};
struct upid {
	int nr;
};
struct pid {
	unsigned int level;
	struct upid numbers[];
};
struct ns_common {
	unsigned int inum;
};
struct user_namespace {
	struct ns_common ns;
};
struct mnt_namespace {
	struct ns_common ns;
};
struct uts_namespace {
	struct ns_common ns;
};
struct ipc_namespace {
	struct ns_common ns;
};
struct pid_namespace {
	struct ns_common ns;
};
struct time_namespace {
	struct ns_common ns;
};
struct cgroup_namespace {
	struct ns_common ns;
};
struct net {
	struct ns_common ns;
};
struct nsproxy {
	struct uts_namespace *uts_ns;
	struct ipc_namespace *ipc_ns;
	struct mnt_namespace *mnt_ns;
	struct pid_namespace *pid_ns_for_children;
	struct net *net_ns;
	struct time_namespace *time_ns;
	struct cgroup_namespace *cgroup_ns;
};
struct group_info {
	int ngroups;
};
struct cred {
	kuid_t uid;
	kgid_t gid;
	kuid_t suid;
	kgid_t sgid;
	kuid_t euid;
	kgid_t egid;
	kuid_t fsuid;
	kgid_t fsgid;
	unsigned int securebits;
	kernel_cap_t cap_inheritable;
	kernel_cap_t cap_permitted;
	kernel_cap_t cap_effective;
	kernel_cap_t cap_bset;
	kernel_cap_t cap_ambient;
	struct user_namespace *user_ns;
	struct group_info *group_info;
};
struct sigpending {
	sigset_t signal;
};
struct sigaction {
	void *sa_handler;
	unsigned long sa_flags;
	void *sa_restorer;
	sigset_t sa_mask;
};
struct k_sigaction {
	struct sigaction sa;
};
struct sighand_struct {
	struct k_sigaction action[64];
};
struct rlimit {
	unsigned long rlim_cur;
	unsigned long rlim_max;
};
struct task_cputime_atomic {
	atomic64_t utime;
	atomic64_t stime;
	atomic64_t sum_exec_runtime;
};
struct thread_group_cputimer {
	struct task_cputime_atomic cputime_atomic;
};
struct tty_struct {
	int index;
};
/* posix_timers is a list_head up to 6.10 and an hlist_head afterwards */
struct signal_struct {
	int nr_threads;
	struct sigpending shared_pending;
	int group_exit_code;
	unsigned int flags;
	unsigned int is_child_subreaper : 1;
	s32 next_posix_timer_id;
	struct list_head posix_timers;
	struct hrtimer real_timer;
	s64 it_real_incr;
	struct cpu_itimer it[2];
	struct thread_group_cputimer cputimer;
	struct pid *pids[4];
	int leader;
	struct tty_struct *tty;
	struct rlimit rlim[TRK_NR_RLIMITS];
	short oom_score_adj;
};
struct signal_struct___atomic_id {
	atomic_t next_posix_timer_id;
};
union sigval_k {
	int sival_int;
	void *sival_ptr;
};
union __sifields {
	struct {
		int _pid;
		u32 _uid;
		union sigval_k _sigval;
	} _rt;
};
struct kernel_siginfo {
	int si_signo;
	union __sifields _sifields;
};
typedef struct kernel_siginfo kernel_siginfo_t;
struct sigqueue {
	kernel_siginfo_t info;
};
struct k_itimer {
	struct list_head list;
	s32 it_clock;
	s32 it_id;
	s64 it_overrun;
	s64 it_overrun_last;
	int it_sigev_notify;
	s64 it_interval;
	struct pid *it_pid;
	struct sigqueue *sigq;
	union {
		struct {
			struct hrtimer timer;
		} real;
		struct cpu_timer cpu;
		struct {
			struct alarm alarmtimer;
		} alarm;
	} it;
};
/* sigq is embedded since 6.13 */
struct k_itimer___embedded {
	struct sigqueue sigq;
};
struct restart_block {
	void *fn;
	union {
		struct {
			u32 *uaddr;
			u32 val;
			u32 flags;
			u32 bitset;
			u64 time;
		} futex;
		struct {
			s32 clockid;
			void *rmtp;
			u64 expires;
		} nanosleep;
		struct {
			void *ufds;
			int nfds;
			int has_timeout;
			unsigned long tv_sec;
			unsigned long tv_nsec;
		} poll;
	};
};
struct seccomp {
	int mode;
	atomic_t filter_count;
};
struct kernfs_node {
	u64 id;
};
struct cgroup {
	int level;
	struct kernfs_node *kn;
	struct cgroup *ancestors[];
};
struct css_set {
	struct cgroup *dfl_cgrp;
};
struct fs_struct {
	int umask;
};
struct task_struct {
	unsigned int __state;
	unsigned int flags;
	unsigned int ptrace;
	int static_prio;
	unsigned int rt_priority;
	unsigned int policy;
	struct mm_struct *mm;
	int exit_state;
	int exit_code;
	int exit_signal;
	int pdeath_signal;
	unsigned long jobctl;
	unsigned int personality;
	unsigned int restore_sigmask : 1;
	unsigned int frozen : 1;
	unsigned long atomic_flags;
	struct restart_block restart_block;
	int pid;
	int tgid;
	struct task_struct *real_parent;
	struct task_struct *parent;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	int *set_child_tid;
	int *clear_child_tid;
	u64 start_boottime;
	const struct cred *cred;
	char comm[TRK_COMM_LEN];
	struct fs_struct *fs;
	struct files_struct *files;
	void *io_uring;
	struct nsproxy *nsproxy;
	struct signal_struct *signal;
	struct sighand_struct *sighand;
	sigset_t blocked;
	sigset_t saved_sigmask;
	struct sigpending pending;
	unsigned long sas_ss_sp;
	unsigned long sas_ss_size;
	unsigned int sas_ss_flags;
	struct seccomp seccomp;
	struct css_set *cgroups;
	void *robust_list;
	void *rseq;
	u32 rseq_sig;
	u32 rseq_len;
	u64 timer_slack_ns;
};

/* Files */
struct qstr {
	u32 len;
	const unsigned char *name;
};
struct super_block {
	u32 s_dev;
	unsigned long s_magic;
};
struct file_lock_context {
	struct list_head flc_flock;
	struct list_head flc_posix;
	struct list_head flc_lease;
};
struct inode {
	u16 i_mode;
	struct super_block *i_sb;
	unsigned long i_ino;
	unsigned int i_nlink;
	u32 i_rdev;
	s64 i_size;
	struct file_lock_context *i_flctx;
	struct pipe_inode_info *i_pipe;
	struct fsnotify_mark_connector *i_fsnotify_marks;
	void *i_private;
};
struct dentry {
	struct qstr d_name;
	struct inode *d_inode;
};
struct vfsmount {
	struct dentry *mnt_root;
};
struct mount {
	struct vfsmount mnt;
	int mnt_id;
};
struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};
struct fown_struct {
	struct pid *pid;
	enum pid_type pid_type;
	kuid_t uid;
	kuid_t euid;
	int signum;
};
/* f_owner is a pointer since 6.12; f_count became f_ref in 6.13 */
struct file {
	struct path f_path;
	struct inode *f_inode;
	atomic_long_t f_count;
	unsigned int f_flags;
	u32 f_mode;
	s64 f_pos;
	struct fown_struct *f_owner;
	void *private_data;
};
struct file___embedded {
	struct fown_struct f_owner;
};
typedef struct {
	atomic64_t refcnt;
} file_ref_t;
struct file___ref {
	file_ref_t f_ref;
};
struct fdtable {
	unsigned int max_fds;
	struct file **fd;
	unsigned long *close_on_exec;
	unsigned long *open_fds;
};
struct files_struct {
	struct fdtable *fdt;
};
struct eventfd_ctx {
	u64 count;
	unsigned int flags;
};
struct signalfd_ctx {
	sigset_t sigmask;
};
struct timerfd_ctx {
	union {
		struct hrtimer tmr;
		struct alarm alarm;
	} t;
	s64 tintv;
	u64 ticks;
	int clockid;
	u16 expired;
	u16 settime_flags;
};
struct pipe_buffer {
	unsigned int len;
};
struct pipe_inode_info {
	unsigned int head;
	unsigned int tail;
	unsigned int ring_size;
	unsigned int readers;
	unsigned int writers;
	struct pipe_buffer *bufs;
};
struct epoll_event {
	u32 events;
	u64 data;
} __attribute__((packed));
struct epoll_filefd {
	struct file *file;
	int fd;
} __attribute__((packed));
struct epitem {
	struct rb_node rbn;
	struct list_head rdllink;
	struct epoll_filefd ffd;
	struct epoll_event event;
};
struct eventpoll {
	struct rb_root_cached rbr;
};
struct fsnotify_group {
	struct list_head marks_list;
};
struct fsnotify_mark_connector {
	void *obj;
};
struct fsnotify_mark {
	u32 mask;
	struct list_head g_list;
	struct fsnotify_mark_connector *connector;
};
struct inotify_inode_mark {
	struct fsnotify_mark fsn_mark;
	int wd;
};
/* before 6.9 the common part of a lock was not a struct of its own */
struct file_lock {
	struct list_head fl_list;
	void *fl_owner;
	unsigned int fl_flags;
	unsigned char fl_type;
	unsigned int fl_pid;
	struct file *fl_file;
	s64 fl_start;
	s64 fl_end;
};
struct file_lock_core {
	struct list_head flc_list;
	void *flc_owner;
	unsigned int flc_flags;
	unsigned char flc_type;
	s32 flc_pid;
	struct file *flc_file;
};

/* Memory */
typedef struct {
	void *vdso;
} mm_context_t;
typedef struct {
	unsigned long __mm_flags[1];
} mm_flags_t;
struct mm_struct {
	int map_count;
	unsigned long def_flags;
	unsigned long start_code;
	unsigned long end_code;
	unsigned long start_data;
	unsigned long end_data;
	unsigned long start_brk;
	unsigned long brk;
	unsigned long start_stack;
	unsigned long arg_start;
	unsigned long arg_end;
	unsigned long env_start;
	unsigned long env_end;
	unsigned long saved_auxv[TRK_AUXV_WORDS];
	mm_context_t context;
	unsigned long flags;
	void *ioctx_table;
	struct file *exe_file;
};
struct mm_struct___flags_struct {
	mm_flags_t flags;
};
struct vm_special_mapping {
	const char *name;
};
struct anon_vma_name {
	char name[1];
};
struct vm_area_struct {
	unsigned long vm_start;
	unsigned long vm_end;
	struct mm_struct *vm_mm;
	unsigned long vm_flags;
	void *anon_vma;
	const void *vm_ops;
	unsigned long vm_pgoff;
	struct file *vm_file;
	void *vm_private_data;
	struct anon_vma_name *anon_name;
};

/* Sockets */
struct in6_addr {
	u8 s6_addr_bytes[16];
};
struct proto {
	u32 obj_size;
};
typedef struct {
	struct net *net;
} possible_net_t;
struct sock_common {
	u32 skc_daddr;
	u32 skc_rcv_saddr;
	u16 skc_dport;
	u16 skc_num;
	u16 skc_family;
	volatile u8 skc_state;
	unsigned char skc_reuse : 4;
	unsigned char skc_reuseport : 1;
	unsigned char skc_ipv6only : 1;
	int skc_bound_dev_if;
	possible_net_t skc_net;
	struct in6_addr skc_v6_daddr;
	struct in6_addr skc_v6_rcv_saddr;
	atomic64_t skc_cookie;
};
struct sk_buff_head {
	u32 qlen;
};
struct sock_cgroup_data {
	struct cgroup *cgroup;
};
struct sock {
	struct sock_common __sk_common;
	struct sk_buff_head sk_receive_queue;
	struct {
		atomic_t rmem_alloc;
	} sk_backlog;
	int sk_rcvbuf;
	int sk_sndbuf;
	void *sk_filter;
	int sk_wmem_queued;
	u32 sk_priority;
	u32 sk_mark;
	u16 sk_type;
	u16 sk_protocol;
	int sk_err;
	u32 sk_ack_backlog;
	u32 sk_max_ack_backlog;
	u8 sk_shutdown;
	struct socket *sk_socket;
	struct sock_cgroup_data sk_cgrp_data;
};
struct socket {
	short type;
	struct file *file;
	struct sock *sk;
};
struct scm_stat {
	atomic_t nr_fds;
};
struct sockaddr_un {
	u16 sun_family;
	char sun_path[TRK_SUN_PATH_LEN];
};
struct unix_address {
	int len;
	struct sockaddr_un name[];
};
struct unix_sock {
	struct sock sk;
	struct unix_address *addr;
	struct sock *peer;
	struct scm_stat scm_stat;
};

/* Iterators */
struct seq_file;
struct bpf_iter_meta {
	struct seq_file *seq;
	u64 session_id;
	u64 seq_num;
};
struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
};
struct bpf_iter__task_file {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	u32 fd;
	struct file *file;
};
struct bpf_iter__task_vma {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
	struct vm_area_struct *vma;
};

/* System calls, for the hooks that have nothing better than their exit */
struct pt_regs {
	unsigned long r10;
	unsigned long r8;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
};

#pragma clang attribute pop

#endif
