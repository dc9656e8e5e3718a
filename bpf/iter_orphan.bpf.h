/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * iter/tcp: connections that a program has closed, which the kernel goes on with until the peer
 * has all that was sent. As with connections to accept, no descriptor leads to them; they are read
 * in the same way.
 */

/* Whether our FIN is in the send queue. */
static __always_inline bool is_sending(u8 state)
{
	return state == TCP_FIN_WAIT1 || state == TCP_LAST_ACK || state == TCP_CLOSING;
}

SEC("iter/tcp")
int iter_orphans(struct bpf_iter__tcp *ctx)
{
	struct sock_common *common = ctx->sk_common;
	struct tcp_sock *tcp;
	struct sock *sk;

	/* others have less than a socket */
	if (!common || !is_sending(common->skc_state))
		return 0;
	tcp = bpf_skc_to_tcp_sock(common);
	if (!tcp)
		return 0;
	sk = (struct sock *)address(tcp);
	if (BPF_CORE_READ(sk, sk_socket))
		return 0;
	if (scope_cgroup && !cgroup_is_under(BPF_CORE_READ(sk, sk_cgrp_data.cgroup), scope_cgroup))
		return 0;
	accept_walk.listener = 0;
	accept_walk.request = 0;
	accept_walk.last = 0;
	accept_walk.family = BPF_CORE_READ(sk, __sk_common.skc_family);
	begin_walk();
	accept_walk.sock = (u64)sk;
	accept_walk.seq = 0;
	accept_walk.flags = 0;
	if (in_window()) {
		fill_found(&out_waiting, sk);
		if (!side_write(&out_waiting, sizeof(out_waiting)))
			return 0;
	}
	accept_walk.sent = 1;
	accept_walk.end = 0;
	go_to_sent(leftmost((u64)BPF_CORE_READ(sk, tcp_rtx_queue.rb_node)));
	bpf_loop(MAX_WAITING_STEPS, accept_step, NULL, 0);
	return 0;
}
