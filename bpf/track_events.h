/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * The part of the wire contract that the tracking hooks use; included by events.h,
 * whose rules hold. An event carries identity and resulting state, and a number
 * that orders it among all events: see track_ring.bpf.h.
 */
#ifndef TRACKER_TRACK_EVENTS_H
#define TRACKER_TRACK_EVENTS_H

#define TRK_WORD_FDS 64
#define TRK_MAX_ROOTS 16
#define TRK_MAX_SHARDS 8

enum event_kind {
	EVENT_TASK_NEW = 64,
	EVENT_TASK_EXEC = 65,
	EVENT_TASK_RENAME = 66,
	EVENT_TASK_EXIT = 67,
	EVENT_TASK_RELEASE = 68,
	EVENT_TASK_FILES = 69,
	EVENT_CGROUP_MOVE = 70,
	EVENT_FILES_NEW = 71,
	EVENT_FILES_WORD = 72,
	EVENT_FD_INSTALL = 73,
	EVENT_FD_CLOSE = 74,
	EVENT_FD_CLOEXEC = 75,
	EVENT_CLOEXEC_WORD = 76,
	EVENT_EXEC_CLOSE = 77,
	EVENT_SOCKET = 78,
	EVENT_SOCKET_STATE = 79,
	EVENT_EPOLL_SET = 80,
	EVENT_EPOLL_DEL = 81,
	EVENT_FILES_GONE = 82,
	EVENT_STALE = 83,
	EVENT_FD_INSTALL_SOCKET = 84,
	EVENT_TASK_ATTRS = 85,
	EVENT_OFD = 86,
	EVENT_WATCH_SET = 87,
	EVENT_WATCH_DEL = 88,
	EVENT_FILES_COPY = 89,
	EVENT_FILES_COPIED = 90,
};

/* What an event is about; losses are counted by it. */
enum event_class {
	CLASS_TASK = 0,
	CLASS_FILES = 1,
	CLASS_SOCKET = 2,
	CLASS_EPOLL = 3,
	CLASS_MM = 4,
	CLASS_INOTIFY = 5,
	CLASS_COUNT = 6,
};

/* A cgroup whose subtree is tracked. */
struct root_rec {
	__u64 id;
	__u32 level; /* depth below the root cgroup, which is 0 */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct root_rec, 16);

/* What every event starts with. */
struct event_hdr {
	struct rec_hdr hdr;
	__u64 seq;
};
TRK_ASSERT_SIZE(struct event_hdr, 16);

/* EVENT_TASK_*: the thread as it is after the event. */
struct task_event {
	struct event_hdr ev;
	__u64 task;
	__u64 files;
	__u64 mm;
	__u64 cgroup;
	__u32 tid;
	__u32 tgid;
	__u32 ppid;
	__u32 pad;
	char comm[TRK_COMM_LEN];
};
TRK_ASSERT_SIZE(struct task_event, 80);

/* EVENT_TASK_ATTRS: what else of a thread must be restored and changes seldom. */
struct task_attr_event {
	struct event_hdr ev;
	__u64 task;
	__u64 fs; /* struct fs_struct, 0 once it exits */
	__u64 cwd_ino;
	__u64 root_ino;
	__u64 cap_inheritable;
	__u64 cap_permitted;
	__u64 cap_effective;
	__u64 cap_bset;
	__u64 cap_ambient;
	__u32 cwd_dev;
	__u32 root_dev;
	__u32 umask;
	__u32 sid;
	__u32 pgid;
	__u32 uid; /* as the initial user namespace counts */
	__u32 gid;
	__u32 euid;
	__u32 egid;
	__u32 suid;
	__u32 sgid;
	__u32 fsuid;
	__u32 fsgid;
	__u32 securebits;
};
TRK_ASSERT_SIZE(struct task_attr_event, 144);

/* EVENT_OFD: what fcntl(2) and ioctl(2) change of an open file description. */
struct ofd_event {
	struct event_hdr ev;
	__u64 file;
	__u32 flags; /* O_* */
	__u32 owner_pid;
	__u32 owner_type; /* as in file_rec */
	__s32 owner_sig;
};
TRK_ASSERT_SIZE(struct ofd_event, 40);

/* EVENT_WATCH_SET, EVENT_WATCH_DEL */
struct watch_event {
	struct event_hdr ev;
	__u64 group; /* struct fsnotify_group of the inotify instance */
	__u64 ino;
	__u32 dev;
	__s32 wd;
	__u32 mask;
	__u32 pad;
};
TRK_ASSERT_SIZE(struct watch_event, 48);

/* EVENT_CGROUP_MOVE */
struct move_event {
	struct event_hdr ev;
	__u64 cgroup;
	__u32 tgid;
	__u32 tracked;
};
TRK_ASSERT_SIZE(struct move_event, 32);

/* EVENT_FD_INSTALL */
struct install_event {
	struct event_hdr ev;
	__u64 files;
	__u64 file;
	__u64 ino;
	/* struct sock, of which more follows in install_socket_event; for inotify instances
	 * struct fsnotify_group */
	__u64 object;
	__u32 dev;
	__u32 fd;
	__u32 cloexec;
	__u32 kind;  /* enum file_kind */
	__u32 mode;  /* st_mode */
	__u32 flags; /* O_* */
	__u32 empty; /* nothing else refers to the file, which was just made; or a set of nothing */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct install_event, 80);

/* EVENT_FILES_NEW, _FILES_GONE, _FD_CLOSE, _FD_CLOEXEC, _CLOEXEC_WORD, _EXEC_CLOSE */
struct fd_event {
	struct event_hdr ev;
	__u64 files;
	__u64 cloexec; /* FD_CLOEXEC of fd; _CLOEXEC_WORD: of fd..fd+63, bit by bit */
	__u32 fd;
	__u32 pad;
};
TRK_ASSERT_SIZE(struct fd_event, 40);

/* EVENT_FILES_WORD: the descriptors base..base+63 of a table that was just copied. */
struct word_event {
	struct event_hdr ev;
	__u64 files;
	__u64 open;
	__u64 cloexec;
	__u32 base;
	__u32 pad;
	__u64 file[TRK_WORD_FDS];
};
TRK_ASSERT_SIZE(struct word_event, 560);

/* A socket as it is. */
struct sock_part {
	__u64 sock;
	__u64 ino;
	__u64 peer; /* struct sock at the other end of a Unix connection */
	__u16 family;
	__u16 type;
	__u16 protocol;
	__u8 state; /* TCP_* also for Unix sockets */
	__u8 shutdown;
	__u16 local_port;  /* host order */
	__u16 remote_port; /* host order */
	__u32 path_len;
	__u8 local_addr[16]; /* network order; IPv4 in the first four bytes */
	__u8 remote_addr[16];
	char path[TRK_SUN_PATH_LEN];
	__u32 pad;
	struct sock_opts opts;
};
TRK_ASSERT_SIZE(struct sock_part, 280);

/* EVENT_SOCKET */
struct socket_event {
	struct event_hdr ev;
	struct sock_part socket;
};
TRK_ASSERT_SIZE(struct socket_event, 296);

/* EVENT_FD_INSTALL_SOCKET */
struct install_socket_event {
	struct install_event install;
	struct sock_part socket;
};
TRK_ASSERT_SIZE(struct install_socket_event, 360);

/* EVENT_SOCKET_STATE */
struct sock_state_event {
	struct event_hdr ev;
	__u64 sock;
	__u32 state;
	__u32 shutdown;
};
TRK_ASSERT_SIZE(struct sock_state_event, 32);

/* EVENT_EPOLL_SET, EVENT_EPOLL_DEL */
struct epoll_ctl_event {
	struct event_hdr ev;
	__u64 epoll;  /* struct file of the epoll instance */
	__u64 target; /* struct file watched */
	__u64 data;
	__u32 fd; /* number it was added under */
	__u32 events;
};
TRK_ASSERT_SIZE(struct epoll_ctl_event, 48);

/* EVENT_STALE: the object of that class. EVENT_FILES_COPY, EVENT_FILES_COPIED: the thread that
 * begins to copy a descriptor table that others use, and has said all of the copy. */
struct object_event {
	struct event_hdr ev;
	__u64 object;
	__u32 class; /* enum event_class */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct object_event, 32);

#endif
