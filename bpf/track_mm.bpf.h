/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Address spaces: every change of a mapping takes mmap_lock for writing. */

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
