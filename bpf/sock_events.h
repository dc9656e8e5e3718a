/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of events.h, whose rules hold: what iterators and hooks tell of sockets. */
#ifndef TRACKER_SOCK_EVENTS_H
#define TRACKER_SOCK_EVENTS_H

/* sock_rec.flags */
enum sock_flag {
	SOCK_REUSEADDR = 1,
	SOCK_REUSEPORT = 2,
	SOCK_V6ONLY = 4,
	SOCK_HAS_FILTER = 8,
	SOCK_SOURCES = 16, /* member of a group for some senders only, IPv4 or IPv6 */
	SOCK_EBPF = 32,    /* its filter or the choice in its port's group is an eBPF program */
	SOCK_FOREIGN = 64, /* made outside the cgroups that are tracked; iterators only */
	/* what getsockopt(2) does not tell, or not whole; iterators only */
	SOCK_ULP = 128,         /* another protocol on top of TCP, as kernel TLS */
	SOCK_TCP_AUTH = 256,    /* TCP keys: MD5 or the authentication option */
	SOCK_IPSEC = 512,       /* an IPsec policy of its own */
	SOCK_V6_STICKY = 1024,  /* extension headers, a flow label, or a size of fragments */
	SOCK_CORKED = 2048,     /* a datagram that is sent in parts has begun */
	SOCK_ROUTER = 4096,     /* raw, and gets packets with Router Alert or routes multicast */
	SOCK_PACKETS = 8192,    /* of AF_PACKET with a ring, a fanout group or memberships */
	SOCK_URGENT = 65536,    /* urgent data (MSG_OOB) on its way, or not passed by the reader */
	SOCK_ZEROCOPY = 131072, /* has counted what was sent with MSG_ZEROCOPY */
	SOCK_ERRORS = 262144,   /* something in its error queue (MSG_ERRQUEUE) */
	/* of a TCP connection, also when it is over; iterators only */
	SOCK_WAS_CONNECTED = 16384, /* no connect(2) that failed or is under way */
	SOCK_GOT_FIN = 32768,       /* reading comes to an end, whatever else happened */
};

/* sock_opts.flags: bits of enum sock_flags of the kernel that setsockopt(2) sets, shifted
 * out of the way of enum sock_flag */
#define TRK_SK_FLAGS_SHIFT 16
/* OOBINLINE, KEEPALIVE, LINGER, BROADCAST, TIMESTAMP, TIMESTAMPNS, DONTROUTE */
#define TRK_SK_FLAGS_MASK 0x385c
/* SOCK_DONE of them: a FIN was received */
#define TRK_SOCK_DONE 2
#define TRK_CONGESTION_LEN 16

/* sock_opts.more */
enum sock_more {
	SOCK_PASSCRED = 1,
	SOCK_FREEBIND = 2,
	SOCK_TRANSPARENT = 4,
	SOCK_PKTINFO = 8,     /* IP_PKTINFO */
	SOCK_V6_PKTINFO = 16, /* IPV6_RECVPKTINFO */
	SOCK_V6_HOPS = 32,    /* IPV6_UNICAST_HOPS was set */
};

/* What setsockopt(2) set and listen(2) was told. A buffer size that the kernel may still
 * change by itself is 0. */
struct sock_opts {
	__u64 rcvtimeo; /* jiffies */
	__u64 sndtimeo;
	__u32 flags; /* enum sock_flag, and sk_flags */
	__u32 bound_ifindex;
	__u32 mark;
	__u32 priority;
	__u32 rcvbuf;
	__u32 sndbuf;
	__u32 rcvlowat;
	__u32 linger; /* jiffies */
	__u32 backlog;
	__u32 keepidle; /* jiffies, as is keepintvl; 0 is the default of the system */
	__u32 keepintvl;
	__u32 user_timeout; /* ms */
	__u8 tos;
	__u8 ttl;
	__u8 nonagle; /* TCP_NAGLE_* */
	__u8 keepcnt;
	__u8 tclass;
	__u8 hops;         /* IPV6_UNICAST_HOPS, 255 also where it was not set */
	__u8 more;         /* enum sock_more */
	__u8 defer_accept; /* retransmissions */
	__u32 notsent_lowat;
	__u32 pad;
	char congestion[TRK_CONGESTION_LEN]; /* name of a TCP socket's algorithm */
};
TRK_ASSERT_SIZE(struct sock_opts, 96);

/* What setsockopt(2) may have set besides, as the kernel keeps it: two TCP sockets of a family that
 * have the same of this and of sock_opts, and both a peer or both none, have the same options.
 * Filled by iterators that are asked for it, of TCP sockets. */
struct sock_choices {
	__u64 flags; /* sk_flags */
	__u64 pacing;
	__u64 inet_flags; /* since 6.6 */
	__u32 tsflags;
	__s32 bind_phc;
	__s32 peek_off;
	__u32 busy_poll;
	__u32 ports; /* IP_LOCAL_PORT_RANGE */
	__s32 linger2;
	__u32 tx_delay;
	/* of those without a peer */
	__u32 mss;
	__u32 user_mss;
	__u32 window_clamp;
	__u32 fastopen;
	__s16 ttl; /* -1 is the default of the system */
	__s16 hops;
	__u8 txrehash;
	__u8 prefer_busy_poll;
	__u8 clockid; /* SO_TXTIME, and the next two */
	__u8 txtime_deadline;
	__u8 txtime_errors;
	__u8 min_ttl;
	__u8 pmtudisc;
	__u8 recverr;
	__u8 bind_no_port;
	__u8 v6_pmtudisc;
	__u8 srcprefs;
	__u8 min_hopcount;
	__u8 v6_recverr;
	__u8 sndflow;
	__u8 dontfrag;
	__u8 autoflowlabel;
	__u8 autoflowlabel_set;
	__u8 syn_retries;
	__u8 thin_lto;
	__u8 recvmsg_inq;
	__u8 save_syn;
	__u8 fastopen_connect;
	__u8 fastopen_no_cookie;
	__u8 known; /* 0: that is not all, ask getsockopt(2) */
};
TRK_ASSERT_SIZE(struct sock_choices, 96);

/* Membership of a socket in a multicast group, by IP_ADD_MEMBERSHIP or IPV6_ADD_MEMBERSHIP. */
struct member_rec {
	struct rec_hdr hdr;
	__u64 sock;
	__u8 group[16]; /* network order; IPv4 in the first four bytes */
	__u16 family;
	__u16 pad;
	__s32 ifindex;
};
TRK_ASSERT_SIZE(struct member_rec, 40);

struct sock_rec {
	struct rec_hdr hdr;
	__u64 sock; /* struct sock */
	__u64 ino;
	__u64 cookie; /* 0 if none was made yet */
	__u16 family;
	__u16 type;
	__u16 protocol;
	__u8 state;    /* TCP_* also for Unix sockets */
	__u8 shutdown; /* RCV_SHUTDOWN 1, SEND_SHUTDOWN 2 */
	__u32 flags;   /* enum sock_flag */
	__u32 bound_ifindex;
	__u32 mark;
	__u32 priority;
	__u32 rcvbuf;
	__u32 sndbuf;
	__u32 ack_backlog; /* accept queue of a listener */
	__u32 max_ack_backlog;
	__u32 rcv_qlen; /* buffers */
	__u32 rmem;     /* bytes of memory charged to the receive queue */
	__u32 wmem;
	__u32 err;
	__u32 net_ns;
	__u16 local_port;    /* host order */
	__u16 remote_port;   /* host order */
	__u8 local_addr[16]; /* network order; IPv4 in the first four bytes */
	__u8 remote_addr[16];
	__u64 cgroup_id; /* cgroup the socket was made in */
	/* Unix sockets */
	__u64 peer;
	__u64 peer_ino;
	__u64 name;      /* of the kernel's own memory: a connection shares its listener's */
	__u64 peer_name; /* the same of the other end */
	__u32 inflight;  /* descriptors queued in SCM_RIGHTS messages */
	__u32 path_len;  /* bytes of path; starts with NUL if abstract */
	char path[TRK_SUN_PATH_LEN];
	__u32 syn_backlog; /* handshakes of a TCP listener that are under way */
	struct sock_opts opts;
	/* interfaces that datagrams leave by (IP_MULTICAST_IF and so on), or 0 */
	__s32 out_multicast;
	__s32 out_unicast;
	__s32 out_multicast6;
	__s32 out_unicast6;
	struct sock_choices choices;
};
TRK_ASSERT_SIZE(struct sock_rec, 496);

#endif
