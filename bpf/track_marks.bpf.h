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
	case 54:  /* setsockopt */
	case 53:  /* socketpair */
	case 85:  /* creat */
	case 213: /* epoll_create */
	case 233: /* epoll_ctl */
	case 240: /* mq_open */
	case 253: /* inotify_init */
	case 254: /* inotify_add_watch */
	case 255: /* inotify_rm_watch */
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
	case 16: /* ioctl: FIOCLEX, FIONCLEX, FIONBIO, FIOASYNC, FIOSETOWN, SIOCSPGRP, and
		  * those that return a descriptor */
		switch (BPF_CORE_READ(regs, si)) {
		case 0x5450:
		case 0x5451:
		case FIONBIO:
		case FIOASYNC:
		case 0x8901:
		case 0x8902:
			return true;
		}
		return ret > 2;
	case 72: /* fcntl: F_DUPFD, F_SETFD, F_SETFL, F_SETOWN, F_SETSIG, F_SETOWN_EX,
		  * F_DUPFD_CLOEXEC */
		switch (BPF_CORE_READ(regs, si)) {
		case 0:
		case 2:
		case F_SETFL:
		case 8:
		case F_SETSIG:
		case 15:
		case 1030:
			return true;
		}
		return false;
	case 47: /* recvmsg with control data: descriptors may have come along */
		bpf_probe_read_user(&controllen, sizeof(controllen),
				    (void *)BPF_CORE_READ(regs, si) + MSGHDR_CONTROLLEN);
		return controllen != 0;
	default:
		return false;
	}
}

/* Whether system call nr may have changed what send_attrs() says of its caller. */
static __always_inline bool changes_attrs(u64 nr)
{
	switch (nr) {
	case 80:  /* chdir */
	case 81:  /* fchdir */
	case 95:  /* umask */
	case 105: /* setuid */
	case 106: /* setgid */
	case 109: /* setpgid */
	case 112: /* setsid */
	case 113: /* setreuid */
	case 114: /* setregid */
	case 116: /* setgroups */
	case 117: /* setresuid */
	case 119: /* setresgid */
	case 122: /* setfsuid */
	case 123: /* setfsgid */
	case 126: /* capset */
	case 155: /* pivot_root */
	case 157: /* prctl: capabilities and securebits */
	case 161: /* chroot */
	case 272: /* unshare */
	case 308: /* setns */
		return true;
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
	if (changes_attrs(nr))
		send_attrs(bpf_get_current_task_btf());
	/* also of a child */
	if (nr == 109 && BPF_CORE_READ(regs, di))
		say_stale(0, CLASS_TASK);
	if (!changes_files(nr, regs, ret))
		return 0;
	if (nr == 59 || nr == 322 || nr == 272 || nr == 436)
		files_switched();
	mark_dirty((u64)current_files(), CLASS_FILES);
	return 0;
}
