/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* iter/task: threads, processes, address spaces, signal actions. */

#define PFA_NO_NEW_PRIVS 1
#define MAX_SECCOMP_FILTERS 64

/* Records are built here: they are too large for the 512 byte stack, and one pass
 * runs at a time. */
struct thread_rec out_thread;
struct process_rec out_process;
struct mm_rec out_mm;
struct sigactions_rec out_sigactions;

/*
 * Where the functions are that go on with an interrupted call; 0 where this kernel has none of
 * that name.
 */
struct {
	u64 nothing;
	u64 nanosleep;
	u64 futex_wait;
	u64 poll;
	u64 cpu_nanosleep;
	u64 alarm_nanosleep;
} restarts;

#define FIND(name, to) bpf_kallsyms_lookup_name(name, sizeof(name), 0, &(to))

/* User space runs this once, before any pass. Declared as symbols, they would have libbpf read
 * all of /proc/kallsyms, which takes longer than everything else that loading does. */
SEC("syscall")
int find_symbols(void *ctx)
{
	FIND("do_no_restart_syscall", restarts.nothing);
	FIND("hrtimer_nanosleep_restart", restarts.nanosleep);
	FIND("futex_wait_restart", restarts.futex_wait);
	FIND("do_restart_poll", restarts.poll);
	FIND("posix_cpu_nsleep_restart", restarts.cpu_nanosleep);
	FIND("alarm_timer_nsleep_restart", restarts.alarm_nanosleep);
	FIND("__per_cpu_offset", symbols.per_cpu_offset);
	FIND("vmemmap_base", symbols.vmemmap_base);
	FIND("page_offset_base", symbols.page_offset_base);
	FIND("landlock_initialized", symbols.landlock_initialized);
	FIND("landlock_blob_sizes", symbols.landlock_blob_sizes);
	FIND("ptracer_relations", symbols.ptracer_relations);
	FIND("dnotify_group", symbols.dnotify_group);
	return 0;
}

static __always_inline void fill_restart(struct thread_rec *r, struct task_struct *task)
{
	/* read through the helper: the verifier refuses direct loads from its unions */
	u64 fn = (u64)BPF_CORE_READ(task, restart_block.fn);

	r->restart_fn = fn;
	r->restart_kind = RESTART_UNKNOWN;
	r->restart_expires_ns = 0;
	r->restart_clock = 0;
	r->restart_arg = 0;
	r->restart_ptr = 0;
	if (!fn || fn == restarts.nothing) {
		r->restart_kind = RESTART_NONE;
	} else if (fn == restarts.futex_wait) {
		r->restart_kind = RESTART_FUTEX_WAIT;
		r->restart_expires_ns = BPF_CORE_READ(task, restart_block.futex.time);
		r->restart_arg = BPF_CORE_READ(task, restart_block.futex.flags);
		r->restart_ptr = (u64)BPF_CORE_READ(task, restart_block.futex.uaddr);
	} else if (fn == restarts.poll) {
		r->restart_kind = RESTART_POLL;
		if (BPF_CORE_READ(task, restart_block.poll.has_timeout))
			r->restart_expires_ns =
				BPF_CORE_READ(task, restart_block.poll.tv_sec) * 1000000000ULL +
				BPF_CORE_READ(task, restart_block.poll.tv_nsec);
		r->restart_arg = BPF_CORE_READ(task, restart_block.poll.nfds);
		r->restart_ptr = (u64)BPF_CORE_READ(task, restart_block.poll.ufds);
	} else {
		if (fn == restarts.nanosleep)
			r->restart_kind = RESTART_NANOSLEEP;
		else if (fn == restarts.cpu_nanosleep)
			r->restart_kind = RESTART_CPU_NANOSLEEP;
		else if (fn == restarts.alarm_nanosleep)
			r->restart_kind = RESTART_ALARM_NANOSLEEP;
		else
			return;
		r->restart_expires_ns = BPF_CORE_READ(task, restart_block.nanosleep.expires);
		r->restart_clock = BPF_CORE_READ(task, restart_block.nanosleep.clockid);
		r->restart_ptr = (u64)BPF_CORE_READ(task, restart_block.nanosleep.rmtp);
	}
}

static __always_inline void fill_cred(struct thread_rec *r, const struct cred *cred)
{
	r->cred = (u64)cred;
	FILL_CRED(r, cred);
	r->user_ns = BPF_CORE_READ(cred, user_ns, ns.inum);
	r->group_info = (u64)BPF_CORE_READ(cred, group_info);
	r->ngroups = BPF_CORE_READ(cred, group_info, ngroups);
}

static __always_inline void fill_namespaces(struct thread_rec *r, struct nsproxy *ns)
{
	r->nsproxy = (u64)ns;
	/* gone once a thread has exited */
	r->mnt_ns = ns ? BPF_CORE_READ(ns, mnt_ns, ns.inum) : 0;
	r->uts_ns = ns ? BPF_CORE_READ(ns, uts_ns, ns.inum) : 0;
	r->ipc_ns = ns ? BPF_CORE_READ(ns, ipc_ns, ns.inum) : 0;
	r->net_ns = ns ? BPF_CORE_READ(ns, net_ns, ns.inum) : 0;
	r->pid_ns = ns ? BPF_CORE_READ(ns, pid_ns_for_children, ns.inum) : 0;
	r->time_ns = ns ? BPF_CORE_READ(ns, time_ns, ns.inum) : 0;
	r->cgroup_ns = ns ? BPF_CORE_READ(ns, cgroup_ns, ns.inum) : 0;
}

/* After the flags. With more filters than are looked through, one may have a listener. */
static __always_inline void fill_seccomp(struct thread_rec *r, struct task_struct *task)
{
	struct seccomp_filter *filter;

	r->seccomp_mode = 0;
	r->seccomp_filters = 0;
	r->seccomp_filter = 0;
	if (!bpf_core_field_exists(task->seccomp.filter_count))
		return;
	r->seccomp_mode = task->seccomp.mode;
	r->seccomp_filters = task->seccomp.filter_count.counter;
	filter = BPF_CORE_READ(task, seccomp.filter);
	r->seccomp_filter = (u64)filter;
	for (int i = 0; i < MAX_SECCOMP_FILTERS && filter; i++) {
		if (BPF_CORE_READ(filter, notif))
			break;
		filter = BPF_CORE_READ(filter, prev);
	}
	if (filter)
		r->flags |= THREAD_SECCOMP_LISTENER;
}

static __always_inline void fill_thread(struct thread_rec *r, struct task_struct *task)
{
	/* through the helper, for a plain number that arithmetic is allowed on */
	struct pid *pid = BPF_CORE_READ(task, thread_pid);
	u32 level;

	r->hdr.kind = REC_THREAD;
	r->hdr.size = sizeof(*r);
	r->tid = task->pid;
	r->tgid = task->tgid;
	r->ns_level = 0;
	r->ns_tid = r->tid;
	if (pid) {
		level = BPF_CORE_READ(pid, level);
		if (level && level < MAX_CGROUP_DEPTH) {
			int nr = 0;

			bpf_probe_read_kernel(&nr, sizeof(nr),
					      (char *)pid +
						      bpf_core_field_offset(struct pid, numbers) +
						      level * bpf_core_type_size(struct upid));
			r->ns_level = level;
			r->ns_tid = nr;
		}
	}
	r->flags = 0;
	r->tracer = 0;
	if (task->ptrace) {
		r->tracer = task->parent->tgid;
		r->flags |= THREAD_PTRACED;
	}
	if (BPF_CORE_READ_BITFIELD(task, restore_sigmask))
		r->flags |= THREAD_RESTORE_SIGMASK;
	if (BPF_CORE_READ_BITFIELD(task, frozen))
		r->flags |= THREAD_FROZEN;
	if (task->atomic_flags & PFA_NO_NEW_PRIVS)
		r->flags |= THREAD_NO_NEW_PRIVS;
	if (has_own_undo(task))
		r->flags |= THREAD_SEM_UNDO;
	if (BPF_CORE_READ_BITFIELD(task, sched_reset_on_fork))
		r->flags |= THREAD_RESET_ON_FORK;
	r->state = task->__state;
	r->exit_state = task->exit_state;
	r->exit_code = task->exit_code;
	r->exit_signal = task->exit_signal;
	r->pdeath_signal = task->pdeath_signal;
	r->personality = task->personality;
	r->policy = task->policy;
	r->static_prio = task->static_prio;
	r->rt_priority = task->rt_priority;
	r->task_flags = task->flags;
	r->start_boottime_ns = task->start_boottime;
	r->task = (u64)task;
	r->files = (u64)task->files;
	r->mm = (u64)task->mm;
	r->fs = (u64)task->fs;
	r->cwd_ino = BPF_CORE_READ(task, fs, pwd.dentry, d_inode, i_ino);
	r->cwd_dev = BPF_CORE_READ(task, fs, pwd.dentry, d_inode, i_sb, s_dev);
	r->root_ino = BPF_CORE_READ(task, fs, root.dentry, d_inode, i_ino);
	r->root_dev = BPF_CORE_READ(task, fs, root.dentry, d_inode, i_sb, s_dev);
	r->umask = BPF_CORE_READ(task, fs, umask);
	r->ioprio = 0;
	if (bpf_core_field_exists(task->io_context))
		r->ioprio = BPF_CORE_READ(task, io_context, ioprio);
	r->sighand = (u64)task->sighand;
	r->signal = (u64)task->signal;
	r->cgroup_id = task_cgroup_id(task);
	r->blocked = task->blocked.sig[0];
	r->saved_sigmask = task->saved_sigmask.sig[0];
	r->pending = task->pending.signal.sig[0];
	r->sas_ss_sp = task->sas_ss_sp;
	r->sas_ss_size = task->sas_ss_size;
	r->sas_ss_flags = task->sas_ss_flags;
	fill_seccomp(r, task);
	r->robust_list = (u64)task->robust_list;
	r->set_child_tid = (u64)task->set_child_tid;
	r->clear_child_tid = (u64)task->clear_child_tid;
	r->rseq = 0;
	r->rseq_sig = 0;
	r->rseq_len = 0;
	if (bpf_core_field_exists(task->rseq_sig)) {
		r->rseq = (u64)task->rseq;
		r->rseq_sig = task->rseq_sig;
		if (bpf_core_field_exists(task->rseq_len))
			r->rseq_len = task->rseq_len;
	}
	r->timer_slack_ns = task->timer_slack_ns;
	r->slice_ns = 0;
	if (bpf_core_field_exists(task->se.custom_slice) && task->se.custom_slice)
		r->slice_ns = task->se.slice;
	r->jobctl = task->jobctl;
	bpf_core_read(&r->comm, sizeof(r->comm), &task->comm);
	fill_cred(r, task->cred);
	fill_namespaces(r, task->nsproxy);
	fill_restart(r, task);
	fill_uring_task(r, task);
	fill_thread_attrs(r, task);
}

static __always_inline void fill_process(struct process_rec *r, struct task_struct *task,
					 struct signal_struct *signal)
{
	struct signal_struct___atomic_id *atomic_id = (void *)signal;

	r->hdr.kind = REC_PROCESS;
	r->hdr.size = sizeof(*r);
	r->pid = task->tgid;
	r->ppid = task->real_parent->tgid;
	r->pgid = pid_nr(signal->pids[PIDTYPE_PGID]);
	r->sid = pid_nr(signal->pids[PIDTYPE_SID]);
	r->nr_threads = signal->nr_threads;
	r->flags = 0;
	if (BPF_CORE_READ_BITFIELD(signal, is_child_subreaper))
		r->flags |= PROCESS_CHILD_SUBREAPER;
	if (signal->leader)
		r->flags |= PROCESS_SESSION_LEADER;
	r->tty = (u64)signal->tty;
	r->autogroup_nice = 0;
	if (bpf_core_field_exists(signal->autogroup))
		r->autogroup_nice = BPF_CORE_READ(signal, autogroup, nice);
	r->ptracer = ptracer_of(task);
	r->oom_score_adj = signal->oom_score_adj;
	r->group_exit_code = signal->group_exit_code;
	r->signal = (u64)signal;
	r->shared_pending = signal->shared_pending.signal.sig[0];
	r->signal_flags = signal->flags;
	r->itimer_real_expires_ns = 0;
	r->itimer_real_interval_ns = 0;
	r->next_timer_id = 0;
	if (bpf_core_field_exists(signal->posix_timers)) {
		r->itimer_real_expires_ns = hrtimer_expires(&signal->real_timer);
		if (r->itimer_real_expires_ns)
			r->flags |= PROCESS_REAL_TIMER_ARMED;
		else /* it may have fired since */
			r->shared_pending = signal->shared_pending.signal.sig[0];
		r->itimer_real_interval_ns = signal->it_real_incr;
		if (bpf_core_field_exists(atomic_id->next_posix_timer_id.counter))
			r->next_timer_id = BPF_CORE_READ(atomic_id, next_posix_timer_id.counter);
		else
			bpf_core_read(&r->next_timer_id, 4, &signal->next_posix_timer_id);
	}
	r->itimer_prof_expires_ns = signal->it[0].expires;
	r->itimer_prof_interval_ns = signal->it[0].incr;
	r->itimer_virt_expires_ns = signal->it[1].expires;
	r->itimer_virt_interval_ns = signal->it[1].incr;
	r->cpu_utime_ns = signal->cputimer.cputime_atomic.utime.counter;
	r->cpu_stime_ns = signal->cputimer.cputime_atomic.stime.counter;
	r->cpu_runtime_ns = signal->cputimer.cputime_atomic.sum_exec_runtime.counter;
	bpf_core_read(&r->rlimits, sizeof(r->rlimits), &signal->rlim);
}

static __always_inline void fill_mm(struct mm_rec *r, struct task_struct *task,
				    struct mm_struct *mm)
{
	struct mm_struct___flags_struct *mm_new = (void *)mm;
	struct file *exe = mm->exe_file;
	u32 auxv = bpf_core_field_size(mm->saved_auxv);

	r->hdr.kind = REC_MM;
	r->hdr.size = sizeof(*r);
	r->mm = (u64)mm;
	if (bpf_core_field_exists(mm_new->flags.__mm_flags))
		bpf_core_read(&r->flags, sizeof(r->flags), &mm_new->flags);
	else
		bpf_core_read(&r->flags, sizeof(r->flags), &mm->flags);
	bpf_core_read(&r->def_flags, sizeof(r->def_flags), &mm->def_flags);
	r->start_code = mm->start_code;
	r->end_code = mm->end_code;
	r->start_data = mm->start_data;
	r->end_data = mm->end_data;
	r->start_brk = mm->start_brk;
	r->brk = mm->brk;
	r->start_stack = mm->start_stack;
	r->arg_start = mm->arg_start;
	r->arg_end = mm->arg_end;
	r->env_start = mm->env_start;
	r->env_end = mm->env_end;
	r->vdso = (u64)mm->context.vdso;
	fill_mm_attrs(r, mm);
	r->exe_file = (u64)exe;
	r->exe_ino = exe ? BPF_CORE_READ(exe, f_inode, i_ino) : 0;
	r->exe_dev = exe ? BPF_CORE_READ(exe, f_inode, i_sb, s_dev) : 0;
	r->tgid = task->tgid;
	r->map_count = mm->map_count;
	r->membarrier = 0;
	if (bpf_core_field_exists(mm->membarrier_state))
		r->membarrier = BPF_CORE_READ(mm, membarrier_state.counter);
	if (auxv > sizeof(r->auxv))
		auxv = sizeof(r->auxv);
	r->auxv_words = auxv / 8;
	bpf_core_read(&r->auxv, auxv, &mm->saved_auxv);
}

static __always_inline void fill_sigactions(struct sigactions_rec *r, struct task_struct *task)
{
	r->hdr.kind = REC_SIGACTIONS;
	r->hdr.size = sizeof(*r);
	r->pid = task->tgid;
	r->sighand = (u64)task->sighand;
	/* x86-64 and arm64 lay a k_sigaction out as sigaction_rec: handler, flags,
	 * restorer, mask; bpf_core_field_size keeps that honest */
	if (bpf_core_field_size(task->sighand->action) == sizeof(r->actions))
		bpf_core_read(&r->actions, sizeof(r->actions), &task->sighand->action);
}

u64 last_mm;

SEC("iter/task")
int iter_tasks(struct bpf_iter__task *ctx)
{
	struct seq_file *seq = ctx->meta->seq;
	struct task_struct *task = ctx->task;
	struct signal_struct *signal;
	struct mm_struct *mm;

	if (!task || !in_scope(task))
		return 0;
	signal = task->signal;
	mm = task->mm;
	if (want & WANT_TASKS) {
		fill_thread(&out_thread, task);
		if (bpf_seq_write(seq, &out_thread, sizeof(out_thread)))
			return 0;
		if ((want & WANT_REGISTERS) && fill_registers(&out_registers, task) &&
		    bpf_seq_write(seq, &out_registers, sizeof(out_registers)))
			return 0;
		if (task->pid == task->tgid && signal) {
			fill_process(&out_process, task, signal);
			if (bpf_seq_write(seq, &out_process, sizeof(out_process)))
				return 0;
		}
		/* threads of a process come in a row, so this drops most repetitions */
		if (mm && (task->pid == task->tgid || (u64)mm != last_mm)) {
			fill_mm(&out_mm, task, mm);
			if (bpf_seq_write(seq, &out_mm, sizeof(out_mm)))
				return 0;
		}
		last_mm = (u64)mm;
	}
	if (task->pid != task->tgid)
		return 0;
	if ((want & WANT_SIGACTIONS) && task->sighand) {
		fill_sigactions(&out_sigactions, task);
		if (bpf_seq_write(seq, &out_sigactions, sizeof(out_sigactions)))
			return 0;
	}
	/* last, since nothing undoes side records when seq_write sends us round again */
	if ((want & WANT_TIMERS) && signal)
		emit_timers(task, signal);
	if ((want & WANT_AIO) && mm)
		emit_aio(task, mm);
	if (want & WANT_SEM_UNDO)
		emit_undos(task);
	return 0;
}
