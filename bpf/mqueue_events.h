/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of events.h, whose rules hold: what the iterators tell of POSIX message queues. */
#ifndef TRACKER_MQUEUE_EVENTS_H
#define TRACKER_MQUEUE_EVENTS_H

#define TRK_MQUEUE_NAME_LEN 256 /* NAME_MAX and a NUL */

/* mqueue_rec.flags */
enum mqueue_flag {
	MQF_NOTIFY = 1, /* somebody has called mq_notify(3) */
	MQF_ENDED = 2,  /* and has ended */
	MQF_EXECED = 4, /* and has executed another program, so that no signal is sent */
};

/* A POSIX message queue. */
struct mqueue_rec {
	struct rec_hdr hdr;
	__u64 inode;
	__u64 qsize;        /* bytes in all messages */
	__s64 maxmsg;       /* mq_attr(3) */
	__s64 msgsize;      /* the same */
	__s64 curmsgs;      /* the same */
	__u64 notify_value; /* sigev_value */
	__u32 open;         /* open file descriptions */
	__u32 uid;
	__u32 gid;
	__u32 account;    /* user whose RLIMIT_MSGQUEUE it counts for */
	__u32 flags;      /* enum mqueue_flag */
	__u32 notify_pid; /* who is notified, initial PID namespace */
	__s32 notify;     /* SIGEV_* */
	__s32 notify_sig;
	char name[TRK_MQUEUE_NAME_LEN];
};
TRK_ASSERT_SIZE(struct mqueue_rec, 344);

#define TRK_MQUEUE_CHUNK 1024

/* Part of a message, in the order in which a receiver gets them. */
struct mqueue_data_rec {
	struct rec_hdr hdr;
	__u64 inode; /* the queue */
	__u32 priority;
	__u32 size;   /* of the whole message */
	__u32 offset; /* in it, of the first byte here */
	__u32 len;    /* valid bytes */
	__u8 data[TRK_MQUEUE_CHUNK];
};
TRK_ASSERT_SIZE(struct mqueue_data_rec, 1056);

#endif
