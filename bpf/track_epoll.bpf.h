/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Epoll interest lists. do_epoll_ctl is hooked outside its lock: what each call found
 * when it began lets user space see that two calls overlapped. */

#define EPOLL_CTL_DEL 2

SEC("fentry/do_epoll_ctl")
int BPF_PROG(epoll_ctl, int epfd, int op, int fd)
{
	struct files_struct *files;
	struct call *call;

	if (!current_tracked())
		return 0;
	call = begin_call();
	if (!call)
		return 0;
	call->since = last_seq;
	files = current_files();
	call->epoll = (u64)file_at(files, epfd);
	call->target = (u64)file_at(files, fd);
	return 0;
}

SEC("fexit/do_epoll_ctl")
int BPF_PROG(epoll_ctl_exit, int epfd, int op, int fd, struct epoll_event *event, bool nonblock,
	     int ret)
{
	u64 id = bpf_get_current_pid_tgid();
	struct epoll_ctl_event *e;
	struct call *call;
	u64 epoll;

	if (!current_tracked())
		return 0;
	call = bpf_map_lookup_elem(&calls, &id);
	if (!call) {
		epoll = (u64)file_at(current_files(), epfd);
		if (!ret && epoll)
			say_stale(epoll, CLASS_EPOLL);
		return 0;
	}
	if (ret)
		goto out;
	epoll = call->epoll;
	e = EVENT(struct epoll_ctl_event, op == EPOLL_CTL_DEL ? EVENT_EPOLL_DEL : EVENT_EPOLL_SET,
		  epoll, CLASS_EPOLL);
	if (!e)
		goto out;
	e->epoll = epoll;
	e->target = call->target;
	e->files = (u64)current_files();
	e->since = call->since;
	e->epfd = epfd;
	e->fd = fd;
	e->events = 0;
	e->data = 0;
	e->pad = 0;
	if (op != EPOLL_CTL_DEL) {
		e->events = BPF_CORE_READ(event, events);
		e->data = BPF_CORE_READ(event, data);
	}
	bpf_ringbuf_submit(e, 0);
out:
	bpf_map_delete_elem(&calls, &id);
	return 0;
}

/* A watched file dies: only files in some interest list come here. Not limited to
 * tracked tasks, since a delayed fput runs in a kernel thread. */
SEC("fentry/eventpoll_release_file")
int BPF_PROG(eventpoll_release, struct file *file)
{
	struct object_event *e;

	e = EVENT(struct object_event, EVENT_EPOLL_RELEASE, file, CLASS_EPOLL);
	if (!e)
		return 0;
	e->object = (u64)file;
	e->class = CLASS_EPOLL;
	e->pad = 0;
	bpf_ringbuf_submit(e, 0);
	return 0;
}
