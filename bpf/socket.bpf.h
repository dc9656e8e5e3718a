/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* What iterators and hooks both say of a socket, so that the two can be compared. */

#define AF_UNIX 1
#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define TCP_LISTEN 10

/* include/net/sock.h */
#define SOCK_SNDBUF_LOCK 1
#define SOCK_RCVBUF_LOCK 2

/* `typed` is about the socket, see MEMBER. */
static __always_inline void fill_inet_opts(const bool typed, struct sock_opts *o,
					   struct inet_sock *inet)
{
	o->tos = MEMBER(typed, inet, tos);
	o->ttl = MEMBER(typed, inet, uc_ttl);
}

static __always_inline void fill_tcp_opts(const bool typed, struct sock_opts *o,
					  struct tcp_sock *tcp)
{
	struct inet_connection_sock *icsk = (void *)tcp;

	fill_inet_opts(typed, o, (void *)tcp);
	o->user_timeout = MEMBER(typed, icsk, icsk_user_timeout);
	o->keepidle = MEMBER(typed, tcp, keepalive_time);
	o->keepintvl = MEMBER(typed, tcp, keepalive_intvl);
	o->keepcnt = MEMBER(typed, tcp, keepalive_probes);
	o->nonagle = BITS(typed, tcp, nonagle);
}

/* `typed` is about the socket, see MEMBER. */
static __always_inline void fill_opts(const bool typed, struct sock_opts *o, struct sock *sk,
				      u16 family, u16 protocol)
{
	u64 flags = MEMBER(typed, sk, __sk_common.skc_flags);
	u64 locks = BITS(typed, sk, sk_userlocks);
	struct tcp_sock *tcp;

	o->flags = (flags & TRK_SK_FLAGS_MASK) << TRK_SK_FLAGS_SHIFT;
	if (BITS(typed, &sk->__sk_common, skc_reuse))
		o->flags |= SOCK_REUSEADDR;
	if (BITS(typed, &sk->__sk_common, skc_reuseport))
		o->flags |= SOCK_REUSEPORT;
	if (BITS(typed, &sk->__sk_common, skc_ipv6only))
		o->flags |= SOCK_V6ONLY;
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
	if (protocol != IPPROTO_TCP) {
		fill_inet_opts(false, o, (struct inet_sock *)sk);
		return;
	}
	/* what a socket of a known type is a part of gets a known type this way; raw ones do not */
	tcp = typed ? bpf_skc_to_tcp_sock(sk) : NULL;
	if (tcp)
		fill_tcp_opts(true, o, tcp);
	else
		fill_tcp_opts(false, o, (struct tcp_sock *)sk);
}
