/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of events.h, whose rules hold: connections, those included that nobody has accepted yet. */
#ifndef TRACKER_ACCEPT_EVENTS_H
#define TRACKER_ACCEPT_EVENTS_H

/* waiting_rec.flags */
enum waiting_flag {
	WAITING_TSTAMP = 1, /* timestamps were agreed on */
	WAITING_USEC = 2,   /* they count microseconds */
	WAITING_SACK = 4,
	WAITING_WSCALE = 8,
	WAITING_URGENT = 16,     /* urgent data has come */
	WAITING_UNREADABLE = 32, /* what it has received cannot be read; of waiting_data_rec */
	WAITING_RIGHTS = 64,     /* descriptors are in flight to it; of waiting_data_rec */
	WAITING_MOVING = 128,    /* it changed while it was read */
};

#define TRK_WAITING_GROUPS 32

/* A connection in the accept queue of a TCP or Unix listener, in the order in which they come;
 * or, without a listener, one of TCP: that a descriptor leads to, or that was closed and still
 * sends. */
struct waiting_rec {
	struct rec_hdr hdr;
	__u64 listener; /* struct sock */
	__u64 sock;
	__u16 family;
	__u8 state;      /* TCP_* */
	__u8 shutdown;   /* RCV_SHUTDOWN 1, SEND_SHUTDOWN 2 */
	__u8 snd_wscale; /* theirs */
	__u8 rcv_wscale; /* ours */
	__u8 pad[2];
	__u32 flags; /* enum waiting_flag */
	__u32 err;
	__u16 local_port;  /* host order */
	__u16 remote_port; /* host order */
	__u32 mss_clamp;
	__u8 local_addr[16]; /* network order; IPv4 in the first four bytes */
	__u8 remote_addr[16];
	__u32 copied_seq;
	__u32 rcv_nxt;
	__u32 snd_una;
	__u32 write_seq;
	__u32 snd_wnd;
	__u32 ts_recent; /* the peer's clock, as last heard */
	__u32 timestamp; /* our clock */
	/* of a Unix socket: the other end, and who connected it */
	__u32 peer_pid;
	__u64 peer;
	__u32 peer_uid;
	__u32 peer_gid;
	__u32 ngroups; /* there may be more than have room */
	/* of TCP, what TCP_REPAIR_WINDOW tells as well */
	__u32 snd_nxt;
	__u32 snd_wl1;
	__u32 max_window;
	__u32 rcv_wnd;
	__u32 rcv_wup;
	__u32 groups[TRK_WAITING_GROUPS];
};
TRK_ASSERT_SIZE(struct waiting_rec, 280);

#define TRK_WAITING_CHUNK 1024

/* Bytes that such a connection has received; of one that was closed, those that it sends. */
struct waiting_data_rec {
	struct rec_hdr hdr;
	__u64 sock;
	__u32 seq; /* sequence number of the first byte; of a Unix socket that of the message */
	__u32 len; /* valid bytes */
	__u32 flags;
	__u32 pid; /* who sent it over a Unix socket, 0 if that was not noted */
	__u32 uid;
	__u32 gid;
	__u8 data[TRK_WAITING_CHUNK];
};
TRK_ASSERT_SIZE(struct waiting_data_rec, 1064);

#endif
