/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * Epoll interest lists. Items come and go under the mutex of their instance, and so do
 * the hooks that say it: ep_ptable_queue_proc is what ep_insert() has the watched file
 * call back (a pointer is taken of it, so it is never inlined), ep_remove takes items out
 * for whatever reason. Only a change of an item has no function of its own: it is looked
 * up when epoll_ctl(2) returns, after its number is taken.
 */

#define EPOLL_CTL_ADD 1
#define EPOLL_CTL_DEL 2
#define EPOLL_CTL_MOD 3
/* more levels than a red-black tree of all possible items has */
#define EPOLL_TREE_DEPTH 48

static __always_inline void send_item(u32 kind, struct file *epoll, struct file *target, u32 fd,
				      struct epitem *item)
{
	struct epoll_ctl_event *e = EVENT(struct epoll_ctl_event, kind, epoll, CLASS_EPOLL);

	if (!e)
		return;
	e->epoll = (u64)epoll;
	e->target = (u64)target;
	e->fd = fd;
	e->events = 0;
	e->data = 0;
	if (kind == EVENT_EPOLL_SET) {
		e->events = BPF_CORE_READ(item, event.events);
		e->data = BPF_CORE_READ(item, event.data);
	}
	submit(e);
}

/* The item this CPU said last: epoll_ctl(2) need not say it again when it returns. */
struct item_said {
	u64 thread;
	u64 target;
	u64 fd;
};
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct item_said);
} items_said SEC(".maps");

SEC("fentry/ep_ptable_queue_proc")
int BPF_PROG(epoll_insert, struct file *file, void *whead, struct poll_table_struct *pt)
{
	struct ep_pqueue *queue = (void *)pt;
	struct item_said *said;
	struct epitem *item;
	u32 zero = 0;

	if (!current_tracked())
		return 0;
	item = BPF_CORE_READ(queue, epi);
	if (!item)
		return 0;
	send_item(EVENT_EPOLL_SET, BPF_CORE_READ(item, ep, file), BPF_CORE_READ(item, ffd.file),
		  BPF_CORE_READ(item, ffd.fd), item);
	said = bpf_map_lookup_elem(&items_said, &zero);
	if (said) {
		said->thread = bpf_get_current_pid_tgid();
		said->target = (u64)BPF_CORE_READ(item, ffd.file);
		said->fd = BPF_CORE_READ(item, ffd.fd);
	}
	return 0;
}

/* Not limited to tracked tasks, since a delayed fput runs in a kernel thread. */
static __always_inline int item_removed(struct eventpoll *ep, struct epitem *item)
{
	struct file *epoll = BPF_CORE_READ(ep, file);

	/* an instance that dies drops all its items: nobody asks for them any more */
	if (bpf_core_field_exists(epoll->f_count) && !BPF_CORE_READ(epoll, f_count.counter))
		return 0;
	send_item(EVENT_EPOLL_DEL, epoll, BPF_CORE_READ(item, ffd.file),
		  BPF_CORE_READ(item, ffd.fd), item);
	return 0;
}

/* Where ep_remove is split in parts that the death of a watched file calls by itself */
SEC("fentry/ep_remove_epi")
int BPF_PROG(epoll_remove_item, struct eventpoll *ep, struct epitem *item)
{
	return item_removed(ep, item);
}

/* up to 6.3 */
SEC("fentry/ep_remove")
int BPF_PROG(epoll_remove, struct eventpoll *ep, struct epitem *item)
{
	return item_removed(ep, item);
}

SEC("fentry/__ep_remove")
int BPF_PROG(epoll_remove_forced, struct eventpoll *ep, struct epitem *item)
{
	return item_removed(ep, item);
}

SEC("fentry/do_epoll_ctl")
int BPF_PROG(epoll_ctl, int epfd, int op, int fd)
{
	struct files_struct *files;
	struct call *call;

	if (op == EPOLL_CTL_DEL || !current_tracked())
		return 0;
	files = current_files();
	if (!table_shared(files))
		return 0;
	call = begin_call();
	if (!call)
		return 0;
	call->epoll = (u64)file_at(files, epfd);
	call->target = (u64)file_at(files, fd);
	return 0;
}

/* Says an item as it is, if there is one. */
static __always_inline void say_item(struct file *epoll, struct file *target, int fd)
{
	struct eventpoll *ep;
	struct rb_node *node;

	if (!epoll || !target)
		return;
	if (anon_name8(epoll) != NAME8('[', 'e', 'v', 'e', 'n', 't', 'p', 'o'))
		return;
	ep = BPF_CORE_READ(epoll, private_data);
	node = BPF_CORE_READ(ep, rbr.rb_root.rb_node);
	for (int level = 0; level < EPOLL_TREE_DEPTH && node; level++) {
		struct epitem *item = (void *)node - bpf_core_field_offset(struct epitem, rbn);
		u64 file = (u64)BPF_CORE_READ(item, ffd.file);
		int number = BPF_CORE_READ(item, ffd.fd);

		if (file == (u64)target && number == fd) {
			send_item(EVENT_EPOLL_SET, epoll, target, fd, item);
			return;
		}
		if ((u64)target > file || ((u64)target == file && fd > number))
			node = BPF_CORE_READ(node, rb_right);
		else
			node = BPF_CORE_READ(node, rb_left);
	}
}

/* Whether the addition that returns now was said from inside. */
static __always_inline bool said_already(u64 thread, struct file *target, u32 fd)
{
	struct item_said *said;
	u32 zero = 0;

	said = bpf_map_lookup_elem(&items_said, &zero);
	return said && said->thread == thread && said->target == (u64)target && said->fd == fd;
}

/* A change, or an addition whose file does not queue. Another thread may have replaced
 * the descriptors meanwhile: what they meant before and after is both said. */
SEC("fexit/do_epoll_ctl")
int BPF_PROG(epoll_ctl_exit, int epfd, int op, int fd, struct epoll_event *event, bool nonblock,
	     int ret)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct files_struct *files;
	struct file *epoll, *target;
	struct call *call;

	if (op == EPOLL_CTL_DEL || !current_tracked())
		return 0;
	files = current_files();
	epoll = file_at(files, epfd);
	target = file_at(files, fd);
	call = bpf_map_lookup_elem(&calls, &thread);
	if (!ret && !(op == EPOLL_CTL_ADD && said_already(thread, target, fd))) {
		if (call && (call->epoll != (u64)epoll || call->target != (u64)target))
			say_item((struct file *)call->epoll, (struct file *)call->target, fd);
		say_item(epoll, target, fd);
	}
	if (call)
		bpf_map_delete_elem(&calls, &thread);
	return 0;
}
