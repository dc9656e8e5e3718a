/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* What iterators and hooks both say of a socket, so that the two can be compared. */

#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17
#define TCP_FIN_WAIT1 4
#define TCP_CLOSE 7
#define TCP_LAST_ACK 9
#define TCP_LISTEN 10
#define TCP_CLOSING 11
#define SOCK_STREAM 1
#define SOCK_RAW 3

/* include/net/sock.h */
#define SOCK_SNDBUF_LOCK 1
#define SOCK_RCVBUF_LOCK 2
/* include/linux/net.h: a bit of struct socket's flags */
#define SOCK_FLAG_PASSCRED 3

/* include/net/inet_sock.h; the numbers of bits are given there */
#define INET_FLAGS_PKTINFO 0
#define INET_FLAGS_FREEBIND 11
#define INET_FLAGS_TRANSPARENT 15
#define IP_CMSG_PKTINFO 1

/* `typed` is about the socket, see MEMBER. */
static __always_inline u8 inet_flags(const bool typed, struct inet_sock *inet)
{
	struct inet_sock___bits *bits = (void *)inet;
	u64 flags;
	u8 more = 0;

	if (bpf_core_field_exists(inet->inet_flags)) {
		flags = MEMBER(typed, inet, inet_flags);
		more |= flags & 1 << INET_FLAGS_PKTINFO ? SOCK_PKTINFO : 0;
		more |= flags & 1 << INET_FLAGS_FREEBIND ? SOCK_FREEBIND : 0;
		more |= flags & 1 << INET_FLAGS_TRANSPARENT ? SOCK_TRANSPARENT : 0;
		return more;
	}
	more |= MEMBER(typed, bits, cmsg_flags) & IP_CMSG_PKTINFO ? SOCK_PKTINFO : 0;
	more |= BITS(typed, bits, freebind) ? SOCK_FREEBIND : 0;
	more |= BITS(typed, bits, transparent) ? SOCK_TRANSPARENT : 0;
	return more;
}

static __always_inline void fill_inet_opts(const bool typed, struct sock_opts *o,
					   struct inet_sock *inet, u16 family)
{
	struct ipv6_pinfo *v6;
	s16 hops;

	o->tos = MEMBER(typed, inet, tos);
	o->ttl = MEMBER(typed, inet, uc_ttl);
	o->more |= inet_flags(typed, inet);
	if (family != AF_INET6)
		return;
	v6 = MEMBER(typed, inet, pinet6);
	o->tclass = MEMBER(typed, v6, tclass);
	hops = BITS(typed, v6, hop_limit);
	o->hops = hops;
	o->more |= hops < 0 ? 0 : SOCK_V6_HOPS;
	o->more |= BITS(typed, v6, rxopt.bits.rxinfo) ? SOCK_V6_PKTINFO : 0;
}

static __always_inline void fill_tcp_opts(const bool typed, struct sock_opts *o,
					  struct tcp_sock *tcp, u16 family)
{
	struct inet_connection_sock *icsk = (void *)tcp;
	struct tcp_congestion_ops *congestion;

	fill_inet_opts(typed, o, (void *)tcp, family);
	o->user_timeout = MEMBER(typed, icsk, icsk_user_timeout);
	o->keepidle = MEMBER(typed, tcp, keepalive_time);
	o->keepintvl = MEMBER(typed, tcp, keepalive_intvl);
	o->keepcnt = MEMBER(typed, tcp, keepalive_probes);
	o->nonagle = BITS(typed, tcp, nonagle);
	o->notsent_lowat = MEMBER(typed, tcp, notsent_lowat);
	o->defer_accept = MEMBER(typed, icsk, icsk_accept_queue.rskq_defer_accept);
	congestion = MEMBER(typed, icsk, icsk_ca_ops);
	bpf_core_read(o->congestion, sizeof(o->congestion), &congestion->name);
}

/* `typed` is about the socket, see MEMBER. */
static __always_inline void fill_opts(const bool typed, struct sock_opts *o, struct sock *sk,
				      u16 family, u16 protocol)
{
	u64 flags = MEMBER(typed, sk, __sk_common.skc_flags);
	u64 locks = BITS(typed, sk, sk_userlocks);
	struct socket *socket = MEMBER(typed, sk, sk_socket);
	struct tcp_sock *tcp;

	o->flags = (flags & TRK_SK_FLAGS_MASK) << TRK_SK_FLAGS_SHIFT;
	if (BITS(typed, &sk->__sk_common, skc_reuse))
		o->flags |= SOCK_REUSEADDR;
	if (BITS(typed, &sk->__sk_common, skc_reuseport))
		o->flags |= SOCK_REUSEPORT;
	if (BITS(typed, &sk->__sk_common, skc_ipv6only))
		o->flags |= SOCK_V6ONLY;
	o->more = MEMBER(typed, socket, flags) & 1 << SOCK_FLAG_PASSCRED ? SOCK_PASSCRED : 0;
	o->rcvtimeo = MEMBER(typed, sk, sk_rcvtimeo);
	o->sndtimeo = MEMBER(typed, sk, sk_sndtimeo);
	o->bound_ifindex = MEMBER(typed, sk, __sk_common.skc_bound_dev_if);
	o->mark = MEMBER(typed, sk, sk_mark);
	o->priority = MEMBER(typed, sk, sk_priority);
	if (locks & SOCK_RCVBUF_LOCK)
		o->rcvbuf = MEMBER(typed, sk, sk_rcvbuf);
	if (locks & SOCK_SNDBUF_LOCK)
		o->sndbuf = MEMBER(typed, sk, sk_sndbuf);
	o->rcvlowat = MEMBER(typed, sk, sk_rcvlowat);
	o->linger = MEMBER(typed, sk, sk_lingertime);
	o->backlog = MEMBER(typed, sk, sk_max_ack_backlog);
	if (family != AF_INET && family != AF_INET6)
		return;
	/* a raw socket may have any protocol, and is none of it */
	if (protocol != IPPROTO_TCP || MEMBER(typed, sk, sk_type) == SOCK_RAW) {
		fill_inet_opts(false, o, (struct inet_sock *)sk, family);
		return;
	}
	/* what a socket of a known type is a part of gets a known type this way; raw ones do not */
	tcp = typed ? bpf_skc_to_tcp_sock(sk) : NULL;
	if (tcp)
		fill_tcp_opts(true, o, tcp, family);
	else
		fill_tcp_opts(false, o, (struct tcp_sock *)sk, family);
}
