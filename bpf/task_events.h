/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of events.h, whose rules hold: threads, processes and address spaces. */
#ifndef TRACKER_TASK_EVENTS_H
#define TRACKER_TASK_EVENTS_H

/* thread_rec.flags */
enum thread_flag {
	THREAD_RESTORE_SIGMASK = 1, /* saved_sigmask replaces blocked at the return to user space */
	THREAD_NO_NEW_PRIVS = 2,
	THREAD_WORKING = 4, /* an io_uring worker with a request at hand */
	THREAD_FROZEN = 8,  /* stopped by the cgroup freezer */
	THREAD_PTRACED = 16,
	THREAD_SEM_UNDO = 32,         /* has operations to undo that its leader has not */
	THREAD_SECCOMP_LISTENER = 64, /* a supervisor listens to one of its filters */
	THREAD_RESET_ON_FORK = 128,   /* SCHED_RESET_ON_FORK */
};

#include "attr_events.h"

/* One thread; ids are those of the initial PID namespace. */
struct thread_rec {
	struct rec_hdr hdr;
	__u32 tid;
	__u32 tgid;
	__u32 ns_tid;   /* TID in the thread's own PID namespace */
	__u32 ns_level; /* depth of that namespace, 0 is the initial one */
	__u32 tracer;   /* PID of the ptracer, 0 if none */
	__u32 state;    /* task_struct.__state */
	__u32 exit_state;
	__s32 exit_code;
	__s32 exit_signal;
	__s32 pdeath_signal;
	__u32 personality;
	__u32 policy;
	__s32 static_prio;
	__u32 rt_priority;
	__u32 flags;      /* enum thread_flag */
	__u32 task_flags; /* task_struct.flags, PF_* */
	__u64 start_boottime_ns;
	__u64 task; /* identities of the kernel's objects */
	__u64 files;
	__u64 mm;
	__u64 fs;
	__u64 sighand;
	__u64 signal;
	__u64 cred;
	__u64 group_info;
	__u64 nsproxy;
	__u64 cgroup_id;
	__u64 blocked; /* signal masks: bit 0 is signal 1 */
	__u64 saved_sigmask;
	__u64 pending;
	__u64 sas_ss_sp;
	__u64 sas_ss_size;
	__u64 seccomp_filter; /* the newest one, which leads to the others */
	__u32 sas_ss_flags;
	__u32 seccomp_mode;
	__u32 seccomp_filters;
	__u32 ngroups;
	__u64 robust_list;
	__u64 set_child_tid;
	__u64 clear_child_tid;
	__u64 rseq;
	__u32 rseq_len; /* 0 where the kernel does not say (before 6.3) */
	__u32 rseq_sig;
	__u32 uid; /* as the initial user namespace counts */
	__u32 gid;
	__u32 euid;
	__u32 egid;
	__u32 suid;
	__u32 sgid;
	__u32 fsuid;
	__u32 fsgid;
	__u64 cap_inheritable;
	__u64 cap_permitted;
	__u64 cap_effective;
	__u64 cap_bset;
	__u64 cap_ambient;
	__u32 securebits;
	__u32 user_ns;
	__u32 mnt_ns;
	__u32 uts_ns;
	__u32 ipc_ns;
	__u32 net_ns;
	__u32 pid_ns;
	__u32 time_ns;
	__u32 cgroup_ns;
	__u32 restart_kind; /* enum restart_kind */
	__u64 restart_fn;   /* kernel address, for RESTART_UNKNOWN */
	__u64 restart_expires_ns;
	__u32 restart_clock;
	__u32 restart_arg; /* futex flags, poll nfds */
	__u64 restart_ptr; /* futex word, pollfd array, remaining-time pointer */
	__u64 timer_slack_ns;
	__u64 slice_ns; /* as sched_setattr(2) was told since 6.12; 0 for nothing */
	__u64 jobctl;
	__u64 cwd_ino;
	__u64 root_ino;
	__u32 cwd_dev;
	__u32 root_dev;
	__u32 umask;
	__u32 ioprio;           /* as ioprio_set(2) was told; 0 for nothing */
	__s32 uring_in_flight;  /* io_uring requests it made that have not ended; -1: unknown */
	__u32 uring_registered; /* IORING_REGISTER_RING_FDS: rings that it reaches without a fd */
	__u32 unusual;          /* enum thread_unusual */
	__u32 loginuid;
	struct policy_rec numa;
	char comm[TRK_COMM_LEN];
};
TRK_ASSERT_SIZE(struct thread_rec, 512);

/* The registers of a frozen thread, as x86-64 has them. */
#define TRK_GENERAL_REGS 21
#define TRK_XSTATE_LEN 3072
struct registers_rec {
	struct rec_hdr hdr;
	__u32 tid;
	__u32 xstate_len;
	__u64 general[TRK_GENERAL_REGS]; /* struct pt_regs */
	__u64 fs_base;
	__u64 gs_base;
	__u16 ds;
	__u16 es;
	__u16 fs;
	__u16 gs;
	__u32 pkru;
	__u32 pad;
	__u64 user_xfeatures;
	__u8 xstate[TRK_XSTATE_LEN]; /* XSAVE area as the kernel keeps it: standard or compacted */
};
TRK_ASSERT_SIZE(struct registers_rec, 3296);

struct rlimit_rec {
	__u64 cur;
	__u64 max;
};
TRK_ASSERT_SIZE(struct rlimit_rec, 16);

/* process_rec.flags */
enum process_flag {
	PROCESS_CHILD_SUBREAPER = 1,
	PROCESS_SESSION_LEADER = 2,
	PROCESS_REAL_TIMER_ARMED = 8,
};

/* What the threads of a process share through signal_struct. */
struct process_rec {
	struct rec_hdr hdr;
	__u32 pid;
	__u32 ppid;
	__u32 pgid;
	__u32 sid;
	__u32 nr_threads;
	__u32 flags; /* enum process_flag */
	__s32 oom_score_adj;
	__s32 group_exit_code;
	__u64 signal;
	__u64 shared_pending;
	__u64 signal_flags; /* SIGNAL_* */
	/* ITIMER_REAL expires on CLOCK_MONOTONIC of the initial time namespace */
	__u64 itimer_real_expires_ns;
	__u64 itimer_real_interval_ns;
	/* the CPU timers expire at an amount of CPU time; cpu_* is what is used so far,
	 * valid while either is armed */
	__u64 itimer_virt_expires_ns;
	__u64 itimer_virt_interval_ns;
	__u64 itimer_prof_expires_ns;
	__u64 itimer_prof_interval_ns;
	__u64 cpu_utime_ns;
	__u64 cpu_stime_ns;
	__u64 cpu_runtime_ns;
	__u32 next_timer_id;
	__s32 autogroup_nice; /* /proc/PID/autogroup, the session's */
	__s32 ptracer;        /* PR_SET_PTRACER: a thread, -1 for any, 0 for none */
	__u32 pad;
	__u64 tty; /* the controlling terminal, a struct tty_struct */
	struct rlimit_rec rlimits[TRK_NR_RLIMITS];
};
TRK_ASSERT_SIZE(struct process_rec, 416);

/* An address space. */
struct mm_rec {
	struct rec_hdr hdr;
	__u64 mm;
	__u64 flags; /* MMF_*, dumpable in the two lowest bits */
	__u64 def_flags;
	__u64 start_code;
	__u64 end_code;
	__u64 start_data;
	__u64 end_data;
	__u64 start_brk;
	__u64 brk;
	__u64 start_stack;
	__u64 arg_start;
	__u64 arg_end;
	__u64 env_start;
	__u64 env_end;
	__u64 vdso;
	__u64 exe_file;
	__u64 exe_ino;
	__u32 exe_dev;
	__u32 tgid;
	__u32 map_count;
	__u32 auxv_words; /* valid words of auxv */
	__u32 membarrier; /* MEMBARRIER_STATE_* */
	__u32 unusual;    /* enum mm_unusual */
	__u32 pkeys;      /* bit for each key that was asked for */
	__u32 pad;
	__u64 auxv[TRK_AUXV_WORDS];
};
TRK_ASSERT_SIZE(struct mm_rec, 688);

/* What is added to semaphores of a set when a process ends, see semop(2). */
#define TRK_SEM_ADJUSTMENTS 256
struct sem_undo_rec {
	struct rec_hdr hdr;
	__u64 list; /* struct sem_undo_list; whose sharers end last add it */
	__u32 tgid;
	__s32 semid;  /* -1: the set is gone */
	__u32 failed; /* adjust could not be read */
	__u32 pad;
	__s16 adjust[TRK_SEM_ADJUSTMENTS]; /* of the first semaphores; more than there are, if few
					    */
};
TRK_ASSERT_SIZE(struct sem_undo_rec, 544);

/* An AIO context, io_setup(2). */
struct aio_rec {
	struct rec_hdr hdr;
	__u64 mm;
	__u64 id; /* where its ring is mapped, which is what user space knows it by */
	__u64 ring_bytes;
	__u32 tgid;
	__u32 max_reqs;  /* argument of io_setup(2) */
	__u32 nr_events; /* slots in the ring */
	__u32 tail;      /* slot the next completion goes to */
	__u32 in_flight; /* requests without a completion; ~0 while that changes */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct aio_rec, 56);

struct sigaction_rec {
	__u64 handler;
	__u64 flags;
	__u64 restorer;
	__u64 mask;
};
TRK_ASSERT_SIZE(struct sigaction_rec, 32);

/* The signal actions of a process; actions[0] is that of signal 1. */
struct sigactions_rec {
	struct rec_hdr hdr;
	__u32 pid;
	__u32 pad;
	__u64 sighand;
	struct sigaction_rec actions[TRK_NR_SIGNALS];
};
TRK_ASSERT_SIZE(struct sigactions_rec, 2072);

#endif
