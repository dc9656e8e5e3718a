/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Part of kernel.h, which explains it: raw and packet sockets. */
#ifndef TRACKER_KERNEL_RAW_H
#define TRACKER_KERNEL_RAW_H

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct refcount_struct {
	atomic_t refs;
};
struct sock_common___counted {
	struct refcount_struct skc_refcnt;
};
struct ip_ra_chain {
	struct ip_ra_chain *next;
	struct sock *sk;
};
struct mr_table {
	struct list_head list;
	struct sock *mroute_sk;
};
/* one table, or a list of them with CONFIG_IPV6_MROUTE_MULTIPLE_TABLES */
struct netns_ipv6 {
	struct mr_table *mrt6;
	struct list_head mr6_tables;
};
struct netns_ipv4 {
	struct ip_ra_chain *ra_chain;
};
struct net___routers {
	struct netns_ipv4 ipv4;
	struct netns_ipv6 ipv6;
};
struct packet_ring_buffer {
	void *pg_vec;
};
struct packet_sock {
	void *fanout;
	struct packet_ring_buffer rx_ring;
	struct packet_ring_buffer tx_ring;
	int copy_thresh;
	void *mclist;
};

#pragma clang attribute pop

#endif
