/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* iter/task: the registers of threads that stand in the freezer. */

#define X86_EFLAGS_TF 0x100
#define EFLAGS 18 /* place in struct pt_regs */
#define TASK_INTERRUPTIBLE 1
#define __TASK_STOPPED 4

struct registers_rec out_registers;

/*
 * Whether its registers lie in memory and stay as they are: it has been switched out (the flag
 * goes after the extended registers were saved, finish_task()), and what it comes back to is the
 * freezer, or a stop within it. A parent in vfork(2) counts as frozen as well: it sleeps
 * uninterruptibly and, once its child is gone, waits for a CPU to end its call on. A tracer may
 * have any thread run.
 */
static __always_inline bool stands_still(struct task_struct *task)
{
	if (!BPF_CORE_READ_BITFIELD(task, frozen) || task->ptrace)
		return false;
	if (!(task->__state & (TASK_INTERRUPTIBLE | __TASK_STOPPED)))
		return false;
	return !bpf_core_field_exists(task->on_cpu) || !task->on_cpu;
}

/*
 * Returns false for a thread of which this does not tell all: ptrace(2) does. That is one that is
 * stepped through, has segments whose bases lie in a table, more extended registers than there is
 * room for, or an rseq area on a kernel that keeps it in another form.
 */
static __always_inline bool fill_registers(struct registers_rec *r, struct task_struct *task)
{
	struct fpstate *fpstate;
	struct pt_regs *regs;
	u64 size;

	if (!bpf_core_type_exists(struct fpstate) || !bpf_core_field_exists(task->rseq_sig))
		return false;
	if (!stands_still(task))
		return false;
	r->hdr.kind = REC_REGISTERS;
	r->hdr.size = sizeof(*r);
	r->tid = task->pid;
	r->fs_base = task->thread.fsbase;
	r->gs_base = task->thread.gsbase;
	r->ds = task->thread.ds;
	r->es = task->thread.es;
	r->fs = task->thread.fsindex;
	r->gs = task->thread.gsindex;
	r->pkru = task->thread.pkru;
	if (r->fs || r->gs)
		return false;
	regs = (void *)bpf_task_pt_regs(task);
	if (bpf_core_type_size(struct pt_regs) < sizeof(r->general) ||
	    bpf_probe_read_kernel(&r->general, sizeof(r->general), regs))
		return false;
	if (r->general[EFLAGS] & X86_EFLAGS_TF)
		return false;
	fpstate = BPF_CORE_READ(fpu_of(task), fpstate);
	size = BPF_CORE_READ(fpstate, size);
	r->user_xfeatures = BPF_CORE_READ(fpstate, user_xfeatures);
	/* one variable for the comparison and the read, or the verifier loses the bound */
	barrier_var(size);
	if (size > sizeof(r->xstate))
		return false;
	r->xstate_len = size;
	return !bpf_probe_read_kernel(
		&r->xstate, size, (void *)fpstate + bpf_core_field_offset(struct fpstate, regs));
}
