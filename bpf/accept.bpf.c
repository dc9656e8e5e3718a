// SPDX-License-Identifier: (GPL-2.0-only OR MIT)
/*
 * Makes connections that wait to be accepted. The restorer sends, on behalf of a peer, the packet
 * that ends a handshake; this program vouches for it, as the kernel itself does for one that comes
 * with a SYN cookie, and says what was agreed on. Packets that follow are like any others.
 */
#include "common.bpf.h"

char LICENSE[] SEC("license") = "Dual MIT/GPL";

#define NEXT (-1) /* TCX_NEXT: let whoever else looks at packets decide */

/* What was agreed on in a handshake that is over: struct bpf_tcp_req_attrs of the kernel. */
struct handshake {
	u32 rcv_tsval; /* the peer's clock */
	u32 rcv_tsecr; /* ours */
	u16 mss;       /* the peer's */
	u8 rcv_wscale; /* ours */
	u8 snd_wscale; /* theirs */
	u8 ecn_ok;
	u8 wscale_ok;
	u8 sack_ok;
	u8 tstamp_ok;
	u8 usec_ts_ok;
	u8 pad[3];
} handshake; /* user space sets it before it sends a packet */

u32 expected; /* whether the next packet is to be vouched for */
u32 vouched;  /* whether it was, and a listener is to be chosen for it */
s32 result;   /* what the kernel said to it */

/* The listener that the handshake was with: others may have the same address. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKMAP);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u64);
} listener SEC(".maps");

/* Since Linux 6.9. */
extern int bpf_sk_assign_tcp_reqsk(struct __sk_buff *skb, struct sock *sk, struct handshake *attrs,
				   int attrs__sz) __ksym;

/* The connection that is made or looked for, by both ends as they are in packets. */
struct sought {
	u8 local[16];
	u8 remote[16];
	u16 local_port;
	u16 remote_port;
	u32 v6;
} sought;

struct seen {
	u32 unread; /* bytes, and one more for a FIN */
	u8 state;   /* TCP_*, 0 if there is no socket */
} seen;

/* User space runs it: no descriptor leads to what nobody has accepted. */
SEC("tc")
int look(struct __sk_buff *skb)
{
	struct bpf_sock_tuple tuple = {};
	struct tcp_sock *tcp;
	struct bpf_sock *sk;

	if (sought.v6) {
		__builtin_memcpy(tuple.ipv6.saddr, sought.remote, 16);
		__builtin_memcpy(tuple.ipv6.daddr, sought.local, 16);
		tuple.ipv6.sport = sought.remote_port;
		tuple.ipv6.dport = sought.local_port;
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv6), BPF_F_CURRENT_NETNS, 0);
	} else {
		__builtin_memcpy(&tuple.ipv4.saddr, sought.remote, 4);
		__builtin_memcpy(&tuple.ipv4.daddr, sought.local, 4);
		tuple.ipv4.sport = sought.remote_port;
		tuple.ipv4.dport = sought.local_port;
		sk = bpf_skc_lookup_tcp(skb, &tuple, sizeof(tuple.ipv4), BPF_F_CURRENT_NETNS, 0);
	}
	if (!sk)
		return 0;
	seen.state = sk->state;
	tcp = (void *)bpf_skc_to_tcp_sock(sk);
	if (tcp)
		seen.unread = BPF_CORE_READ(tcp, rcv_nxt) - BPF_CORE_READ(tcp, copied_seq);
	bpf_sk_release(sk);
	return 0;
}

/* Among listeners that share a port the kernel chooses by the addresses, and not necessarily the
 * one that the packet is vouched for. */
SEC("sk_reuseport")
int choose(struct sk_reuseport_md *ctx)
{
	u32 zero = 0;

	if (vouched) {
		vouched = 0;
		bpf_sk_select_reuseport(ctx, &listener, &zero, 0);
	}
	return SK_PASS;
}

/* Addresses; those of IPv4 have zeroes behind them. */
static __always_inline bool same(const u8 *one, const u8 *other)
{
	u8 differ = 0;

	for (u32 i = 0; i < 16; i++)
		differ |= one[i] ^ other[i];
	return !differ;
}

/* Whether a packet is the one that user space is about to send: another restore may send its own
 * at the same time. Without options in its IP header, as they are made. */
static __always_inline bool is_sought(struct __sk_buff *skb)
{
	u8 remote[16] = {}, local[16] = {};
	u16 ports[2] = {};

	if (skb->protocol != __builtin_bswap16(sought.v6 ? ETH_P_IPV6 : ETH_P_IP))
		return false;
	if (sought.v6) {
		if (bpf_skb_load_bytes_relative(skb, 8, remote, 16, BPF_HDR_START_NET) ||
		    bpf_skb_load_bytes_relative(skb, 24, local, 16, BPF_HDR_START_NET) ||
		    bpf_skb_load_bytes_relative(skb, 40, ports, 4, BPF_HDR_START_NET))
			return false;
	} else {
		if (bpf_skb_load_bytes_relative(skb, 12, remote, 4, BPF_HDR_START_NET) ||
		    bpf_skb_load_bytes_relative(skb, 16, local, 4, BPF_HDR_START_NET) ||
		    bpf_skb_load_bytes_relative(skb, 20, ports, 4, BPF_HDR_START_NET))
			return false;
	}
	return ports[0] == sought.remote_port && ports[1] == sought.local_port &&
	       same(remote, sought.remote) && same(local, sought.local);
}

SEC("tcx/ingress")
int vouch(struct __sk_buff *skb)
{
	struct bpf_sock *sk;
	u32 zero = 0;

	if (skb->mark != TRK_FILL_MARK || !expected || !is_sought(skb))
		return NEXT;
	sk = bpf_map_lookup_elem(&listener, &zero);
	if (!sk)
		return NEXT;
	expected = 0;
	result = bpf_sk_assign_tcp_reqsk(skb, (void *)sk, &handshake, sizeof(handshake));
	vouched = !result;
	bpf_sk_release(sk);
	return NEXT;
}
