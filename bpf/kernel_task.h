/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of kernel.h, which explains it: time, processes, memory. */
#ifndef TRACKER_KERNEL_TASK_H
#define TRACKER_KERNEL_TASK_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct timerqueue_node {
	s64 expires;
};
struct hrtimer;
struct hrtimer_clock_base {
	s32 clockid;
	struct hrtimer *running;
};
struct hrtimer {
	struct timerqueue_node node;
	struct hrtimer_clock_base *base;
	u8 state;
};
struct alarm {
	struct timerqueue_node node;
	struct hrtimer timer;
	int type;
	int state;
};
struct pid;
struct cpu_timer {
	struct timerqueue_node node;
	void *head;
	struct pid *pid;
};
struct cpu_itimer {
	u64 expires;
	u64 incr;
};

struct sem_undo_list {
	struct list_head list_proc;
};
struct sem_undo {
	struct list_head list_proc;
	int semid;
	short *semadj;
};
/* since 6.11 */
struct sem_undo___array {
	int semid;
	short semadj[];
};
struct sysv_sem {
	struct sem_undo_list *undo_list;
};

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
	struct hlist_head tasks[4];
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
	kgid_t gid[1];
};
struct assoc_array_node {
	void *slots[16];
};
struct assoc_array {
	void *root;
	unsigned long nr_leaves_on_tree;
};
struct key {
	char *description;
	struct assoc_array keys;
};
struct lsm_blob_sizes {
	int lbs_cred;
};
struct cred {
	struct key *session_keyring;
	struct key *process_keyring;
	struct key *thread_keyring;
	void *security;
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
struct tty_struct;
struct autogroup {
	int nice;
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
	struct autogroup *autogroup;
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
	struct list_head list;
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
struct seccomp_filter {
	struct seccomp_filter *prev;
	struct notification *notif;
};
struct seccomp {
	int mode;
	atomic_t filter_count;
	struct seccomp_filter *filter;
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
struct path {
	struct vfsmount *mnt;
	struct dentry *dentry;
};
struct fs_struct {
	int umask;
	struct path root;
	struct path pwd;
};
struct io_context {
	unsigned short ioprio;
};
struct thread_info {
	unsigned long flags;
	unsigned long syscall_work;
};
enum syscall_work_bit {
	SYSCALL_WORK_BIT_SYSCALL_USER_DISPATCH = 5,
};
struct desc_struct {
	u16 limit0;
};
/* x86-64 */
union fpregs_state {
	u8 bytes[1];
};
struct fpstate {
	unsigned int size;
	u64 user_xfeatures;
	union fpregs_state regs;
};
struct fpu_state_perm {
	u64 __state_perm;
};
struct fpu {
	struct fpstate *fpstate;
	struct fpu_state_perm perm;
};
struct thread_struct {
	struct desc_struct tls_array[3];
	unsigned short es;
	unsigned short ds;
	unsigned short fsindex;
	unsigned short gsindex;
	unsigned long fsbase;
	unsigned long gsbase;
	u32 pkru;
	struct fpu fpu;
	void *ptrace_bps[4];
	void *io_bitmap;
	unsigned long iopl_emul;
	unsigned long features;
};
typedef struct {
	unsigned long bits[1];
} nodemask_t;
struct mempolicy {
	unsigned short mode;
	unsigned short flags;
	nodemask_t nodes;
	int home_node;
	union {
		nodemask_t user_nodemask;
	} w;
};
/* custom_slice since 6.12 */
struct sched_entity {
	unsigned char custom_slice;
	u64 slice;
	u64 sum_exec_runtime;
};
struct task_struct {
	void *stack;
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
	unsigned int sched_reset_on_fork : 1;
	int on_cpu;
	struct sched_entity se;
	unsigned long atomic_flags;
	struct restart_block restart_block;
	int pid;
	int tgid;
	struct task_struct *real_parent;
	struct task_struct *parent;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	struct hlist_node pid_links[4];
	u64 utime;
	u64 stime;
	int *set_child_tid;
	int *clear_child_tid;
	u64 start_boottime;
	const struct cred *cred;
	char comm[TRK_COMM_LEN];
	struct fs_struct *fs;
	struct files_struct *files;
	struct io_context *io_context;
	struct io_uring_task *io_uring;
	void *worker_private;
	struct sysv_sem sysvsem;
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
	kuid_t loginuid;
	unsigned long core_cookie;
	struct mempolicy *mempolicy;
	struct thread_info thread_info;
	struct thread_struct thread;
};
/* of Yama */
struct ptrace_relation {
	struct task_struct *tracer;
	struct task_struct *tracee;
	bool invalid;
	struct list_head node;
};

typedef struct {
	void *vdso;
	void *ldt;
	unsigned long lam_cr3_mask;
	u16 pkey_allocation_map;
	s16 execute_only_pkey;
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
	atomic_t membarrier_state;
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
	struct mempolicy *vm_policy;
};

struct percpu_counter {
	s64 count;
	s32 *counters;
};
struct io_worker {
	void *cur_work;
};
#define IO_RINGFD_REG_MAX 16
struct io_uring_task {
	int cached_refs;
	struct file *registered_rings[IO_RINGFD_REG_MAX];
	struct percpu_counter inflight;
};

/* fs/aio.c; some members are in unnamed structs there, which CO-RE looks through */
struct kioctx_cpu {
	unsigned int reqs_available;
};
struct kioctx {
	unsigned long user_id;
	struct kioctx_cpu *cpu;
	unsigned int max_reqs;
	unsigned int nr_events;
	unsigned long mmap_size;
	atomic_t reqs_available;
	unsigned int tail;
	unsigned int completed_events;
};
struct kioctx_table {
	unsigned int nr;
	struct kioctx *table[];
};

#pragma clang attribute pop

#endif
