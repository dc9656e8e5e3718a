/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* Sockets, as the descriptor iterator reports them. */

#include "socket.bpf.h"
#include "iter_choices.bpf.h"
#include "iter_raw.bpf.h"

#define SOCK_DGRAM 2

struct sock_rec out_sock;
struct member_rec out_member;

#define MAX_MEMBERS (1 << 16)
/* include/uapi/linux/in.h: all senders but those on the list */
#define MCAST_EXCLUDE 0

static __always_inline void fill_unix(struct sock_rec *r, struct sock *sk)
{
	struct unix_sock *unix = (void *)sk;
	struct unix_address *addr = BPF_CORE_READ(unix, addr);
	struct sock *peer = BPF_CORE_READ(unix, peer);
	struct file *peer_file;

	r->peer = (u64)peer;
	r->name = (u64)addr;
	if (peer) {
		r->peer_name = (u64)BPF_CORE_READ((struct unix_sock *)peer, addr);
		/* a connection still in an accept queue has no socket or file yet */
		peer_file = BPF_CORE_READ(peer, sk_socket, file);
		if (peer_file)
			r->peer_ino = BPF_CORE_READ(peer_file, f_inode, i_ino);
	}
	r->inflight = BPF_CORE_READ(unix, scm_stat.nr_fds.counter);
	if (bpf_core_field_exists(unix->oob_skb) && BPF_CORE_READ(unix, oob_skb))
		r->flags |= SOCK_URGENT;
	if (addr) {
		int len = BPF_CORE_READ(addr, len) - (int)sizeof(u16);
		char *path = (char *)addr + bpf_core_field_offset(struct unix_address, name) +
			     sizeof(u16);

		if (len > 0 && len <= TRK_SUN_PATH_LEN) {
			r->path_len = len;
			bpf_probe_read_kernel(r->path, sizeof(r->path), path);
		}
	}
}

/* Whether urgent data is on its way, or waits in a queue, where it is left out of what is read.
 * A listener has none, nor has what was never connected. */
static __always_inline bool has_urgent(struct tcp_sock *tcp, u32 state)
{
	if (state == TCP_LISTEN)
		return false;
	if (tcp->urg_data)
		return true;
	return state != TCP_CLOSE && tcp->snd_una != tcp->snd_up;
}

/* Whether a TCP socket was ever connected. After a connect(2) that did not wait, the state of the
 * `struct socket` says so only once connect(2) is called again, which hardly anybody does; but
 * the peer has acknowledged the SYN. One that was accepted, or restored, has the state. */
static __always_inline bool was_connected(struct socket *socket, struct tcp_sock *tcp)
{
	return socket->state == SS_CONNECTED || tcp->bytes_acked;
}

/* What no option tells of a TCP socket. */
static __always_inline void fill_tcp(struct sock_rec *r, struct socket *socket,
				     struct tcp_sock *tcp)
{
	struct inet_connection_sock *icsk = (void *)tcp;
	struct sock *sk = (void *)tcp;

	if (icsk->icsk_ulp_ops)
		r->flags |= SOCK_ULP;
	if (bpf_core_field_exists(tcp->md5sig_info) && tcp->md5sig_info)
		r->flags |= SOCK_TCP_AUTH;
	if (bpf_core_field_exists(tcp->ao_info) && tcp->ao_info)
		r->flags |= SOCK_TCP_AUTH;
	if (has_urgent(tcp, r->state))
		r->flags |= SOCK_URGENT;
	if (was_connected(socket, tcp))
		r->flags |= SOCK_WAS_CONNECTED;
	if (sk->__sk_common.skc_flags & TRK_SOCK_DONE)
		r->flags |= SOCK_GOT_FIN;
	if (r->state == TCP_LISTEN)
		r->syn_backlog = icsk->icsk_accept_queue.qlen.counter;
}

/* The same of what only sockets for datagrams have: an accepted connection has the interfaces of
 * its handshake, which mean nothing to it. */
static __always_inline void fill_datagrams(struct sock_rec *r, struct sock *sk)
{
	struct inet_sock *inet = (void *)sk;
	struct udp_sock *udp = (void *)sk;
	struct ipv6_pinfo *v6;

	r->out_multicast = BPF_CORE_READ(inet, mc_index);
	r->out_unicast = BPF_CORE_READ(inet, uc_index);
	if (r->type == SOCK_RAW && is_router(r, sk))
		r->flags |= SOCK_ROUTER;
	if (r->type == SOCK_DGRAM && r->protocol == IPPROTO_UDP && BPF_CORE_READ(udp, pending))
		r->flags |= SOCK_CORKED;
	v6 = r->family == AF_INET6 ? BPF_CORE_READ(inet, pinet6) : NULL;
	if (!v6)
		return;
	r->out_multicast6 = BPF_CORE_READ(v6, mcast_oif);
	r->out_unicast6 = BPF_CORE_READ(v6, ucast_oif);
}

/* The same of IPv6 sockets. `typed` is about the socket, see MEMBER. */
static __always_inline void fill_sticky(const bool typed, struct sock_rec *r,
					struct inet_sock *inet)
{
	struct ipv6_pinfo *v6 = MEMBER(typed, inet, pinet6);
	void *labels;

	if (!v6)
		return;
	if (bpf_core_field_exists(v6->ipv6_fl_list))
		labels = MEMBER(typed, v6, ipv6_fl_list);
	else
		labels = MEMBER(typed, inet, ipv6_fl_list);
	if (labels || MEMBER(typed, v6, opt) || MEMBER(typed, v6, frag_size))
		r->flags |= SOCK_V6_STICKY;
}

struct {
	u64 v4;
	u64 v6;
	u64 sock;
	bool emit;
	bool sources; /* one of them is for some senders only */
} member_walk;

static long member_step(u64 index, void *ctx)
{
	struct ip_mc_socklist *v4 = (void *)member_walk.v4;
	struct ipv6_mc_socklist *v6 = (void *)member_walk.v6;
	struct member_rec *r = &out_member;
	u64 sources, mode;

	__builtin_memset(r, 0, sizeof(*r));
	r->hdr.kind = REC_MEMBER;
	r->hdr.size = sizeof(*r);
	r->sock = member_walk.sock;
	if (v4) {
		r->family = AF_INET;
		bpf_core_read(r->group, 4, &v4->multi.imr_multiaddr);
		r->ifindex = BPF_CORE_READ(v4, multi.imr_ifindex);
		mode = BPF_CORE_READ(v4, sfmode);
		sources = (u64)BPF_CORE_READ(v4, sflist);
		member_walk.v4 = (u64)BPF_CORE_READ(v4, next_rcu);
	} else if (v6) {
		r->family = AF_INET6;
		bpf_core_read(r->group, 16, &v6->addr);
		r->ifindex = BPF_CORE_READ(v6, ifindex);
		mode = BPF_CORE_READ(v6, sfmode);
		sources = (u64)BPF_CORE_READ(v6, sflist);
		member_walk.v6 = (u64)BPF_CORE_READ(v6, next);
	} else {
		return 1;
	}
	if (sources || mode != MCAST_EXCLUDE)
		member_walk.sources = true;
	return member_walk.emit && !side_write(r, sizeof(*r));
}

/* The newest membership comes first. `typed` is about the socket, see MEMBER. */
static __always_inline void walk_members(const bool typed, struct sock_rec *r,
					 struct inet_sock *inet)
{
	struct ipv6_pinfo *v6 = r->family == AF_INET6 ? MEMBER(typed, inet, pinet6) : NULL;

	member_walk.v4 = (u64)MEMBER(typed, inet, mc_list);
	member_walk.v6 = v6 ? (u64)MEMBER(typed, v6, ipv6_mc_list) : 0;
	if (!member_walk.v4 && !member_walk.v6)
		return;
	member_walk.sock = r->sock;
	member_walk.sources = false;
	member_walk.emit = (want & WANT_MEMBERS) && first_visit(r->sock);
	bpf_loop(MAX_MEMBERS, member_step, NULL, 0);
	if (member_walk.sources)
		r->flags |= SOCK_SOURCES;
}

/* Both addresses of an internet socket: IPv4 takes the first four bytes. `typed` is about the
 * socket, see MEMBER. */
static __always_inline void read_ends(const bool typed, u8 *local, u8 *remote, struct sock *sk,
				      u16 family)
{
	if (family == AF_INET) {
		*(u32 *)local = MEMBER(typed, sk, __sk_common.skc_rcv_saddr);
		*(u32 *)remote = MEMBER(typed, sk, __sk_common.skc_daddr);
	} else if (bpf_core_field_exists(sk->__sk_common.skc_v6_daddr)) {
		bpf_core_read(local, 16, &sk->__sk_common.skc_v6_rcv_saddr);
		bpf_core_read(remote, 16, &sk->__sk_common.skc_v6_daddr);
	}
}

static __always_inline void fill_inet(struct sock_rec *r, struct socket *socket, struct sock *sk)
{
	u16 dport = sk->__sk_common.skc_dport;
	struct tcp_sock *tcp = NULL;

	if (bpf_core_field_exists(sk->sk_policy) && (sk->sk_policy[0] || sk->sk_policy[1]))
		r->flags |= SOCK_IPSEC;
	r->local_port = sk->__sk_common.skc_num;
	r->remote_port = dport >> 8 | dport << 8;
	read_ends(true, r->local_addr, r->remote_addr, sk, r->family);
	if (r->type == SOCK_DGRAM || r->type == SOCK_RAW)
		fill_datagrams(r, sk);
	else
		tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp) {
		if (r->family == AF_INET6)
			fill_sticky(false, r, (struct inet_sock *)sk);
		walk_members(false, r, (struct inet_sock *)sk);
		return;
	}
	fill_tcp(r, socket, tcp);
	if (r->family == AF_INET6)
		fill_sticky(true, r, (struct inet_sock *)tcp);
	if (want & WANT_CHOICES)
		fill_choices(r, tcp);
	walk_members(true, r, (struct inet_sock *)tcp);
}

/* A classic program is kept as it was given to setsockopt(2); an eBPF program has no other form. */
static __always_inline void fill_filter(struct sock_rec *r, struct sock *sk)
{
	struct sk_filter *filter = sk->sk_filter;
	struct sock_reuseport *group = sk->sk_reuseport_cb;

	if (filter) {
		r->flags |= SOCK_HAS_FILTER;
		if (!BPF_CORE_READ(filter, prog, orig_prog))
			r->flags |= SOCK_EBPF;
	}
	if (group && BPF_CORE_READ(group, prog))
		r->flags |= SOCK_EBPF;
}

/* Whether a cgroup is none of those that are tracked. */
static __always_inline bool is_foreign(struct cgroup *cgrp)
{
	if ((u64)cgrp != foreign_cgroup) {
		foreign_cgroup = (u64)cgrp;
		foreign = !is_below_root(true, cgrp, roots, root_count);
	}
	return foreign;
}

static __always_inline long write_socket(struct seq_file *seq, struct file *file)
{
	struct socket *socket = bpf_sock_from_file(file);
	struct sock_rec *r = &out_sock;
	struct sock *sk;

	if (!socket)
		return 0;
	sk = socket->sk;
	if (!sk)
		return 0;
	__builtin_memset(r, 0, sizeof(*r));
	r->hdr.kind = REC_SOCKET;
	r->hdr.size = sizeof(*r);
	r->sock = (u64)sk;
	r->ino = file->f_inode->i_ino;
	r->cookie = sk->__sk_common.skc_cookie.counter;
	r->family = sk->__sk_common.skc_family;
	r->type = sk->sk_type;
	r->protocol = sk->sk_protocol;
	r->state = sk->__sk_common.skc_state;
	r->shutdown = sk->sk_shutdown;
	if (BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_reuse))
		r->flags |= SOCK_REUSEADDR;
	if (BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_reuseport))
		r->flags |= SOCK_REUSEPORT;
	if (BPF_CORE_READ_BITFIELD(&sk->__sk_common, skc_ipv6only))
		r->flags |= SOCK_V6ONLY;
	fill_filter(r, sk);
	r->bound_ifindex = sk->__sk_common.skc_bound_dev_if;
	r->mark = sk->sk_mark;
	r->priority = sk->sk_priority;
	r->rcvbuf = sk->sk_rcvbuf;
	r->sndbuf = sk->sk_sndbuf;
	r->ack_backlog = sk->sk_ack_backlog;
	r->max_ack_backlog = sk->sk_max_ack_backlog;
	r->rcv_qlen = sk->sk_receive_queue.qlen;
	/* what was looked at waits apart: __skb_recv_udp() moves the whole queue there */
	if ((r->family == AF_INET || r->family == AF_INET6) && r->type == SOCK_DGRAM &&
	    r->protocol == IPPROTO_UDP)
		r->rcv_qlen += BPF_CORE_READ((struct udp_sock *)sk, reader_queue.qlen);
	r->rmem = sk->sk_backlog.rmem_alloc.counter;
	r->wmem = sk->sk_wmem_queued;
	r->err = sk->sk_err;
	if (sk->sk_error_queue.qlen)
		r->flags |= SOCK_ERRORS;
	if (sk->sk_zckey.counter)
		r->flags |= SOCK_ZEROCOPY;
	r->net_ns = sk->__sk_common.skc_net.net->ns.inum;
	if (bpf_core_field_exists(sk->sk_cgrp_data)) {
		r->cgroup_id = sk->sk_cgrp_data.cgroup->kn->id;
		if (root_count && is_foreign(sk->sk_cgrp_data.cgroup))
			r->flags |= SOCK_FOREIGN;
	}
	fill_opts(true, &r->opts, sk, r->family, r->protocol);
	if (r->family == AF_UNIX)
		fill_unix(r, sk);
	else if (r->family == AF_INET || r->family == AF_INET6)
		fill_inet(r, socket, sk);
	else if (r->family == AF_PACKET && has_packet_state(r->sock))
		r->flags |= SOCK_PACKETS;
	return bpf_seq_write(seq, r, sizeof(*r));
}
