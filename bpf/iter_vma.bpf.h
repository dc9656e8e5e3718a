/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* iter/task_vma: the mappings of every address space. */

#define VM_SHARED 0x8

struct vma_rec out_vma;

SEC("iter/task_vma")
int iter_vmas(struct bpf_iter__task_vma *ctx)
{
	struct vm_area_struct *vma = ctx->vma;
	struct task_struct *task = ctx->task;
	struct vma_rec *r = &out_vma;
	struct file *file;

	if (!task || !vma || !in_scope(task))
		return 0;
	/* a thread with descriptors of its own is visited besides its leader */
	if (task->pid != task->tgid && task->mm == task->group_leader->mm)
		return 0;
	file = vma->vm_file;
	r->hdr.kind = REC_VMA;
	r->hdr.size = sizeof(*r);
	r->mm = (u64)vma->vm_mm;
	r->start = vma->vm_start;
	r->end = vma->vm_end;
	r->flags = vma->vm_flags;
	r->pgoff = vma->vm_pgoff;
	r->file = (u64)file;
	r->ino = 0;
	r->dev = 0;
	r->nlink = 0;
	r->kind = VMA_ANON;
	r->tgid = task->tgid;
	r->has_anon = vma->anon_vma != NULL;
	r->unusual = 0;
	__builtin_memset(&r->numa, 0, sizeof(r->numa));
	if (bpf_core_field_exists(vma->vm_policy) && vma->vm_policy &&
	    !fill_policy(&r->numa, vma->vm_policy))
		r->unusual |= VMA_FAR_NODES;
	__builtin_memset(r->name, 0, sizeof(r->name));
	if (file) {
		u64 magic = file->f_inode->i_sb->s_magic;

		r->ino = file->f_inode->i_ino;
		r->dev = file->f_inode->i_sb->s_dev;
		r->nlink = file->f_inode->i_nlink;
		r->kind = magic == TMPFS_MAGIC       ? VMA_SHMEM
			  : magic == HUGETLBFS_MAGIC ? VMA_HUGETLB
						     : VMA_FILE;
		bpf_probe_read_kernel_str(r->name, sizeof(r->name),
					  file->f_path.dentry->d_name.name);
		if (magic == TMPFS_MAGIC && has_shared_policy(file->f_inode))
			r->unusual |= VMA_SHARED_POLICY;
		if (vma->vm_flags & VM_SHARED && has_write_error(file))
			r->unusual |= VMA_WRITE_ERROR;
	} else if (vma->vm_ops) {
		/* without a file, operations mean _install_special_mapping() */
		struct vm_special_mapping *special = vma->vm_private_data;

		r->kind = VMA_SPECIAL;
		bpf_probe_read_kernel_str(r->name, sizeof(r->name), BPF_CORE_READ(special, name));
	} else if (bpf_core_field_exists(vma->anon_name) && vma->anon_name) {
		bpf_probe_read_kernel_str(r->name, sizeof(r->name), &vma->anon_name->name);
	}
	bpf_seq_write(ctx->meta->seq, r, sizeof(*r));
	return 0;
}
