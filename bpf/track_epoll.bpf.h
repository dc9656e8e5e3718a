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

/* An event about an item, not yet submitted, or NULL. */
static __always_inline struct epoll_ctl_event *item_event(u32 kind, struct file *epoll,
							  struct file *target, u32 fd)
{
	struct epoll_ctl_event *e = EVENT(struct epoll_ctl_event, kind, epoll, CLASS_EPOLL);

	if (!e)
		return NULL;
	e->epoll = (u64)epoll;
	e->target = (u64)target;
	e->fd = fd;
	e->events = 0;
	e->data = 0;
	return e;
}

/* Says an item as it is now. */
static __always_inline void send_item(struct file *epoll, struct file *target, u32 fd,
				      struct epitem *item)
{
	struct epoll_ctl_event *e = item_event(EVENT_EPOLL_SET, epoll, target, fd);
	struct epoll_event asked = {};

	if (!e)
		return;
	bpf_core_read(&asked, sizeof(asked), &item->event);
	e->events = asked.events;
	e->data = asked.data;
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

APART BPF_PROG(inserts, struct file *file, void *whead, struct poll_table_struct *pt)
{
	struct ep_pqueue *queue = (void *)pt;
	struct epoll_filefd watched = {};
	struct item_said *said;
	struct epitem *item;
	u32 zero = 0;

	item = BPF_CORE_READ(queue, epi);
	if (!item)
		return;
	bpf_core_read(&watched, sizeof(watched), &item->ffd);
	send_item(BPF_CORE_READ(item, ep, file), watched.file, watched.fd, item);
	said = bpf_map_lookup_elem(&items_said, &zero);
	if (said) {
		said->thread = bpf_get_current_pid_tgid();
		said->target = (u64)watched.file;
		said->fd = watched.fd;
	}
}

SEC("fentry/ep_ptable_queue_proc")
int BPF_PROG(epoll_insert)
{
	if (current_tracked())
		inserts(ctx);
	return 0;
}

/* Whoever lets go of a watched file last takes its items out: a kernel thread, or someone
 * who only looked at it. What others take out of their own instances does not matter. */
static __always_inline int item_removed(struct eventpoll *ep, struct epitem *item)
{
	struct file *epoll = ep->file;
	struct file *target = item->ffd.file;
	struct epoll_ctl_event *e;

	if (bpf_core_field_exists(epoll->f_count)) {
		/* an instance that dies drops all its items: nobody asks for them any more */
		if (!epoll->f_count.counter)
			return 0;
		if (target->f_count.counter && !current_tracked())
			return 0;
	}
	e = item_event(EVENT_EPOLL_DEL, epoll, target, item->ffd.fd);
	if (e)
		submit(e);
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

APART BPF_PROG(changes_item, int epfd, int op, int fd)
{
	struct files_struct *files = current_files();
	struct call *call;

	if (!table_shared(files))
		return;
	call = begin_call();
	if (!call)
		return;
	call->epoll = (u64)file_at(files, epfd);
	call->target = (u64)file_at(files, fd);
}

SEC("fentry/do_epoll_ctl")
int BPF_PROG(epoll_ctl, int epfd, int op)
{
	if (op != EPOLL_CTL_DEL && current_tracked())
		changes_item(ctx);
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
		struct epoll_filefd watched = {};
		u64 file;

		bpf_core_read(&watched, sizeof(watched), &item->ffd);
		file = (u64)watched.file;
		if (file == (u64)target && watched.fd == fd) {
			send_item(epoll, target, fd, item);
			return;
		}
		if ((u64)target > file || ((u64)target == file && fd > watched.fd))
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

/* Whether nobody else can reach a file: its one reference is in the caller's table. */
static __always_inline bool exclusive(struct files_struct *files, struct file *file)
{
	return !table_shared(files) && bpf_core_field_exists(file->f_count) &&
	       BPF_CORE_READ(file, f_count.counter) == 1;
}

/* A change, or an addition whose file does not queue. Another thread may have replaced
 * the descriptors meanwhile: what they meant before and after is both said. */
APART BPF_PROG(changed_item, int epfd, int op, int fd, struct epoll_event *event, bool nonblock,
	       int ret)
{
	u64 thread = bpf_get_current_pid_tgid();
	struct files_struct *files = current_files();
	struct file *epoll, *target;
	struct epoll_ctl_event *e;
	struct call *call = NULL;

	if (table_shared(files))
		call = bpf_map_lookup_elem(&calls, &thread);
	target = file_at(files, fd);
	if (ret || (op == EPOLL_CTL_ADD && said_already(thread, target, fd)))
		goto out;
	epoll = file_at(files, epfd);
	if (op == EPOLL_CTL_MOD && target && epoll && exclusive(files, epoll)) {
		/* then nobody changed it since, and the kernel made of the argument what counts */
		e = item_event(EVENT_EPOLL_SET, epoll, target, fd);
		if (e) {
			e->events = event->events;
			e->data = event->data;
			submit(e);
		}
		goto out;
	}
	if (call && (call->epoll != (u64)epoll || call->target != (u64)target))
		say_item((struct file *)call->epoll, (struct file *)call->target, fd);
	say_item(epoll, target, fd);
out:
	if (call)
		bpf_map_delete_elem(&calls, &thread);
}

SEC("fexit/do_epoll_ctl")
int BPF_PROG(epoll_ctl_exit, int epfd, int op)
{
	if (op != EPOLL_CTL_DEL && current_tracked())
		changed_item(ctx);
	return 0;
}
