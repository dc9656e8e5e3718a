/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * Address spaces. A change is said as a mark, once until the mappings are read again: they
 * are read in one pass anyway, and the functions that change them cannot all be hooked.
 *
 * With fentry each function that changes mappings marks when it is done. They are slow by
 * themselves, and the alternative is dear: for the tracepoint of mmap_lock the kernel
 * composes the path of the memory cgroup, for readers of the lock too, which is every page
 * fault and everybody's. It is the fallback.
 */

#define PR_SET_VMA 0x53564d41

/* Not in the programs themselves, for the reason that APART tells. */
static __noinline void mark_mappings(void)
{
	mark_dirty((u64)bpf_get_current_task_btf()->mm, CLASS_MM);
}

/* A program that marks when this function is done. */
#define MARKS(program, function)                                                                   \
	SEC("fexit/" #function)                                                                    \
	int program(void *ctx)                                                                     \
	{                                                                                          \
		if (current_tracked())                                                             \
			mark_mappings();                                                           \
		return 0;                                                                          \
	}

/* mmap, shmat, AIO rings, program loading */
MARKS(mmap_region, mmap_region);
MARKS(do_mas_munmap, do_mas_munmap);
MARKS(do_vmi_munmap, do_vmi_munmap);
MARKS(do_vmi_align_munmap, do_vmi_align_munmap);
MARKS(mprotect_fixup, mprotect_fixup);
MARKS(do_brk_flags, do_brk_flags);
/* shrinking, for which some kernels call a function that cannot be hooked */
MARKS(sys_brk, __x64_sys_brk);
MARKS(sys_mremap, __x64_sys_mremap);
MARKS(do_madvise, do_madvise);
MARKS(mlock_fixup, mlock_fixup);
MARKS(mbind_range, mbind_range);
MARKS(ksys_shmdt, ksys_shmdt);
MARKS(userfaultfd_ioctl, userfaultfd_ioctl);
MARKS(do_mseal, do_mseal);

/* names of anonymous mappings */
SEC("fexit/__x64_sys_prctl")
int BPF_PROG(sys_prctl, struct pt_regs *regs)
{
	if (BPF_CORE_READ(regs, di) == PR_SET_VMA && current_tracked())
		mark_mappings();
	return 0;
}

/* Stacks grow under page faults, also when somebody else writes there. */
SEC("fexit/expand_downwards")
int BPF_PROG(expand_downwards, struct vm_area_struct *vma)
{
	if (current_tracked())
		mark_dirty((u64)BPF_CORE_READ(vma, vm_mm), CLASS_MM);
	return 0;
}

static __always_inline int mm_locked(struct mm_struct *mm, bool write, bool success)
{
	if (write && success && current_tracked())
		mark_dirty((u64)mm, CLASS_MM);
	return 0;
}

/* up to 6.17, with the path of the memory cgroup as second argument */
SEC("tp_btf/mmap_lock_acquire_returned")
int BPF_PROG(mmap_lock_path, struct mm_struct *mm, const char *path, bool write, bool success)
{
	return mm_locked(mm, write, success);
}

SEC("tp_btf/mmap_lock_acquire_returned")
int BPF_PROG(mmap_lock, struct mm_struct *mm, bool write, bool success)
{
	return mm_locked(mm, write, success);
}
