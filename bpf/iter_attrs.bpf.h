/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * Attributes of tasks and address spaces that few programs have: those that are carried, and of
 * those that are not, whether there are any.
 */

#define MPOL_USER_NODES 0xc000 /* MPOL_F_STATIC_NODES, MPOL_F_RELATIVE_NODES */
#define MAX_NODE_BYTES 128     /* MAX_NUMNODES of 1024 */
#define TIF_NOCPUID 15         /* arch/x86/include/asm/thread_info.h */
#define TIF_NOTSC 16
#define PFA_SPECULATION 0xf8 /* PFA_SPEC_*, include/linux/sched.h */
#define XFEATURE_TILE_DATA 18
#define NODE_SLOTS 16
#define NODE_TAG 1    /* ASSOC_ARRAY_PTR_META_TYPE */
#define KEYRING_TAG 2 /* KEYRING_PTR_SUBTYPE */

u64 node_words[MAX_NODE_BYTES / 8];

const char service_key[] = "invocation_id";

/* Whether all of its nodes have room. */
static __always_inline bool fill_policy(struct policy_rec *r, struct mempolicy *policy)
{
	u32 bytes = bpf_core_field_size(policy->nodes), i;

	r->set = 1;
	r->mode = BPF_CORE_READ(policy, mode);
	r->flags = BPF_CORE_READ(policy, flags);
	r->home_node = BPF_CORE_READ(policy, home_node);
	if (bytes > MAX_NODE_BYTES)
		return false;
	if (r->flags & MPOL_USER_NODES)
		bpf_core_read(&node_words, bytes, &policy->w.user_nodemask);
	else
		bpf_core_read(&node_words, bytes, &policy->nodes);
	r->nodes = node_words[0];
	for (i = 1; i < MAX_NODE_BYTES / 8; i++) {
		if (i < bytes / 8 && node_words[i])
			return false;
	}
	return true;
}

/* Whether parts of a tmpfs file have NUMA policies. */
static __always_inline bool has_shared_policy(struct inode *inode)
{
	struct shmem_inode_info *info;

	if (!bpf_core_field_exists(struct shmem_inode_info, policy))
		return false;
	info = (void *)inode - bpf_core_field_offset(struct shmem_inode_info, vfs_inode);
	return BPF_CORE_READ(info, policy.root.rb_node);
}

static __always_inline bool has_breakpoints(struct task_struct *task)
{
	u64 found[4] = {};

	if (bpf_core_field_exists(task->thread.ptrace_bps))
		bpf_core_read(&found, sizeof(found), &task->thread.ptrace_bps);
	return found[0] | found[1] | found[2] | found[3];
}

static __always_inline bool has_tls_segments(struct task_struct *task)
{
	u64 found[3] = {};

	if (bpf_core_field_exists(task->thread.tls_array))
		bpf_core_read(&found, sizeof(found), &task->thread.tls_array);
	return found[0] | found[1] | found[2];
}

/* It was a part of thread_struct; since 6.16 it is right behind the task. */
static __always_inline struct fpu *fpu_of(struct task_struct *task)
{
	if (bpf_core_field_exists(task->thread.fpu))
		return (void *)task + bpf_core_field_offset(task->thread.fpu);
	return (void *)task + bpf_core_type_size(struct task_struct);
}

/* Whether it may use the tiles of AMX, which is asked for by the whole process. */
static __always_inline bool has_tiles(struct task_struct *task)
{
	u64 granted = 0;

	if (bpf_core_field_exists(struct fpu, perm.__state_perm))
		granted = BPF_CORE_READ(fpu_of(task->group_leader), perm.__state_perm);
	return granted & (1ULL << XFEATURE_TILE_DATA);
}

/* The first field of its part of credentials is the domain. */
static __always_inline bool in_landlock(const struct cred *cred)
{
	struct lsm_blob_sizes *sizes = (void *)symbols.landlock_blob_sizes;
	u8 initialized = 0;
	u64 domain = 0;
	s32 offset;

	if (!sizes || !symbols.landlock_initialized)
		return false;
	bpf_probe_read_kernel(&initialized, sizeof(initialized),
			      (void *)symbols.landlock_initialized);
	if (!initialized)
		return false;
	offset = BPF_CORE_READ(sizes, lbs_cred);
	bpf_probe_read_kernel(&domain, sizeof(domain), BPF_CORE_READ(cred, security) + offset);
	return domain;
}

/*
 * Keys in the session's keyring, beside other keyrings: a login links that of the user, and systemd
 * notes the invocation of each service.
 */
static __always_inline bool has_session_keys(const struct cred *cred)
{
	struct key *keyring = BPF_CORE_READ(cred, session_keyring);
	u64 root = keyring ? (u64)BPF_CORE_READ(keyring, keys.root) : 0;
	struct assoc_array_node *node = (void *)(root & ~3ULL);
	u64 slots[NODE_SLOTS] = {};
	u32 i;

	if (!root)
		return false;
	bpf_core_read(&slots, sizeof(slots), &node->slots);
	for (i = 0; i < NODE_SLOTS; i++) {
		struct key *key = (void *)(slots[i] & ~3ULL);
		char name[sizeof(service_key)] = {};

		if (slots[i] & NODE_TAG)
			return true;
		if (!slots[i] || slots[i] & KEYRING_TAG)
			continue;
		bpf_probe_read_kernel_str(name, sizeof(name), BPF_CORE_READ(key, description));
		if (bpf_strncmp(name, sizeof(name), service_key))
			return true;
	}
	return false;
}

/* Threads that have the same credentials come in a row, mostly. */
u64 cred_seen;
u64 cred_generation;
u32 cred_found;

static __always_inline u32 cred_unusual(const struct cred *cred)
{
	if (cred_seen == (u64)cred && cred_generation == generation)
		return cred_found;
	cred_seen = (u64)cred;
	cred_generation = generation;
	cred_found = in_landlock(cred) ? THREAD_LANDLOCK : 0;
	if (bpf_core_field_exists(cred->session_keyring)) {
		if (cred->thread_keyring || cred->process_keyring)
			cred_found |= THREAD_OWN_KEYRING;
		if (has_session_keys(cred))
			cred_found |= THREAD_SESSION_KEYS;
	}
	return cred_found;
}

static __always_inline u32 thread_unusual(struct task_struct *task)
{
	u64 tif = task->thread_info.flags;
	u32 found = 0;

	if (bpf_core_field_exists(task->thread.io_bitmap) && task->thread.io_bitmap)
		found |= THREAD_IO_PORTS;
	if (bpf_core_field_exists(task->thread.iopl_emul) && task->thread.iopl_emul)
		found |= THREAD_IO_PORTS;
	if (has_tls_segments(task))
		found |= THREAD_TLS_SEGMENTS;
	if (has_breakpoints(task))
		found |= THREAD_BREAKPOINTS;
	if (bpf_core_field_exists(task->core_cookie) && task->core_cookie)
		found |= THREAD_CORE_COOKIE;
	if (task->thread_info.syscall_work &
	    (1UL << bpf_core_enum_value(enum syscall_work_bit,
					SYSCALL_WORK_BIT_SYSCALL_USER_DISPATCH)))
		found |= THREAD_USER_DISPATCH;
	if (tif & (1UL << TIF_NOTSC))
		found |= THREAD_NO_TSC;
	if (tif & (1UL << TIF_NOCPUID))
		found |= THREAD_NO_CPUID;
	if (bpf_core_field_exists(task->thread.features) && task->thread.features)
		found |= THREAD_SHADOW_STACK;
	if (has_tiles(task))
		found |= THREAD_TILES;
	if (task->atomic_flags & PFA_SPECULATION)
		found |= THREAD_SPECULATION;
	return found | cred_unusual(task->cred);
}

static __always_inline void fill_thread_attrs(struct thread_rec *r, struct task_struct *task)
{
	r->unusual = thread_unusual(task);
	r->loginuid = bpf_core_field_exists(task->loginuid) ? task->loginuid.val : ~0;
	__builtin_memset(&r->numa, 0, sizeof(r->numa));
	if (bpf_core_field_exists(task->mempolicy) && task->mempolicy &&
	    !fill_policy(&r->numa, task->mempolicy))
		r->unusual |= THREAD_FAR_NODES;
}

/* Protection keys. mprotect(2) itself takes the lowest free one for memory that can only be
 * executed, and will again; with others beside it that may be another one. */
static __always_inline void fill_pkeys(struct mm_rec *r, struct mm_struct *mm)
{
	u16 given;

	r->pkeys = 0;
	if (!bpf_core_field_exists(mm->context.pkey_allocation_map))
		return;
	given = mm->context.pkey_allocation_map & ~1; /* which all have */
	if (mm->context.execute_only_pkey <= 0)
		r->pkeys = given;
	else if (given != 1 << 1)
		r->unusual |= MM_PKEYS;
}

static __always_inline void fill_mm_attrs(struct mm_rec *r, struct mm_struct *mm)
{
	r->unusual = 0;
	if (bpf_core_field_exists(mm->context.ldt) && mm->context.ldt)
		r->unusual |= MM_LDT;
	if (bpf_core_field_exists(mm->context.lam_cr3_mask) && mm->context.lam_cr3_mask)
		r->unusual |= MM_TAGS;
	fill_pkeys(r, mm);
}

#define MAX_PTRACERS (1 << 16)

struct ptracer_search {
	u64 node;
	u64 tracee;
	int found;
	u32 pad;
};

/* bpf_loop callback: the list has one entry at most for each tracee that is valid. */
static long search_ptracer(u64 index, void *ctx)
{
	struct ptracer_search *search = ctx;
	struct list_head *node = (void *)search->node;
	struct ptrace_relation *relation;
	struct task_struct *tracer;

	if (!node || search->node == symbols.ptracer_relations)
		return 1;
	relation = (void *)node - bpf_core_field_offset(struct ptrace_relation, node);
	if ((u64)BPF_CORE_READ(relation, tracee) == search->tracee &&
	    !BPF_CORE_READ(relation, invalid)) {
		tracer = BPF_CORE_READ(relation, tracer);
		search->found = tracer ? BPF_CORE_READ(tracer, pid) : -1;
		return 1;
	}
	search->node = (u64)BPF_CORE_READ(node, next);
	return 0;
}

/* Whom Yama lets trace a process: a thread, -1 for any, 0 for none beside its parents. */
static __always_inline int ptracer_of(struct task_struct *task)
{
	struct list_head *relations = (void *)symbols.ptracer_relations;
	struct ptracer_search search = {.tracee = (u64)task};

	if (!bpf_core_type_exists(struct ptrace_relation) || !relations)
		return 0;
	search.node = (u64)BPF_CORE_READ(relations, next);
	if (search.node != symbols.ptracer_relations)
		bpf_loop(MAX_PTRACERS, search_ptracer, &search, 0);
	return search.found;
}
