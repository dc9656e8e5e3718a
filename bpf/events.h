/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * The wire contract between the BPF programs and the tracker.
 *
 * Every record that crosses from kernel to user space is laid out here and
 * nowhere else: build.rs runs bindgen over this file (struct thread_rec becomes
 * ThreadRec), so the Rust side cannot disagree. Rules: fixed-width types only,
 * no implicit padding, every size asserted, pointers travel as opaque __u64
 * identities, and each record starts with a struct rec_hdr.
 */
#ifndef TRACKER_EVENTS_H
#define TRACKER_EVENTS_H

#include <linux/types.h>

#define TRK_COMM_LEN 16
#define TRK_NAME_LEN 32
#define TRK_SUN_PATH_LEN 108
#define TRK_NR_RLIMITS 16
#define TRK_NR_SIGNALS 64
#define TRK_AUXV_WORDS 64
/* As many long records are told of in one pass: more would not fit the side ring. */
#define TRK_WINDOW 4096

#define TRK_ASSERT_SIZE(type, size)                                                                \
	_Static_assert(sizeof(type) == (size), #type " must be " #size " bytes")

enum rec_kind {
	REC_THREAD = 1,
	REC_PROCESS = 2,
	REC_MM = 3,
	REC_SIGACTIONS = 4,
	REC_TIMER = 5,
	REC_FILE = 6,
	REC_EVENTFD = 7,
	REC_PIPE = 8,
	REC_TIMERFD = 9,
	REC_SIGNALFD = 10,
	REC_SOCKET = 11,
	REC_PIDFD = 12,
	REC_EPOLL_ITEM = 13,
	REC_WATCH = 14,
	REC_LOCK = 15,
	REC_VMA = 16,
	REC_TTY = 17,
	REC_TTY_DATA = 18,
	REC_AIO = 19,
	REC_MEMBER = 20,
	REC_URING = 21,
	REC_PRESSURE = 22,
	REC_MQUEUE = 23,
	REC_MQUEUE_DATA = 24,
	REC_SEM_UNDO = 25,
	REC_WAITING = 26,
	REC_WAITING_DATA = 27,
	REC_EPOLL = 28,
	REC_REGISTERS = 29,
};

/* What an iterator pass reports besides its main records. */
enum iter_want {
	WANT_TASKS = 1,
	WANT_SIGACTIONS = 2,
	WANT_TIMERS = 4,
	WANT_EPOLL = 8,
	WANT_WATCHES = 16,
	WANT_LOCKS = 32,
	WANT_TTY_DATA = 64,
	WANT_CHOICES = 128, /* of TCP sockets */
	WANT_AIO = 256,
	WANT_MEMBERS = 512,
	WANT_MQUEUE_DATA = 1024, /* and nothing else */
	WANT_SEM_UNDO = 2048,
	WANT_WAITING = 4096,     /* and nothing else */
	WANT_CONNECTIONS = 8192, /* and nothing else */
	WANT_REGISTERS = 16384,  /* of threads that are frozen */
};

/* What every record starts with; size counts the header itself. */
struct rec_hdr {
	__u32 kind; /* enum rec_kind, or an event kind */
	__u32 size;
};
TRK_ASSERT_SIZE(struct rec_hdr, 8);

/* What kind of open file a struct file is. */
enum file_kind {
	FILE_OTHER = 0, /* named by file_rec.name and file_rec.magic */
	FILE_REGULAR = 1,
	FILE_DIRECTORY = 2,
	FILE_CHAR_DEVICE = 3,
	FILE_BLOCK_DEVICE = 4,
	FILE_SYMLINK = 5, /* O_PATH | O_NOFOLLOW only */
	FILE_FIFO = 6,    /* named, on a real filesystem */
	FILE_PIPE = 7,    /* from pipe(2) */
	FILE_SOCKET = 8,
	FILE_EVENTFD = 9,
	FILE_EPOLL = 10,
	FILE_TIMERFD = 11,
	FILE_SIGNALFD = 12,
	FILE_INOTIFY = 13,
	FILE_FANOTIFY = 14,
	FILE_PIDFD = 15,
	FILE_MEMFD = 16, /* shmem or hugetlb file made by memfd_create(2) */
	FILE_IO_URING = 17,
	FILE_USERFAULTFD = 18,
	FILE_PERF_EVENT = 19,
	FILE_BPF = 20,
	FILE_MQUEUE = 21,
	FILE_NAMESPACE = 22,
};

/* Which system call a restart_block would continue. */
enum restart_kind {
	RESTART_NONE = 0,
	RESTART_NANOSLEEP = 1,
	RESTART_FUTEX_WAIT = 2,
	RESTART_POLL = 3,
	RESTART_CPU_NANOSLEEP = 4,
	RESTART_ALARM_NANOSLEEP = 5,
	RESTART_UNKNOWN = 6,
};

#include "task_events.h"

/* A POSIX timer. */
struct timer_rec {
	struct rec_hdr hdr;
	__u32 pid;
	__s32 id;
	__s32 clock;
	__s32 notify; /* SIGEV_* */
	__s32 signo;
	__u32 target; /* TID for SIGEV_THREAD_ID */
	__u64 value;  /* sigev_value */
	__u64 interval_ns;
	/* absolute, on base_clock; for CPU clocks an amount of CPU time; 0 is disarmed */
	__u64 expires_ns;
	__u32 base_clock; /* CLOCK_* that expires_ns counts on */
	__s32 overrun_last;
	__s64 overrun;
	__u32 queued;    /* its signal is pending */
	__u32 clock_tid; /* of the thread whose CPU clock it is on, 0 once that has ended */
	__u64 used_ns;   /* what that clock shows */
};
TRK_ASSERT_SIZE(struct timer_rec, 88);

/* One file descriptor. Details of some kinds follow in a record of their own. */
/* file_rec.hints */
enum file_hint {
	HINT_SEQUENTIAL = 1,    /* POSIX_FADV_SEQUENTIAL */
	HINT_RANDOM = 2,        /* POSIX_FADV_RANDOM */
	HINT_NOREUSE = 4,       /* POSIX_FADV_NOREUSE, since 6.3 */
	HINT_NOTIFY = 8,        /* F_NOTIFY of the directory */
	HINT_EVENTS = 16,       /* of inotify or fanotify that were not read, or not answered */
	HINT_WRITE_ERROR = 32,  /* fsync(2) will tell of a failed write-back */
	HINT_UNPRIVILEGED = 64, /* a fanotify group made without CAP_SYS_ADMIN */
};

struct file_rec {
	struct rec_hdr hdr;
	__u64 files; /* files_struct, the table the descriptor is in */
	__u64 file;  /* struct file, the open file description */
	__u64 inode;
	__u64 private_data;
	__u32 tgid;
	__u32 tid;
	__u32 fd;
	__u32 cloexec;
	__u32 kind;  /* enum file_kind */
	__u32 flags; /* O_* */
	__u32 fmode; /* FMODE_* */
	__u32 mode;  /* st_mode */
	__s64 pos;
	__s64 size;
	__u64 ino;
	__u64 refs;  /* references to the open file description */
	__u64 magic; /* superblock magic */
	__u32 dev;   /* superblock's device, kernel encoding: major << 20 | minor */
	__u32 rdev;  /* same encoding */
	__u32 nlink;
	__u32 mnt_id;
	__u32 owner_pid;  /* F_GETOWN, initial PID namespace */
	__u32 owner_type; /* enum pid_type: 0 thread, 1 process, 2 process group */
	__s32 owner_sig;  /* F_GETSIG */
	__u32 owner_uid;
	__u32 owner_euid;
	__u32 has_locks;         /* non-zero if the inode carries locks or leases */
	__u32 hints;             /* enum file_hint */
	__u32 write_hint;        /* F_GET_RW_HINT */
	char name[TRK_NAME_LEN]; /* dentry name, cut to fit */
};
TRK_ASSERT_SIZE(struct file_rec, 192);

struct eventfd_rec {
	struct rec_hdr hdr;
	__u64 count;
	__u32 flags; /* EFD_SEMAPHORE is bit 0 */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct eventfd_rec, 24);

struct pipe_rec {
	struct rec_hdr hdr;
	__u64 pipe;  /* pipe_inode_info */
	__u64 bytes; /* queued */
	__u32 slots; /* ring size in buffers, 4096 bytes each for F_GETPIPE_SZ */
	__u32 used;  /* buffers in use */
	__u32 readers;
	__u32 writers;
};
TRK_ASSERT_SIZE(struct pipe_rec, 40);

struct timerfd_rec {
	struct rec_hdr hdr;
	__s32 clock;
	__u32 settime_flags; /* TFD_TIMER_* */
	__u64 interval_ns;
	__u64 expires_ns; /* absolute, on base_clock of the initial time namespace; 0 is disarmed */
	__u32 base_clock;
	__u32 expired; /* non-zero if it fired and was not read since */
	__u64 ticks;
};
TRK_ASSERT_SIZE(struct timerfd_rec, 48);

struct signalfd_rec {
	struct rec_hdr hdr;
	__u64 mask; /* signals it accepts: bit 0 is signal 1 */
};
TRK_ASSERT_SIZE(struct signalfd_rec, 16);

/* How an epoll instance polls devices (EPIOCSPARAMS, since 6.9), unless as usual. */
struct epoll_rec {
	struct rec_hdr hdr;
	__u32 busy_poll_usecs;
	__u16 busy_poll_budget;
	__u8 prefer_busy_poll;
	__u8 pad;
};
TRK_ASSERT_SIZE(struct epoll_rec, 16);

struct pidfd_rec {
	struct rec_hdr hdr;
	__u32 pid; /* initial PID namespace; 0 if the process was waited for */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct pidfd_rec, 16);

/* uring_rec.state */
enum uring_state {
	URING_EVENTFD = 1,       /* IORING_REGISTER_EVENTFD */
	URING_BUFFERS = 2,       /* buffers the kernel chooses from */
	URING_PERSONALITIES = 4, /* IORING_REGISTER_PERSONALITY */
	URING_RESTRICTED = 8,    /* IORING_REGISTER_RESTRICTIONS */
	URING_OVERFLOWN = 16,    /* completions that did not fit the ring */
	URING_WORKERS = 32,      /* IORING_REGISTER_IOWQ_MAX_WORKERS */
	URING_NAPI = 64,         /* IORING_REGISTER_NAPI */
	URING_WAITS = 128,       /* requests that wait for an event or a time-out */
};

/* An io_uring instance. */
struct uring_rec {
	struct rec_hdr hdr;
	__u32 flags; /* IORING_SETUP_* */
	__u32 sq_entries;
	__u32 cq_entries;
	__u32 sq_head; /* the kernel's own positions, which count on and wrap at 2^32 */
	__u32 cq_tail;
	__u32 files;   /* IORING_REGISTER_FILES: slots */
	__u32 buffers; /* IORING_REGISTER_BUFFERS: slots */
	__u32 state;   /* enum uring_state */
};
TRK_ASSERT_SIZE(struct uring_rec, 40);

/* A trigger of pressure stall information, set by a write to the file. */
struct pressure_rec {
	struct rec_hdr hdr;
	__u64 threshold_ns;
	__u64 window_ns;
	__u32 state; /* enum psi_states: of each resource some, then full */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct pressure_rec, 32);

/* One file watched by an epoll instance. */
struct epoll_item_rec {
	struct rec_hdr hdr;
	__u64 epoll;  /* struct file of the epoll instance */
	__u64 target; /* struct file watched */
	__u64 data;
	__u32 fd; /* number it was added under */
	__u32 events;
	__u32 ready; /* non-zero if on the ready list */
	__u32 pad;
};
TRK_ASSERT_SIZE(struct epoll_item_rec, 48);

/* One inotify watch. */
struct watch_rec {
	struct rec_hdr hdr;
	__u64 group; /* struct file of the inotify instance */
	__u64 ino;
	__u32 dev;
	__s32 wd;
	__u32 mask;
	__u32 pad;
};
TRK_ASSERT_SIZE(struct watch_rec, 40);

enum lock_class {
	LOCK_FLOCK = 0,
	LOCK_POSIX = 1,
	LOCK_LEASE = 2,
};

/* A lock or lease on an inode some traced process has open. */
struct lock_rec {
	struct rec_hdr hdr;
	__u64 inode;
	__u64 ino;
	__u64 file;  /* struct file it was taken through */
	__u64 owner; /* files_struct for POSIX locks, struct file for flock and OFD locks */
	__s64 start;
	__s64 end;
	__u32 dev;
	__u32 class; /* enum lock_class */
	__u32 flags; /* FL_* */
	__u32 type;  /* F_RDLCK 0, F_WRLCK 1 */
	__u32 pid;
	__s32 fd; /* of a lease, the descriptor that its signal names */
};
TRK_ASSERT_SIZE(struct lock_rec, 80);

/* What a mapping maps. */
enum vma_kind {
	VMA_ANON = 0,
	VMA_FILE = 1,
	VMA_SHMEM = 2,   /* file on tmpfs or the kernel's internal shmem mount */
	VMA_HUGETLB = 3, /* file on hugetlbfs */
	VMA_SPECIAL = 4, /* [vdso], [vvar] and the like: see name */
};

/* One mapping. */
struct vma_rec {
	struct rec_hdr hdr;
	__u64 mm;
	__u64 start;
	__u64 end;
	__u64 flags; /* VM_* */
	__u64 pgoff; /* in pages */
	__u64 file;
	__u64 ino;
	__u32 dev;
	__u32 kind; /* enum vma_kind */
	__u32 tgid;
	__u32 nlink;
	__u32 has_anon; /* non-zero if private pages may exist */
	__u32 unusual;  /* enum vma_unusual */
	struct policy_rec numa;
	char name[TRK_NAME_LEN]; /* special mapping, PR_SET_VMA_ANON_NAME, or dentry name */
};
TRK_ASSERT_SIZE(struct vma_rec, 136);

#include "lock_events.h"
#include "sock_events.h"
#include "tty_events.h"
#include "mqueue_events.h"
#include "accept_events.h"
#include "track_events.h"

#endif
