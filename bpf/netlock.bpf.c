// SPDX-License-Identifier: (GPL-2.0-only OR MIT)
/*
 * The network lock: while attached to the root cgroup it drops, in both directions,
 * every packet that belongs to an application whose sockets are being carried over.
 * Silence is safe, since peers retransmit; an ACK for data that is not in the image
 * or a RST for a socket that is not there yet is not.
 *
 * The root cgroup is the place because it also sees what the kernel sends on its own
 * behalf (RST, SYN-ACK) and sockets made before their process joined its cgroup.
 */
#include "common.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define IPPROTO_ICMP 1
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define IPPROTO_ICMPV6 58
#define ICMP_DEST_UNREACH 3
#define ICMPV6_DEST_UNREACH 1

#define TCP_SYN 0x02
#define TCP_ACK 0x10

#define DROP 0
#define PASS 1

/* User space sets its size. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct lock_flow_key);
	__type(value, u8);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1 << 14);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct lock_port_key);
	__type(value, u8);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, u64);
	__type(value, u8);
} cgroups SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct lock_control);
} control SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DIRECTION_COUNT);
	__type(key, u32);
	__type(value, u64);
} drops SEC(".maps");

/*
 * Reads addresses, protocol and ports; local and remote as a receiver sees them. Of ICMP the
 * type, of TCP the flags go to `detail`.
 */
static __always_inline bool parse(struct __sk_buff *skb, struct lock_flow_key *key, u8 *detail)
{
	u32 l4;

	if (skb->protocol == __builtin_bswap16(ETH_P_IP)) {
		u8 first = 0;

		if (bpf_skb_load_bytes(skb, 0, &first, 1) ||
		    bpf_skb_load_bytes(skb, 9, &key->protocol, 1) ||
		    bpf_skb_load_bytes(skb, 12, key->remote, 4) ||
		    bpf_skb_load_bytes(skb, 16, key->local, 4))
			return false;
		key->version = 4;
		l4 = (first & 15) * 4;
	} else if (skb->protocol == __builtin_bswap16(ETH_P_IPV6)) {
		/* TCP and UDP behind extension headers are not looked for: nothing we
		 * carry sends them */
		if (bpf_skb_load_bytes(skb, 6, &key->protocol, 1) ||
		    bpf_skb_load_bytes(skb, 8, key->remote, 16) ||
		    bpf_skb_load_bytes(skb, 24, key->local, 16))
			return false;
		key->version = 6;
		l4 = 40;
	} else {
		return false;
	}
	if (key->protocol == IPPROTO_TCP || key->protocol == IPPROTO_UDP) {
		u16 port[2];

		/* these hooks see whole datagrams: before fragmentation, after reassembly */
		if (bpf_skb_load_bytes(skb, l4, port, sizeof(port)))
			return false;
		key->remote_port = __builtin_bswap16(port[0]);
		key->local_port = __builtin_bswap16(port[1]);
		if (key->protocol == IPPROTO_TCP && bpf_skb_load_bytes(skb, l4 + 13, detail, 1))
			return false;
	} else if (bpf_skb_load_bytes(skb, l4, detail, 1)) {
		return false;
	}
	return true;
}

static __always_inline void swap_ends(struct lock_flow_key *key)
{
	u8 address[16];
	u16 port = key->local_port;

	__builtin_memcpy(address, key->local, 16);
	__builtin_memcpy(key->local, key->remote, 16);
	__builtin_memcpy(key->remote, address, 16);
	key->local_port = key->remote_port;
	key->remote_port = port;
}

static __always_inline bool port_is_locked(struct lock_flow_key *key)
{
	struct lock_port_key port = {
		.port = key->local_port,
		.version = key->version,
		.protocol = key->protocol,
	};

	if (bpf_map_lookup_elem(&ports, &port))
		return true;
	__builtin_memcpy(port.local, key->local, 16);
	return bpf_map_lookup_elem(&ports, &port) != NULL;
}

/* Whether the socket of the packet was made in a locked cgroup or below one. */
static __always_inline bool cgroup_is_locked(struct __sk_buff *skb)
{
	for (int level = 0; level < MAX_CGROUP_DEPTH; level++) {
		u64 id = bpf_skb_ancestor_cgroup_id(skb, level);

		if (!id)
			return false;
		if (bpf_map_lookup_elem(&cgroups, &id))
			return true;
	}
	return false;
}

/* A connection attempt, or a datagram. */
static __always_inline bool is_new(const struct lock_flow_key *key, u8 flags)
{
	return key->protocol == IPPROTO_UDP || (flags & (TCP_SYN | TCP_ACK)) == TCP_SYN;
}

static __always_inline bool is_locked(struct __sk_buff *skb, u32 direction)
{
	struct lock_flow_key key = {};
	struct lock_control *how;
	u32 zero = 0;
	u8 detail = 0;

	how = bpf_map_lookup_elem(&control, &zero);
	if (!how || skb->mark == TRK_FILL_MARK)
		return false;
	if (how->mode & LOCK_NEW) {
		if (direction == DIRECTION_EGRESS || !parse(skb, &key, &detail))
			return false;
		if (key.protocol != IPPROTO_TCP && key.protocol != IPPROTO_UDP)
			return false;
		return is_new(&key, detail) && port_is_locked(&key);
	}
	if (how->cgroups && cgroup_is_locked(skb))
		return true;
	if (!parse(skb, &key, &detail))
		return false;
	if (direction == DIRECTION_EGRESS)
		swap_ends(&key);
	if (how->mode & LOCK_ALL_TCP && key.protocol == IPPROTO_TCP)
		return true;
	if (how->mode & LOCK_ALL_UDP) {
		if (key.protocol == IPPROTO_UDP)
			return true;
		if (direction == DIRECTION_EGRESS && key.version == 4 &&
		    key.protocol == IPPROTO_ICMP && detail == ICMP_DEST_UNREACH)
			return true;
		if (direction == DIRECTION_EGRESS && key.version == 6 &&
		    key.protocol == IPPROTO_ICMPV6 && detail == ICMPV6_DEST_UNREACH)
			return true;
	}
	if (key.protocol != IPPROTO_TCP && key.protocol != IPPROTO_UDP)
		return false;
	return port_is_locked(&key) || bpf_map_lookup_elem(&flows, &key);
}

static __always_inline int decide(struct __sk_buff *skb, u32 direction)
{
	u64 *count;

	if (!is_locked(skb, direction))
		return PASS;
	count = bpf_map_lookup_elem(&drops, &direction);
	if (count)
		(*count)++;
	return DROP;
}

SEC("cgroup_skb/ingress")
int lock_ingress(struct __sk_buff *skb)
{
	return decide(skb, DIRECTION_INGRESS);
}

SEC("cgroup_skb/egress")
int lock_egress(struct __sk_buff *skb)
{
	return decide(skb, DIRECTION_EGRESS);
}
