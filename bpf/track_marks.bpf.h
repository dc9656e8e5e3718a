/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * The fallback where fentry is refused: the return of each system call that can change
 * a descriptor table marks the table, once, until user space reads it again. By then
 * the change is long published, so order is not to be had here.
 */

#define MSGHDR_CONTROLLEN 40 /* offset of msg_controllen in struct msghdr, x86-64 */

/* Whether system call nr may have changed the caller's table or what it refers to. */
static __always_inline bool changes_files(u64 nr, struct pt_regs *regs, long ret)
{
	u64 controllen = 0;

	switch (nr) {
	case 2:   /* open */
	case 3:   /* close */
	case 22:  /* pipe */
	case 32:  /* dup */
	case 33:  /* dup2 */
	case 41:  /* socket */
	case 42:  /* connect, which also fails with EINPROGRESS */
	case 43:  /* accept */
	case 48:  /* shutdown */
	case 49:  /* bind */
	case 50:  /* listen */
	case 53:  /* socketpair */
	case 85:  /* creat */
	case 213: /* epoll_create */
	case 233: /* epoll_ctl */
	case 240: /* mq_open */
	case 253: /* inotify_init */
	case 257: /* openat */
	case 272: /* unshare */
	case 282: /* signalfd */
	case 283: /* timerfd_create */
	case 284: /* eventfd */
	case 288: /* accept4 */
	case 289: /* signalfd4 */
	case 290: /* eventfd2 */
	case 291: /* epoll_create1 */
	case 292: /* dup3 */
	case 293: /* pipe2 */
	case 294: /* inotify_init1 */
	case 298: /* perf_event_open */
	case 299: /* recvmmsg */
	case 300: /* fanotify_init */
	case 304: /* open_by_handle_at */
	case 319: /* memfd_create */
	case 321: /* bpf */
	case 323: /* userfaultfd */
	case 425: /* io_uring_setup */
	case 426: /* io_uring_enter */
	case 428: /* open_tree */
	case 430: /* fsopen */
	case 432: /* fsmount */
	case 433: /* fspick */
	case 434: /* pidfd_open */
	case 435: /* clone3 with CLONE_PIDFD */
	case 436: /* close_range */
	case 437: /* openat2 */
	case 438: /* pidfd_getfd */
	case 444: /* landlock_create_ruleset */
	case 447: /* memfd_secret */
		return true;
	case 56: /* clone */
		return BPF_CORE_READ(regs, di) & CLONE_PIDFD;
	case 59:  /* execve */
	case 322: /* execveat */
		return ret == 0;
	case 16: /* ioctl: FIOCLEX, FIONCLEX, and those that return a descriptor */
		return ret > 2 || BPF_CORE_READ(regs, si) == 0x5450 ||
		       BPF_CORE_READ(regs, si) == 0x5451;
	case 72: /* fcntl: F_DUPFD, F_SETFD, F_DUPFD_CLOEXEC */
		return BPF_CORE_READ(regs, si) == 0 || BPF_CORE_READ(regs, si) == 2 ||
		       BPF_CORE_READ(regs, si) == 1030;
	case 47: /* recvmsg with control data: descriptors may have come along */
		bpf_probe_read_user(&controllen, sizeof(controllen),
				    (void *)BPF_CORE_READ(regs, si) + MSGHDR_CONTROLLEN);
		return controllen != 0;
	default:
		return false;
	}
}

SEC("tp_btf/sys_exit")
int BPF_PROG(sys_exit, struct pt_regs *regs, long ret)
{
	u64 nr;

	if (!current_tracked())
		return 0;
	nr = BPF_CORE_READ(regs, orig_ax);
	if (!changes_files(nr, regs, ret))
		return 0;
	if (nr == 59 || nr == 322 || nr == 272 || nr == 436)
		files_switched();
	mark_dirty((u64)current_files(), CLASS_FILES);
	return 0;
}
