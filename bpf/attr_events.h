/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of events.h, whose rules hold: attributes that few programs have. */
#ifndef TRACKER_ATTR_EVENTS_H
#define TRACKER_ATTR_EVENTS_H

/* What a thread has that is told by one bit. */
enum thread_unusual {
	THREAD_IO_PORTS = 1,        /* ioperm(2), iopl(2) */
	THREAD_TLS_SEGMENTS = 2,    /* set_thread_area(2) */
	THREAD_BREAKPOINTS = 4,     /* debug registers */
	THREAD_CORE_COOKIE = 8,     /* PR_SCHED_CORE */
	THREAD_USER_DISPATCH = 16,  /* PR_SET_SYSCALL_USER_DISPATCH */
	THREAD_NO_TSC = 32,         /* PR_SET_TSC */
	THREAD_NO_CPUID = 64,       /* ARCH_SET_CPUID */
	THREAD_SHADOW_STACK = 128,  /* ARCH_SHSTK_ENABLE */
	THREAD_TILES = 256,         /* ARCH_REQ_XCOMP_PERM */
	THREAD_LANDLOCK = 512,      /* landlock_restrict_self(2) */
	THREAD_SPECULATION = 1024,  /* PR_SET_SPECULATION_CTRL */
	THREAD_FAR_NODES = 2048,    /* more NUMA nodes than policy_rec has room for */
	THREAD_OWN_KEYRING = 4096,  /* a keyring of its own or of its process */
	THREAD_SESSION_KEYS = 8192, /* keys in its session keyring */
};

enum mm_unusual {
	MM_LDT = 1,   /* modify_ldt(2) */
	MM_TAGS = 2,  /* ARCH_ENABLE_TAGGED_ADDR */
	MM_PKEYS = 4, /* pkey_alloc(2), with memory that can only be executed */
};

enum vma_unusual {
	VMA_FAR_NODES = 1,
	VMA_SHARED_POLICY = 2, /* mbind(2) on its file, which others may share */
	VMA_WRITE_ERROR = 4,   /* msync(2) will tell of a failed write-back */
};

/* A NUMA policy, see set_mempolicy(2). */
struct policy_rec {
	__u16 set; /* whether there is one */
	__u16 mode;
	__u16 flags;     /* MPOL_F_*, those of the kernel's own included */
	__s16 home_node; /* set_mempolicy_home_node(2); -1 for none */
	__u64 nodes;     /* as they were asked for */
};
TRK_ASSERT_SIZE(struct policy_rec, 16);

#endif
