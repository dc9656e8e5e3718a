/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Raw and packet sockets: what no option tells of them. */

#define AF_PACKET 17
#define IPPROTO_RAW 255
#define MAX_ROUTERS (1 << 10)
#define RAW_SOCK_REFS 2 /* its struct socket and the table of raw sockets, see raw_hash_sk() */

struct {
	u64 sk;
	u64 node;
	u64 end;
	u32 found;
} router_walk;

static long ra_chain_step(u64 index, void *ctx)
{
	struct ip_ra_chain *entry = (void *)router_walk.node;

	if (!entry)
		return 1;
	if ((u64)BPF_CORE_READ(entry, sk) == router_walk.sk)
		router_walk.found = 1;
	router_walk.node = (u64)BPF_CORE_READ(entry, next);
	return router_walk.found != 0;
}

static long mr_table_step(u64 index, void *ctx)
{
	struct list_head *node = (void *)router_walk.node;
	struct mr_table *table;

	if (!node || router_walk.node == router_walk.end)
		return 1;
	table = (void *)node - bpf_core_field_offset(struct mr_table, list);
	if ((u64)BPF_CORE_READ(table, mroute_sk) == router_walk.sk)
		router_walk.found = 1;
	router_walk.node = (u64)BPF_CORE_READ(node, next);
	return router_walk.found != 0;
}

/* Whether it gets packets with the Router Alert option, as one does that routes multicast. */
static __always_inline bool is_router(struct sock_rec *r, struct sock *sk)
{
	u64 net = (u64)BPF_CORE_READ(sk, __sk_common.skc_net.net);
	u64 v4 = net + bpf_core_field_offset(struct net___routers, ipv4);
	u64 v6 = net + bpf_core_field_offset(struct net___routers, ipv6);
	struct sock_common___counted *counted = (void *)r->sock;
	struct mr_table *table;
	struct list_head *head;

	router_walk.sk = r->sock;
	router_walk.found = 0;
	if (r->family == AF_INET) {
		/* MRT_INIT enters there, too */
		router_walk.node = (u64)BPF_CORE_READ((struct netns_ipv4 *)v4, ra_chain);
		bpf_loop(MAX_ROUTERS, ra_chain_step, NULL, 0);
		return router_walk.found != 0;
	}
	/* ip6_ra_control() takes a reference; its list is nowhere to be found */
	if (r->protocol == IPPROTO_RAW)
		return BPF_CORE_READ(counted, skc_refcnt.refs.counter) > RAW_SOCK_REFS;
	if (!bpf_core_type_exists(struct mr_table))
		return false;
	if (!bpf_core_field_exists(struct netns_ipv6, mr6_tables)) {
		table = BPF_CORE_READ((struct netns_ipv6 *)v6, mrt6);
		return table && (u64)BPF_CORE_READ(table, mroute_sk) == r->sock;
	}
	router_walk.end = v6 + bpf_core_field_offset(struct netns_ipv6, mr6_tables);
	head = (void *)router_walk.end;
	router_walk.node = (u64)BPF_CORE_READ(head, next);
	bpf_loop(MAX_ROUTERS, mr_table_step, NULL, 0);
	return router_walk.found != 0;
}

/* A ring, a fanout group, memberships: whatever belongs to a packet socket but options. Those
 * of a kernel that does not tell have it. */
static __always_inline bool has_packet_state(u64 sk)
{
	struct packet_sock *packet = (void *)sk;

	if (!bpf_core_type_exists(struct packet_sock))
		return true;
	return BPF_CORE_READ(packet, fanout) || BPF_CORE_READ(packet, rx_ring.pg_vec) ||
	       BPF_CORE_READ(packet, tx_ring.pg_vec) || BPF_CORE_READ(packet, mclist) ||
	       BPF_CORE_READ(packet, copy_thresh);
}
