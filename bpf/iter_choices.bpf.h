/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/* What setsockopt(2) sets of TCP sockets besides sock_opts, as the kernel keeps it. */

/* Of a pointer of a known type. Where a kernel has no such member, nobody knows where it keeps the
 * option. */
#define CHOICE(to, pointer, member)                                                                \
	do {                                                                                       \
		if (bpf_core_field_exists((pointer)->member))                                      \
			to = BITS(true, pointer, member);                                          \
		else                                                                               \
			known = false;                                                             \
	} while (0)

static __always_inline bool any_choices(struct sock_choices *c, struct sock *sk)
{
	bool known = true;

	c->flags = sk->__sk_common.skc_flags & ~TRK_SOCK_DONE;
	CHOICE(c->pacing, sk, sk_max_pacing_rate);
	CHOICE(c->tsflags, sk, sk_tsflags);
	CHOICE(c->bind_phc, sk, sk_bind_phc);
	CHOICE(c->peek_off, sk, sk_peek_off);
	CHOICE(c->busy_poll, sk, sk_ll_usec);
	CHOICE(c->prefer_busy_poll, sk, sk_prefer_busy_poll);
	CHOICE(c->txrehash, sk, sk_txrehash);
	CHOICE(c->clockid, sk, sk_clockid);
	CHOICE(c->txtime_deadline, sk, sk_txtime_deadline_mode);
	CHOICE(c->txtime_errors, sk, sk_txtime_report_errors);
	return known;
}

static __always_inline bool inet_choices(struct sock_choices *c, struct inet_sock *inet)
{
	struct inet_sock___range *range = (void *)inet;
	struct inet_sock___bits *bits = (void *)inet;
	struct ip_options_rcu *options;
	bool known = true;

	CHOICE(c->ttl, inet, uc_ttl);
	CHOICE(c->min_ttl, inet, min_ttl);
	CHOICE(c->pmtudisc, inet, pmtudisc);
	if (bpf_core_field_exists(inet->inet_flags)) {
		c->inet_flags = inet->inet_flags;
	} else {
		CHOICE(c->recverr, bits, recverr);
		CHOICE(c->bind_no_port, bits, bind_address_no_port);
	}
	/* an option of 6.3, which older kernels may have by backport */
	if (bpf_core_field_exists(inet->local_port_range))
		c->ports = inet->local_port_range;
	else if (bpf_core_field_exists(range->local_port_range))
		c->ports = range->local_port_range.lo | (u32)range->local_port_range.hi << 16;
	/* IP options are more than a number; a restore leaves an empty list of them behind */
	options = inet->inet_opt;
	return known && (!options || !options->opt.optlen);
}

static __always_inline bool v6_choices(struct sock_choices *c, struct inet_sock *inet)
{
	struct ipv6_pinfo *v6 = inet->pinet6;
	struct ipv6_pinfo___bits *bits = (void *)v6;
	bool known = true;

	CHOICE(c->hops, v6, hop_limit);
	CHOICE(c->v6_pmtudisc, v6, pmtudisc);
	CHOICE(c->srcprefs, v6, srcprefs);
	CHOICE(c->min_hopcount, v6, min_hopcount);
	/* later among inet_flags */
	if (bpf_core_field_exists(bits->sndflow)) {
		CHOICE(c->sndflow, bits, sndflow);
		CHOICE(c->v6_recverr, bits, recverr);
		CHOICE(c->dontfrag, bits, dontfrag);
		CHOICE(c->autoflowlabel, bits, autoflowlabel);
		CHOICE(c->autoflowlabel_set, bits, autoflowlabel_set);
	} else if (!bpf_core_field_exists(inet->inet_flags)) {
		known = false;
	}
	return known;
}

static __always_inline bool tcp_choices(struct sock_choices *c, struct tcp_sock *tcp, u8 state)
{
	struct inet_connection_sock *icsk = (void *)tcp;
	bool known = true;

	CHOICE(c->syn_retries, icsk, icsk_syn_retries);
	CHOICE(c->thin_lto, tcp, thin_lto);
	CHOICE(c->recvmsg_inq, tcp, recvmsg_inq);
	CHOICE(c->linger2, tcp, linger2);
	CHOICE(c->tx_delay, tcp, tcp_tx_delay);
	/* what a connection has of these was agreed on */
	if (state == TCP_CLOSE || state == TCP_LISTEN) {
		CHOICE(c->mss, tcp, mss_cache);
		CHOICE(c->user_mss, tcp, rx_opt.user_mss);
		CHOICE(c->window_clamp, tcp, window_clamp);
		CHOICE(c->fastopen, icsk, icsk_accept_queue.fastopenq.max_qlen);
		CHOICE(c->save_syn, tcp, save_syn);
		CHOICE(c->fastopen_connect, tcp, fastopen_connect);
		CHOICE(c->fastopen_no_cookie, tcp, fastopen_no_cookie);
	}
	return known;
}

static __always_inline void fill_choices(struct sock_rec *r, struct tcp_sock *tcp)
{
	struct sock_choices *c = &r->choices;
	bool known = any_choices(c, (struct sock *)tcp);

	known &= inet_choices(c, (struct inet_sock *)tcp);
	if (r->family == AF_INET6)
		known &= v6_choices(c, (struct inet_sock *)tcp);
	known &= tcp_choices(c, tcp, r->state);
	c->known = known;
}
