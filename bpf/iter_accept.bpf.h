/* SPDX-License-Identifier: (GPL-2.0-only OR MIT) */
/*
 * Connections in the accept queues of TCP and Unix listeners. No descriptor leads to them, so what
 * they have received can be had from the kernel's memory only. There may be more than fits the
 * side ring: see iter_window.bpf.h.
 */

#define MAX_WAITING_STEPS (1 << 23)           /* what bpf_loop() allows */
#define WAITING_CHUNK (TRK_WAITING_CHUNK - 1) /* bytes, also as a mask */
#define KERNEL_PAGE_SHIFT 12
#define MAX_TREE_DEPTH 64
#define FRAG_SIZE 16 /* a page, length and offset: the same in all kernels, by various names */

struct waiting_rec out_waiting;
struct waiting_data_rec out_waiting_data;

/* One record, or one step from one thing to the next. */
struct {
	u64 listener;
	u64 request; /* whose turn is next: a request_sock, or the sk_buff of a Unix connection */
	u64 last;    /* head of the list that these sk_buffs are on */
	u64 sock;
	u64 skb;  /* the next one of its receive queue, or of those that it sends */
	u64 end;  /* head of that queue */
	u64 sent; /* whether skb is in the tree of those that were sent */
	u64 frag;
	u64 from; /* bytes that come next */
	u32 left;
	u32 frags; /* that come then */
	u32 seq;
	u32 family;
	u32 flags; /* of the message */
	u32 pid;   /* who sent it */
	u32 uid;
	u32 gid;
} accept_walk;

/* The kernel maps all of memory in one piece; a page is told by the place of its descriptor. */
static __always_inline u64 page_address(u64 page)
{
	u64 descriptors = 0, memory = 0;

	bpf_probe_read_kernel(&descriptors, sizeof(descriptors), (void *)symbols.vmemmap_base);
	bpf_probe_read_kernel(&memory, sizeof(memory), (void *)symbols.page_offset_base);
	if (!descriptors || !memory || page < descriptors)
		return 0;
	return memory +
	       ((page - descriptors) / bpf_core_type_size(struct page) << KERNEL_PAGE_SHIFT);
}

static __always_inline void fill_waiting_unix(struct waiting_rec *r, struct sock *sk)
{
	const struct cred *cred = BPF_CORE_READ(sk, sk_peer_cred);
	struct pid *pid = BPF_CORE_READ(sk, sk_peer_pid);
	struct group_info *info;
	u64 count;

	r->peer = (u64)BPF_CORE_READ((struct unix_sock *)sk, peer);
	r->peer_pid = pid ? pid_nr(pid) : 0;
	if (!cred)
		return;
	r->peer_uid = BPF_CORE_READ(cred, euid.val);
	r->peer_gid = BPF_CORE_READ(cred, egid.val);
	info = BPF_CORE_READ(cred, group_info);
	count = BPF_CORE_READ(info, ngroups);
	r->ngroups = count;
	if (count > TRK_WAITING_GROUPS)
		return;
	count *= sizeof(r->groups[0]);
	barrier_var(count);
	if (count <= sizeof(r->groups))
		bpf_probe_read_kernel(r->groups, count,
				      (void *)info + bpf_core_field_offset(struct group_info, gid));
}

/* `typed` is about the socket, see MEMBER. */
static __always_inline void fill_sequences(const bool typed, struct waiting_rec *r,
					   struct tcp_sock *tcp)
{
	r->copied_seq = MEMBER(typed, tcp, copied_seq);
	r->rcv_nxt = MEMBER(typed, tcp, rcv_nxt);
	r->snd_una = MEMBER(typed, tcp, snd_una);
	r->write_seq = MEMBER(typed, tcp, write_seq);
	r->snd_nxt = MEMBER(typed, tcp, snd_nxt);
	r->snd_wnd = MEMBER(typed, tcp, snd_wnd);
	r->snd_wl1 = MEMBER(typed, tcp, snd_wl1);
	r->max_window = MEMBER(typed, tcp, max_window);
	r->rcv_wnd = MEMBER(typed, tcp, rcv_wnd);
	r->rcv_wup = MEMBER(typed, tcp, rcv_wup);
}

static __always_inline void fill_waiting_tcp(const bool typed, struct waiting_rec *r,
					     struct tcp_sock *tcp)
{
	struct sock *sk = (void *)tcp;
	u16 dport = MEMBER(typed, sk, __sk_common.skc_dport);

	r->local_port = MEMBER(typed, sk, __sk_common.skc_num);
	r->remote_port = dport >> 8 | dport << 8;
	read_ends(typed, r->local_addr, r->remote_addr, sk, r->family);
	if (BITS(typed, tcp, rx_opt.tstamp_ok))
		r->flags |= WAITING_TSTAMP;
	if (bpf_core_field_exists(tcp->tcp_usec_ts) && BITS(typed, tcp, tcp_usec_ts))
		r->flags |= WAITING_USEC;
	if (BITS(typed, tcp, rx_opt.sack_ok))
		r->flags |= WAITING_SACK;
	if (BITS(typed, tcp, rx_opt.wscale_ok))
		r->flags |= WAITING_WSCALE;
	if (MEMBER(typed, tcp, urg_data))
		r->flags |= WAITING_URGENT;
	r->snd_wscale = BITS(typed, tcp, rx_opt.snd_wscale);
	r->rcv_wscale = BITS(typed, tcp, rx_opt.rcv_wscale);
	r->mss_clamp = MEMBER(typed, tcp, rx_opt.mss_clamp);
	r->ts_recent = MEMBER(typed, tcp, rx_opt.ts_recent);
	/* tcp_clock_ms(): since the start of the machine */
	r->timestamp = (u32)(bpf_ktime_get_ns() / 1000000) + MEMBER(typed, tcp, tsoffset);
	fill_sequences(typed, r, tcp);
}

/* `typed` is about the socket, see MEMBER. */
static __always_inline void fill_waiting(const bool typed, struct waiting_rec *r, struct sock *sk)
{
	__builtin_memset(r, 0, sizeof(*r));
	r->hdr.kind = REC_WAITING;
	r->hdr.size = sizeof(*r);
	r->listener = accept_walk.listener;
	r->sock = (u64)sk;
	r->family = MEMBER(typed, sk, __sk_common.skc_family);
	r->state = MEMBER(typed, sk, __sk_common.skc_state);
	r->shutdown = MEMBER(typed, sk, sk_shutdown);
	r->err = MEMBER(typed, sk, sk_err);
}

/* Of a socket that is known by its address only. */
static __always_inline void fill_found(struct waiting_rec *r, struct sock *sk)
{
	fill_waiting(false, r, sk);
	if (r->family == AF_UNIX)
		fill_waiting_unix(r, sk);
	else
		fill_waiting_tcp(false, r, (struct tcp_sock *)sk);
}

struct waiting_rec again;

/* Whether anything changed while a record was made: a packet, or a timer, that came before the
 * network was silent. */
static __always_inline bool is_moving(struct waiting_rec *r, struct tcp_sock *tcp)
{
	/* a word that the compiler has read it need not read again */
	barrier();
	fill_sequences(true, &again, tcp);
	return again.rcv_nxt != r->rcv_nxt || again.snd_una != r->snd_una ||
	       again.write_seq != r->write_seq || again.snd_nxt != r->snd_nxt ||
	       again.snd_wnd != r->snd_wnd || again.snd_wl1 != r->snd_wl1 ||
	       again.rcv_wnd != r->rcv_wnd || again.rcv_wup != r->rcv_wup;
}

/* A TCP connection that a descriptor leads to. */
static __always_inline void write_connection(struct seq_file *seq, struct file *file)
{
	struct socket *socket = bpf_sock_from_file(file);
	struct waiting_rec *r = &out_waiting;
	struct tcp_sock *tcp;
	struct sock *sk;

	if (!socket)
		return;
	sk = socket->sk;
	/* a socket of any other type is none of TCP, and only some kernels look */
	if (!sk || sk->sk_type != SOCK_STREAM || sk->__sk_common.skc_state == TCP_LISTEN)
		return;
	tcp = bpf_skc_to_tcp_sock(sk);
	if (!tcp)
		return;
	accept_walk.listener = 0;
	fill_waiting(true, r, sk);
	fill_waiting_tcp(true, r, tcp);
	if (is_moving(r, tcp))
		r->flags |= WAITING_MOVING;
	bpf_seq_write(seq, r, sizeof(*r));
}

/* Goes on with the next connection. */
static __always_inline bool next_waiting(void)
{
	struct sock *sk;

	if (accept_walk.family == AF_UNIX) {
		struct sk_buff *skb = (void *)accept_walk.request;
		u64 next = (u64)BPF_CORE_READ(skb, next);

		sk = BPF_CORE_READ(skb, sk);
		accept_walk.request = next == accept_walk.last ? 0 : next;
	} else {
		struct request_sock *request = (void *)accept_walk.request;

		sk = BPF_CORE_READ(request, sk);
		accept_walk.request = (u64)BPF_CORE_READ(request, dl_next);
	}
	accept_walk.sock = (u64)sk;
	accept_walk.seq = 0;
	accept_walk.flags = 0;
	accept_walk.skb = 0;
	if (!sk)
		return true;
	accept_walk.skb = (u64)BPF_CORE_READ(sk, sk_receive_queue.next);
	accept_walk.end = (u64)sk + bpf_core_field_offset(struct sock, sk_receive_queue);
	if (!in_window())
		return true;
	fill_found(&out_waiting, sk);
	return side_write(&out_waiting, sizeof(out_waiting));
}

static __always_inline bool write_waiting_data(u64 len, u32 flags)
{
	struct waiting_data_rec *r = &out_waiting_data;

	if (!in_window())
		return true;
	/* Linux 6.1 forgets the bound of a word that it spills. */
	barrier_var(len);
	len &= WAITING_CHUNK;
	r->hdr.kind = REC_WAITING_DATA;
	r->hdr.size = sizeof(*r);
	r->sock = accept_walk.sock;
	r->seq = accept_walk.seq;
	r->len = len;
	r->flags = flags;
	r->pid = accept_walk.pid;
	r->uid = accept_walk.uid;
	r->gid = accept_walk.gid;
	if (!flags && bpf_probe_read_kernel(r->data, len, (void *)accept_walk.from))
		r->flags = WAITING_UNREADABLE;
	return side_write(r, sizeof(*r));
}

/* The next bytes of a segment. */
static __always_inline bool next_chunk(void)
{
	u64 len = accept_walk.left;
	bool go_on;

	if (len > WAITING_CHUNK)
		len = WAITING_CHUNK;
	go_on = write_waiting_data(len,
				   accept_walk.flags | (accept_walk.from ? 0 : WAITING_UNREADABLE));
	accept_walk.from += len;
	accept_walk.left -= len;
	if (accept_walk.family != AF_UNIX)
		accept_walk.seq += len;
	return go_on;
}

/* A part of a segment that lies in a page. */
static __always_inline void next_frag(void)
{
	struct {
		u64 page;
		u32 len;
		u32 offset;
	} frag = {};

	bpf_probe_read_kernel(&frag, sizeof(frag), (void *)accept_walk.frag);
	accept_walk.frag += FRAG_SIZE;
	accept_walk.frags--;
	accept_walk.left = frag.len;
	/* an odd address is none of a page but of a device's memory */
	accept_walk.from = frag.page & 1 ? 0 : page_address(frag.page);
	if (accept_walk.from)
		accept_walk.from += frag.offset;
}

/* Of a message over a Unix socket: its number, who sent it, what comes with it. */
static __always_inline void begin_message(struct sk_buff *skb)
{
	struct unix_skb_parms *parms;
	struct pid *pid;

	accept_walk.seq++;
	if (!bpf_core_type_exists(struct unix_skb_parms)) {
		accept_walk.flags = WAITING_UNREADABLE;
		return;
	}
	parms = (void *)((u64)skb + bpf_core_field_offset(struct sk_buff, cb));
	pid = BPF_CORE_READ(parms, pid);
	accept_walk.pid = pid ? pid_nr(pid) : 0;
	accept_walk.uid = BPF_CORE_READ(parms, uid.val);
	accept_walk.gid = BPF_CORE_READ(parms, gid.val);
	accept_walk.flags = BPF_CORE_READ(parms, fp) ? WAITING_RIGHTS : 0;
}

static __always_inline u64 leftmost(u64 node)
{
	for (u32 depth = 0; node && depth < MAX_TREE_DEPTH; depth++) {
		u64 left = (u64)BPF_CORE_READ((struct rb_node *)node, rb_left);

		if (!left)
			break;
		node = left;
	}
	return node;
}

/* The next node of a tree, in its order; 0 behind the last. */
static __always_inline u64 next_node(u64 node)
{
	u64 right = (u64)BPF_CORE_READ((struct rb_node *)node, rb_right);

	if (right)
		return leftmost(right);
	for (u32 depth = 0; depth < MAX_TREE_DEPTH; depth++) {
		u64 parent = BPF_CORE_READ((struct rb_node *)node, __rb_parent_color) & ~3ULL;

		if (!parent || (u64)BPF_CORE_READ((struct rb_node *)parent, rb_left) == node)
			return parent;
		node = parent;
	}
	return 0;
}

/* What was not sent yet follows what was. */
static __always_inline void go_to_unsent(void)
{
	struct sock *sk = (void *)accept_walk.sock;

	accept_walk.sent = 0;
	accept_walk.skb = (u64)BPF_CORE_READ(sk, sk_write_queue.next);
	accept_walk.end = (u64)sk + bpf_core_field_offset(struct sock, sk_write_queue);
}

static __always_inline void go_to_sent(u64 node)
{
	if (node)
		accept_walk.skb = node - bpf_core_field_offset(struct sk_buff, rbnode);
	else
		go_to_unsent();
}

static __always_inline void go_to_next(struct sk_buff *skb)
{
	if (accept_walk.sent)
		go_to_sent(next_node((u64)skb + bpf_core_field_offset(struct sk_buff, rbnode)));
	else
		accept_walk.skb = (u64)BPF_CORE_READ(skb, next);
}

/* Begins with the next segment, or message. */
static __always_inline bool next_segment(void)
{
	struct sk_buff *skb = (void *)accept_walk.skb;
	struct skb_shared_info *shared = (void *)BPF_CORE_READ(skb, head) + BPF_CORE_READ(skb, end);
	struct tcp_skb_cb *cb = (void *)accept_walk.skb + bpf_core_field_offset(struct sk_buff, cb);

	go_to_next(skb);
	accept_walk.from = (u64)BPF_CORE_READ(skb, data);
	accept_walk.left = BPF_CORE_READ(skb, len) - BPF_CORE_READ(skb, data_len);
	if (accept_walk.family == AF_UNIX)
		begin_message(skb);
	else
		accept_walk.seq = BPF_CORE_READ(cb, seq);
	accept_walk.frags = BPF_CORE_READ(shared, nr_frags);
	accept_walk.frag = (u64)shared + bpf_core_field_offset(struct skb_shared_info, frags);
	if (BPF_CORE_READ(shared, frag_list))
		return write_waiting_data(0, WAITING_UNREADABLE);
	/* there may be no bytes in a message */
	if (accept_walk.family == AF_UNIX && !BPF_CORE_READ(skb, len))
		return write_waiting_data(0, accept_walk.flags);
	return true;
}

static long accept_step(u64 index, void *ctx)
{
	if (accept_walk.left)
		return !next_chunk();
	if (accept_walk.frags) {
		next_frag();
		return 0;
	}
	if (accept_walk.skb && accept_walk.skb != accept_walk.end)
		return !next_segment();
	if (accept_walk.request)
		return !next_waiting();
	return 1;
}

static __always_inline void begin_walk(void)
{
	accept_walk.skb = 0;
	accept_walk.sent = 0;
	accept_walk.left = 0;
	accept_walk.frags = 0;
	accept_walk.pid = 0;
	accept_walk.uid = 0;
	accept_walk.gid = 0;
}

static __always_inline void emit_waiting(struct file *file)
{
	struct socket *socket = bpf_sock_from_file(file);
	struct sock *sk;

	if (!socket)
		return;
	sk = socket->sk;
	if (!sk || sk->__sk_common.skc_state != TCP_LISTEN)
		return;
	accept_walk.request = 0;
	accept_walk.last = 0;
	accept_walk.family = sk->__sk_common.skc_family;
	if (accept_walk.family == AF_UNIX) {
		accept_walk.last = (u64)sk + bpf_core_field_offset(struct sock, sk_receive_queue);
		accept_walk.request = (u64)BPF_CORE_READ(sk, sk_receive_queue.next);
		if (accept_walk.request == accept_walk.last)
			accept_walk.request = 0;
	} else if (sk->sk_protocol == IPPROTO_TCP) {
		struct inet_connection_sock *icsk = (void *)sk;

		accept_walk.request = (u64)BPF_CORE_READ(icsk, icsk_accept_queue.rskq_accept_head);
	}
	if (!accept_walk.request || !first_visit((u64)sk))
		return;
	accept_walk.listener = (u64)sk;
	begin_walk();
	bpf_loop(MAX_WAITING_STEPS, accept_step, NULL, 0);
}
