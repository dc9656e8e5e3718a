/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* What of a thread changes seldom: credentials, session, process group, directories,
 * umask. Hooked where the change has taken effect; the event then says what is. */

#define EXIT_DEAD 0x10

static __always_inline int attrs_changed(void)
{
	if (current_tracked())
		send_attrs(bpf_get_current_task_btf());
	return 0;
}

SEC("fexit/commit_creds")
int BPF_PROG(commit_creds)
{
	return attrs_changed();
}

SEC("fexit/set_fs_pwd")
int BPF_PROG(set_fs_pwd)
{
	return attrs_changed();
}

SEC("fexit/set_fs_root")
int BPF_PROG(set_fs_root)
{
	return attrs_changed();
}

SEC("fexit/__x64_sys_umask")
int BPF_PROG(sys_umask)
{
	return attrs_changed();
}

/* setsid(2), setpgid(2) also of a child. One that is being reaped has been said to be gone:
 * its parent can find it until it is unhashed, if it ignores SIGCHLD or has several threads. */
SEC("fexit/change_pid")
int BPF_PROG(change_pid, struct task_struct *task)
{
	if (task_tracked(task) && !(task->exit_state & EXIT_DEAD))
		send_attrs(task);
	return 0;
}
