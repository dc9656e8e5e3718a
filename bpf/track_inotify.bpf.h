/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Watches of inotify instances. */

#define MAX_GROUP_MARKS (1 << 20)

struct mark_search {
	u64 node;
	u64 end;
	int wd;
	u32 mask;
	u32 found;
	u32 pad;
};

/* bpf_loop callback: a new watch is the first of its group. */
static long search_mark(u64 index, void *ctx)
{
	struct mark_search *search = ctx;
	struct list_head *node = (void *)search->node;
	struct inotify_inode_mark *mark;

	if (!node || search->node == search->end)
		return 1;
	mark = (void *)node - bpf_core_field_offset(struct fsnotify_mark, g_list);
	if (BPF_CORE_READ(mark, wd) == search->wd) {
		search->mask = BPF_CORE_READ(mark, fsn_mark.mask);
		search->found = 1;
		return 1;
	}
	search->node = (u64)BPF_CORE_READ(node, next);
	return 0;
}

SEC("fexit/inotify_update_watch")
int BPF_PROG(watch_set, struct fsnotify_group *group, struct inode *inode, u32 arg, int wd)
{
	struct mark_search search;
	struct watch_event *e;

	if (wd < 0 || !current_tracked())
		return 0;
	e = EVENT(struct watch_event, EVENT_WATCH_SET, group, CLASS_INOTIFY);
	if (!e)
		return 0;
	search.node = (u64)BPF_CORE_READ(group, marks_list.next);
	search.end = (u64)group + bpf_core_field_offset(struct fsnotify_group, marks_list);
	search.wd = wd;
	search.mask = arg;
	search.found = 0;
	search.pad = 0;
	bpf_loop(MAX_GROUP_MARKS, search_mark, &search, 0);
	e->group = (u64)group;
	e->ino = BPF_CORE_READ(inode, i_ino);
	e->dev = BPF_CORE_READ(inode, i_sb, s_dev);
	e->wd = wd;
	e->mask = search.mask;
	e->pad = 0;
	/* The group's lock is free by now: somebody may have removed the watch already, and
	 * that may have been said before this. */
	if (!search.found && search.node == search.end)
		e->ev.hdr.kind = EVENT_WATCH_DEL;
	submit(e);
	return 0;
}

/* Whoever removes the file may be anyone. */
SEC("fentry/inotify_ignored_and_remove_idr")
int BPF_PROG(watch_removed, struct fsnotify_mark *fsn_mark, struct fsnotify_group *group)
{
	struct inotify_inode_mark *mark = (void *)fsn_mark;
	struct watch_event *e;

	e = EVENT(struct watch_event, EVENT_WATCH_DEL, group, CLASS_INOTIFY);
	if (!e)
		return 0;
	e->group = (u64)group;
	e->ino = 0;
	e->dev = 0;
	e->wd = BPF_CORE_READ(mark, wd);
	e->mask = 0;
	e->pad = 0;
	submit(e);
	return 0;
}
