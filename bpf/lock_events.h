/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of events.h, whose rules hold: the network lock, and what passes it. */
#ifndef TRACKER_LOCK_EVENTS_H
#define TRACKER_LOCK_EVENTS_H

/* Keys of its maps. Addresses are in network order, IPv4 in the first
 * four bytes and the rest zero; ports are in host order. */
struct lock_flow_key {
	__u8 local[16];
	__u8 remote[16];
	__u16 local_port;
	__u16 remote_port;
	__u8 version;  /* 4 or 6 */
	__u8 protocol; /* IPPROTO_* */
	__u16 pad;
};
TRK_ASSERT_SIZE(struct lock_flow_key, 40);

/* A bound port; an address of zeroes is any. */
struct lock_port_key {
	__u8 local[16];
	__u16 port;
	__u8 version;
	__u8 protocol;
};
TRK_ASSERT_SIZE(struct lock_port_key, 20);

/* lock_control.mode */
enum lock_mode {
	LOCK_ALL_TCP = 1,
	LOCK_ALL_UDP = 2, /* and the ICMP errors UDP draws */
	LOCK_NEW = 4,     /* of what is locked, only what brings something new in */
};

/* Mark (SO_MARK) of the packets by which a restore fills the queues of the sockets it makes. They
 * pass; no packet has a mark that comes from elsewhere. */
#define TRK_FILL_MARK 0x7472666c

struct lock_control {
	__u32 mode;    /* enum lock_mode */
	__u32 cgroups; /* non-zero once a cgroup was added */
};
TRK_ASSERT_SIZE(struct lock_control, 8);

/* Index into the drop counters. */
enum lock_direction {
	DIRECTION_INGRESS = 0,
	DIRECTION_EGRESS = 1,
	DIRECTION_COUNT = 2,
};

#endif
